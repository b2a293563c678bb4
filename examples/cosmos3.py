"""diffusers' Cosmos 3 transformer, small, with random weights.

    torchtrt-md export examples/cosmos3.py --mesh cp=4 -o cosmos3.mdtrt
    torchrun --nproc_per_node=4 -m torchtrt_md.run cosmos3.mdtrt --verify examples/cosmos3.py

It has two pathways: text attends to itself, and vision and sound to all.  The list ``parallel`` splits what is
generated, over layers whose rotary tables come as a tuple of four, and leaves the text whole on every rank.  Neither
the text's length nor that of what is generated needs to divide by the ranks.

COSMOS_WIDTH=4096 COSMOS_HEADS=32 COSMOS_KV_HEADS=8 COSMOS_LAYERS=4 COSMOS_MLP=12288 COSMOS_TEXT_TOKENS=512
COSMOS_FRAMES=12 COSMOS_HEIGHT=88 COSMOS_WIDTH_TOKENS=160 is 4 of the 36 layers of the real one.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from diffusers import Cosmos3OmniTransformer
from diffusers.utils import logging

import torchtrt_md as md

logging.set_verbosity_error()  # it warns of every cast to bfloat16, which is meant here

parallel = [
    md.ContextParallel(
        "cp",
        plan={
            "layers.0": {"gen_seq": md.Split(0)},
            "layers.*": {"rotary_emb": (None, None, md.Split(0), md.Split(0))},  # cos, sin of text; of the rest
            "norm_moe_gen": md.Gather(0),
        },
    )
]


def size(name: str, small: int) -> int:
    return int(os.environ.get(f"COSMOS_{name}", small))


def model() -> tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]:
    transformer = Cosmos3OmniTransformer(
        head_dim=128,
        hidden_size=size("WIDTH", 512),
        intermediate_size=size("MLP", 1024),
        num_attention_heads=size("HEADS", 4),
        num_key_value_heads=size("KV_HEADS", 2),
        num_hidden_layers=size("LAYERS", 2),
        vocab_size=1024,
        sound_gen=True,
        sound_dim=64,
    ).to(torch.bfloat16)
    text, sound = size("TEXT_TOKENS", 37), 25
    frames, height, width = size("FRAMES", 3), size("HEIGHT", 16), size("WIDTH_TOKENS", 18)  # of the latents
    rows, columns = height // 2, width // 2  # in patches of 2 x 2
    vision = frames * rows * columns
    total = text + vision + sound
    positions = torch.arange(total)
    grid = torch.cartesian_prod(torch.arange(frames), torch.arange(rows), torch.arange(columns)).T + text
    kwargs = {
        "input_ids": torch.randint(0, 1024, (text,)),
        "text_indexes": positions[:text],
        "position_ids": torch.cat([positions[:text].expand(3, -1), grid, positions[-sound:].expand(3, -1)], dim=1),
        "und_len": text,
        "sequence_length": total,
        "vision_tokens": [torch.randn(1, 48, frames, height, width, dtype=torch.bfloat16)],
        "vision_token_shapes": [(frames, rows, columns)],
        "vision_sequence_indexes": positions[text : text + vision],
        "vision_mse_loss_indexes": positions[text : text + vision],
        "vision_timesteps": torch.full((vision,), 500.0),
        "vision_noisy_frame_indexes": [torch.arange(frames)],
        "sound_tokens": [torch.randn(64, sound, dtype=torch.bfloat16)],
        "sound_token_shapes": [(sound, 1, 1)],
        "sound_sequence_indexes": positions[-sound:],
        "sound_mse_loss_indexes": positions[-sound:],
        "sound_timesteps": torch.full((sound,), 500.0),
        "sound_noisy_frame_indexes": [torch.arange(sound)],
        "return_dict": False,
    }
    return transformer.eval(), (), kwargs
