"""The models of the suite: small, of 16-bit weights, and of the structure of real ones."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import torchtrt_md as md
from gpu.case import ROOT, Call

# The sizes of the examples, which read them from the environment.
SIZES = {
    "FLUX_HEADS": "4",
    "FLUX_LAYERS": "1",
    "FLUX_SINGLE_LAYERS": "1",
    "FLUX_IMAGE_TOKENS": "256",
    "FLUX_TEXT_TOKENS": "64",
    "LLAMA_HIDDEN": "512",
    "LLAMA_TOKENS": "128",
}
DTYPE = torch.bfloat16
DECODER_PLAN: Any = {"": {"x": md.Split(1), "cos": md.Split(0), "sin": md.Split(0)}, "head": md.Gather(1)}
ATTENTION_PLAN: Any = {"": {"x": md.Split(1)}, "out": md.Gather(1)}
BLOCK_PLAN = {"up": "colwise", "down": "rowwise"}


class Decoder(nn.Module):
    """Two causal blocks with rotary positions that are passed in, as a long-context decoder has them."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, head_dim = heads, kv_heads, width // heads
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.q = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(2))
        self.kv = nn.ModuleList(nn.Linear(width, 2 * kv_heads * head_dim, bias=False) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(2))
        self.head = nn.Linear(width, 64)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        for norm, to_q, to_kv, out in zip(self.norms, self.q, self.kv, self.out, strict=True):
            y = norm(x)
            q = to_q(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            k, v = to_kv(y).unflatten(-1, (2 * self.kv_heads, -1)).transpose(1, 2).chunk(2, 1)
            q, k = (
                t * cos + torch.cat((-t[..., t.shape[-1] // 2 :], t[..., : t.shape[-1] // 2]), -1) * sin for t in (q, k)
            )
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = x + out(a.transpose(1, 2).flatten(2))
        result: Tensor = self.head(x)
        return result


def decoder(width: int = 512, heads: int = 8, kv_heads: int = 4, tokens: int = 512) -> Call:
    size = width // heads
    angles = torch.arange(tokens)[:, None] / 100 ** (torch.arange(0, size, 2) / size)
    args = (torch.randn(1, tokens, width), angles.cos().repeat(1, 2), angles.sin().repeat(1, 2))
    return Decoder(width, heads, kv_heads), args, {}


class Attention(nn.Module):
    """One attention, and a number that Dynamo makes a graph for each value of."""

    def __init__(self, width: int = 256, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        q, k, v = self.qkv(x * scale).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        result: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return result


class Block(nn.Module):
    """A feed-forward block for ``parallelize_module``."""

    def __init__(self, width: int = 256, hidden: int = 1024) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(width, hidden), nn.Linear(hidden, width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
        return result


class Product(nn.Module):
    """Two products and nothing else, which Inductor has no C++ to compile for on the CPU."""

    def __init__(self, width: int = 256, hidden: int = 512) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(self.up(x))
        return result


class Layers(nn.Module):
    """Blocks of one class, to be compiled one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Explicit(nn.Module):
    """A block whose weights were cut by hand, and whose parts are summed by a functional collective."""

    def __init__(self, dense: Block, rank: int, size: int) -> None:
        super().__init__()
        width = dense.up.out_features // size
        rows = slice(rank * width, (rank + 1) * width)
        self.norm, self.down_bias = dense.norm, dense.down.bias
        self.up_weight, self.up_bias = nn.Parameter(dense.up.weight[rows]), nn.Parameter(dense.up.bias[rows])
        self.down_weight = nn.Parameter(dense.down.weight[:, rows].contiguous())

    def forward(self, x: Tensor) -> Tensor:
        part = F.linear(F.gelu(F.linear(self.norm(x), self.up_weight, self.up_bias)), self.down_weight)
        world: Any = dist.group.WORLD
        whole = torch.distributed._functional_collectives.all_reduce(part, "sum", world)
        result: Tensor = x + (whole + self.down_bias)
        return result


def example(name: str) -> str:
    """The path of an example's model file."""
    return str(ROOT / "examples" / f"{name}.py")


def make(name: str) -> Call:
    """A dense model and its arguments, on the CPU; with one seed the same in every process."""
    if name in ("flux", "llama"):
        from torchtrt_md.doors.user_file import load_user_file

        return load_user_file(example(name))
    if name == "decoder":
        model, args, kwargs = decoder()
    elif name == "wide decoder":
        model, args, kwargs = decoder(4096, 32, 32, 256)
    elif name == "attention":
        model, args, kwargs = Attention(), (torch.randn(1, 256, 256),), {}
    else:
        if name == "other block":
            torch.manual_seed(1)
        classes = {"product": Product, "layers": Layers, "block": Block, "other block": Block}
        model, args, kwargs = classes[name](), (torch.randn(1, 256, 256),), {}
    return model.to(DTYPE).eval(), tuple(a.to(DTYPE) for a in args), kwargs


def parallel(model: str, strategy: str, size: int) -> dict[str, Any]:
    """The options ``mesh`` and ``parallel``."""
    if strategy == "tp":
        own = None if model == "llama" else BLOCK_PLAN
        return {"mesh": md.Mesh(tp=size), "parallel": md.TensorParallel("tp", own)}
    plan = {"attention": ATTENTION_PLAN, "flux": None}.get(model, DECODER_PLAN)
    return {"mesh": md.Mesh(cp=size), "parallel": md.ContextParallel("cp", strategy, plan)}  # type: ignore[arg-type]
