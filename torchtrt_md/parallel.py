"""What the user says is parallel: along which axis, by which plan, with which strategy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from torchtrt_md.errors import PlanError

Strategy: TypeAlias = Literal["ulysses", "allgather_kv", "ring", "auto"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)
# Where attention and its collectives run: in the engine, or in PyTorch between engines.
Placement: TypeAlias = Literal["engine", "split"]


@dataclass(frozen=True)
class Split:
    """Split a module's argument (or, with ``output``, its result) along ``dim`` over the axis."""

    dim: int
    output: bool = False
    ndim: int | None = None  # split only a tensor of this many dims, as diffusers' expected_dims


@dataclass(frozen=True)
class Gather:
    """Gather a module's result along ``dim`` from the axis, so that every rank has the whole."""

    dim: int


ModulePlan: TypeAlias = "Mapping[str | int, Split | Sequence[Split]] | Gather | Sequence[Gather | None]"
ContextPlan: TypeAlias = "Mapping[str, ModulePlan]"


@dataclass(frozen=True)
class ContextParallel:
    """Split the sequence over one axis of the mesh.

    Args:
        axis: the mesh axis.
        strategy: what attention does about it.  ``"ulysses"`` exchanges heads for sequence (all-to-all;
            heads must divide by the axis; https://arxiv.org/abs/2309.14509), ``"allgather_kv"`` gathers
            keys and values, ``"ring"`` passes them from rank to rank while attending to those in hand
            (https://arxiv.org/abs/2310.01889), ``"auto"`` takes for each attention what sends the fewest bytes
            among those that its shapes allow.
        plan: module name -> which arguments or results are split, or where the result is gathered, in the
            shape of diffusers' ``_cp_plan`` (whose own classes are accepted as well).  ``""`` is the model
            itself, ``*`` stands for any one part of a name.  ``None`` takes the model's own ``_cp_plan``.

    Raises:
        PlanError: an unknown strategy.
    """

    axis: str
    strategy: Strategy = "ulysses"
    plan: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise PlanError(
                f"there is no context-parallel strategy {self.strategy!r}", fix=f"use one of {', '.join(STRATEGIES)}"
            )


@dataclass(frozen=True)
class TensorParallel:
    """Split weights over one axis of the mesh, by DTensor.

    Args:
        axis: the mesh axis.
        plan: module name -> ``ParallelStyle`` of ``torch.distributed.tensor.parallel``, or the name of one
            in transformers' and diffusers' plans (``"colwise"``, ``"rowwise"``, ...).  ``None`` takes the
            model's own ``tp_plan`` (transformers) or ``_tp_plan`` (diffusers).
    """

    axis: str
    plan: Mapping[str, Any] | None = None


Parallel: TypeAlias = "ContextParallel | TensorParallel"
