"""transformers' Vision Transformer, small, with random weights, and a tensor parallel plan, since it brings none.

    torchtrt-md export examples/vit.py --mesh tp=4 -o vit.mdtrt
    torchrun --nproc_per_node=4 -m torchtrt_md.run vit.mdtrt --verify examples/vit.py

With its class token the sequence has 197 positions at 224 x 224, which no number of ranks divides: so heads are split,
not the sequence.  VIT_HIDDEN=1024 VIT_HEADS=16 VIT_LAYERS=24 VIT_INTERMEDIATE=4096 VIT_IMAGE=224 is ViT-L/16.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import ViTConfig, ViTForImageClassification

import torchtrt_md as md

parallel = [
    md.TensorParallel(
        "tp",
        plan={
            "vit.layers.*.attention.q_proj": "colwise",
            "vit.layers.*.attention.k_proj": "colwise",
            "vit.layers.*.attention.v_proj": "colwise",
            "vit.layers.*.attention.o_proj": "rowwise",
            "vit.layers.*.mlp.fc1": "colwise",
            "vit.layers.*.mlp.fc2": "rowwise",
        },
    )
]


def model() -> tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]:
    size = int(os.environ.get("VIT_IMAGE", 64))
    config = ViTConfig(
        hidden_size=int(os.environ.get("VIT_HIDDEN", 256)),
        num_hidden_layers=int(os.environ.get("VIT_LAYERS", 2)),
        num_attention_heads=int(os.environ.get("VIT_HEADS", 4)),
        intermediate_size=int(os.environ.get("VIT_INTERMEDIATE", 1024)),
        image_size=size,
        num_labels=1000,
    )
    vit = ViTForImageClassification(config).to(torch.bfloat16).eval()
    return vit, (torch.randn(1, 3, size, size, dtype=torch.bfloat16),), {}
