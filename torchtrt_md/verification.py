"""Prove a program against the dense model, on a CPU, for all ranks, before an engine exists.

Two questions, answered apart because 16-bit rounding would hide a wrong answer to the first:

    structure   Does it compute the same function?  Program and model both in fp64: equal to 1e-5.
    rounding    Is it as accurate as the model?     Both in their own dtype, against the model in fp64:
                the program's error is at most 1.5 times the model's own; in fp32 they agree within 1e-5.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from torchtrt_md.capture.arguments import Arguments
from torchtrt_md.errors import VerificationError
from torchtrt_md.lowering import lower
from torchtrt_md.mesh import Mesh
from torchtrt_md.program import ShardedProgram, Sharding, Weights
from torchtrt_md.simulate import EXACT, Precision, simulate

STRUCTURE_TOLERANCE = 1e-5
ROUNDING_RATIO = 1.5


@dataclass(frozen=True)
class Report:
    """What ``verify`` measured.  Errors are ``norm(difference) / norm(reference)``, the worst of all outputs.

    Attributes:
        error: the program in its own dtype, worst rank: against the dense model in fp32, for 16-bit models
            against the dense model in fp64.
        dense_error: the dense model in its own dtype against itself in fp64.
        structure_error: program against dense model, both in fp64, worst rank.
        per_rank: ``error`` of each rank.
        dtype: the model's own dtype.
        seconds: how long it took.
    """

    error: float
    dense_error: float
    structure_error: float
    per_rank: tuple[float, ...]
    dtype: torch.dtype
    seconds: float


def verify(
    program: ShardedProgram, model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> Report:
    """Run the program of all ranks in the simulator and the dense model beside it.

    Args:
        program: captured or lowered.
        model: the dense model.
        args: positional arguments, of the shapes that the program was captured with.
        kwargs: keyword arguments.

    Raises:
        VerificationError: the program computes something else, or less accurately.
    """
    start = time.perf_counter()
    program = lower(program)
    kwargs = dict(kwargs or {})
    weights = _dense_weights(model)
    inputs = Arguments.of(model, args, kwargs).tensors
    _check_inputs(program, inputs)
    dtype = _dtype(weights, inputs)
    wide = Precision(dtype, torch.float64)
    reference = _run_dense(model, args, kwargs, wide)
    _check_finite(reference)

    exact = simulate(program, inputs, weights=weights, precision=wide)
    structure = _errors(program, exact, reference)
    if not max(structure) <= STRUCTURE_TOLERANCE:
        raise VerificationError(
            f"the program does not compute what {type(model).__name__} computes: computed in fp64, the outputs of"
            f" {_worst(structure)}, relative, where {STRUCTURE_TOLERANCE:g} is rounding",
            fix="look at the plan: every tensor with a sequence must be split, and gathered where it is returned",
        )
    dense = _run_dense(model, args, kwargs, EXACT)
    own = simulate(program, inputs, weights=weights)
    dense_error = max(_relative(a, b) for a, b in zip(dense, reference, strict=True))
    if dtype == torch.float32:
        errors = _errors(program, own, dense)
        limit = STRUCTURE_TOLERANCE
    else:
        errors = _errors(program, own, reference)
        limit = max(ROUNDING_RATIO * dense_error, STRUCTURE_TOLERANCE)
    if not max(errors) <= limit:
        raise VerificationError(
            f"the program rounds more than {type(model).__name__} in {_short(dtype)}: the outputs of"
            f" {_worst(errors)}, relative, where {limit:.3g} is allowed and the dense model's own error is"
            f" {dense_error:.3g}",
            fix="reduce in a wider dtype, or use another strategy",
        )
    return Report(max(errors), dense_error, max(structure), tuple(errors), dtype, time.perf_counter() - start)


def _dense_weights(model: nn.Module) -> Weights:
    tensors = {
        name: t.detach()
        for name, t in [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]
    }
    sharded = next((name for name, t in tensors.items() if isinstance(t, DTensor)), None)
    if sharded is not None:
        raise VerificationError(
            f"parameter {sharded!r} of the model to compare with is a DTensor",
            fix="pass the dense model, as it was before parallelize_module",
        )
    return Weights(tensors)


def _check_inputs(program: ShardedProgram, inputs: Mapping[str, Tensor]) -> None:
    expected = {v.name: (v.shape, v.dtype) for v in program.inputs}
    found = {name: (tuple(t.shape), t.dtype) for name, t in inputs.items()}
    if expected != found:
        raise VerificationError(
            f"the program takes {expected} and was given {found}",
            fix="verify with arguments of the shapes and dtypes that were captured",
        )


def _dtype(weights: Weights, inputs: Mapping[str, Tensor]) -> torch.dtype:
    """The floating dtype that most of the model's weights are in; of the inputs, where it has none."""
    counts: dict[torch.dtype, int] = {}
    for t in list(weights.whole.values()) or list(inputs.values()):
        if t.is_floating_point():
            counts[t.dtype] = counts.get(t.dtype, 0) + t.numel()
    return max(counts, key=lambda d: counts[d]) if counts else torch.float32


def _run_dense(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], precision: Precision) -> list[Tensor]:
    weights = {name: precision.of(t.detach()) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    args, kwargs = pytree.tree_map(precision.of, (tuple(args), dict(kwargs)))
    with torch.no_grad():
        result = torch.func.functional_call(model, weights, tuple(args), dict(kwargs))
    return [t.clone() for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]


def _check_finite(reference: Sequence[Tensor]) -> None:
    for index, t in enumerate(reference):
        if not t.isfinite().all():
            raise VerificationError(
                f"output {index} of the dense model is not finite, so nothing can be compared with it",
                fix="verify with arguments on which the model's result is finite",
            )
        if t.is_floating_point() and not t.any():
            raise VerificationError(
                f"output {index} of the dense model is all zeros, which would hide any error",
                fix="verify with random arguments and weights",
            )


def _errors(program: ShardedProgram, ranks: Sequence[Sequence[Tensor]], reference: Sequence[Tensor]) -> list[float]:
    """The relative error of each rank, over all outputs."""
    return [
        max(
            _relative(value, part(whole, spec.sharding, program.mesh, rank))
            for value, whole, spec in zip(values, reference, program.outputs, strict=True)
        )
        for rank, values in enumerate(ranks)
    ]


def part(whole: Tensor, sharding: Sequence[Sharding], mesh: Mesh, rank: int) -> Tensor:
    """What a rank holds of a value with this sharding."""
    for s in sharding:
        whole = whole.chunk(mesh.axis_size(s.axis), s.dim)[mesh.coordinate(rank, s.axis)]
    return whole


def _relative(value: Tensor, reference: Tensor) -> float:
    if value.shape != reference.shape:
        return float("inf")
    if not reference.is_floating_point():
        return 0.0 if torch.equal(value, reference) else float("inf")
    difference = (value.double() - reference.double()).norm()
    error = float(difference / reference.double().norm())
    return error if error == error else float("inf")  # NaN must not pass for small


def _worst(errors: Sequence[float]) -> str:
    worst = max(range(len(errors)), key=lambda rank: errors[rank])
    return f"rank {worst} differ by {errors[worst]:.3g}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
