"""Attention masks that depend on no input: nothing, or causal.

    before    m = le(arange(S), unsqueeze(arange(S), 1))        after    a = attention(q, k, v, None, True, ...)
              a = attention(q, k, v, m, False, ...)

Models build such masks while they are traced.  As a flag it costs no memory, and TensorRT has kernels for it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from torchtrt_md.graph.rewrite import emit, substitute
from torchtrt_md.lowering.ops import bound_args, is_collective
from torchtrt_md.lowering.passes import PassContext

md = torch.ops.torchtrt_md


def run(graph: GraphModule, context: PassContext) -> int:
    count = 0
    known: dict[Node, Tensor] = {}
    for node in list(graph.graph.nodes):
        if node.target is not md.attention.default:
            continue
        args = bound_args(node)
        mask = args["mask"]
        value = _evaluate(graph, mask, known) if isinstance(mask, Node) and not args["is_causal"] else None
        if value is None:
            continue
        attended = value if value.dtype == torch.bool else value == 0
        if value.dtype != torch.bool and not _hides(value[~attended]):
            continue
        if attended.all():
            causal = False
        elif attended.shape[-1] == attended.shape[-2] and torch.equal(
            attended, attended.new_ones(attended.shape).tril()
        ):
            causal = True
        else:
            continue
        new = emit(
            node,
            md.attention.default,
            *(args[name] for name in ("q", "k", "v")),
            None,
            causal,
            args["scale"],
            args["enable_gqa"],
        )
        substitute(node, new)
        count += 1
    return count


def _hides(values: Tensor) -> bool:
    """Do these additive values hide a key altogether?"""
    return bool((values <= torch.finfo(values.dtype).min).all()) if values.numel() else True


def _evaluate(graph: GraphModule, node: Node, known: dict[Node, Tensor]) -> Tensor | None:
    """The node's value, where no input takes part in it, and every rank has the same."""
    order: list[Node] = []
    pending, seen = [node], set()
    while pending:
        current = pending.pop()
        if current in seen or current in known:
            continue
        if current.op == "placeholder" or is_collective(current) or current.target is md.shard.default:
            return None
        seen.add(current)
        order.append(current)
        pending.extend(current.all_input_nodes)
    for current in sorted(order):
        if current.op == "get_attr":
            known[current] = getattr(graph, str(current.target))
            continue
        args, kwargs = torch.fx.node.map_arg((current.args, current.kwargs), lambda n: known[n])
        known[current] = current.target(*args, **kwargs)  # type: ignore[operator]
    return known[node]
