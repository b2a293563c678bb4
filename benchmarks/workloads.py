"""The models of whole_models.py: made with random weights, at full size or small for a trial."""

from __future__ import annotations

import os
import runpy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Workload:
    """A model, its arguments, and how it is parallel.

    Attributes:
        make: the dense model, on the default device, in the default dtype.
        kwargs: its arguments.
        parallel: an axis and a strategy; ``tp`` for the model's own tensor parallel plan.
        about: the size, for people.
        plan: what splits the sequence; None for the model's own, by which its library does, too.
        groups: of heads, that Ulysses is tried with.
    """

    make: Callable[[], nn.Module]
    kwargs: Callable[[], dict[str, Any]]
    parallel: str
    about: str
    plan: Any = None
    groups: tuple[int, ...] = ()


def flux(small: bool, pixels: int = 1024) -> Workload:
    from diffusers import FluxTransformer2DModel

    cut = {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 4} if small else {}
    text, side = (32, 8) if small else (512, pixels // 16)

    def kwargs() -> dict[str, Any]:
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        return {
            "hidden_states": torch.randn(1, side * side, 64),
            "encoder_hidden_states": torch.randn(1, text, 4096),
            "pooled_projections": torch.randn(1, 768),
            "timestep": torch.tensor([0.5]),
            "guidance": torch.tensor([3.5]),
            "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).to(torch.bfloat16),
            "txt_ids": torch.zeros(text, 3),
            "return_dict": False,
        }

    about = f"{3 if small else 57} blocks, {side * side} + {text} tokens"
    return Workload(
        lambda: FluxTransformer2DModel(guidance_embeds=True, **cut), kwargs, "ulysses", f"FLUX.1, {about}", groups=(2,)
    )


def wan(small: bool, rows: int = 720) -> Workload:
    from diffusers import WanTransformer3DModel

    size = {"num_attention_heads": 4, "ffn_dim": 512, "num_layers": 2} if small else {"num_layers": 4}
    # 81 frames of 1280 x 720 or 832 x 480
    shape = (1, 16, 3, 8, 8) if small else (1, 16, 21, 90, 160) if rows == 720 else (1, 16, 21, 60, 104)

    def kwargs() -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(shape),
            "timestep": torch.tensor([500]),
            "encoder_hidden_states": torch.randn(1, 512, 4096),
            "return_dict": False,
        }

    about = f"Wan2.1 at the width of 14B, {size['num_layers']} blocks, latents {list(shape)}"
    return Workload(lambda: WanTransformer3DModel(**size), kwargs, "ulysses", about, groups=(2,) if small else (2, 5))


def cosmos3(small: bool, layers: int = 4) -> Workload:
    """As examples/cosmos3.py has it, with whole text; its library has no plan for it."""
    if not small:
        sizes = "WIDTH=4096 HEADS=32 KV_HEADS=8 MLP=12288 TEXT_TOKENS=512 FRAMES=12 HEIGHT=88 WIDTH_TOKENS=160"
        os.environ |= {f"COSMOS_{name}": value for name, value in (size.split("=") for size in sizes.split())}
        os.environ["COSMOS_LAYERS"] = str(layers)
    example = runpy.run_path(str(Path(__file__).resolve().parents[1] / "examples" / "cosmos3.py"))
    (parallel,) = example["parallel"]

    def kwargs() -> dict[str, Any]:
        found: dict[str, Any] = example["model"]()[2]
        return found

    about = f"{example['size']('LAYERS', 2)} layers at width {example['size']('WIDTH', 512)}"

    def make() -> nn.Module:
        found: nn.Module = example["model"]()[0]
        return found

    return Workload(make, kwargs, "ulysses", f"Cosmos 3, {about}", parallel.plan)


def llama(small: bool, tokens: int = 2048) -> Workload:
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    large = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 16, "num_attention_heads": 32}
    config: dict[str, Any] = {**(size if small else large), "num_key_value_heads": 4 if small else 8}
    tokens = 32 if small else tokens

    def make() -> nn.Module:
        model: nn.Module = LlamaForCausalLM(LlamaConfig(vocab_size=512 if small else 128256, **config))
        return model

    def kwargs() -> dict[str, Any]:
        return {"input_ids": torch.randint(0, 512, (1, tokens)), "use_cache": False, "return_dict": False}

    about = f"{config['num_hidden_layers']} layers, {tokens} tokens"
    return Workload(make, kwargs, "tp", f"Llama at the width of 8B, {about}")


WORKLOADS: dict[str, Callable[[bool], Workload]] = {
    "flux": flux,
    "flux2048": partial(flux, pixels=2048),
    "wan": wan,
    "wan480": partial(wan, rows=480),
    "cosmos3": cosmos3,
    "cosmos3whole": partial(cosmos3, layers=36),
    "llama": llama,
    "llama8192": partial(llama, tokens=8192),
}
