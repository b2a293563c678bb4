"""What ``verify`` runs: the dense model and the program, from the inputs and weights that tell programs apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from torchtrt_md.capture.arguments import Arguments
from torchtrt_md.capture.kept_state import OwnState
from torchtrt_md.errors import VerificationError
from torchtrt_md.lowering.ops import OF_PARTS, bound_args
from torchtrt_md.program import Output, ShardedProgram, Weight, Weights, dtype_name, value_of
from torchtrt_md.verification.compare import relative_error
from torchtrt_md.verification.dense import (
    Sample,
    captured,
    check_captured,
    check_finite,
    run,
    samples,
    weights_of,
    widest,
    with_given,
)
from torchtrt_md.verification.draw import draw, drawn_constants, largest_last, scaled
from torchtrt_md.verification.operands import has_bounds
from torchtrt_md.verification.simulate import Precision, interpret, simulate

aten = torch.ops.aten
_FACTORS = (64.0, 1 / 64)  # powers of two, by which nothing is rounded
_NAMED = 3  # weights in a message


@dataclass(frozen=True)
class Proof:
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
    def of(cls, program: ShardedProgram, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Proof:
        weights = _dense_weights(program, model)
        arguments = Arguments.of(model, args, kwargs)
        _check_inputs(program, arguments.tensors)
        dense = captured(model, args, kwargs)
        _check_result(program, dense, type(model).__name__)
        return cls(program, model, weights, arguments, dense)


@dataclass(frozen=True)
class Trial:
    """What dense model and program compute from some inputs and weights.

    Attributes:
        inputs: by name.
        own: the outputs of the dense model in its own dtype, by PyTorch.
        reference: the same in ``precision``.
        samples: what rounding does to them.
        exact: the outputs of each rank of the program in ``precision``.
        limited: why ``precision`` is not float64.
        about: what is not as it was given, for messages.
    """

    inputs: Mapping[str, Tensor]
    own: Sequence[Tensor]
    reference: Sequence[Tensor]
    samples: Sequence[Sample]
    exact: Sequence[Sequence[Tensor]]
    precision: torch.dtype | None
    limited: str
    about: str = ""


def trials_of(proof: Proof) -> tuple[list[Trial], list[str]]:
    """With the inputs that tell programs apart best first, and the given ones among them; and what there is to say.

    Raises:
        VerificationError: dense model or program cannot be run, or what the model gives is no use as a reference.
    """
    given = proof.arguments.tensors
    drawn = draw(proof.dense, given)
    if not drawn:
        first, told = _first(proof, given)
        outlying, said = _outlying(proof, given)
        return [*first, *outlying], [*told, *said]
    notes: list[str] = []
    # A mask need not fit, which is no reason to leave out the numbers that were drawn beside it.
    for these in (drawn, {name: t for name, t in drawn.items() if t.dtype != torch.bool}):
        if not these or (notes and these.keys() == drawn.keys()):
            continue
        names = ", ".join(map(repr, these))
        try:
            first, told = _first(proof, {**given, **these})
        except VerificationError as error:  # a model need not take what was drawn
            notes.append(f"{names} cannot tell programs apart, and others do not fit: {error.problem}")
            continue
        notes.append(f"{names} cannot tell programs apart, so others were drawn too")
        outlying, said = _outlying(proof, {**given, **these})
        return [*first, _as_given(proof), *outlying], [*notes, *told, *said]
    first, told = _first(proof, given)
    return first, [*notes, *told]


def _as_given(proof: Proof) -> Trial:
    """The trial of the given inputs beside drawn ones.  A model may do otherwise with each, untraced.

    Raises:
        VerificationError: as :func:`trials_of`; or the model computes something else than what is captured of it.
    """
    trial = _trial(proof, proof.arguments.tensors, draws=False)
    check_model(proof, trial)
    return trial


def check_model(proof: Proof, trial: Trial) -> None:
    """See that the captured graph of the dense model is what the model computes.

    Raises:
        VerificationError: it is not.
    """
    graph = interpret(proof.dense, trial.inputs, weights=proof.weights)
    check_captured(proof.name, graph, trial.own, trial.reference, trial.samples)


def _first(proof: Proof, inputs: Mapping[str, Tensor]) -> tuple[list[Trial], list[str]]:
    """The trial for rounding, and one with other numbers in the weights that hide something, where there are such.

    Drawn numbers may hide something as well, so structure is asked with both.
    """
    first = _trial(proof, inputs)
    drawn = drawn_constants(_parameters(proof))
    if not drawn:
        return [first], []
    about = f"with other numbers in {', '.join(list(drawn)[:_NAMED])}{', ...' if len(drawn) > _NAMED else ''}"
    other = replace(proof, weights=replace(proof.weights, whole={**proof.weights.whole, **drawn}))
    try:
        graph = list(interpret(other.dense, inputs, weights=other.weights))
        return [first, replace(_with_program(other, inputs, graph, draws=False), about=about)], []
    except VerificationError as error:  # a model need not take these
        return [first], [f"some weights hide errors, being one number everywhere; others do not fit: {error.problem}"]


def _parameters(proof: Proof) -> dict[str, Tensor]:
    """The plain parameters and buffers in memory that both model and program read; tied ones by the names of both.

    What one of them reads and the other does not, a table was made of that the model keeps.
    """
    plain = {
        name: p
        for named in (proof.model.named_parameters, proof.model.named_buffers)
        for name, p in named(remove_duplicate=False)
        if type(p) in (nn.Parameter, Tensor) and not p.is_meta
    }
    names = [
        {leaf.name for weight in program.read() for leaf in weight.parts or (weight,)} & plain.keys()
        for program in (proof.dense, proof.program)
    ]
    of_model, of_program = ({id(plain[name]) for name in read} for read in names)
    both = of_model & of_program
    return {name: proof.weights.whole[name] for name in sorted(names[0] | names[1]) if id(plain[name]) in both}


def _outlying(proof: Proof, given: Mapping[str, Tensor]) -> tuple[list[Trial], list[str]]:
    """With numbers elsewhere or of other sizes, where the given ones may hide something; and what there is to say."""
    others: dict[str, dict[str, Tensor]] = {}
    if _compares(proof.dense):
        others["inputs whose largest numbers are at the end"] = largest_last(given)
    if cuts_width(proof.program) and has_bounds(proof.dense.graphs[0]):
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


def cuts_width(program: ShardedProgram) -> bool:
    """Has a rank a part of some weight?"""
    return any(isinstance(source, Weight) and source.shardings for source in program.sources.values())


def _trial(proof: Proof, inputs: Mapping[str, Tensor], *, draws: bool = True) -> Trial:
    return _with_program(proof, inputs, _own(proof, inputs), draws=draws)


def _own(proof: Proof, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """What the dense model makes of the inputs in its own dtype."""

    def call() -> list[Tensor]:
        args, kwargs = proof.arguments.call_with(inputs)
        found = pytree.tree_leaves(run(proof.model, args, kwargs, proof.weights))
        return [t.detach().clone() for t in found if isinstance(t, Tensor)]

    with OwnState(proof.model) as state:
        own = call()
        if state.changed():  # a table that it keeps, or what its next call depends on
            _check_alike(proof.name, own, call())
    return own


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


def _with_program(proof: Proof, inputs: Mapping[str, Tensor], own: list[Tensor], *, draws: bool) -> Trial:
    """What model and program compute; ``own`` is the model's result in its own dtype."""

    def both(precision: Precision) -> tuple[tuple[Tensor, ...], list[tuple[Tensor, ...]]]:
        reference = interpret(proof.dense, inputs, weights=proof.weights, precision=precision)
        return reference, simulate(proof.program, inputs, weights=proof.weights, precision=precision)

    (reference, exact), wide, limited = widest(both)
    check_finite({v.name: t for v, t in zip(proof.program.outputs, reference, strict=True)})
    made = samples(proof.dense, inputs, proof.weights, own, reference, wide, draws=draws)
    return Trial(inputs, own, reference, made, exact, wide, limited)


def _tables(program: ShardedProgram, model: nn.Module) -> list[torch.dtype]:
    """The floating dtypes of the tensors that a program holds in its graph, or reads from buffers of the model."""
    graph = program.graphs[0]
    held = [getattr(graph, str(node.target)) for node in graph.graph.find_nodes(op="get_attr")]
    buffers = dict(model.named_buffers(remove_duplicate=False))
    held += [buffers[s.name] for s in program.sources.values() if isinstance(s, Weight) and s.name in buffers]
    return [t.dtype for t in held if isinstance(t, Tensor) and t.is_floating_point()]


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
    dtypes, own = ([v.dtype for v in p.outputs] for p in (program, dense))
    if dtypes != own:
        raise VerificationError(
            f"{name} returns {', '.join(map(dtype_name, own))}, and the program {', '.join(map(dtype_name, dtypes))}",
            fix="let the plan's modules keep the dtype; under torch.autocast, cast the model itself instead",
        )
