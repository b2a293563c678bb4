"""What the user says is parallel: along which axis, by which plan, with which strategy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from torchtrt_md.errors import PlanError

Strategy: TypeAlias = Literal["ulysses", "allgather_kv", "ring", "auto"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)
# Where attention and its collectives run: in the engine, or in PyTorch between engines.
Placement: TypeAlias = Literal["engine", "split"]


@dataclass(frozen=True)
class Split:
    """Split a module's argument (or, with ``output``, its result) along ``dim`` over the axis.

    Args:
        dim: the dimension, counted from the end where negative.
        output: split a result, which the plan names by its index, ``{0: Split(1, output=True)}``, or by its name where
            the module returns a dict.
        ndim: split only a tensor of this many dims, as diffusers' ``expected_dims``.

    Raises:
        PlanError: an argument of another type.
    """

    dim: int
    output: bool = False
    ndim: int | None = None

    def __post_init__(self) -> None:
        if not _is_int(self.dim):
            raise PlanError(f"a Split has the dim {self.dim!r}", fix="give the dimension as an integer: md.Split(1)")
        if not isinstance(self.output, bool):
            raise PlanError(f"a Split has output={self.output!r}", fix="pass output=True to split a module's result")
        if self.ndim is not None and not _is_int(self.ndim):
            raise PlanError(f"a Split has ndim={self.ndim!r}", fix="give the number of dims: md.Split(1, ndim=3)")


@dataclass(frozen=True)
class Gather:
    """Gather a module's result along ``dim`` from the axis, so that every rank has the whole.

    Raises:
        PlanError: ``dim`` is no integer.
    """

    dim: int

    def __post_init__(self) -> None:
        if not _is_int(self.dim):
            raise PlanError(f"a Gather has the dim {self.dim!r}", fix="give the dimension as an integer: md.Gather(1)")


@dataclass(frozen=True)
class ContextParallel:
    """Split the sequence over one axis of the mesh, or over several.

    Over several, as ``("ring", "ulysses")``, each rank has one of as many chunks as there are ranks along all of them.
    Attention then exchanges heads for sequence along every axis but the first, and does what ``strategy`` says along
    the first, over which less is sent: the one between hosts.  With ``"ring"`` that is unified sequence parallelism
    (USP, https://arxiv.org/abs/2405.07719), which diffusers calls ``ring_degree`` and ``ulysses_degree``.

    Args:
        axis: the mesh axis, or a tuple of axes, the slowest first.
        strategy: what attention does about it.  ``"ulysses"`` exchanges heads for sequence (all-to-all;
            https://arxiv.org/abs/2309.14509), ``"allgather_kv"`` gathers
            keys and values, ``"ring"`` passes them from rank to rank while attending to those in hand
            (https://arxiv.org/abs/2310.01889), ``"auto"`` takes for each attention what sends the fewest bytes
            among those that its shapes allow; of several axes, over the first.
        plan: module name -> which arguments or results are split, or where the result is gathered, in the
            shape of diffusers' ``_cp_plan`` (whose own classes are accepted as well).  ``""`` is the model
            itself, ``*`` stands for any one part of a name.  ``None`` takes the model's own ``_cp_plan``; ``{}`` is
            for a model that calls ``md.split`` and ``md.gather`` itself.

    Raises:
        PlanError: an unknown strategy, or an argument of another type.
    """

    axis: str | tuple[str, ...]
    strategy: Strategy = "ulysses"
    plan: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.axis, list):  # as JSON and habit have it
            object.__setattr__(self, "axis", tuple(self.axis))
        _check(self, self.axis, self.plan)
        if self.strategy not in STRATEGIES:
            raise PlanError(
                f"there is no context-parallel strategy {self.strategy!r}", fix=f"use one of {', '.join(STRATEGIES)}"
            )


@dataclass(frozen=True)
class TensorParallel:
    """Split weights over one axis of the mesh.

    Args:
        axis: the mesh axis.
        plan: name of a module or parameter -> a style by its name in transformers' and diffusers' plans
            (``"colwise"``, ``"rowwise"``, ...), one of diffusers' packed ones, or, for a module, a ``ParallelStyle``
            of ``torch.distributed.tensor.parallel``, which DTensor applies.  ``None`` takes the model's own
            ``tp_plan`` (transformers) or ``_tp_plan`` (diffusers).

    Raises:
        PlanError: an argument of another type.
    """

    axis: str
    plan: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        _check(self, self.axis, self.plan)


@dataclass(frozen=True)
class DataParallel:
    """Nothing is split or sent along this axis: each rank along it computes the whole, for data of its own.

    It says that this is meant.  An axis of the mesh that nothing uses is refused otherwise.

    Args:
        axis: the mesh axis.

    Raises:
        PlanError: an argument of another type.
    """

    axis: str

    def __post_init__(self) -> None:
        _check(self, self.axis, None)


Parallel: TypeAlias = "ContextParallel | TensorParallel | DataParallel"
PARALLELS = (ContextParallel, TensorParallel, DataParallel)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check(parallel: Parallel, axis: object, plan: object) -> None:
    kind = type(parallel).__name__
    if isinstance(parallel, ContextParallel) and isinstance(axis, tuple):
        if len(axis) < 2 or not all(isinstance(name, str) for name in axis):
            raise PlanError(
                f"the axes of {kind} are {axis!r}",
                fix=f'name several axes of the mesh, {kind}(("ring", "ulysses")), or one: {kind}("cp")',
            )
    elif not isinstance(axis, str):
        raise PlanError(f"the axis of {kind} is {axis!r}", fix=f'name an axis of the mesh: {kind}("cp")')
    if plan is not None and not isinstance(plan, Mapping):
        raise PlanError(
            f"the plan of {kind}({axis!r}) is a {type(plan).__name__}", fix="pass a dict: module name -> what it does"
        )
    name = next((name for name in plan or () if not isinstance(name, str)), "")
    if not isinstance(name, str):
        raise PlanError(
            f"the plan of {kind}({axis!r}) names a module {name!r}",
            fix='name modules as model.named_modules() does; "" is the model itself',
        )
