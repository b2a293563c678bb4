"""Key and value heads that are repeated by hand -> grouped-query attention.

    before    k = reshape(expand(unsqueeze(k0, 2), [B, Hkv, n, S, D]), [B, Hkv * n, S, D])    (v likewise)
              a = attention(q, k, v, mask, causal, scale, False)
    after     a = attention(q, k0, v0, mask, causal, scale, True)

The repeated heads would be stored, and sent between ranks, n times.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from torchtrt_md.graph.functional import RESHAPES
from torchtrt_md.graph.rewrite import emit, substitute
from torchtrt_md.lowering.ops import bound_args
from torchtrt_md.lowering.passes import PassContext
from torchtrt_md.program import value_of

aten, md = torch.ops.aten, torch.ops.torchtrt_md


def run(graph: GraphModule, context: PassContext) -> int:
    count = 0
    for node in list(graph.graph.find_nodes(op="call_function", target=md.attention.default)):
        args = bound_args(node)
        k, v = _unrepeated(args["k"]), _unrepeated(args["v"])
        if k is None or v is None or value_of(k).shape[1] != value_of(v).shape[1]:
            continue
        if not args["enable_gqa"] and value_of(args["q"]).shape[1] != value_of(args["k"]).shape[1]:
            continue  # queries of one head over keys of many, which PyTorch broadcasts
        rest = [args[name] for name in ("mask", "is_causal", "scale")]
        substitute(node, emit(node, md.attention.default, args["q"], k, v, *rest, True))
        count += 1
    return count


def _unrepeated(node: Node) -> Node | None:
    """``x`` where node is x with each head repeated, else None."""
    if node.target not in RESHAPES:
        return None
    expanded = node.args[0]
    if isinstance(expanded, Node) and expanded.target is aten.clone.default:
        expanded = expanded.args[0]
    if not isinstance(expanded, Node) or expanded.target is not aten.expand.default:
        return None
    unsqueezed = expanded.args[0]
    if not isinstance(unsqueezed, Node) or unsqueezed.target is not aten.unsqueeze.default:
        return None
    if unsqueezed.args[1] not in (2, -3):  # of five dims
        return None
    x = unsqueezed.args[0]
    assert isinstance(x, Node)
    batch, heads, *rest = value_of(x).shape
    repeats = value_of(expanded).shape[2]
    same = [*value_of(node).shape] == [batch, heads * repeats, *rest]
    return x if same and value_of(x).dim() == 4 else None
