"""Trace one rank's graph: flat, functional aten ops, weights as placeholders.

Tensor parallelism is in the graph's shapes, which are those of a rank.  Context parallelism is not: the sequence is
whole, and marked where the plan splits and gathers it (:mod:`torchtrt_md.capture.context_parallel`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from torchtrt_md.capture import quantizers
from torchtrt_md.capture.arguments import Arguments, Scalar
from torchtrt_md.capture.attention import WholeAttention
from torchtrt_md.capture.known_values import KnownValues
from torchtrt_md.capture.quiet import quiet
from torchtrt_md.capture.repeated import RepeatedBlocks, UnrepeatedError
from torchtrt_md.capture.torch_private import DEPENDS_ON_VALUES, FakeTensor, FakeTensorMode, told_stacks
from torchtrt_md.capture.written_collectives import refuse_written
from torchtrt_md.capture.written_tensors import refuse_filled, refuse_written_marks, refuse_written_tensors
from torchtrt_md.errors import CaptureError, MDError
from torchtrt_md.graph.functional import functional, mutates
from torchtrt_md.graph.private import lazy_modules
from torchtrt_md.graph.source import error_line, set_user_name, source_line
from torchtrt_md.graph.uncollected import uncollected
from torchtrt_md.program import Output, Source, Value, Weight, placeholders
from torchtrt_md.wrappers import wrapped


@dataclass(frozen=True)
class LocalWeight:
    """A weight, the shadow's tensor for it (a DTensor where ranks hold parts), and the device to trace it on."""

    weight: Weight
    tensor: Tensor
    device: torch.device


@dataclass(frozen=True)
class Trace:
    """One rank's graph and what it says about inputs and outputs."""

    graph: GraphModule
    sources: Mapping[str, Source]
    outputs: Sequence[Tensor]
    out_spec: pytree.TreeSpec
    out_leaves: tuple[object, ...]
    met: Sequence[Tensor]  # those with values: no inputs, and no weights


def trace(
    shadow: nn.Module, arguments: Arguments, weights: Sequence[LocalWeight], repeated: RepeatedBlocks | None = None
) -> Trace:
    """Run the shadow on fake tensors and record what it does.

    Args:
        repeated: writes down again what equal blocks do; without it, all are traced.

    Raises:
        UnrepeatedError: equal blocks do not do the same.
        CaptureError: the model does what cannot be one graph, with the user's source line.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake_weights = [fake(mode, w) for w in weights]
    fake_inputs = [without_memory(mode, t) for t in arguments.tensors.values()]
    structure: list[pytree.TreeSpec] = []
    leaves: list[object] = []
    known = KnownValues()

    def call(*flat: Tensor) -> tuple[Tensor, ...]:
        held = {w.weight.name: as_placed(w.tensor, t) for w, t in zip(weights, flat, strict=False)}
        named = {name: wrapped(name, t, held) for name, t in [*shadow.named_parameters(), *shadow.named_buffers()]}
        args, kwargs = arguments.call_with(dict(zip(arguments.tensors, flat[len(weights) :], strict=True)))
        blocks = repeated.traced(known) if repeated is not None else nullcontext()
        with WholeAttention(), quantizers.whole(), known, torch.no_grad(), blocks:
            before = pytree.tree_leaves((args, kwargs))
            result = torch.func.functional_call(shadow, named, args, kwargs)
        refuse_filled(before, (args, kwargs))
        flat_result, spec = pytree.tree_flatten(result)
        _check_result(shadow, flat_result)
        structure.append(spec)
        tensors = [_local(t) for t in flat_result if isinstance(t, Tensor)]
        indices = iter(range(len(tensors)))
        leaves.extend(Output(next(indices)) if isinstance(t, Tensor) else t for t in flat_result)
        return tuple(tensors)

    expand = repeated.expand if repeated is not None else None
    graph = recorded(call, [*fake_weights, *fake_inputs], type(shadow).__name__, expand=expand)
    sources: dict[str, Source] = {}
    values = [Value(name, tuple(t.shape), t.dtype) for name, t in arguments.tensors.items()]
    in_order: list[Weight | Value] = [*(w.weight for w in weights), *values]
    for node, source in zip(placeholders(graph), in_order, strict=True):
        sources[node.name] = source
        set_user_name(node, source.name)
    (output,) = graph.graph.find_nodes(op="output")
    outputs = [node.meta["val"] for node in output.args[0]]
    return Trace(graph, sources, outputs, structure[0], tuple(leaves), tuple(known.met.values()))


def recorded(
    call: Callable[..., tuple[object, ...]],
    inputs: Sequence[Tensor],
    what: str,
    line: Callable[[BaseException], str] | None = None,
    names: Sequence[str] = (),
    writable: Collection[str] = (),
    expand: Callable[[GraphModule], None] | None = None,
) -> GraphModule:
    """What ``call`` does with fake tensors, as a flat, functional graph.

    Args:
        call: takes ``inputs``, and returns a tuple of tensors and plain values.
        inputs: fake tensors.
        what: the name of what is traced, for messages.
        line: the user's source line of an error that ``call`` raised; by default that of its innermost frame.
        names: of the inputs, for messages; none where they have none.
        writable: names of inputs that may be written to.  The graph returns their new values behind what ``call``
            returns, and its attribute ``meta["written"]`` has their names in this order.
        expand: what is done first with the graph as PyTorch traced it.

    Raises:
        CaptureError: it does what cannot be one graph.
    """
    try:
        with quiet(), told_stacks(), lazy_modules(), uncollected():
            graph = make_fx(call, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
            if expand is not None:
                expand(graph)
            refuse_written(graph)
            refuse_written_tensors(graph)
            refuse_written_marks(graph)
            _integer_products(graph)
            quantizers.as_one_op(graph)
            graph = functional(graph, inputs)
    except CaptureError as error:
        if error.at:
            raise
        raise CaptureError(error.problem, fix=error.fix, at=(line or error_line)(error)) from error
    except (MDError, UnrepeatedError):
        raise
    except DEPENDS_ON_VALUES as error:
        raise CaptureError(
            f"{what} calls {error.func}, whose result's size, or what is done next, depends on the values of tensors",
            fix="make the model's forward depend on shapes only; where the values are the same in all calls, as those"
            " of a mask may be, let a module hold them as a plain tensor, no buffer, so that they are known; where it"
            " is a loop over the experts that were chosen, use a form without one: in transformers,"
            " model.set_experts_implementation('grouped_mm'), or 'batched_mm' for a few tokens and for a sequence that"
            " is split; where the model's experts do not take it, give them a forward without a loop; where it is a"
            " check of transformers, that there are as many places for images as images,"
            " TRANSFORMERS_DISABLE_TORCH_CHECK=1 leaves it out",
            at=(line or error_line)(error),
        ) from error
    except Exception as error:  # whatever the model's code raised, the user's line is what helps
        reason = next(iter(str(error).strip().splitlines()), "")
        raise CaptureError(
            f"{what} could not be traced: {type(error).__name__}: {reason}",
            fix="make the model's forward depend on shapes only, not on the values of tensors;"
            " under tensor parallelism, a rank's shapes must fit it too: where it counts its heads itself, give the"
            " projections to them ColwiseParallel(use_local_output=False), of torch.distributed.tensor.parallel",
            at=(line or error_line)(error),
        ) from error
    by_node = dict(zip(placeholders(graph), names, strict=False))
    graph.meta["written"] = _return_written(graph, {n: name for n, name in by_node.items() if name in writable})
    _check(graph, by_node)
    return graph


def _integer_products(graph: GraphModule) -> None:
    """out_dtype(aten.mm, int32, x, y) of int8 -> aten._int_mm(x, y), which is how PyTorch computes it.

    It is an op that takes an op, which no pass knows of; torchao calls it where tensors are on a GPU.
    """
    for node in graph.graph.nodes:
        if not isinstance(node.target, torch._ops.HigherOrderOperator) or str(node.target) != "out_dtype":
            continue
        op, dtype, *operands = node.args
        narrow = all(isinstance(x, Node) and x.meta["val"].dtype == torch.int8 for x in operands)
        if op is torch.ops.aten.mm.default and dtype == torch.int32 and narrow:
            node.target, node.args = torch.ops.aten._int_mm.default, tuple(operands)


def _return_written(graph: GraphModule, writable: Mapping[Node, str]) -> tuple[str, ...]:
    """Let the graph return what it would copy to these placeholders; their names in order.

    before    copy_(x, value); return y
    after     return y, value
    """
    written: dict[Node, Node] = {}
    (output,) = graph.graph.find_nodes(op="output")
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default):
        target, value = node.args[0], node.args[1]
        if target in writable and _alike(target, value):
            node.replace_all_uses_with(value)
            graph.graph.erase_node(node)
            written[target] = value
    if written:
        (returned,) = output.args
        output.args = (type(returned)([*returned, *written.values()]),)
        graph.recompile()
    return tuple(writable[node] for node in written)


def _alike(a: Node, b: object) -> bool:
    if not isinstance(b, Node):
        return False
    ours, theirs = a.meta["val"], b.meta["val"]
    return bool(ours.shape == theirs.shape and ours.dtype == theirs.dtype)


def fake(mode: FakeTensorMode, w: LocalWeight) -> Tensor:
    """The local part of a weight, without memory."""
    if not isinstance(w.tensor, DTensor):
        return without_memory(mode, w.tensor, w.device)
    local = w.tensor.to_local()  # as it lies, since results that are DTensors have strides, too
    shape_only = torch.empty_strided(local.shape, local.stride(), dtype=local.dtype, device="meta")
    return FakeTensor(mode, shape_only, w.device)


def without_memory(mode: FakeTensorMode, tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """A tensor of this shape and dtype that is contiguous, as all is that a program is given when it runs.

    What reads strides, as ``torch.stft`` does by ``as_strided``, would else be right for those of the example only.
    """
    shape_only = torch.empty([*map(int, tensor.shape)], dtype=tensor.dtype, device="meta")
    return FakeTensor(mode, shape_only, device or tensor.device)


def as_placed(shadow: Tensor, local: Tensor) -> Tensor:
    """``local`` as the DTensor that ``shadow`` is, or as it is."""
    if not isinstance(shadow, DTensor):
        return local
    return DTensor.from_local(
        local,
        shadow.device_mesh,
        shadow.placements,
        run_check=False,
        shape=shadow.shape,
        stride=shadow.stride(),
    )


def _local(result: Tensor) -> Tensor:
    return result.full_tensor() if isinstance(result, DTensor) else result


def _check_result(model: nn.Module, leaves: Sequence[object]) -> None:
    for leaf in leaves:
        if not isinstance(leaf, (Tensor, *Scalar)):
            raise CaptureError(
                f"{type(model).__name__} returns a {type(leaf).__name__}, which is no tensor, plain value or nest",
                fix="return tensors in tuples, lists or dicts; register a class of your own with torch.utils._pytree;"
                " in transformers, pass use_cache=False",
            )
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        raise CaptureError(f"{type(model).__name__} returns no tensor", fix="return what the model computes")


def _check(graph: GraphModule, names: Mapping[Node, str]) -> None:
    for node in graph.graph.nodes:
        if node.op == "get_attr" and isinstance(held := getattr(graph, str(node.target)), Tensor) and held.is_meta:
            raise CaptureError(
                f"the model holds a tensor {list(held.shape)} on meta, which is no parameter and no buffer, and so has"
                " no value",
                fix="make it with its value: put parameters alone on meta, as accelerate's init_empty_weights() does",
                at=next(filter(None, map(source_line, node.users)), ""),
            )
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise CaptureError(
                f"the model calls {node.target}, an op that takes functions or other ops, of which no stage knows",
                fix="write it with ops of tensors: torch.where in place of torch.cond, or"
                " scaled_dot_product_attention with a mask in place of flex_attention",
                at=source_line(node),
            )
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        if "scaled_dot_product" in str(node.target):
            raise CaptureError(
                f"an attention was traced as {node.target} and not kept whole",
                fix="call torch.nn.functional.scaled_dot_product_attention, not an op of one backend",
                at=source_line(node),
            )
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            raise CaptureError(
                f"the model draws random numbers ({node.target}); ranks would draw different ones",
                fix="call model.eval(), or pass the random tensor as an input",
                at=source_line(node),
            )
        if mutates(node):
            # What functionalization leaves is a copy at the end, with no line; the line is that of the new value.
            lines = (source_line(n) for n in (node, *node.all_input_nodes))
            written = names.get(node.args[0]) if node.args and isinstance(node.args[0], Node) else None
            raise CaptureError(
                f"the model writes to an input or a buffer in its forward{f': {written!r}' if written else ''}"
                f" ({node.target})",
                fix="pass the buffer in and return the new value",
                at=next(filter(None, lines), ""),
            )


def same_graph(a: GraphModule, b: GraphModule) -> bool:
    """Do two graphs compute the same, constants included?"""
    return fingerprint(a) == fingerprint(b)


def fingerprint(graph: GraphModule) -> str:
    """A digest of a graph: its nodes, shapes, dtypes and constants; not the names of process groups' tensors."""
    digest = hashlib.sha256()
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        shape = f"{value.dtype}{list(value.shape)}" if isinstance(value, Tensor) else ""
        digest.update(f"{node.format_node()}{shape}\n".encode())
        if node.op == "get_attr":
            constant = getattr(graph, str(node.target))
            digest.update(constant.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
