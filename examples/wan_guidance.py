"""Guidance in parallel: diffusers' Wan, small, with both samples of a guided step, each on ranks of its own.

    torchtrt-md export examples/wan_guidance.py --mesh cfg=2,cp=2 -o wan_guidance.mdtrt
    torchrun --nproc_per_node=4 -m torchtrt_md.run wan_guidance.mdtrt --verify examples/wan_guidance.py

Classifier-free guidance asks the model twice in a step, with the prompt and without.  As a batch of two, axis ``cfg``
splits the batch, and ``cp`` the sequence of each sample by the plan that the model brings.  Nothing is sent along
``cfg`` but the result, which every rank gets whole: ``without + scale * (with - without)`` is then the pipeline's.

The variables of examples/wan.py make it as large as the real one.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import torch

import torchtrt_md as md

SAMPLES = md.Split(0)
parallel = [
    md.ContextParallel(
        "cfg",
        plan={
            "": {"hidden_states": SAMPLES, "timestep": SAMPLES, "encoder_hidden_states": SAMPLES},
            "proj_out": md.Gather(0),
        },
    ),
    md.ContextParallel("cp"),
]


def model() -> tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]:
    transformer, args, kwargs = runpy.run_path(str(Path(__file__).with_name("wan.py")))["model"]()
    prompt = kwargs["encoder_hidden_states"]
    kwargs["encoder_hidden_states"] = torch.cat([prompt, torch.randn_like(prompt)])  # of the prompt, and of none
    for name in ("hidden_states", "timestep"):  # the same latents at the same time
        kwargs[name] = torch.cat([kwargs[name]] * 2)
    return transformer, args, kwargs
