"""The collective IR as TensorRT layers.

Collective layers act on dim 0, in equal chunks, over ranks 0 .. size - 1 of the engine's communicator,
which at run time is the one of the mesh axis.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from torchtrt_md.build.flavour import Flavour

# Op of the IR -> CollectiveOperation.
OPERATIONS = {
    "all_reduce": "ALL_REDUCE",
    "all_gather": "ALL_GATHER",
    "reduce_scatter": "REDUCE_SCATTER",
    "all_to_all": "ALL_TO_ALL",
    "broadcast": "BROADCAST",
    "reduce": "REDUCE",
    "gather": "GATHER",
    "scatter": "SCATTER",
}
_REDUCE_OPS = {"sum": "SUM", "product": "PROD", "max": "MAX", "min": "MIN", "avg": "AVG"}
NO_ROOT = -1


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
    layer.num_ranks = size  # before get_output: the output's shape follows from it
    return layer.get_output(0)


def add_all_gather_by_exchange(flavour: Flavour, network: Any, x: Any, size: int) -> Any:
    """ALL_GATHER as the ALL_TO_ALL of ``size`` copies: the same result, for the same bytes on the wire."""
    copies = network.add_concatenation([x] * size)
    copies.axis = 0
    return add_collective(flavour, network, copies.get_output(0), "all_to_all", size)


def add_attention(
    flavour: Flavour, network: Any, q: Any, k: Any, v: Any, mask: Any | None, is_causal: bool, scale: Any
) -> Any:
    """Add an IAttention on [B, H, S, D] tensors; ``scale`` is a tensor that broadcasts over q.

    The layer itself does not scale.  Without a fused kernel for the shape it may be decomposed.
    """
    trt = flavour.trt
    scaled = network.add_elementwise(q, scale, trt.ElementWiseOperation.PROD).get_output(0)
    if hasattr(network, "add_attention_v2"):
        kind = trt.CausalMaskKind.UPPER_LEFT if is_causal else trt.CausalMaskKind.NONE
        layer = network.add_attention_v2(scaled, k, v, trt.AttentionNormalizationOp.SOFTMAX, kind)
    else:
        layer = network.add_attention(scaled, k, v, trt.AttentionNormalizationOp.SOFTMAX, is_causal)
    layer.decomposable = True
    if mask is not None:
        layer.mask = mask
    return layer.get_output(0)


def default_scale(head_dim: int) -> float:
    """1 / sqrt(d), as scaled_dot_product_attention has it."""
    return 1.0 / math.sqrt(head_dim)
