"""Attention that also returns its log-sum-exp, and which part of a block of a ring is attended to.

Two attentions of the same queries over different keys are put together by their log-sum-exps, so a ring can attend
to one block after another (Ring Attention, https://arxiv.org/abs/2310.01889; the merge is that of
https://arxiv.org/abs/2112.05682).

Causal blocks are in zigzag order: of 2P equal chunks of the sequence, rank r of P has chunks r and 2P-1-r, in this
order.  All ranks then have equal work in every step, half of a whole block (the order of
https://github.com/zhuzilin/ring-flash-attention).  Nothing here communicates or waits for a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

aten = torch.ops.aten


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    mask: Tensor | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention and the log-sum-exp of its scores, as ``scaled_dot_product_attention`` defines the arguments.

    On CUDA it is the flash or cuDNN kernel that PyTorch itself would choose, and plain math where it would choose
    another, and where there is a mask; on the CPU it is plain math, in at least float32.

    Args:
        q: [B, H, Sq, D].
        k: [B, H, Sk, D]; [B, Hkv, Sk, D] with ``enable_gqa``.
        v: [B, H, Sk, Dv]; [B, Hkv, Sk, Dv] with ``enable_gqa``.
        is_causal: query i attends to keys 0 .. i.
        scale: of the scores; 1/sqrt(D) where None.
        enable_gqa: each key/value head serves H / Hkv query heads.
        mask: boolean or added to the scores, broadcast to [B, H, Sq, Sk]; a query that it lets see nothing gets zeros.
        offset: what is taken from all scores of a query, mask included, broadcast to [B, H, Sq, 1].  The output stays
            the same, and the log-sum-exp is less by as much: one near the mask's -1e9 would lose all else to rounding.

    Returns:
        The output [B, H, Sq, Dv] in q's dtype, in any layout, and the natural logarithm of the sum of the
        exponentials of the scaled scores [B, H, Sq] in float32, or float64 where q is.
    """
    kernel = _fused_kernel(q, k, v, is_causal, scale, enable_gqa) if mask is None else None
    if kernel is SDPBackend.FLASH_ATTENTION:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)
    elif kernel is SDPBackend.CUDNN_ATTENTION:
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, is_causal, scale=scale)
    else:
        return _attention_in_math(q, k, v, is_causal, scale, enable_gqa, mask, offset)
    return out, lse.reshape(q.shape[:3])  # cuDNN's is [B, H, Sq, 1]


def _fused_kernel(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float | None, enable_gqa: bool
) -> SDPBackend | None:
    """The fused CUDA kernel that PyTorch would run, if it returns a log-sum-exp and takes the operands as they are."""
    if q.device.type != "cuda" or q.shape[3] % 8 or q.shape[3] != v.shape[3]:  # PyTorch would fill up to 8
        return None
    choice = aten._fused_sdp_choice(q, k, v, None, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
    kernels = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
    return next((kernel for kernel in kernels if kernel.value == choice), None)


def _attention_in_math(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    mask: Tensor | None,
    offset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q.to(wide) @ k.to(wide).mT * (1 / math.sqrt(q.shape[3]) if scale is None else scale)
    if is_causal:
        attended = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~attended, -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask
    if offset is not None:  # behind the mask, in whose sum with a score that may be lost, as in the dense model
        scores = scores - offset
    largest = scores.amax(-1, keepdim=True)
    largest = largest.masked_fill(largest == -math.inf, 0.0)  # of a query that sees nothing
    weights = (scores - largest).exp()
    # Not exp(scores - lse): a log-sum-exp that is large has lost the logarithm of how many keys there are.
    total = weights.sum(-1, keepdim=True)
    out = (weights @ v.to(wide)) / total.masked_fill(total == 0, 1.0)
    return out.to(q.dtype), (largest + total.log()).squeeze(-1)


def ring_attention_block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coordinate: int,
    step: int,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    size: int,
    mask: Tensor | None = None,
    lengths: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of this rank's queries over the block of keys and values that it has in this step of the ring.

    Args:
        q: [B, H, Sq, D], this rank's; causal: in zigzag order.
        k: [B, Hkv, Sk, D], those of rank ``(coordinate - step) % size``; causal: in zigzag order, with Sk = Sq.
        v: [B, Hkv, Sk, Dv], likewise.
        coordinate: where this rank stands along the axis; read where it matters only.
        step: how often the blocks went on, from 0.
        is_causal: of the whole sequence.
        scale: as in :func:`attention_with_lse`.
        enable_gqa: as in :func:`attention_with_lse`.
        size: the number of ranks along the axis.
        mask: for this rank's queries and all ranks' keys, in the order of the ranks; None where causal.
        lengths: of the parts of the keys, how many a rank has and how many there are, as ``context_attention`` has
            them; None where all keys are to be seen.

    Returns:
        Output and log-sum-exp as in :func:`attention_with_lse`, both contiguous, the latter less the largest that the
        mask adds to a score of the query, in any block.  Queries that attend to nothing of the block have zeros, and a
        log-sum-exp of -inf.
    """
    source = (coordinate - step) % size
    offset = None if mask is None or mask.dtype is torch.bool else mask.amax(-1, keepdim=True)
    if offset is not None:
        offset = offset.masked_fill(offset == -math.inf, 0.0)
    if lengths:
        k, v = (_there(x, lengths, source) for x in (k, v))
    if mask is not None and mask.shape[3] > 1:
        mask = mask[..., source * k.shape[2] : (source + 1) * k.shape[2]]
    if not k.shape[2]:  # all of this block is behind the end
        out = q.new_zeros(*q.shape[:3], v.shape[3])
        return out, q.new_full(q.shape[:3], -math.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    if is_causal and step:
        rows, keys, values = block_of(q, k, v, coordinate, step, size)
        out, lse = attention_with_lse(rows, keys, values, False, scale, enable_gqa)
        missing = q.shape[2] - rows.shape[2]
        if missing:
            out, lse = F.pad(out, (0, 0, missing, 0)), F.pad(lse, (missing, 0), value=-math.inf)
    else:
        out, lse = attention_with_lse(q, k, v, is_causal, scale, enable_gqa, mask, offset)
    return out.contiguous(), lse.contiguous()


def _there(x: Tensor, lengths: Sequence[int], source: int) -> Tensor:
    """A rank's keys or values that are not behind the end of their part; a view, unless there are several parts."""
    parts, start = [], 0
    for held, total in zip(lengths[::2], lengths[1::2], strict=True):
        parts.append(x[:, :, start : start + max(0, min(held, total - source * held))])
        start += held
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def block_of(q: Tensor, k: Tensor, v: Tensor, coordinate: int, step: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The part of a causal block, not the rank's own, in which every query attends to every key; views.

    Rank r has chunks r and 2P-1-r, the block chunks j and 2P-1-j.  For j < r, chunk j is before both of r's and
    2P-1-j behind both.  For j > r, both of the block's are behind chunk r and before chunk 2P-1-r.

    Args:
        q: as in :func:`ring_attention_block`, as are all others.
        step: at least 1.
    """
    source = (coordinate - step) % size
    if source < coordinate:
        half = k.shape[2] // 2
        return q, k[:, :, :half], v[:, :, :half]
    return q[:, :, q.shape[2] // 2 :], k, v
