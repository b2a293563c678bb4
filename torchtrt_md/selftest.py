"""Self-tests: small engines of one collective each, whose results are known before they run.

A TensorRT that ignores a communicator, or takes another group than it was given, gives wrong values with no error.  So
for each axis and each op with which engines communicate along it there is an engine of that op alone, built and
bundled as the others are.  It is run on the GPUs at hand before any other engine, on operands that follow from rank
and size, and each rank knows what it must get.  A self-test is a :class:`~torchtrt_md.segment.Segment`: a
reader runs it as it runs the others.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from torchtrt_md.lowering.schedule import collective
from torchtrt_md.program import dtype_name
from torchtrt_md.segment import Binding, Segment, Wire

RING = "ring_attention"
# Of ``ring_attention``: heads, key/value heads, tokens of each rank, head_dim.
RING_SIZES = (8, 8, 256, 128)
WIDTH = 8  # elements of each chunk of dim 0
MODULUS = 251  # the sum of any 4096 operands is exact in float32
ROOT = 0  # of the op that has one
SUMS = ("all_reduce", "reduce_scatter")
# Op -> chunks of the result, for P ranks: 1, P, or P * P.
_CHUNKS = {
    **dict.fromkeys(("all_reduce", "all_to_all", "broadcast"), 1),
    "all_gather": 2,
    "reduce_scatter": 0,
}
OPS = (*_CHUNKS, RING)
RING_DTYPES = (torch.float16, torch.bfloat16)


def self_test(op: str, axis: str, ranks: int, dtype: torch.dtype = torch.float32) -> Segment:
    """The self-test of one op, which must be one of ``OPS``.

    Args:
        dtype: of a ring, float16 or bfloat16; that of all other ops is float32.
    """
    if op == RING:
        heads, kv_heads, tokens, width = RING_SIZES
        shape, kv_shape = (1, heads, tokens, width), (1, kv_heads, tokens, width)
        shapes: dict[str, tuple[int, ...]] = {"q": shape, "k": kv_shape, "v": kv_shape}
        result: tuple[int, ...] = shape
        elements = 2 * kv_heads * tokens * width
    else:
        shapes, result = {"x": (ranks, WIDTH)}, (ranks ** _CHUNKS[op], WIDTH)
        elements = ranks * WIDTH
    return Segment(
        runs="engine",
        file="",
        axis=axis,
        inputs=tuple(Binding(name, Wire("input", name), dtype, shape) for name, shape in shapes.items()),
        outputs=(Binding("y", Wire("output", "y"), dtype, result),),
        collectives=(collective(op, axis, ranks, dtype, elements),),
        name=f"the self-test of {op} in {dtype_name(dtype)} on axis {axis!r}",
    )


def self_tests(segments: Iterable[Segment]) -> list[Segment]:
    """The self-tests of programs of these segments: one for each axis and op of their engines, in order."""
    used = {
        (c.axis, c.op, c.ranks, c.dtype if c.op == RING else torch.float32)
        for segment in segments
        if segment.runs == "engine"
        for c in segment.collectives
    }
    return [self_test(op, axis, ranks, dtype) for axis, op, ranks, dtype in sorted(used, key=str) if op in OPS]


def operand(ranks: int, rank: int) -> Tensor:
    """What a rank of a group puts in: float32 [ranks, WIDTH]; element i is ``(ranks * WIDTH * rank + i) % MODULUS``."""
    count = ranks * WIDTH
    return ((count * rank + torch.arange(count)) % MODULUS).float().view(ranks, WIDTH)


def expected(op: str, ranks: int, rank: int) -> Tensor:
    """What a rank must get.

    Args:
        op: any of ``OPS`` but a ring.
    """
    whole = torch.stack([operand(ranks, r) for r in range(ranks)])  # [rank, chunk, WIDTH]
    results = {
        "all_reduce": lambda: whole.sum(0),
        "reduce_scatter": lambda: whole.sum(0)[rank : rank + 1],
        "all_gather": lambda: whole.flatten(0, 1),
        "all_to_all": lambda: whole[:, rank],
        "broadcast": lambda: whole[ROOT],
    }
    return results[op]()
