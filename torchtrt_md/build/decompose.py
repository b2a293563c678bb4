"""From the graph that was verified to the one that is converted: Torch-TensorRT's decompositions, then the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx

from torchtrt_md.build.held_numbers import dequantize_held
from torchtrt_md.build.pairs import find_pairs
from torchtrt_md.build.quantized_products import put_scales_behind
from torchtrt_md.build.torch_trt import load, without_gpu
from torchtrt_md.capture.torch_private import FakeTensorMode
from torchtrt_md.errors import BuildError, MDError, first_line
from torchtrt_md.graph.functional import copied, functional
from torchtrt_md.graph.source import source_line
from torchtrt_md.program import placeholders, value_of


class _Walk(Interpreter):
    """Knows the node that it is at, None before and after."""

    at: Node | None = None

    def run_node(self, n: Node) -> Any:
        self.at = n
        result = super().run_node(n)
        self.at = None
        return result


aten = torch.ops.aten
# Torch-TensorRT writes these out row by row, a dozen ops for each row of the source.  TensorRT has no such layers
# either, so they stay whole, and in PyTorch.
_WHOLE = (aten.scatter_add.default, aten.scatter_reduce.two)


_decomposed: WeakKeyDictionary[GraphModule, GraphModule] = WeakKeyDictionary()


def _decompositions() -> dict[Any, Any]:
    # PyTorch detaches what looks at bits as another dtype, and refuses a rule that gives the tensor itself.  What is
    # detached is the tensor afterwards, for functional() removes it.
    left_out = (*_WHOLE, aten.detach.default)
    table = {op: rule for op, rule in load().get_decompositions().items() if op not in left_out}
    return {**table, aten.eye.default: _eye, aten.eye.m: _eye}


def _eye(n: int, m: int | None = None, *, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    """PyTorch's own counts in the narrowest integers, of which some cannot be folded to constants."""
    device = options.get("device")
    rows, columns = torch.arange(n, device=device), torch.arange(n if m is None else m, device=device)
    return (rows[:, None] == columns).to(dtype or torch.get_default_dtype())


def decompose(graph: GraphModule) -> GraphModule:
    """The same graph in the ops that Torch-TensorRT has converters for; placeholders keep their names.

    It is done once for a graph: whether all of it converts is asked before an engine is built, and a graph may be
    built once for each class of ranks.  Neither graph is to be changed.

    Raises:
        BuildError: an op fails to decompose, with the user's line where it is known.
    """
    if graph not in _decomposed:
        _decomposed[graph] = _decompose(graph)
    return _decomposed[graph]


def _decompose(graph: GraphModule) -> GraphModule:
    graph = copied(graph)
    find_pairs(graph)
    put_scales_behind(graph)
    dequantize_held(graph)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = []
    for node in placeholders(graph):
        like = value_of(node)
        with mode:
            fakes.append(torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device))

    walk = _Walk(graph)

    def run(*flat: Tensor) -> Any:
        return walk.run(*flat)

    try:
        with without_gpu(), torch.fx.traceback.preserve_node_meta():
            decomposed = make_fx(
                run,
                decomposition_table=_decompositions(),
                tracing_mode="fake",
                _allow_non_fake_inputs=True,
            )(*fakes)
            decomposed = functional(decomposed, fakes)  # some decompositions work in place
    except MDError:
        raise
    except Exception as error:  # decompositions raise anything; the user's line is what helps
        failed = walk.at
        what = failed.target if failed else "the graph"
        raise BuildError(
            f"decomposing {what} failed: {type(error).__name__}: {first_line(error)}",
            fix="see lower(program, dump=...) for the graph",
            at=source_line(failed) if failed else "",
        ) from error
    for new, old in zip(placeholders(decomposed), placeholders(graph), strict=True):
        new.name, new.target = old.name, old.target
    return decomposed


def origin(node: Node) -> str:
    """The name of the node, in the graph that was decomposed, that this one came from."""
    history = node.meta.get("from_node") or ()
    return str(history[0].name) if history else node.name


def bind_weights(graph: GraphModule, weights: Mapping[str, Tensor]) -> GraphModule:
    """A copy of the graph in which these placeholders are constants.  The tensors are not copied."""
    bound = copied(graph)
    for node in placeholders(bound):
        if node.name not in weights:
            continue
        attribute = f"weight_{node.name}"
        bound.register_parameter(attribute, nn.Parameter(weights[node.name], requires_grad=False))
        with bound.graph.inserting_before(node):
            constant = bound.graph.get_attr(attribute)
        constant.meta = dict(node.meta)
        node.replace_all_uses_with(constant)
        bound.graph.erase_node(node)
    bound.recompile()
    return bound
