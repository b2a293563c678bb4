"""The dense model as the reference, on a CPU or a GPU.

It is run twice: by PyTorch in its own dtype, and in fp64 as the graph that is captured of it at one rank.  The model
itself cannot be run in fp64 to compare with: an eps or a mask value that its code takes from a tensor's dtype
(``torch.finfo(x.dtype).min``, the default eps of ``nn.RMSNorm``) would be fp64's, and a cast to a fixed dtype would
stay narrow.  In the graph such numbers are those of the model's own dtype, as they are in the program.  That the graph
is the model is shown apart: in the model's own dtype it gives what the model gives.

A model on meta is compared as any other, in whole.  A weight of it is read when an op takes it, and let go of after it,
in the model, in its graph and in the program: what is in memory is a weight or two, and what lies between ops.

Where an op has no kernel in fp64, all is run in fp32; where not in that either, in the model's own dtype.  What
rounding does to an output then has no finer reference: it is sampled by changing every weight and input by one
rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from torchtrt_md.capture import capture
from torchtrt_md.capture.marks import Marking, marking
from torchtrt_md.checkpoint import Given
from torchtrt_md.errors import MDError, VerificationError
from torchtrt_md.mesh import Mesh
from torchtrt_md.program import Output, ShardedProgram, Weight, Weights, dtype_name, outputs_of
from torchtrt_md.verification.compare import FP32_RATIO, coarsest, noise_of, ratio, relative_error, rounding
from torchtrt_md.verification.private import ReadWhenUsed
from torchtrt_md.verification.simulate import Precision, interpret
from torchtrt_md.wrappers import named_weights, plain, wrapped

T = TypeVar("T")
# A 16-bit dtype that leaves less than this behind was only a dtype of what is stored, not of what is computed.
_16_BIT_NOISE = 2e-5
# Of the weights and inputs that a draw of rounding changes: what then comes out of a product is off by about as much as
# where its terms were rounded and not their sum.
_JITTER = 0.25
aten, md = torch.ops.aten, torch.ops.torchtrt_md


@dataclass(frozen=True)
class Sample:
    """Of one output, what rounding does to it.

    Attributes:
        value: the output with the rounding of the dense model's own dtype.
        noise: of each element, over several draws of rounding; None where they were not asked for.
        coarse: the dtype that it is computed in, the coarsest of several.
        finer: epsilon of the reference's dtype over that of ``coarse``.
        ratio: how many times the unit the program may be off.
        error: of the dense model's own output, relative, in its worst part.
    """

    value: Tensor
    coarse: torch.dtype
    finer: float
    ratio: float
    error: float
    noise: Tensor | None = None

    @property
    def unit(self) -> float:
        """The relative error that one unit stands for."""
        return max(self.error, float(torch.finfo(self.coarse).eps) / 4)


def captured(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], given: Given = None) -> ShardedProgram:
    """The graph of the dense model."""
    return capture(model, args, kwargs, mesh=Mesh(dense=1), weights=given)


def weights_of(model: nn.Module) -> Weights:
    """By name, each under all of its names."""
    return Weights({name: t.detach() for name, t in named_weights(model).items()})


def is_on_meta(model: nn.Module) -> bool:
    """Has it weights without memory?"""
    return any(t.is_meta for t in (*model.parameters(), *model.buffers()))


def with_given(weights: Weights, given: Weights) -> Weights:
    """The weights of a dense model, those on meta being of the checkpoint that the others were given."""
    read = {name: there for name, there in given.given.items() if name in weights.whole and weights.whole[name].is_meta}
    whole = {name: t for name, t in weights.whole.items() if name not in read}
    return Weights(whole, given=read, checkpoint=given.checkpoint if read else None)


def run(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], weights: Weights) -> Any:
    """What the model returns.

    Args:
        weights: its own.  Of a model on meta each is read, or moved to where the arguments are, when an op takes it.

    Raises:
        VerificationError: it cannot be called with these arguments.
        CaptureError: a weight that an op takes has no value.
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    tensors = plain(named)
    device = next((t.device for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)), torch.device("cpu"))
    one = Mesh(dense=1)

    def read(name: str) -> ReadWhenUsed:
        weight = Weight(name, tuple(tensors[name].shape), tensors[name].dtype)
        return ReadWhenUsed(tensors[name], device, lambda: weights.local(weight, one, 0).to(device))

    unread = {name: read(name) for name in tensors} if is_on_meta(model) else {}
    lazy = {name: wrapped(name, tensor, unread) for name, tensor in named} if unread else {}
    try:
        with torch.no_grad(), marking(Marking({})):  # one process has the whole, also where a launch has a mesh in use
            if lazy:
                return torch.func.functional_call(model, lazy, tuple(args), dict(kwargs))
            return model(*args, **kwargs)
    except MDError:
        raise
    except Exception as error:  # of the user's code
        reason = next(iter(str(error).strip().splitlines()), "")
        raise VerificationError(
            f"the dense {type(model).__name__} cannot be run to compare with: {type(error).__name__}: {reason}",
            fix="verify with arguments that the model itself takes, of the shapes that were captured",
        ) from error


def widest(compute: Callable[[Precision], T]) -> tuple[T, torch.dtype | None, str]:
    """The result in fp64, or in fp32, or in the model's own dtype (None); and why in none that is finer.

    Raises:
        VerificationError: an op cannot be run in any.
    """
    reasons: list[str] = []
    for wide in (torch.float64, torch.float32):
        try:
            return compute(Precision(wide)), wide, "; ".join(reasons)
        except VerificationError as error:
            reasons.append(error.problem)
        torch.cuda.empty_cache()  # only now, when the error's frames have let go of their tensors
    return compute(Precision(None)), None, "; ".join(reasons)


def samples(
    program: ShardedProgram,
    inputs: Mapping[str, Tensor],
    weights: Weights,
    own: Sequence[Tensor],
    outputs: Sequence[Tensor],
    wide: torch.dtype | None,
    *,
    draws: bool = True,
) -> list[Sample]:
    """What rounding does to each output of the dense model.

    Args:
        own: the outputs in the model's own dtype.
        outputs: those in the dtype ``wide``.
        draws: run the model once more, on weights and inputs that are changed by a rounding, for ``Sample.noise``.
    """
    jittered: tuple[Tensor, ...] = ()
    found = []
    drawn: tuple[Tensor | None, ...] = (None,) * len(own)
    if draws:
        drawn = interpret(program, inputs, weights=weights, precision=Precision(None, jitter=_JITTER))
    for index, (node, value, reference) in enumerate(zip(outputs_of(program.graphs[0]), own, outputs, strict=True)):
        coarse = coarsest(computed_in(node))
        error = _own_error(value, reference)
        finer = 1.0 if wide is None else torch.finfo(wide).eps / torch.finfo(coarse).eps
        if finer >= 1.0:
            jittered = jittered or interpret(program, inputs, weights=weights, precision=Precision(wide, jitter=1.0))
            # It says the order of magnitude only: what kernels round in between is not in it.
            found.append(Sample(jittered[index], coarse, 1.0, FP32_RATIO, error))
            continue
        if error < _16_BIT_NOISE and coarse not in (torch.float64, torch.float32):
            coarse, finer = torch.float32, finer * torch.finfo(coarse).eps / torch.finfo(torch.float32).eps
        other = drawn[index]
        noise = None if other is None else noise_of([value, other], reference)
        found.append(Sample(value, coarse, finer, ratio(coarse), error, noise))
    return found


def check_captured(
    name: str, graph: Sequence[Tensor], own: Sequence[Tensor], reference: Sequence[Tensor], made: Sequence[Sample]
) -> None:
    """Refuse a model that computes something else than what is captured of it: one that asks whether it is traced.

    Each is measured by the rounding of the other: what the model gives is part of its own sample, which would excuse
    any difference.

    Args:
        graph: the outputs of what is captured, in the model's own dtype.
        own: what the model returns.
        reference: the outputs of what is captured, computed in the widest dtype that there is.
        made: of :func:`samples`.

    Raises:
        VerificationError: naming the output.
    """
    for index, (value, given, exact, sample) in enumerate(zip(graph, own, reference, made, strict=True)):
        if torch.equal(value, given):
            continue
        differences = (
            rounding(value, exact, sample.value, sample.coarse, sample.noise),
            rounding(given, exact, value, sample.coarse),
        )
        for difference in differences:
            if not difference.error <= sample.ratio:
                raise VerificationError(
                    f"{name} computes something else than what is captured of it: output {index}, {difference.place}",
                    fix="let forward do the same while it is traced: does it ask torch.compiler.is_compiling(), how a"
                    " tensor lies in memory, or whether two arguments are one tensor?  torch.nn.TransformerEncoder does"
                    " otherwise with a mask in eval(): torch.backends.mha.set_fastpath_enabled(False).  Else report"
                    " it, with the model",
                )


def longest_sum(program: ShardedProgram) -> int:
    """The number of terms of the longest sum that the program computes, at most: by shapes."""
    return max((_terms(node) for graph in program.graphs for node in graph.graph.nodes), default=1)


def _terms(node: Node) -> int:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return 1
    if torch.Tag.pointwise in node.target.tags or node.target.is_view:
        return 1
    operands = [n.meta["val"] for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    packet = node.target.overloadpacket
    if packet in (aten.mm, aten.bmm, aten.addmm, aten.baddbmm):
        return int(operands[-1].shape[-2])
    if packet == aten.convolution:
        return int(math.prod(operands[1].shape[1:]))
    # Norms, softmax, attention, reductions of some dims or of all: what they take, over what they leave of it.
    results = [v.numel() for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, Tensor)]
    reduced = max((v.numel() for v in operands), default=1) // max(min(results, default=1), 1)
    return int(max([reduced, 1, *(size for v in operands for size in v.shape)]))


def check_finite(outputs: Mapping[str, Tensor]) -> None:
    """Refuse a reference with which nothing can be compared; infinities are compared where others are finite.

    Raises:
        VerificationError: naming the output.
    """
    for name, t in outputs.items():
        if not (t.is_floating_point() or t.is_complex()) or not t.numel():
            continue
        if bool(t.isnan().any()) or not bool(t.isfinite().any()):
            raise VerificationError(
                f"{name!r} of the dense model is not finite, so nothing can be compared with it",
                fix="use arguments on which the model's result is finite",
            )


class Reference(NamedTuple):
    """What the dense model computes, by output.

    Attributes:
        outputs: computed in ``precision``, integers included.
        samples: what rounding does to them.
        precision: None for the model's own dtype.
        limited: why it is not fp64.
        terms: of the longest sum.
    """

    outputs: dict[str, Tensor]
    samples: dict[str, Sample]
    precision: torch.dtype | None
    limited: str
    terms: int


def dense_reference(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    flat: Callable[[Any], dict[str, Tensor]],
    device: torch.device,
    given: Given = None,
) -> Reference:
    """Run the dense model on one GPU: in its own dtype, then in the widest that there is.

    The model is moved to ``device`` in place.  Weights are widened one at a time.

    Args:
        flat: the output tensors, by name, of what the model returns.
        given: the weights of a model on meta, which are moved one at a time too.

    Raises:
        VerificationError: the model does not run, or its outputs are no use as a reference.
        CaptureError: it has weights on meta, and none are given.
        WeightsError: what is given is not those of the model.
    """
    with torch.no_grad(), _no_tf32():
        on_meta = is_on_meta(model)
        if not on_meta:
            model.to(device)
        args, kwargs = pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, (tuple(args), kwargs))
        weights = weights_of(model)
        own = None if on_meta else run(model, args, kwargs, weights)  # before it is traced, whose errors say less
        program = captured(model, args, kwargs, given if on_meta else None)
        program.weights.check_values(program.read())
        if on_meta:
            weights = with_given(weights, program.weights)
            own = run(model, args, kwargs, weights)
        inputs = _inputs(model, args, kwargs)
        found, wide, limited = widest(lambda p: interpret(program, inputs, weights=weights, precision=p))
        leaves = [found[leaf.index] if isinstance(leaf, Output) else leaf for leaf in program.out_leaves]
        outputs = flat(pytree.tree_unflatten(leaves, program.out_spec))
        check_finite(outputs)
        own_leaves = [t for t in pytree.tree_leaves(own) if isinstance(t, Tensor)]
        made = samples(program, inputs, weights, own_leaves, found, wide)
        check_captured(type(model).__name__, interpret(program, inputs, weights=weights), own_leaves, found, made)
        by_tensor = {id(t): s for t, s in zip(found, made, strict=True)}
        by_name = {name: by_tensor[id(t)] for name, t in outputs.items()}
        return Reference(outputs, by_name, wide, limited, longest_sum(program))


def precision_name(wide: torch.dtype | None) -> str:
    """For messages."""
    return "its own dtype" if wide is None else dtype_name(wide)


def _inputs(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    from torchtrt_md.capture.arguments import Arguments

    return dict(Arguments.of(model, args, kwargs).tensors)


def _own_error(value: Tensor, reference: Tensor) -> float:
    """Of what does not overflow."""
    return relative_error(torch.where(value.isfinite(), value, reference.to(value.dtype)), reference)


def computed_in(node: Node) -> list[torch.dtype]:
    """The dtypes of all that an output is computed from; weights and inputs, which are as they are, left out.

    Float8 is left out too: to be rounded to it is what a quantized model computes, in the widest precision as well.
    """
    seen, todo = {node}, [node]
    dtypes = []
    while todo:
        at = todo.pop()
        if at.op == "call_function":
            made = [v.dtype for v in pytree.tree_leaves(at.meta.get("val")) if isinstance(v, Tensor)]
            dtypes += [dtype for dtype in made if dtype.itemsize > 1 or not dtype.is_floating_point]
        todo += [n for n in at.all_input_nodes if n not in seen]
        seen.update(at.all_input_nodes)
    return dtypes


@contextmanager
def _no_tf32() -> Iterator[None]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
