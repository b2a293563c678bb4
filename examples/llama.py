"""transformers' Llama, small, with random weights and grouped-query attention.

    torchtrt-md export examples/llama.py --mesh tp=4 -o llama.mdtrt
    torchrun --nproc_per_node=4 -m torchtrt_md.run llama.mdtrt --verify examples/llama.py

LLAMA_HIDDEN=4096 LLAMA_HEADS=32 LLAMA_KV_HEADS=8 LLAMA_LAYERS=8 LLAMA_TOKENS=2048 LLAMA_INTERMEDIATE=14336
LLAMA_VOCABULARY=128256 has the width of Llama 3 8B.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def model() -> tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]:
    vocabulary = int(os.environ.get("LLAMA_VOCABULARY", 1024))
    config = LlamaConfig(
        hidden_size=int(os.environ.get("LLAMA_HIDDEN", 512)),
        intermediate_size=int(os.environ.get("LLAMA_INTERMEDIATE", 1024)),
        num_hidden_layers=int(os.environ.get("LLAMA_LAYERS", 2)),
        num_attention_heads=int(os.environ.get("LLAMA_HEADS", 8)),
        num_key_value_heads=int(os.environ.get("LLAMA_KV_HEADS", 4)),
        vocab_size=vocabulary,
    )
    llama = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    tokens = torch.randint(0, vocabulary, (1, int(os.environ.get("LLAMA_TOKENS", 128))))
    return llama, (tokens,), {"use_cache": False}
