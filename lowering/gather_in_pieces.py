"""A large gather on an inner dim -> a gather on dim 0 and a cat; of a product in pieces, so that both overlap.

    before    y = all_gather(view(mm(x, t(w))), -1)                          w [N, K]
    after     g_i = all_gather(view(mm(x, t(w)[:, i])), 0)                   i-th of 4 parts of the columns
              y = cat([g_0 of rank 0, g_1 of rank 0, ..., g_3 of rank P - 1], -1)

So one piece is gathered while the next is multiplied, as for logits that every rank gets whole.  What is gathered lies
rank by rank, and has to be copied to its places in any case: here once, for all pieces, by a kernel of Inductor's or
TensorRT's.  In the split placement only, where collectives run beside products, and where the graph is that of all
ranks, which have to gather as many pieces.  Smaller ones, and those behind dims of size 1, which need no copy, are left
to ``leading_dim``.
"""

from __future__ import annotations

import math

import torch
from torch.fx import GraphModule, Node

from torchtrt_md.graph.functional import RESHAPES
from torchtrt_md.graph.rewrite import emit, substitute, view
from torchtrt_md.lowering.ops import bound_args
from torchtrt_md.lowering.passes import PassContext
from torchtrt_md.program import value_of

aten, md = torch.ops.aten, torch.ops.torchtrt_md
PIECES = 4
LARGE = 64 << 20  # bytes of the result: a piece then takes longer to send than a collective takes to begin
_ALIGNED = 16  # bytes, at which wide loads and TensorRT begin


def run(graph: GraphModule, context: PassContext) -> int:
    if context.placement != "split":
        return 0
    count = 0
    for node in graph.graph.find_nodes(op="call_function", target=md.all_gather.default):
        x, dim, axis, size, *sent = bound_args(node).values()
        rows = value_of(x).shape[0]
        if axis not in context.alike or math.prod(value_of(x).shape[:dim]) == 1 or value_of(node).nbytes < LARGE:
            continue
        gathered = [emit(node, md.all_gather.default, piece, 0, axis, size, *sent) for piece in _pieces(node, x, dim)]
        parts = [
            emit(node, aten.slice.Tensor, piece, 0, rank * rows, (rank + 1) * rows)
            for rank in range(size)
            for piece in gathered
        ]
        substitute(node, emit(node, aten.cat.default, parts, dim))
        count += 1
    return count


def _pieces(gather: Node, x: Node, dim: int) -> list[Node]:
    """The operand, or where it is a large product columns of it, each multiplied by itself."""
    shape, product = list(value_of(x).shape), x
    while product.target in RESHAPES and len(product.users) == 1:
        product = product.all_input_nodes[0]
    columns = value_of(product).shape[-1]
    piece = columns // PIECES
    if (
        product.target not in (aten.mm.default, aten.addmm.default)
        or product.kwargs
        or len(product.users) > 1
        or dim != len(shape) - 1
        or columns != shape[-1]
        or columns % PIECES
        or piece * value_of(x).itemsize % _ALIGNED
        or any(value_of(b).shape != (columns,) for b in product.args[:-2] if isinstance(b, Node))
    ):
        return [x]
    *bias, left, right = product.args
    assert isinstance(right, Node)
    pieces = []
    for first in range(0, columns, piece):
        its = [emit(product, aten.slice.Tensor, b, 0, first, first + piece) for b in bias]
        # Of the transposed weight, which is then read as such only: an engine is given it in that layout.
        its_columns = emit(product, aten.slice.Tensor, right, 1, first, first + piece)
        multiplied = emit(product, product.target, *its, left, its_columns)
        pieces.append(view(gather, multiplied, [*shape[:-1], piece]))
    return pieces
