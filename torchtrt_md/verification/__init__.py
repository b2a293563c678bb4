"""Prove a program against the dense model, on a CPU, for all ranks, before an engine exists.

Two questions, answered apart because 16-bit rounding would hide a wrong answer to the first:

    structure   Does it compute the same function?  Program and model both in fp64: every element is equal to 1e-8.
    rounding    Is it as accurate as the model?     Both in their own dtype, against the model in fp64: in every part
                of an output the program is at most 1.5 times as far off as the model itself, in fp32 32 times.

What is exchanged in float8 (:mod:`torchtrt_md.lowering.float8_rows`) is left out of both: they are asked of the program
that sends what there is.  What float8 adds is measured, and bounded by one rounding of it.

``compare`` asks both, of parts (``cells``) in units (``units``) by which ``judge`` finds the worst.  ``dense`` says
how the model is run in fp64, and what happens where it cannot be.  ``draw`` says which inputs tell programs apart;
where the given ones do not, structure is asked of both, and rounding of those that were drawn.  Where ranks compare
the largest numbers that each found, structure is asked with those at the end, too, and where a model whose width is
split has a bound that its numbers may stay inside, with inputs of other sizes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchtrt_md.checks import check_verify
from torchtrt_md.errors import VerificationError
from torchtrt_md.lowering import lower
from torchtrt_md.lowering.float8_rows import LARGEST_ERROR
from torchtrt_md.lowering.ops import packing_of
from torchtrt_md.program import ShardedProgram, Value, dtype_name, part
from torchtrt_md.verification.compare import is_inexact, rounding, structure, structure_tolerance
from torchtrt_md.verification.dense import Sample, precision_name
from torchtrt_md.verification.simulate import Precision, simulate
from torchtrt_md.verification.trials import Proof, Trial, check_model, cuts_width, trials_of

_CONSTANT = 256.0  # times the largest number that changes: what is larger and does not change is a filling


@dataclass(frozen=True)
class Report:
    """What ``verify`` measured.

    Attributes:
        error: the program in its own dtype, with what it sends in float8 in that, in the worst part of the outputs of
            the worst rank: ``dense_error``, times how many times further off than the dense model the program is in
            that part.
        dense_error: the dense model in its own dtype against itself in ``precision``, relative, in the worst part of
            the worst output.
        structure_error: program against dense model, both in ``precision``, relative: of the worst element.  NaN
            where ``precision`` is None, and nothing finer than rounding could be seen.
        per_rank: ``error`` of each rank.
        dtype: the model's own dtype.
        seconds: how long it took.
        worst: where ``error`` is: output, rank, part, element, and both values.
        structure_worst: where ``structure_error`` is.
        precision: the dtype of the reference: float64; or float32, or None for the model's own dtype, where ops have
            no kernels for what is finer.
        notes: what limits the proof: why ``precision`` is not float64, which inputs were drawn or could not be; and
            what exchanges in float8 change, relative, by L2 norms.
    """

    error: float
    dense_error: float
    structure_error: float
    per_rank: tuple[float, ...]
    dtype: torch.dtype
    seconds: float
    worst: str = ""
    structure_worst: str = ""
    precision: torch.dtype | None = torch.float64
    notes: tuple[str, ...] = ()


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
        VerificationError: the program computes something else, or less accurately; or nothing can be compared.
        RankMismatchError: ranks reach different collectives.
    """
    check_verify(program, model, args, kwargs)
    start = time.perf_counter()
    program = lower(program)
    proof = Proof.of(program, model, args, dict(kwargs or {}))
    trials, notes = trials_of(proof)
    if proof.weights.checkpoint is not None:
        notes.append(
            f"{proof.name} is on meta: the whole of it was compared, its weights read one at a time from"
            f" {proof.weights.checkpoint.where}"
        )
    if trials[0].limited:
        notes.append(f"compared in {precision_name(trials[0].precision)}: {trials[0].limited}")
    structures = [_structure(proof, trial) for trial in trials]
    errors, dense_error, told = _rounding(proof, trials[0])
    notes += told
    worst_structure = max(structures, key=lambda found: found.error)
    per_rank = tuple(max(found.error for found in rank) if rank else 0.0 for rank in errors)
    flat = [found for rank in errors for found in rank]
    return Report(
        error=max(per_rank),
        dense_error=dense_error,
        structure_error=worst_structure.error,
        per_rank=per_rank,
        dtype=_dtype(proof),
        seconds=time.perf_counter() - start,
        worst=max(flat, key=lambda found: found.error).place if flat else "",
        structure_worst=worst_structure.place,
        precision=trials[0].precision,
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class _Found:
    """A relative error, and where it is."""

    error: float
    place: str


def _structure(proof: Proof, trial: Trial) -> _Found:
    """Is it the same function?

    Raises:
        VerificationError: it is not.
    """
    if trial.precision is None:
        return _Found(float("nan"), "")
    worst = _Found(0.0, "")
    of_tables = proof.of_tables()
    for rank, output, value, reference, sample in _parts(proof, trial, trial.exact):
        difference = structure(value, reference, _part(sample.value, output, proof.program, rank), sample.finer)
        place = ", ".join(filter(None, (f"{output.name!r} of rank {rank}: {difference.place}", trial.about)))
        tolerance = max(structure_tolerance(value.dtype), of_tables)
        if not difference.error <= tolerance:
            raise VerificationError(
                f"the program does not compute what {proof.name} computes: in"
                f" {precision_name(trial.precision)}, {place}, an error of {difference.error:.3g}, relative, where"
                f" {tolerance:g} is rounding",
                fix=_way_out(proof.program),
            )
        if difference.error >= worst.error:
            worst = _Found(difference.error, place)
    return worst


def _way_out(program: ShardedProgram) -> str:
    """Where to look, by what is parallel."""
    of_sequence = "every tensor with a sequence must be split, and gathered where it is returned"
    of_width = (
        "between a colwise layer and the rowwise one that sums its parts, the model may do nothing that reads across"
        " the features, of which a rank has a part, as a norm, a softmax or a mean does: give the first the style"
        " colwise_gather_output and the second rowwise_split_input, or leave both out"
    )
    there = ((of_sequence, bool(program.strategies)), (of_width, cuts_width(program)))
    looked_at = [text for text, is_split in there if is_split]
    return f"look at the plan: {'; '.join(looked_at or [of_sequence])}"


def _rounding(proof: Proof, trial: Trial) -> tuple[list[list[_Found]], float, list[str]]:
    """Is it as accurate?  The errors of each rank, by output, the dense model's own, and what there is to say.

    Raises:
        VerificationError: it is not; or the captured graph of the dense model is not what the model computes.
    """
    check_model(proof, trial)
    packs = any(map(packing_of, proof.program.graphs[0].graph.nodes))
    program = simulate(
        proof.program, trial.inputs, weights=proof.weights, precision=Precision(None, float8_exchanges=False)
    )
    found = _differences(proof, trial, program, bounded=True)
    told = []
    if packs:
        sent = simulate(proof.program, trial.inputs, weights=proof.weights)
        changed = _check_sent(proof, trial, program, sent)
        told.append(
            f"sending queries, keys and values in float8 changes the outputs by {changed:.2g}, relative, by L2 norms"
        )
        found = _differences(proof, trial, sent, bounded=False)
    return found, max((sample.error for sample in trial.samples), default=0.0), told


def _differences(
    proof: Proof, trial: Trial, program: Sequence[Sequence[Tensor]], *, bounded: bool
) -> list[list[_Found]]:
    """The errors of each rank, by output.

    Raises:
        VerificationError: one is beyond what rounding may cost, where it is ``bounded``.
    """
    found: list[list[_Found]] = [[] for _ in program]
    for rank, output, value, reference, sample in _parts(proof, trial, program):
        own = _part(sample.value, output, proof.program, rank)
        noise = None if sample.noise is None else _part(sample.noise, output, proof.program, rank)
        difference = rounding(value, reference, own, sample.coarse, noise)
        place = f"{output.name!r} of rank {rank}: {difference.place}"
        if bounded and not difference.error <= sample.ratio:
            raise VerificationError(
                f"the program rounds more than {proof.name} in {dtype_name(output.dtype)}: {place}; there it is"
                f" {difference.error:.3g} times as far off as the dense model, where {sample.ratio:g} times is allowed"
                f" and the dense model's own error is {sample.error:.3g}, relative",
                fix="reduce in a wider dtype, or use another strategy",
            )
        found[rank].append(_Found(difference.error * sample.unit, place))
    return found


def _check_sent(
    proof: Proof, trial: Trial, plain: Sequence[Sequence[Tensor]], sent: Sequence[Sequence[Tensor]]
) -> float:
    """What exchanges in float8 change of an output, at most, relative, by L2 norms.

    Raises:
        VerificationError: more than a rounding of float8 does.
    """
    worst = 0.0
    pairs = zip(_parts(proof, trial, sent), _parts(proof, trial, plain), strict=True)
    for (rank, output, value, _, _), (_, _, without, _, _) in pairs:
        error = _changed(value, without) if is_inexact(value) else 0.0
        if not error <= LARGEST_ERROR:
            raise VerificationError(
                f"sending queries, keys and values in float8 changes {output.name!r} of rank {rank} by {error:.3g},"
                f" relative, by L2 norms, where {LARGEST_ERROR:g} is allowed, a rounding of float8",
                fix="leave exchange_dtype out: this model makes more of the rounding",
            )
        worst = max(worst, error)
    return worst


def _changed(value: Tensor, without: Tensor) -> float:
    """How far two results are apart, relative, by L2 norms.

    Of what is equal, what is infinite or far above all that differs is left out: a constant in masked places would hide
    the rest.
    """
    value, without = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in (value, without))
    value, without = (t.to(torch.float64) for t in (value, without))
    differs = (value != without) & ~(value.isnan() & without.isnan())
    if not bool(differs.any()):
        return 0.0
    largest = torch.maximum(value.abs(), without.abs())[differs].max()
    peers = without[differs | (without.abs() <= _CONSTANT * largest)]
    size = peers.norm()
    error = (value - without)[differs].norm()
    return float(error / size) if size and bool(error.isfinite()) else float("inf")


def _parts(
    proof: Proof, trial: Trial, ranks: Sequence[Sequence[Tensor]]
) -> Iterator[tuple[int, Value, Tensor, Tensor, Sample]]:
    """Rank, output, value, what it should be, and its sample, of every output of every rank."""
    for rank, values in enumerate(ranks):
        outputs = zip(proof.program.outputs, values, trial.reference, trial.samples, strict=True)
        for output, value, whole, sample in outputs:
            yield rank, output, value, _part(whole, output, proof.program, rank), sample


def _part(whole: Tensor, output: Value, program: ShardedProgram, rank: int) -> Tensor:
    """A rank's part of an output."""
    return part(whole, output.sharding, program.mesh, rank)


def _dtype(proof: Proof) -> torch.dtype:
    """The floating dtype that most of the model's weights are in; of the inputs, where it has none."""
    counts: dict[torch.dtype, int] = {}
    for t in [*proof.model.parameters(), *proof.model.buffers()] or list(proof.arguments.tensors.values()):
        if t.is_floating_point():
            counts[t.dtype] = counts.get(t.dtype, 0) + t.numel()
    return max(counts, key=lambda d: counts[d]) if counts else torch.float32
