"""The collective IR as TensorRT layers.

Collective layers act on dim 0, in equal chunks, over ranks 0 .. size - 1 of the engine's communicator,
which at run time is the one of the mesh axis.  An attention with ``num_ranks`` communicates over the same one.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from torchtrt_md.build.flavour import Flavour
from torchtrt_md.errors import BuildError
from torchtrt_md.selftest import RING

# Op of the IR -> CollectiveOperation.
OPERATIONS = {
    "all_reduce": "ALL_REDUCE",
    "all_gather": "ALL_GATHER",
    "reduce_scatter": "REDUCE_SCATTER",
    "all_to_all": "ALL_TO_ALL",
    "broadcast": "BROADCAST",
}
_REDUCE_OPS = {"sum": "SUM", "product": "PROD", "max": "MAX", "min": "MIN", "avg": "AVG"}
NO_ROOT = -1
# Of these, which compute nothing, some TensorRTs have none in INT64.
MOVES = ("all_gather", "all_to_all", "broadcast")
WORD = 1 << 32


def add_collective(
    flavour: Flavour, network: Any, x: Any, op: str, size: int, *, reduce_op: str | None = None, root: int = NO_ROOT
) -> Any:
    """Add an IDistCollectiveLayer on the tensor ``x``; returns its output tensor."""
    trt = flavour.trt
    layer = network.add_dist_collective(
        x,
        getattr(trt.CollectiveOperation, OPERATIONS[op]),
        getattr(trt.ReduceOperation, _REDUCE_OPS[reduce_op] if reduce_op else "NONE"),
        root,
        np.arange(size, dtype=np.int64),
    )
    layer.metadata = op  # the layer does not tell its operation, and the builder checks it
    layer.num_ranks = size  # before get_output: the output's shape follows from it
    return layer.get_output(0)


def add_all_gather_by_exchange(flavour: Flavour, network: Any, x: Any, size: int) -> Any:
    """ALL_GATHER as the ALL_TO_ALL of ``size`` copies: the same result, for the same bytes on the wire."""
    copies = network.add_concatenation([x] * size)
    copies.axis = 0
    return add_collective(flavour, network, copies.get_output(0), "all_to_all", size)


def add_in_words(flavour: Flavour, network: Any, x: Any, op: str, size: int, root: int, word: Any, half: Any) -> Any:
    """A collective that moves INT64, as one that moves INT32 of twice as many elements.

    With ``word`` 2**32 and ``half`` 2**31, an integer is ``high * word + low + half``, and both fit in 32 bits::

        high = floor(x / word)        low = (x - high * word) - half

    They stand beside each other on dim 1, so that the collective acts on dim 0 of both.
    """
    trt = flavour.trt
    ops = trt.ElementWiseOperation

    def computed(a: Any, b: Any, operation: Any) -> Any:
        return network.add_elementwise(a, b, operation).get_output(0)

    rows, *rest = tuple(x.shape)
    width = math.prod(rest)
    x = viewed(network, x, (rows, width))
    high = computed(x, word, ops.FLOOR_DIV)
    low = computed(computed(x, computed(high, word, ops.PROD), ops.SUB), half, ops.SUB)
    words = network.add_concatenation(
        [network.add_cast(part, trt.DataType.INT32).get_output(0) for part in (high, low)]
    )
    words.axis = 1
    moved = add_collective(flavour, network, words.get_output(0), op, size, root=root)
    moved = network.add_cast(moved, trt.DataType.INT64).get_output(0)
    rows, _ = tuple(moved.shape)
    high, low = (network.add_slice(moved, (0, at), (rows, width), (1, 1)).get_output(0) for at in (0, width))
    found = computed(computed(high, word, ops.PROD), computed(low, half, ops.SUM), ops.SUM)
    return viewed(network, found, (rows, *rest))


def add_attention(
    flavour: Flavour,
    network: Any,
    q: Any,
    k: Any,
    v: Any,
    mask: Any | None,
    is_causal: bool,
    scale: Any,
    *,
    ranks: int = 1,
) -> Any:
    """Add an IAttention on q [B, H, Sq, D], k [B, G, Sk, D] and v [B, G, Sk, E]; returns [B, H, Sq, E].

    ``scale`` is a tensor that broadcasts over q, in q's dtype or in float32: then the product is rounded to q's
    dtype once.  A batch of 1 serves all, as do single heads of q, k or v.  The layer itself does not scale, and has
    one shape for k and v, so of unequal widths the narrower is filled with zeros: they add nothing to q.k, and those
    of v are cut off again.  Without a fused kernel for the shape it may be decomposed.

    With ``ranks`` > 1 it is TensorRT's multi-device attention: k and v are this rank's parts of the sequence, and the
    queries attend to those of all ranks, which pass around in a ring (https://arxiv.org/abs/2310.01889).  Ask
    :meth:`Flavour.check_ring` first, and :mod:`torchtrt_md.selftest` where it runs.

    Raises:
        BuildError: TensorRT does not take these shapes.
    """
    trt = flavour.trt
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"
    if not len(q.shape) == len(k.shape) == len(v.shape) == 4:
        raise BuildError(
            f"TensorRT's attention has four dims [batch, heads, tokens, width], not those of {shapes}",
            fix="reshape q, k and v to four dims",
        )
    batch = max(x.shape[0] for x in (q, k, v))
    groups = max(k.shape[1], v.shape[1])
    heads = groups if q.shape[1] == 1 else q.shape[1]
    out_width, width = v.shape[3], max(q.shape[3], v.shape[3])
    tokens = q.shape[2]
    scaled = _filled(trt, network, _scaled(trt, network, q, scale), (batch, heads, tokens, width))
    k = _filled(trt, network, k, (batch, groups, k.shape[2], width))
    v = _filled(trt, network, v, (batch, groups, v.shape[2], width))
    if hasattr(network, "add_attention_v2"):
        kind = trt.CausalMaskKind.UPPER_LEFT if is_causal else trt.CausalMaskKind.NONE
        layer = network.add_attention_v2(scaled, k, v, trt.AttentionNormalizationOp.SOFTMAX, kind)
    else:
        layer = network.add_attention(scaled, k, v, trt.AttentionNormalizationOp.SOFTMAX, is_causal)
    out = None
    if layer is not None:
        layer.decomposable = ranks == 1  # the parts of a decomposed one are not known to communicate
        if ranks > 1:
            layer.metadata = RING
            layer.num_ranks = ranks  # before get_output, as for collectives
        if mask is not None:
            layer.mask = mask
        out = layer.get_output(0)
    if _shape(out) != (batch, heads, tokens, width):
        raise BuildError(
            f"TensorRT refuses the attention of {shapes}"
            + (f" with a mask {tuple(mask.shape)}" if mask is not None else ""),
            fix="its log above says why; use equal batches, and a number of heads of q that those of k and v divide",
        )
    if out_width < width:
        out = network.add_slice(out, (0,) * 4, (batch, heads, tokens, out_width), (1,) * 4).get_output(0)
    return out


def add_product_of_rows(flavour: Flavour, network: Any, x: Any, matrix: Any) -> Any:
    """x [..., K] @ matrix [K, N] -> [..., N]."""
    none = flavour.trt.MatrixOperation.NONE
    (*dims, width), (_, columns) = tuple(x.shape), tuple(matrix.shape)
    product = network.add_matrix_multiply(viewed(network, x, (math.prod(dims), width)), none, matrix, none)
    return viewed(network, product.get_output(0), (*dims, columns))


def add_quantize_dequantize(
    flavour: Flavour, network: Any, x: Any, scale: Any, axis: int | None, kind: str, dtype: str = ""
) -> Any:
    """x, rounded to a number of 8 bits times ``scale``: an IQuantizeLayer and an IDequantizeLayer.

    Args:
        scale: float32, one number, or [n] for the places of the dim ``axis``.
        kind: of TensorRT's DataType: "INT8", "FP8".
        dtype: of the result, of the same names; by default x's.
    """
    trt = flavour.trt
    quantize = network.add_quantize(x, scale, getattr(trt.DataType, kind))
    if axis is not None:
        quantize.axis = axis
    dequantize = network.add_dequantize(
        quantize.get_output(0), scale, getattr(trt.DataType, dtype) if dtype else x.dtype
    )
    if axis is not None:
        dequantize.axis = axis
    return dequantize.get_output(0)


def add_widened(flavour: Flavour, network: Any, x: Any, scale: Any, dtype: str) -> Any:
    """x, of 8 bits, times ``scale``, which is float32 and one number; of a dtype of TensorRT's names."""
    return network.add_dequantize(x, scale, getattr(flavour.trt.DataType, dtype)).get_output(0)


def add_scaled(flavour: Flavour, network: Any, x: Any, factor: Any) -> Any:
    """x * factor in float32; the factor is float32 and broadcasts over x."""
    trt = flavour.trt
    x = network.add_cast(x, trt.DataType.FLOAT).get_output(0)
    return network.add_elementwise(x, factor, trt.ElementWiseOperation.PROD).get_output(0)


def add_bounds(flavour: Flavour, network: Any, x: Any, scale: Any, largest: Any, axis: int | None) -> Any:
    """x, no further from zero than ``scale * largest``; NaN stays NaN, which IElementWiseLayer's MIN would lose.

    Args:
        scale: float32, one number, or [n] for the places of the dim ``axis``.
        largest: float32, of as many dims.
    """
    trt = flavour.trt
    ops = trt.ElementWiseOperation
    bound = network.add_elementwise(scale, largest, ops.PROD).get_output(0)
    shape = [1] * len(x.shape)
    if axis is not None:
        shape[axis] = x.shape[axis]
    upper = network.add_cast(viewed(network, bound, tuple(shape)), x.dtype).get_output(0)
    lower = network.add_unary(upper, trt.UnaryOperation.NEG).get_output(0)
    for limit, beyond in ((upper, ops.GREATER), (lower, ops.LESS)):
        is_beyond = network.add_elementwise(x, limit, beyond).get_output(0)
        x = network.add_select(is_beyond, limit, x).get_output(0)
    return x


def add_ratio(flavour: Flavour, network: Any, above: Any, below: Any, amax: Any, limit: Any, otherwise: Any) -> Any:
    """above / below, and ``otherwise`` where amax is not above ``limit``; all of them float32 of as many dims."""
    trt = flavour.trt
    ops = trt.ElementWiseOperation
    there = network.add_elementwise(amax, limit, ops.GREATER).get_output(0)
    ratio = network.add_elementwise(above, below, ops.DIV).get_output(0)
    return network.add_select(there, ratio, otherwise).get_output(0)


class Communication(NamedTuple):
    """What one layer of a network communicates; elements of its operands and of what they become."""

    op: str
    ranks: int
    dtype: str
    elements_in: int
    elements_out: int


def communications(flavour: Flavour, network: Any) -> list[Communication]:
    """What a network communicates, in the order of its layers: collectives, and attentions over several ranks.

    The operands of such an attention are keys and values together: a rank sends as much as it receives.
    """
    found = []
    for layer in (network.get_layer(i) for i in range(network.num_layers)):
        if layer.type.name == "DIST_COLLECTIVE":
            x, out = layer.get_input(0), layer.get_output(0)
            found.append(
                Communication(layer.metadata, layer.num_ranks, x.dtype.name, math.prod(x.shape), math.prod(out.shape))
            )
        elif layer.type.name == "ATTENTION_OUTPUT":
            attention = attention_of(flavour, layer)
            if attention.num_ranks > 1:
                k, v = attention.get_input(1), attention.get_input(2)
                elements = math.prod(k.shape) + math.prod(v.shape)
                found.append(Communication(RING, attention.num_ranks, k.dtype.name, elements, elements))
    return found


def attention_of(flavour: Flavour, layer: Any) -> Any:
    """The IAttention that an ATTENTION_INPUT or ATTENTION_OUTPUT layer is a boundary of."""
    layer.__class__ = flavour.trt.IAttentionBoundaryLayer  # TensorRT's own way to a layer's class from get_layer
    return layer.attention


def _shape(x: Any) -> tuple[int, ...] | None:
    """None for what a layer that TensorRT refuses gives: no tensor, or one that has no shape."""
    try:
        return None if x is None else tuple(x.shape)
    except (RuntimeError, ValueError):  # versions differ
        return None


def viewed(network: Any, x: Any, shape: tuple[int, ...]) -> Any:
    """x in another shape."""
    shuffle = network.add_shuffle(x)
    shuffle.reshape_dims = shape
    return shuffle.get_output(0)


def _scaled(trt: Any, network: Any, q: Any, scale: Any) -> Any:
    product = trt.ElementWiseOperation.PROD
    if scale.dtype == q.dtype:
        return network.add_elementwise(q, scale, product).get_output(0)
    wide = network.add_cast(q, scale.dtype).get_output(0)
    return network.add_cast(network.add_elementwise(wide, scale, product).get_output(0), q.dtype).get_output(0)


def _filled(trt: Any, network: Any, x: Any, shape: tuple[int, ...]) -> Any:
    """``x`` repeated over the batch and heads that it has one of, and with zeros up to the width of ``shape``."""
    if tuple(x.shape) == shape:
        return x
    repeated = (*(0 if have == 1 else 1 for have in tuple(x.shape)[:2]), 1, 1)  # a stride of 0 reads it again
    if x.shape[3] < shape[3]:
        wide = network.add_slice(x, (0,) * 4, (*tuple(x.shape)[:3], shape[3]), (1,) * 4)
        wide.mode = trt.SampleMode.FILL  # with zeros, unless told
        x = wide.get_output(0)
    if tuple(x.shape) == shape:
        return x
    return network.add_slice(x, (0,) * 4, shape, repeated).get_output(0)


def default_scale(head_dim: int) -> float:
    """1 / sqrt(d), as scaled_dot_product_attention has it."""
    return 1.0 / math.sqrt(head_dim)
