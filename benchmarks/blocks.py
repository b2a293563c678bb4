"""The block that is timed: a dense, ordinary DiT block, as diffusers would write it.

It knows nothing of ranks.  ``PLAN`` is what a user would say to have its sequence split.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchtrt_md as md

EPS = 1e-6
# The result stays split: each rank has its chunk of the tokens, as between the blocks of a model.
PLAN = {"": {"x": md.Split(1), "cos": md.Split(0), "sin": md.Split(0)}}

Args = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Size:
    """Width ``d``, heads and tokens of one block; the batch is 1."""

    name: str
    d: int
    heads: int
    tokens: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def head_dim(self) -> int:
        return self.d // self.heads


FLUX = Size("flux", 3072, 24, 4608)  # FLUX.1 at 1024x1024: 4096 image and 512 text tokens
WAN = Size("wan", 5120, 40, 75600)  # Wan 14B at 720p, 81 frames
SMALL = Size("small", 64, 4, 32, torch.float32)
SIZES = {size.name: size for size in (FLUX, WAN, SMALL)}


class Block(nn.Module):
    """Modulated attention with normalized, rotated queries and keys, then a modulated MLP."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(d, eps=EPS, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(d, eps=EPS, elementwise_affine=False)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(d, d) for _ in range(4))
        self.norm_q, self.norm_k = (nn.RMSNorm(d // heads, eps=EPS) for _ in range(2))
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, modulation: Tensor) -> Tensor:
        """One block.

        Args:
            x: [1, S, d] in the block's dtype.
            cos: [S, head_dim], float32, each value twice in a row; ``sin`` likewise.
            modulation: [1, 6, d]: shift, scale and gate of the attention, then of the MLP.

        Returns:
            [1, S, d].
        """
        h = self.modulated(x, modulation)
        q, k, v = self.queries(h, cos, sin), self.keys(h, cos, sin), self.values(h)
        return self.after_attention(x, F.scaled_dot_product_attention(q, k, v), modulation)

    def modulated(self, x: Tensor, modulation: Tensor) -> Tensor:
        shift, scale = modulation.chunk(6, dim=1)[:2]
        result: Tensor = self.norm1(x) * (1 + scale) + shift
        return result

    def queries(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotary(self.norm_q(self.by_head(self.to_q(h))), cos, sin).transpose(1, 2)

    def keys(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotary(self.norm_k(self.by_head(self.to_k(h))), cos, sin).transpose(1, 2)

    def values(self, h: Tensor) -> Tensor:
        return self.by_head(self.to_v(h)).transpose(1, 2)

    def by_head(self, t: Tensor) -> Tensor:
        return t.view(*t.shape[:2], self.heads, -1)

    def after_attention(self, x: Tensor, attended: Tensor, modulation: Tensor) -> Tensor:
        """``attended`` is [1, heads, S, head_dim]."""
        _, _, gate, shift, scale, gate_mlp = modulation.chunk(6, dim=1)
        x = x + gate * self.to_out(attended.transpose(1, 2).flatten(2))
        h = self.norm2(x) * (1 + scale) + shift
        result: Tensor = x + gate_mlp * self.down(F.gelu(self.up(h), approximate="tanh"))
        return result


def rotary(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring pairs in float32, as diffusers does; ``t`` is [1, S, heads, head_dim]."""
    real, imaginary = t.view(*t.shape[:3], -1, 2).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(-2)
    return (t.float() * cos[None, :, None] + turned.float() * sin[None, :, None]).to(t.dtype)


def make(size: Size, seed: int, device: torch.device | str) -> tuple[Block, Args]:
    """The block and its whole arguments, equal for equal seeds and devices.

    Queries and keys are scaled so that logits have a deviation of 2.5: attention that is nearly uniform would add
    next to nothing to the result, and so hide its errors.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = size.dtype) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    with torch.device(device):
        block = Block(size.d, size.heads).to(size.dtype).eval().requires_grad_(False)
    for name, weight in block.named_parameters():
        if name.startswith("norm_"):
            weight.copy_(2.5**0.5 * (1 + normal(*weight.shape, scale=0.1)))
        else:
            weight.copy_(normal(*weight.shape, scale=weight.shape[-1] ** -0.5))
    half = size.head_dim // 2
    frequencies = 1e4 ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
    angles = torch.arange(size.tokens, device=device, dtype=torch.float32)[:, None] * frequencies
    cos, sin = (t.repeat_interleave(2, dim=1) for t in (angles.cos(), angles.sin()))
    return block, (normal(1, size.tokens, size.d), cos, sin, normal(1, 6, size.d))


def reference_rows(block: Block, args: Args, rows: Tensor, at_once: int = 512) -> Tensor:
    """The block's result at some tokens, in float32 throughout; TF32 is off unless the caller switched it on.

    Every token needs all keys and values, but only its own query and MLP: so the reference of a long sequence
    can be had for some of its tokens, ``at_once`` at a time.

    Args:
        block: in any dtype; it is not changed.
        args: the whole arguments.
        rows: int64 [R], which tokens.

    Returns:
        float32 [1, R, d].
    """
    with torch.device(rows.device):
        wide = Block(block.up.in_features, block.heads)
    wide.load_state_dict(block.state_dict())
    x, cos, sin, modulation = (t.float() for t in args)
    with torch.no_grad():
        h = wide.modulated(x, modulation)
        k, v = wide.keys(h, cos, sin), wide.values(h)
        parts = []
        for some in torch.split(rows, at_once):
            q = wide.queries(h[:, some], cos[some], sin[some])
            parts.append(wide.after_attention(x[:, some], F.scaled_dot_product_attention(q, k, v), modulation))
    return torch.cat(parts, dim=1)
