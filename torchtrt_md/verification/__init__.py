"""Prove a program against the dense model, on a CPU, for all ranks, before an engine exists.

Two questions, answered apart because 16-bit rounding would hide a wrong answer to the first:

    structure   Does it compute the same function?  Program and model both in fp64: equal to 1e-5.
    rounding    Is it as accurate as the model?     Both in their own dtype, against the model in fp64:
                the program's error is at most 1.5 times the model's own; in fp32 they agree within 1e-5.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from torchtrt_md.capture.arguments import Arguments
from torchtrt_md.checks import check_verify
from torchtrt_md.errors import VerificationError
from torchtrt_md.lowering import lower
from torchtrt_md.program import Output, ShardedProgram, Weight, Weights, dtype_name, part
from torchtrt_md.verification.simulate import EXACT, Precision, simulate

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
        OptionError: an argument of another type.
        VerificationError: the program computes something else, or less accurately.
    """
    check_verify(program, model, args, kwargs)
    start = time.perf_counter()
    program = lower(program)
    kwargs = dict(kwargs or {})
    weights = _dense_weights(program, model)
    inputs = Arguments.of(model, args, kwargs).tensors
    _check_inputs(program, inputs)
    dtype = _dtype(weights, inputs)
    wide = Precision(dtype, torch.float64)
    reference = _run_dense(program, model, args, kwargs, wide)
    _check_finite(reference)

    exact = simulate(program, inputs, weights=weights, precision=wide)
    structure = _errors(program, exact, reference)
    if not max(structure) <= STRUCTURE_TOLERANCE:
        raise VerificationError(
            f"the program does not compute what {type(model).__name__} computes: computed in fp64, the outputs of"
            f" {_worst(structure)}, relative, where {STRUCTURE_TOLERANCE:g} is rounding",
            fix="look at the plan: every tensor with a sequence must be split, and gathered where it is returned",
        )
    dense = _run_dense(program, model, args, kwargs, EXACT)
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
            f"the program rounds more than {type(model).__name__} in {dtype_name(dtype)}: the outputs of"
            f" {_worst(errors)}, relative, where {limit:.3g} is allowed and the dense model's own error is"
            f" {dense_error:.3g}",
            fix="reduce in a wider dtype, or use another strategy",
        )
    return Report(max(errors), dense_error, max(structure), tuple(errors), dtype, time.perf_counter() - start)


def _dense_weights(program: ShardedProgram, model: nn.Module) -> Weights:
    """The dense model's weights, which must be those that the engines will get.

    Raises:
        VerificationError: the model is sharded itself, or a weight of the program is another.
    """
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
            fix="pass the dense model, as it was before parallelize_module; md.export(..., dense=...)",
        )
    dense, mesh = Weights(tensors), program.mesh
    for source in program.sources.values():
        if not isinstance(source, Weight) or source.parts:  # the parts are among the sources themselves
            continue
        if source.name not in tensors:
            raise VerificationError(
                f"the program has a weight {source.name!r} and {type(model).__name__} has none of that name",
                fix="verify with the model that was captured",
            )
        held = replace(source, shardings=()) if source.name in program.weights.whole else source
        rank = program.weights.rank  # the one whose part is held, where not the whole is
        own, expected = program.weights.local(held, mesh, rank), dense.local(held, mesh, rank)
        same = own.data_ptr() == expected.data_ptr() and own.stride() == expected.stride()
        if own.dtype != expected.dtype or own.shape != expected.shape or not (same or torch.equal(own, expected)):
            raise VerificationError(
                f"weight {source.name!r} of the program is not that of the dense {type(model).__name__}",
                fix="capture with the dense model's own weights, or verify with the model that was captured",
            )
    return dense


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


class _Widened(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Run ops in the wide dtype wherever the model names the narrow one, as the simulator does for the program."""

    def __init__(self, precision: Precision) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.precision = precision

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        of = self.precision.of
        return func(*(of(a) for a in args), **{key: of(value) for key, value in (kwargs or {}).items()})


def _run_dense(
    program: ShardedProgram, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], precision: Precision
) -> list[Tensor]:
    weights = {name: precision.of(t.detach()) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    args, kwargs = pytree.tree_map(precision.of, (tuple(args), dict(kwargs)))
    with torch.no_grad(), _Widened(precision):
        result = torch.func.functional_call(model, weights, tuple(args), dict(kwargs))
    leaves, spec = pytree.tree_flatten(result)
    expected = [None if isinstance(leaf, Output) else leaf for leaf in program.out_leaves]
    found = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    if spec != program.out_spec or found != expected:
        raise VerificationError(
            f"{type(model).__name__} returns {found} in {spec}, and the program {expected} in {program.out_spec}",
            fix="return no numbers that depend on the length of the sequence; under a plan they are those of one rank",
        )
    return [t.clone() for t in leaves if isinstance(t, Tensor)]


def _check_finite(reference: Sequence[Tensor]) -> None:
    for index, t in enumerate(reference):
        if not t.isfinite().all():
            raise VerificationError(
                f"output {index} of the dense model is not finite, so nothing can be compared with it",
                fix="verify with arguments on which the model's result is finite",
            )
        if t.numel() and not t.any():
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
