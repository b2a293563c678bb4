"""Keep each ``scaled_dot_product_attention`` one node of the graph.

PyTorch would decompose it while tracing, differently for each device, and the strategies need it whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from torchtrt_md.errors import CaptureError
from torchtrt_md.lowering import ops


class WholeAttention(TorchFunctionMode):
    """While active, attention calls become ``torchtrt_md::attention``.

    The function is also replaced where PyTorch's own modules look it up: a mode is off inside the functions
    that it was called for, and ``nn.MultiheadAttention`` calls it from inside one.
    """

    def __enter__(self) -> Self:
        self._original = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = _attention  # type: ignore[assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        F.scaled_dot_product_attention = self._original

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is self._original:
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if dropout_p:
        raise CaptureError(f"attention with dropout_p={dropout_p}", fix="call model.eval() before capturing")
    if query.dim() == key.dim() == value.dim() == 4:
        query, key, value = _broadcast(query, key, value, enable_gqa)
        _check_mask(attn_mask, (*query.shape[:3], key.shape[2]))
        out: Tensor = ops.attention(query, key, value, attn_mask, is_causal, scale, enable_gqa)
        return out
    if query.dim() == 3 and key.dim() == 3 and (attn_mask is None or attn_mask.dim() < 3):
        # [B, S, D] is one head; only the mask of a whole batch would need a place for it.
        out = ops.attention(
            query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1), attn_mask, is_causal, scale, False
        )
        return out.squeeze(1)
    raise CaptureError(
        f"attention over queries of {query.dim()} dims: {list(query.shape)}",
        fix="shape query, key and value as [batch, heads, tokens, head_dim]",
    )


def _broadcast(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Batches and heads of one that serve many, repeated as PyTorch would: passes read heads off their operands."""
    operands = (query, key, value)
    heads = {x.shape[1] for x in operands}
    grouped = enable_gqa and key.shape[1] == value.shape[1] and query.shape[1] % key.shape[1] == 0
    batches = {x.shape[0] for x in operands}
    if len(batches - {1}) > 1 or (len(heads - {1}) > 1 and not grouped):
        shapes = ", ".join(str(list(x.shape)) for x in operands)
        raise CaptureError(
            f"attention over query, key and value of {shapes}, whose batches or heads do not fit each other",
            fix="give all three the same batch and heads, or with enable_gqa=True key and value heads that divide those"
            " of the query; under tensor parallelism, count a rank's heads",
        )
    batch, count = max(batches), max(heads)
    shapes_of = [(batch, x.shape[1] if grouped else count) for x in operands]
    query, key, value = (
        x if x.shape[:2] == lead else x.expand(*lead, -1, -1) for x, lead in zip(operands, shapes_of, strict=True)
    )
    return query, key, value


def _check_mask(mask: Tensor | None, scores: tuple[int, ...]) -> None:
    if mask is None:
        return
    trailing = scores[len(scores) - mask.dim() :]
    if mask.dim() > len(scores) or any(n not in (1, extent) for n, extent in zip(mask.shape, trailing, strict=True)):
        raise CaptureError(
            f"an attention mask of {list(mask.shape)} over scores of {list(scores)}",
            fix="shape it to broadcast to [batch, heads, queries, keys]; under tensor parallelism, with a rank's heads",
        )
