"""Peak memory of capturing and building four tensor-parallel ranks: ``memory_probe.py WIDTH``, for test_memory.py."""

from __future__ import annotations

import gc
import json
import sys
import tempfile

import torch
from resident import forget_peak, resident
from transformers import LlamaConfig, LlamaForCausalLM

import torchtrt_md as md
from torchtrt_md.build import probes
from torchtrt_md.build.torch_trt import load


def main() -> None:
    width = int(sys.argv[1])
    load()
    probes.gathers_beside_attention("BF16")
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=6,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=32000,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    gc.collect()
    dense = sum(p.numel() * p.element_size() for p in model.parameters())
    before = forget_peak()
    program = md.capture(
        model,
        (torch.randint(0, 32000, (1, 64)),),
        {"use_cache": False},
        mesh=md.Mesh(tp=4),
        parallel=md.TensorParallel("tp"),
    )
    captured = resident("VmHWM") - before
    with tempfile.TemporaryDirectory() as folder:
        engines = md.build(program, folder)
        shard = max(engine.file.stat().st_size for engine in engines)
    built = resident("VmHWM") - before
    print(json.dumps({"dense": dense, "shard": shard, "capture": captured, "build": built}))


if __name__ == "__main__":
    main()
