"""diffusers' Wan video transformer, small, with random weights, and the context parallel plan that it brings.

    torchtrt-md export examples/wan.py --mesh cp=4 -o wan.mdtrt
    torchrun --nproc_per_node=4 -m torchtrt_md.run wan.mdtrt --verify examples/wan.py

WAN_HEADS=40 WAN_LAYERS=4 WAN_FFN=13824 WAN_TEXT_TOKENS=512 WAN_FRAMES=21 WAN_HEIGHT=90 WAN_WIDTH=160 is Wan 2.1 14B at
720p with 4 of its 40 blocks: 75,600 tokens.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.utils import logging

logging.set_verbosity_error()  # it warns of every cast to bfloat16, which is meant here


def model() -> tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]:
    transformer = WanTransformer3DModel(
        num_attention_heads=int(os.environ.get("WAN_HEADS", 4)),
        attention_head_dim=128,
        num_layers=int(os.environ.get("WAN_LAYERS", 2)),
        ffn_dim=int(os.environ.get("WAN_FFN", 1024)),
    )
    frames, height, width = (
        int(os.environ.get(name, size)) for name, size in (("WAN_FRAMES", 4), ("WAN_HEIGHT", 16), ("WAN_WIDTH", 16))
    )
    kwargs = {
        "hidden_states": torch.randn(1, 16, frames, height, width, dtype=torch.bfloat16),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, int(os.environ.get("WAN_TEXT_TOKENS", 64)), 4096, dtype=torch.bfloat16),
        "return_dict": False,
    }
    return transformer.to(torch.bfloat16).eval(), (), kwargs
