"""Keep each ``scaled_dot_product_attention`` one node of the graph, and each grouped product of experts.

PyTorch would decompose attention while tracing, differently for each device, and the strategies need it whole.  Its
grouped product has a shape rule for 16-bit floats only, and no kernel in fp64, in which programs are verified.

DTensor knows how to shard PyTorch's attention ops, not ours.  So ours has a rule of its own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from torchtrt_md.capture.torch_private import grouped_mm
from torchtrt_md.errors import CaptureError
from torchtrt_md.graph.source import running_line
from torchtrt_md.lowering import ops


class WholeAttention(TorchFunctionMode):
    """While active, attention calls become ``torchtrt_md::attention``, grouped products ``torchtrt_md::grouped_mm``.

    The function is also replaced where PyTorch's own modules look it up: a mode is off inside the functions
    that it was called for, and ``nn.MultiheadAttention`` calls it from inside one.
    """

    def __enter__(self) -> Self:
        _register_sharding()
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
        if func is grouped_mm:
            return _grouped_mm(*args, **(kwargs or {}))
        # What is traced is contiguous where the model's own tensor may not be, and then has no such view.
        if func is Tensor.view and not any(isinstance(a, torch.dtype) for a in (*args, *(kwargs or {}).values())):
            return Tensor.reshape(args[0], *args[1:], *(kwargs or {}).values())
        if func is Tensor.view_as:
            return Tensor.reshape_as(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@functools.cache
def _register_sharding() -> None:
    """Tell DTensor which placements attention takes; once in a process, and only where attention is captured."""
    from torch.distributed.tensor.experimental import register_sharding  # it loads more than importing this package may

    register_sharding(torch.ops.torchtrt_md.attention.default)(_shardings)


def _shardings(q: Any, k: Any, v: Any, mask: Any, *_: Any) -> list[tuple[list[Any], list[Any]]]:
    """Along one axis of the mesh: all whole, all split by batch, or all split by heads.

    DTensor keeps decisions by the shapes and placements of the operands alone, so they depend on nothing else: not on
    ``is_causal``, as a split of the queries would.
    """
    from torch.distributed.tensor import Replicate, Shard

    whole = Replicate()
    found: list[tuple[list[Any], list[Any]]] = [([whole], [whole, whole, whole, _of_mask(mask), None, None, None])]
    # Heads are grouped by their position, so each rank needs as many whole groups as any other.
    ranks = math.prod(
        q.mesh.size(axis)
        for axis in range(q.mesh.ndim)
        if any(Shard(1) == operand.placements[axis] for operand in (q, k, v))
    )
    for dim in (0, 1) if q.shape[1] == k.shape[1] or k.shape[1] % ranks == 0 else (0,):
        split = Shard(dim)
        found.append(([split], [split, split, split, _of_mask(mask, dim), None, None, None]))
    return found


def _of_mask(mask: Any, dim: int | None = None) -> Any:
    """How a mask is placed whose scores are split on ``dim``; it has their trailing dims, some of one element."""
    from torch.distributed.tensor import Replicate, Shard

    if mask is None:
        return None
    own = -1 if dim is None else dim - (4 - len(mask.shape))
    return Replicate() if own < 0 or mask.shape[own] == 1 else Shard(own)


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
        raise CaptureError(
            f"attention with dropout_p={dropout_p}", fix="call model.eval() before capturing", at=running_line()
        )
    if query.dim() == key.dim() == value.dim() == 4:
        query, key, value = _alike(query, key, value, enable_gqa)
        _check_mask(attn_mask, (*query.shape[:3], key.shape[2]))
        out: Tensor = ops.attention(query, key, value, attn_mask, is_causal, scale, enable_gqa)
        return out
    if query.dim() == key.dim() == value.dim() == 3 and (attn_mask is None or attn_mask.dim() < 3):
        # [B, S, D] is one head; only the mask of a whole batch would need a place for it.
        query, key, value = _alike(query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1), False)
        out = ops.attention(query, key, value, attn_mask, is_causal, scale, False)
        return out.squeeze(1)
    raise CaptureError(
        f"attention over queries of {query.dim()} dims: {list(query.shape)}, with keys {list(key.shape)} and values"
        f" {list(value.shape)}",
        fix="shape query, key and value as [batch, heads, tokens, head_dim]",
        at=running_line(),
    )


def _grouped_mm(
    x: Tensor,
    weight: Tensor,
    *,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    if offs is None or bias is not None or (x.dim(), weight.dim()) != (2, 3) or out_dtype not in (None, x.dtype):
        raise CaptureError(
            f"a grouped_mm of {list(x.shape)} and {list(weight.shape)}"
            + (", with a bias" if bias is not None else "" if offs is not None else ", without offs"),
            fix="pass x [S, K], weight [E, K, N] and offs [E]; add a bias behind it",
            at=running_line(),
        )
    out: Tensor = ops.grouped_mm(x, weight, offs)
    return out


def _alike(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The operands [B, H, S, D] with one batch, and as many heads of values as of keys: PyTorch broadcasts them.

    Raises:
        CaptureError: shapes that PyTorch does not take either.
    """
    operands = (query, key, value)
    batches, heads = ({t.shape[dim] for t in operands} for dim in (0, 1))
    of_query, of_key = query.shape[1], key.shape[1]
    grouped = enable_gqa and of_key == value.shape[1] and of_query % of_key == 0
    problem = ""
    if len(batches - {1}) > 1:
        problem = f"batches of {_listed(batches)}"
    elif key.shape[2] != value.shape[2]:
        problem = f"{key.shape[2]} keys for {value.shape[2]} values"
    elif query.shape[3] != key.shape[3]:
        problem = f"a head_dim of {query.shape[3]} for queries and {key.shape[3]} for keys"
    elif not grouped and (enable_gqa or len(heads - {1}) > 1):
        problem = f"{of_query} heads of queries, {of_key} of keys and {value.shape[1]} of values"
    if problem:
        raise CaptureError(
            f"an attention has {problem}: queries {list(query.shape)}, keys {list(key.shape)}, values"
            f" {list(value.shape)}",
            fix="shape them as [batch, heads, tokens, head_dim], and expand keys and values to the heads of the"
            " queries; with enable_gqa=True their heads must divide these",
            at=running_line(),
        )
    batch = max(batches)
    sizes = [(batch, t.shape[1] if grouped else max(heads)) for t in operands]
    alike = [t if t.shape[:2] == size else t.expand(*size, -1, -1) for t, size in zip(operands, sizes, strict=True)]
    return alike[0], alike[1], alike[2]


def _listed(sizes: set[int]) -> str:
    return " and ".join(map(str, sorted(sizes)))


def _check_mask(mask: Tensor | None, scores: tuple[int, ...]) -> None:
    if mask is None:
        return
    trailing = scores[len(scores) - mask.dim() :]
    if mask.dim() > len(scores) or any(n not in (1, extent) for n, extent in zip(mask.shape, trailing, strict=True)):
        raise CaptureError(
            f"an attention mask of {list(mask.shape)} over scores of {list(scores)}",
            fix="shape it to broadcast to [batch, heads, queries, keys]; under tensor parallelism, with a rank's heads",
            at=running_line(),
        )
