"""Apply a tensor-parallel plan with DTensor, or read one that the user applied.

The plan is applied to a shadow of the model whose parameters have shapes but no memory; what it decides,
the placements, then says which part of each dense weight a rank holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from torchtrt_md.capture.context_parallel import modules_named
from torchtrt_md.errors import PlanError
from torchtrt_md.mesh import Mesh, axis_names
from torchtrt_md.parallel import TensorParallel
from torchtrt_md.program import Sharding

# The names in transformers' and diffusers' plans whose meaning is one of PyTorch's own styles.
STYLES: Mapping[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "colwise_rep": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rowwise": RowwiseParallel,
    "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
    "rowwise_rep": lambda: RowwiseParallel(input_layouts=Replicate()),
    "embedding_rowwise": lambda: RowwiseParallel(input_layouts=Replicate()),
    "sequence_parallel": lambda: SequenceParallel(use_local_output=True),
}
# These leave a module whole on every rank; what the second adds concerns training only.
_REPLICATED = ("replicate", "replicated_with_grad_allreduce")
# Config fields, with what they count, that a rank gets an equal part of.
_HEADS = {"num_attention_heads": "heads", "num_key_value_heads": "key/value heads"}


def apply(shadow: nn.Module, parallel: TensorParallel, device_mesh: DeviceMesh) -> None:
    """Parallelize the shadow in place.

    Raises:
        PlanError: there is no plan, it names what is not there or one module twice, a style does not fit its module,
            or heads do not divide by the axis.
    """
    plan = parallel.plan
    if plan is None:
        plan = getattr(shadow, "tp_plan", None) or getattr(shadow, "_tp_plan", None)
    if not plan:
        raise PlanError(
            f"{type(shadow).__name__} has no tensor-parallel plan of its own (tp_plan or _tp_plan)",
            fix=f"pass one: {_example(shadow, parallel.axis)}",
        )
    names = dict(zip(axis_names(device_mesh), device_mesh.mesh_dim_names or (), strict=True))
    mesh = device_mesh[names[parallel.axis]]
    _check_heads(shadow, mesh.size(), parallel.axis)
    taken: dict[str, str] = {}
    for name, entry in plan.items():
        style = _style(name, entry)
        for path, module in modules_named(shadow, name):
            if taken.setdefault(path, name) != name:
                raise PlanError(
                    f"the plan names module {path!r} twice: by {taken[path]!r} and by {name!r}",
                    fix="let one of the two names stand for it",
                )
            if style is not None:
                _check_weights(module, path, style, mesh.size(), parallel.axis)
                _parallelize(module, path, mesh, style)


def _parallelize(module: nn.Module, path: str, mesh: DeviceMesh, style: ParallelStyle) -> None:
    try:
        parallelize_module(module, mesh, style, src_data_rank=None)
    except Exception as error:  # PyTorch has several for a style that does not fit
        reason = next(iter(str(error).strip().splitlines()), "")
        raise PlanError(
            f"the style {type(style).__name__} does not fit module {path!r}, a {type(module).__name__}:"
            f" {type(error).__name__}: {reason}",
            fix="ColwiseParallel and RowwiseParallel are for nn.Linear and nn.Embedding, SequenceParallel for norms;"
            " or leave the module out of the plan",
        ) from error


def _example(model: nn.Module, axis: str) -> str:
    """A plan in the model's own names, for a message."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    up, down = linear[:2] if len(linear) > 1 else ("up", "down")
    return f'TensorParallel("{axis}", plan={{"{up}": "colwise", "{down}": "rowwise"}})'


def _style(name: str, entry: Any) -> ParallelStyle | None:
    if isinstance(entry, ParallelStyle):
        return entry
    if entry in _REPLICATED:
        return None
    if isinstance(entry, str) and entry in STYLES:
        return STYLES[entry]()
    raise PlanError(
        f"the plan gives module {name!r} the style {entry if isinstance(entry, str) else type(entry).__name__!r},"
        " which has no equal in torch.distributed.tensor.parallel",
        fix=f"use a ParallelStyle, or one of {', '.join((*STYLES, *_REPLICATED))}; or leave the module out",
    )


def _check_heads(model: nn.Module, size: int, axis: str) -> None:
    config = getattr(model, "config", None)
    for field, what in _HEADS.items():
        heads = getattr(config, field, None)
        if isinstance(heads, int) and heads % size:
            raise PlanError(
                f"{type(model).__name__} has {heads} {what}, which do not divide by the {size} ranks of axis"
                f" {axis!r}: {heads % size} left over",
                fix=f"use an axis whose size divides {heads}",
            )


def _check_weights(module: nn.Module, path: str, style: ParallelStyle, size: int, axis: str) -> None:
    dim = {ColwiseParallel: 0, RowwiseParallel: 1}.get(type(style))
    if isinstance(module, nn.Embedding) and dim is not None:
        dim = 1 - dim
    weight = getattr(module, "weight", None)
    if dim is None or not isinstance(weight, nn.Parameter) or weight.dim() != 2 or weight.shape[dim] % size == 0:
        return
    raise PlanError(
        f"the weight of module {path!r} has {weight.shape[dim]} on dim {dim}, which does not divide by the {size}"
        f" ranks of axis {axis!r}: {weight.shape[dim] % size} left over",
        fix="use an axis whose size divides it, or leave the module out of the plan",
    )


def shardings(name: str, parameter: DTensor, mesh: Mesh) -> tuple[Sharding, ...]:
    """Which part of a parameter a rank holds.

    Raises:
        PlanError: a placement other than replicated or evenly sharded.
    """
    found = []
    for axis, placement in zip(axis_names(parameter.device_mesh), parameter.placements, strict=True):
        if isinstance(placement, Replicate):
            continue
        # A subclass of Shard orders its parts otherwise than Sharding says.
        if type(placement) is not Shard or parameter.shape[placement.dim] % mesh.axis_size(axis):
            raise PlanError(
                f"parameter {name!r} of shape {list(parameter.shape)} is placed as {placement} on axis {axis!r}",
                fix="use Replicate() or Shard(dim) with a dim that divides by the axis",
            )
        found.append(Sharding(placement.dim, axis))
    return tuple(found)
