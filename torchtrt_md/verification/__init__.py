"""Prove a program against the dense model, on a CPU, for all ranks, before an engine exists.

Two questions, answered apart because 16-bit rounding would hide a wrong answer to the first:

    structure   Does it compute the same function?  Program and model both in fp64: every element is equal to 1e-8.
    rounding    Is it as accurate as the model?     Both in their own dtype, against the model in fp64: in every part
                of an output the program is at most 1.5 times as far off as the model itself, in fp32 32 times.

What is exchanged in float8 (:mod:`torchtrt_md.lowering.float8_rows`) is left out of both: they are asked of the program
that sends what there is.  What float8 adds is measured, and bounded by one rounding of it.

``compare`` says what a part is, and how an element's error is measured where terms cancel.  ``dense`` says how the
model is run in fp64, and what happens where it cannot be.  ``draw`` says which inputs tell programs apart; where the
given ones do not, structure is asked of both, and rounding of those that were drawn.  Where ranks compare the largest
numbers that each found, structure is asked with those at the end, too, and where a model whose width is split has a
bound that its numbers may stay inside, with inputs of other sizes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from torchtrt_md.capture.arguments import Arguments
from torchtrt_md.capture.kept_state import OwnState
from torchtrt_md.checks import check_verify
from torchtrt_md.errors import VerificationError
from torchtrt_md.lowering import lower
from torchtrt_md.lowering.float8_rows import LARGEST_ERROR
from torchtrt_md.lowering.ops import OF_PARTS, bound_args, packing_of
from torchtrt_md.program import Output, ShardedProgram, Value, Weight, Weights, dtype_name, part, value_of
from torchtrt_md.verification.compare import is_inexact, relative_error, rounding, structure, structure_tolerance
from torchtrt_md.verification.dense import (
    Sample,
    captured,
    check_captured,
    check_finite,
    precision_name,
    run,
    samples,
    weights_of,
    widest,
    with_given,
)
from torchtrt_md.verification.draw import draw, largest_last, scaled
from torchtrt_md.verification.simulate import Precision, interpret, simulate

aten = torch.ops.aten
# What does nothing, or one thing only, as long as numbers stay on one side of a bound or of each other.
_BOUNDS = {aten.clamp, aten.clamp_min, aten.clamp_max, aten.minimum, aten.maximum, aten.gt, aten.ge, aten.lt, aten.le}
_BOUNDS |= {aten.hardtanh, aten.hardswish, aten.hardsigmoid, aten.threshold, aten.softshrink, aten.hardshrink}
_BOUNDS |= {aten.fmin, aten.fmax}
_FACTORS = (64.0, 1 / 64)  # powers of two, by which nothing is rounded
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
    proof = _Proof.of(program, model, args, dict(kwargs or {}))
    trials, notes = _trials(proof)
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
class _Proof:
    """What is compared.  ``dense`` is the captured graph of ``model``."""

    program: ShardedProgram
    model: nn.Module
    weights: Weights
    arguments: Arguments
    dense: ShardedProgram

    @property
    def name(self) -> str:
        return type(self.model).__name__

    def of_tables(self) -> float:
        """What the structure may differ by where one graph holds a table that the other computes.

        A model that keeps tables, in an attribute or a buffer, gives those of its own dtype once it was called; what
        is captured before computes them, and so in fp64.
        """
        held = [_tables(self.program, self.model), _tables(self.dense, self.model)]
        different = [dtype for dtype in {*held[0], *held[1]} if held[0].count(dtype) != held[1].count(dtype)]
        return max((4 * torch.finfo(dtype).eps for dtype in different), default=0.0)

    @classmethod
    def of(cls, program: ShardedProgram, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Proof:
        weights = _dense_weights(program, model)
        arguments = Arguments.of(model, args, kwargs)
        _check_inputs(program, arguments.tensors)
        dense = captured(model, args, kwargs)
        _check_result(program, dense, type(model).__name__)
        return cls(program, model, weights, arguments, dense)


@dataclass(frozen=True)
class _Trial:
    """What dense model and program compute from some inputs.

    Attributes:
        inputs: by name.
        own: the outputs of the dense model in its own dtype, by PyTorch.
        reference: the same in ``precision``.
        samples: what rounding does to them.
        exact: the outputs of each rank of the program in ``precision``.
        limited: why ``precision`` is not float64.
    """

    inputs: Mapping[str, Tensor]
    own: Sequence[Tensor]
    reference: Sequence[Tensor]
    samples: Sequence[Sample]
    exact: Sequence[Sequence[Tensor]]
    precision: torch.dtype | None
    limited: str


@dataclass(frozen=True)
class _Found:
    """A relative error, and where it is."""

    error: float
    place: str


def _trials(proof: _Proof) -> tuple[list[_Trial], list[str]]:
    """With the inputs that tell programs apart best first, and the given ones among them; and what there is to say."""
    given = proof.arguments.tensors
    drawn = draw(proof.dense, given)
    if not drawn:
        outlying, said = _outlying(proof, given)
        return [_trial(proof, given), *outlying], said
    notes: list[str] = []
    # A mask need not fit, which is no reason to leave out the numbers that were drawn beside it.
    for these in (drawn, {name: t for name, t in drawn.items() if t.dtype != torch.bool}):
        if not these or (notes and these.keys() == drawn.keys()):
            continue
        names = ", ".join(map(repr, these))
        try:
            first = _trial(proof, {**given, **these})
        except VerificationError as error:  # a model need not take what was drawn
            notes.append(f"{names} cannot tell programs apart, and others do not fit: {error.problem}")
            continue
        notes.append(f"{names} cannot tell programs apart, so others were drawn too")
        outlying, said = _outlying(proof, {**given, **these})
        return [first, _trial(proof, given, draws=False), *outlying], [*notes, *said]
    return [_trial(proof, given)], notes


def _outlying(proof: _Proof, given: Mapping[str, Tensor]) -> tuple[list[_Trial], list[str]]:
    """With numbers elsewhere or of other sizes, where the given ones may hide something; and what there is to say."""
    others: dict[str, dict[str, Tensor]] = {}
    if _compares(proof.dense):
        others["inputs whose largest numbers are at the end"] = largest_last(given)
    if _cuts_width(proof.program) and _bounds(proof.dense):
        others |= {f"inputs {factor:g} times as large": scaled(given, factor) for factor in _FACTORS}
    trials, said = [], []
    for what, inputs in others.items():
        try:
            trials += [_trial(proof, {**given, **inputs}, draws=False)] if inputs else []
        except VerificationError as error:  # a model need not take these
            said.append(f"{what} do not fit: {error.problem}")
    return trials, said


def _compares(dense: ShardedProgram) -> bool:
    """Does the model look for the largest, or least, of more than each row by itself?  Those may be of all tokens."""
    for node in dense.graphs[0].graph.nodes:
        if node.target in OF_PARTS:
            args = bound_args(node)
            ndim = value_of(args["self"]).ndim
            if {d % max(ndim, 1) for d in args.get("dim") or range(ndim)} - {ndim - 1}:
                return True
    return False


def _bounds(dense: ShardedProgram) -> bool:
    """Does the model compare floating numbers with bounds, or with each other, which the given ones may stay inside?"""
    for node in dense.graphs[0].graph.nodes:
        if getattr(node.target, "overloadpacket", None) in _BOUNDS:
            first = next(iter(node.all_input_nodes), None)
            if first is not None and value_of(first).is_floating_point():
                return True
    return False


def _cuts_width(program: ShardedProgram) -> bool:
    """Has a rank a part of some weight?"""
    return any(isinstance(source, Weight) and source.shardings for source in program.sources.values())


def _trial(proof: _Proof, inputs: Mapping[str, Tensor], *, draws: bool = True) -> _Trial:
    return _with_program(proof, *_reference(proof, inputs), draws=draws)


def _reference(proof: _Proof, inputs: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], list[Tensor]]:
    """The inputs, and what the dense model makes of them in its own dtype."""

    def call() -> list[Tensor]:
        args, kwargs = proof.arguments.call_with(inputs)
        found = pytree.tree_leaves(run(proof.model, args, kwargs, proof.weights))
        return [t.detach().clone() for t in found if isinstance(t, Tensor)]

    with OwnState(proof.model) as state:
        own = call()
        if state.changed():  # a table that it keeps, or what its next call depends on
            _check_alike(proof.name, own, call())
    return inputs, own


def _check_alike(name: str, first: Sequence[Tensor], again: Sequence[Tensor]) -> None:
    """Refuse a model whose result depends on the calls before: what is compiled knows of none.

    Raises:
        VerificationError: it returned something else when it was called again.
    """
    for a, b in zip(first, again, strict=True):
        same = (a.shape, a.dtype) == (b.shape, b.dtype)
        # Kernels of a GPU may sum in another order each time, which a deep model in bfloat16 makes much of.
        limit = 5e-2 if a.is_cuda else 1e-5
        if not same or not (torch.equal(a, b) or relative_error(b, a) <= limit):
            raise VerificationError(
                f"{name} keeps something from one call to the next, and returns something else when it is called again"
                " with the same arguments",
                fix="pass in what it keeps, and return the new value",
            )


def _with_program(proof: _Proof, inputs: Mapping[str, Tensor], own: list[Tensor], *, draws: bool = True) -> _Trial:
    def both(precision: Precision) -> tuple[tuple[Tensor, ...], list[tuple[Tensor, ...]]]:
        reference = interpret(proof.dense, inputs, weights=proof.weights, precision=precision)
        return reference, simulate(proof.program, inputs, weights=proof.weights, precision=precision)

    (reference, exact), wide, limited = widest(both)
    check_finite({v.name: t for v, t in zip(proof.program.outputs, reference, strict=True)})
    made = samples(proof.dense, inputs, proof.weights, own, reference, wide, draws=draws)
    return _Trial(inputs, own, reference, made, exact, wide, limited)


def _tables(program: ShardedProgram, model: nn.Module) -> list[torch.dtype]:
    """The floating dtypes of the tensors that a program holds in its graph, or reads from buffers of the model."""
    graph = program.graphs[0]
    held = [getattr(graph, str(node.target)) for node in graph.graph.find_nodes(op="get_attr")]
    buffers = dict(model.named_buffers(remove_duplicate=False))
    held += [buffers[s.name] for s in program.sources.values() if isinstance(s, Weight) and s.name in buffers]
    return [t.dtype for t in held if isinstance(t, Tensor) and t.is_floating_point()]


def _structure(proof: _Proof, trial: _Trial) -> _Found:
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
        place = f"{output.name!r} of rank {rank}: {difference.place}"
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
    there = ((of_sequence, bool(program.strategies)), (of_width, _cuts_width(program)))
    looked_at = [text for text, is_split in there if is_split]
    return f"look at the plan: {'; '.join(looked_at or [of_sequence])}"


def _rounding(proof: _Proof, trial: _Trial) -> tuple[list[list[_Found]], float, list[str]]:
    """Is it as accurate?  The errors of each rank, by output, the dense model's own, and what there is to say.

    Raises:
        VerificationError: it is not; or the captured graph of the dense model is not what the model computes.
    """
    graph = interpret(proof.dense, trial.inputs, weights=proof.weights)
    check_captured(proof.name, graph, trial.own, trial.reference, trial.samples)
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
    proof: _Proof, trial: _Trial, program: Sequence[Sequence[Tensor]], *, bounded: bool
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
    proof: _Proof, trial: _Trial, plain: Sequence[Sequence[Tensor]], sent: Sequence[Sequence[Tensor]]
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
    proof: _Proof, trial: _Trial, ranks: Sequence[Sequence[Tensor]]
) -> Iterator[tuple[int, Value, Tensor, Tensor, Sample]]:
    """Rank, output, value, what it should be, and its sample, of every output of every rank."""
    for rank, values in enumerate(ranks):
        outputs = zip(proof.program.outputs, values, trial.reference, trial.samples, strict=True)
        for output, value, whole, sample in outputs:
            yield rank, output, value, _part(whole, output, proof.program, rank), sample


def _part(whole: Tensor, output: Value, program: ShardedProgram, rank: int) -> Tensor:
    """A rank's part of an output."""
    return part(whole, output.sharding, program.mesh, rank)


def _dense_weights(program: ShardedProgram, model: nn.Module) -> Weights:
    """The dense model's weights, which must be those that the engines will get.

    Raises:
        VerificationError: the model is sharded itself, or a weight of the program is another.
    """
    own_weights, mesh = weights_of(model), program.mesh
    tensors, dense = own_weights.whole, with_given(own_weights, program.weights)
    sharded = next((name for name, t in tensors.items() if isinstance(t, DTensor)), None)
    if sharded is not None:
        raise VerificationError(
            f"parameter {sharded!r} of the model to compare with is a DTensor",
            fix="pass the dense model, as it was before parallelize_module; md.export(..., dense=...)",
        )
    read = {leaf.name for weight in program.read() for leaf in weight.parts or (weight,)}
    for source in program.sources.values():
        if not isinstance(source, Weight) or source.parts:  # the parts are among the sources themselves
            continue
        if source.name not in tensors:
            raise VerificationError(
                f"the program has a weight {source.name!r} and {type(model).__name__} has none of that name",
                fix="verify with the model that was captured",
            )
        if source.name in dense.given or source.name not in read:  # of the same checkpoint, or of no use
            continue
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


def _check_result(program: ShardedProgram, dense: ShardedProgram, name: str) -> None:
    expected, found = ([None if isinstance(leaf, Output) else leaf for leaf in p.out_leaves] for p in (program, dense))
    if dense.out_spec != program.out_spec or found != expected:
        raise VerificationError(
            f"{name} returns {found} in {dense.out_spec}, and the program {expected} in {program.out_spec}",
            fix="return no numbers that depend on the length of the sequence; under a plan they are those of one rank",
        )


def _dtype(proof: _Proof) -> torch.dtype:
    """The floating dtype that most of the model's weights are in; of the inputs, where it has none."""
    counts: dict[torch.dtype, int] = {}
    for t in [*proof.model.parameters(), *proof.model.buffers()] or list(proof.arguments.tensors.values()):
        if t.is_floating_point():
            counts[t.dtype] = counts.get(t.dtype, 0) + t.numel()
    return max(counts, key=lambda d: counts[d]) if counts else torch.float32
