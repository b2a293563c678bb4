"""The same block with explicit, packed Ulysses in plain PyTorch, written as well as its authors could.

One exchange carries queries, keys and values, in the layout in which they are received and attended to:

    q, k, v [1, N, H, D]  ->  packed [P, N, 3, H/P, D]  -- all-to-all -->  [P, N, 3, H/P, D] = [S, 3, H/P, D]

whose slices are the strided q, k, v of the attention; its result lies in memory as [S, H/P, D] = [P, N, H/P, D],
which is what the exchange back sends.  N = S/P tokens are local; D is the head's width.

What is faster depends on the shapes, so a :class:`Form` has options, of which the benchmark takes the fastest.
"""

from __future__ import annotations

import re
import unittest.mock
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives  # has the shape rules of the functional collectives
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.blocks import EPS, Args, Block, rotary

Timed = Callable[[], Tensor]

_WARM_UP = 3
_IN_BLOCK = re.compile(r"(?:blocks|layers)\.\d+\.")


@dataclass(frozen=True)
class Form:
    """How the block is written.

    Attributes:
        compiled: by torch.compile; else eager.
        fused_qkv: one product for queries, keys and values; else three.
        gelu_epilogue: bias and GELU in cuBLASLt's epilogue (GPU only); else GELU is a kernel of its own, or
            Inductor's.
        pieces: compiled before and after the attention, the exchanges and it left eager; else in one graph.
        mode: torch.compile's.
        backend: of scaled_dot_product_attention; None leaves it to PyTorch.
    """

    compiled: bool = False
    fused_qkv: bool = False
    gelu_epilogue: bool = False
    pieces: bool = False
    mode: str = "default"
    backend: SDPBackend | None = None

    def __str__(self) -> str:
        words = [
            "compiled" if self.compiled else "eager",
            "qkv fused" if self.fused_qkv else "q, k, v",
            *(["GELU epilogue"] if self.gelu_epilogue else []),
            *(["in pieces"] if self.pieces else []),
            *([self.mode] if self.mode != "default" else []),
            *([self.backend.name] if self.backend else []),
        ]
        return ", ".join(words)


class UlyssesBlock(nn.Module):
    """The block on this rank's tokens; it shares the dense block's weights.

    Args:
        dense: the dense block.
        form: how to compute it.
        group: the ranks among whom the sequence is split; None is one rank, which exchanges nothing.
    """

    def __init__(self, dense: Block, form: Form, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.form, self.group, self.heads = form, group, dense.heads
        self.ranks = 1 if group is None else group.size()
        self.group_name = "" if group is None else group.group_name
        self.norm_q, self.norm_k = dense.norm_q, dense.norm_k
        self.to_out, self.up, self.down = dense.to_out, dense.up, dense.down
        # An exchange outside of a graph may write where it is told to.
        self.functional = form.compiled and not form.pieces
        projections = dense.to_q, dense.to_k, dense.to_v
        if form.fused_qkv:
            self.qkv_weight = nn.Parameter(torch.cat([p.weight for p in projections]), requires_grad=False)
            self.qkv_bias = nn.Parameter(torch.cat([p.bias for p in projections]), requires_grad=False)
        else:
            self.to_q, self.to_k, self.to_v = projections

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, turns: Tensor, modulation: Tensor) -> Tensor:
        """As :meth:`Block.forward`, of this rank's chunk.

        Args:
            x: [1, N, d].
            cos: [N, D], float32; ``sin`` likewise.
            turns: complex64 [N, 1, D/2]: cos + i sin, which eager forms use.  A model makes it once for all blocks.
            modulation: [1, 6, d].
        """
        sent = self.before(x, cos, sin, turns, modulation)
        return self.after(x, self.attend(sent), modulation)

    def before(self, x: Tensor, cos: Tensor, sin: Tensor, turns: Tensor, modulation: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values: packed [P, N, 3, H/P, D], or three of [1, N, H, D] for one rank."""
        h = modulated(x, modulation[0, 0], modulation[0, 1])
        q, k, v = self.projected(h)
        q, k = self.norm_q(q), self.norm_k(k)
        if self.form.compiled:
            q, k = rotary(q, cos, sin), rotary(k, cos, sin)
            if self.ranks == 1:
                return q, k, v
            return (torch.stack([self.by_rank(t) for t in (q, k, v)], dim=2),)
        if self.ranks == 1:
            return turned(q, turns).to(v.dtype), turned(k, turns).to(v.dtype), v
        packed = v.new_empty(self.ranks, v.shape[1], 3, self.heads // self.ranks, v.shape[3])
        for slot, t in enumerate((turned(q, turns), turned(k, turns), v)):
            packed[:, :, slot].copy_(self.by_rank(t))  # rounds and packs in one kernel
        return (packed,)

    def projected(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [1, N, H, D] each."""
        if self.form.fused_qkv:
            q, k, v = F.linear(h, self.qkv_weight, self.qkv_bias).view(1, h.shape[1], 3, self.heads, -1).unbind(2)
        else:
            q, k, v = (to(h).view(1, h.shape[1], self.heads, -1) for to in (self.to_q, self.to_k, self.to_v))
        return q, k, v

    def by_rank(self, t: Tensor) -> Tensor:
        """[1, N, H, D] -> a view [P, N, H/P, D]: the heads of each rank."""
        return t.view(t.shape[1], self.ranks, -1, t.shape[3]).transpose(0, 1)

    def attend(self, sent: tuple[Tensor, ...]) -> Tensor:
        """Exchange, attend, exchange back: [1, N, d]."""
        if self.ranks == 1:
            return attention(*sent).flatten(2)
        q, k, v = self.exchange(sent[0]).flatten(0, 1).unbind(1)  # [S, H/P, D] each
        attended = attention(q[None], k[None], v[None])
        sent_back = attended.reshape(self.ranks, -1, *attended.shape[2:]).contiguous()
        back = self.exchange(sent_back)  # [P, N, H/P, D]
        return back.transpose(0, 1).flatten(1)[None]

    def exchange(self, t: Tensor) -> Tensor:
        """All-to-all on dim 0, which has one element for each rank."""
        if self.functional:
            ones = [1] * self.ranks
            sent = torch.ops._c10d_functional.all_to_all_single(t, ones, ones, self.group_name)
            received: Tensor = torch.ops._c10d_functional.wait_tensor(sent)
            return received
        received = torch.empty_like(t)
        dist.all_to_all_single(received, t, group=self.group)
        return received

    def after(self, x: Tensor, attended: Tensor, modulation: Tensor) -> Tensor:
        """Out-projection and MLP, with their gates and residuals."""
        x = torch.addcmul(x, modulation[:, 2:3], self.to_out(attended))
        h = modulated(x, modulation[0, 3], modulation[0, 4])
        if self.form.gelu_epilogue:
            h = torch.ops.aten._addmm_activation(self.up.bias, h[0], self.up.weight.t(), use_gelu=True)[None]
        else:
            h = F.gelu(self.up(h), approximate="tanh")
        return torch.addcmul(x, modulation[:, 5:6], self.down(h))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalized and modulated by one kernel: scale and shift are the norm's own weight and bias."""
    return F.layer_norm(x, x.shape[-1:], 1 + scale, shift, EPS)


def turned(t: Tensor, turns: Tensor) -> Tensor:
    """Rotary as one product of complex numbers; float32 [1, N, H, D]."""
    return torch.view_as_real(torch.view_as_complex(t.float().view(*t.shape[:3], -1, 2)) * turns).flatten(-2)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of and to [1, S, heads, D], the layout in which flash attention and cuDNN return their result."""
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def local_args(args: Args, rank: int, ranks: int) -> tuple[Tensor, ...]:
    """This rank's arguments of :class:`UlyssesBlock`, of the whole ones of :class:`Block`."""
    x, cos, sin, modulation = args
    cos, sin = cos.chunk(ranks)[rank].contiguous(), sin.chunk(ranks)[rank].contiguous()
    turns = torch.complex(cos[:, None, ::2].contiguous(), sin[:, None, ::2].contiguous())
    return x.chunk(ranks, dim=1)[rank].contiguous(), cos, sin, turns, modulation


def make(dense: Block, args: tuple[Tensor, ...], form: Form, group: dist.ProcessGroup | None) -> Timed:
    """A call of the block in one form on this rank's arguments.

    Args:
        args: of :func:`local_args`.
    """
    block = UlyssesBlock(dense, form, group).eval()
    compiled: dict[str, Any] = {"fullgraph": True, "dynamic": False, "mode": form.mode}
    if form.pieces:
        block.before = torch.compile(block.before, **compiled)  # type: ignore[method-assign]
        block.after = torch.compile(block.after, **compiled)  # type: ignore[method-assign]
    run: Callable[..., Tensor] = torch.compile(block, **compiled) if form.compiled and not form.pieces else block

    def call() -> Tensor:
        with torch.no_grad(), sdpa_kernel(form.backend) if form.backend else nullcontext():
            return run(*args)

    return call


def quantize_blocks(model: nn.Module, to: str) -> None:
    """Quantize the linear layers of the model's repeated blocks in place: weights and arguments, with a scale for each
    row.  Inductor's options stay as they are, for all candidates: torchao's have it try many forms of kernels.  With
    int8 the layers of one row, the blocks' modulations, stay as they are: PyTorch has no such product on GPUs.

    Args:
        to: ``float8`` or ``int8``.

    Raises:
        ValueError: the model has no such layers.
    """
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        PerRow,
        quantize_,
    )

    def is_in_block(module: nn.Module, name: str) -> bool:
        of_one_row = to == "int8" and ".norm" in name
        return isinstance(module, nn.Linear) and _IN_BLOCK.search(name) is not None and not of_one_row

    if not any(is_in_block(module, name) for name, module in model.named_modules()):
        raise ValueError(f"{type(model).__name__} has no linear layers in repeated blocks")
    on_cpu = next(model.parameters()).device.type == "cpu"
    # For a trial: torchao asks for a GPU, and PyTorch has kernels for CPUs too.
    unasked = unittest.mock.patch("torchao.quantization.quant_api._check_hardware_support")
    with unasked if on_cpu else nullcontext():
        config = {
            "float8": Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False),
            "int8": Int8DynamicActivationInt8WeightConfig(set_inductor_config=False),
        }[to]
        quantize_(model, config, is_in_block)


def captured(call: Timed) -> Timed:
    """The call as a CUDA graph, captured after some calls that warm up; every replay writes the same result."""
    side: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Other threads (NCCL's watchdog) may call CUDA during the capture.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = call()

    def replay() -> Tensor:
        assert call is not None  # what it is of has the weights that the graph reads
        graph.replay()
        return result

    return replay
