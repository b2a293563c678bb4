"""diffusers' FLUX transformer, small, with random weights: the model of `make demo`.

    torchtrt-md export examples/flux.py --mesh cp=4 --strategy ulysses -o flux.mdtrt
    torchrun --nproc_per_node=4 -m torchtrt_md.run flux.mdtrt --verify examples/flux.py

A model file has one function, ``model``, that returns (model, args, kwargs).  Environment variables make this
one as large as the real one: FLUX_HEADS=24 FLUX_LAYERS=4 FLUX_SINGLE_LAYERS=8 FLUX_IMAGE_TOKENS=4096
FLUX_TEXT_TOKENS=512 is FLUX.1 at 1024 x 1024 with 12 of its 57 blocks.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.utils import logging

logging.set_verbosity_error()  # it warns of every cast to bfloat16, which is meant here


def model() -> tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]:
    heads = int(os.environ.get("FLUX_HEADS", 4))
    image_tokens = int(os.environ.get("FLUX_IMAGE_TOKENS", 1024))
    text_tokens = int(os.environ.get("FLUX_TEXT_TOKENS", 128))
    transformer = FluxTransformer2DModel(
        num_layers=int(os.environ.get("FLUX_LAYERS", 2)),
        num_single_layers=int(os.environ.get("FLUX_SINGLE_LAYERS", 4)),
        num_attention_heads=heads,
        attention_head_dim=128,
        guidance_embeds=True,
    )
    transformer = transformer.to(torch.bfloat16).eval()
    height = next(side for side in range(math.isqrt(image_tokens), 0, -1) if image_tokens % side == 0)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(image_tokens // height), indexing="ij")
    image_ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)
    inputs = {
        "hidden_states": torch.randn(1, image_tokens, 64),
        "encoder_hidden_states": torch.randn(1, text_tokens, 4096),
        "pooled_projections": torch.randn(1, 768),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": image_ids.float(),
        "txt_ids": torch.zeros(text_tokens, 3),
    }
    return transformer, (), {**{name: t.to(torch.bfloat16) for name, t in inputs.items()}, "return_dict": False}
