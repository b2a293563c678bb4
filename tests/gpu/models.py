"""Kinds of models beside those of ``gpu.cases``, in a launch of their own:

    python tests/gpu/suite.py --cases gpu.models --ranks 2 --out FOLDER

Each is small, goes through ``md.compile``, and is compared with the dense model in fp64.  On 4 ranks those come to it
that have two axes.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

import torchtrt_md as md
from gpu.case import TIMEOUT, Call, Case, Found, Rank, first_tensor
from gpu.networks import SIZES, example
from torchtrt_md.doors.user_file import load_user_file, read_user_file

__all__ = ["cases", "export", "make"]

_SMALL = {
    "COSMOS_WIDTH": "256",
    "COSMOS_HEADS": "4",
    "COSMOS_KV_HEADS": "2",
    "COSMOS_MLP": "512",
    "WAN_FFN": "512",
    "WAN_TEXT_TOKENS": "37",
}
_PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
_COSMOS_PLAN = {  # of the weights of both pathways
    # It counts its heads itself, by ``view(-1, num_attention_heads, head_dim)``: DTensors know how many there are.
    **{f"layers.*.self_attn.{name}": ColwiseParallel(use_local_output=False) for name in _PROJECTIONS},
    **{f"layers.*.self_attn.{name}": RowwiseParallel() for name in ("to_out", "to_add_out")},
    **{f"layers.*.{mlp}.{name}_proj": "colwise" for mlp in ("mlp", "mlp_moe_gen") for name in ("gate", "up")},
    **{f"layers.*.{mlp}.down_proj": "rowwise" for mlp in ("mlp", "mlp_moe_gen")},
}


@dataclass(frozen=True)
class Kind:
    """A model, how it is parallel on so many ranks, and what runs it.

    Attributes:
        mesh: axis -> ranks.
        parallel: what ``md.compile`` gets; "" for what the example's file says.
    """

    model: str
    mesh: tuple[tuple[str, int], ...]
    parallel: Any
    compute: str = "inductor"
    note: str = ""

    @property
    def name(self) -> str:
        axes = " ".join(f"{axis}={size}" for axis, size in self.mesh)
        strategies = [getattr(p, "strategy", "") for p in self.parallel] if self.parallel else []
        return " ".join(filter(None, [f"{self.model}:", axes, *strategies, self.compute, self.note]))


def kinds(size: int) -> list[Kind]:
    """What runs on so many ranks."""

    def cp(strategy: str) -> tuple[md.ContextParallel, ...]:
        return (md.ContextParallel("cp", strategy),)  # type: ignore[arg-type]

    whole = (("cp", size),)
    found = [
        Kind("cosmos3", whole, ()),
        Kind("cosmos3", whole, (), "tensorrt"),
        Kind("ltx", whole, cp("ulysses"), note="masked prompt of 37 tokens"),
        Kind("ltx", whole, cp("ring"), note="masked prompt of 37 tokens"),
        Kind("ltx", whole, cp("allgather_kv"), "tensorrt", note="masked prompt of 37 tokens"),
        Kind("odd flux", whole, cp("ulysses"), note="3 heads, 37 + 30 tokens"),
        Kind("qwen3 moe", (("tp", size),), (md.TensorParallel("tp"),)),
    ]
    if size == 4:
        tp_and_cp = (("cp", 2), ("tp", 2))
        cosmos3 = (*_of_the_file("cosmos3"), md.TensorParallel("tp", _COSMOS_PLAN))
        joined = ("ring", "ulysses")
        found += [
            Kind("flux", tp_and_cp, (md.TensorParallel("tp"), *cp("ulysses"))),
            Kind("cosmos3", tp_and_cp, cosmos3),
            Kind("wan_guidance", (("cfg", 2), ("cp", 2)), ()),
            Kind("wan_guidance", (("cfg", 2), ("cp", 2)), (), "tensorrt"),
            *[
                Kind("flux", (("ring", 2), ("ulysses", 2)), (md.ContextParallel(joined, outer),), compute)  # type: ignore[arg-type]
                for outer, compute in (("ring", "inductor"), ("allgather_kv", "tensorrt"))
            ],
        ]
    return found


def _of_the_file(model: str) -> tuple[Any, ...]:
    """What an example's file says in its list ``parallel``."""
    return tuple(read_user_file(example(model)).parallel or ())


def make(name: str) -> Call:
    """A dense model and its arguments, on the CPU."""
    if name in ("cosmos3", "flux", "wan_guidance"):
        os.environ |= {**SIZES, **_SMALL}
        return load_user_file(example(name))
    return {"ltx": _ltx, "odd flux": _odd_flux, "qwen3 moe": _qwen3_moe}[name]()


def _ltx() -> Call:
    from diffusers import LTXVideoTransformer3DModel

    model = LTXVideoTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=4,
        attention_head_dim=64,
        cross_attention_dim=256,
        num_layers=2,
        caption_channels=64,
    )
    kept = torch.ones(1, 37)
    kept[:, 21:] = 0  # padding of the prompt
    frames, height, width = 3, 7, 9
    kwargs = {
        "hidden_states": torch.randn(1, frames * height * width, 16),
        "encoder_hidden_states": torch.randn(1, 37, 64),
        "timestep": torch.tensor([500]),
        "encoder_attention_mask": kept,
        "num_frames": frames,
        "height": height,
        "width": width,
        "return_dict": False,
    }
    return _in_bfloat16(model, kwargs)


def _odd_flux() -> Call:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=64,
        num_attention_heads=3,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        axes_dims_rope=(16, 24, 24),
    )
    image, text = 30, 37
    kwargs = {
        "hidden_states": torch.randn(1, image, 16),
        "encoder_hidden_states": torch.randn(1, text, 64),
        "pooled_projections": torch.randn(1, 64),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(image, 3),
        "txt_ids": torch.zeros(text, 3),
        "guidance": None,
        "return_dict": False,
    }
    return _in_bfloat16(model, kwargs)


def _in_bfloat16(model: torch.nn.Module, kwargs: dict[str, Any]) -> Call:
    low = {
        name: value.to(torch.bfloat16) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in kwargs.items()
    }
    return model.to(torch.bfloat16).eval(), (), low


def _qwen3_moe() -> Call:
    """In float32: in 16 bits the dense model itself sends tokens to other experts than in fp64."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        vocab_size=512,
        max_position_embeddings=256,
    )
    return Qwen3MoeForCausalLM(config).eval(), (torch.randint(0, 512, (1, 96)),), {"use_cache": False}


@torch.no_grad()
def through(kind: Kind, at: Rank) -> Found:
    """Compile, call three times, compare."""
    model, args, kwargs = at.model(kind.model)
    found = Found()
    parallel = kind.parallel or _of_the_file(kind.model)
    assert parallel
    runner = md.compile(
        model,
        args,
        kwargs,
        mesh=md.Mesh(dict(kind.mesh)),
        parallel=list(parallel),
        placement="split",
        compute=kind.compute,
        cuda_graph=at.device.type == "cuda",
        timeout=TIMEOUT,
        check=False,
        tune=False,
        report=False,
    )
    results = [first_tensor(runner(*args, **kwargs)).clone() for _ in range(3)]
    at.synchronize()
    ran = sorted({segment.runs for segment in runner.manifest.ranks[at.rank]})
    found.message = f"runs as {', '.join(ran)}"
    found.expect(("engine" in ran) == (kind.compute == "tensorrt"), found.message)
    found.compare(results, *at.reference(kind.model))
    runner.close()
    return found


def cases(device: str, ranks: int) -> list[Case]:
    """One for each kind."""
    return [Case(kind.name, functools.partial(through, kind), "models", 150) for kind in kinds(ranks)]


def export(device: str, ranks: int, folder: Path) -> None:
    """Nothing: these are compiled in the launch."""
