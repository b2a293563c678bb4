"""diffusers' FluxPipeline, its transformer compiled for all ranks of a launch and put back in its place.

    torchrun --nproc_per_node=2 examples/flux_pipeline.py              # TensorRT on 2 GPUs; without any, Inductor
    torchrun --nproc_per_node=2 examples/flux_pipeline.py --compute inductor
    torchrun --nproc_per_node=4 examples/flux_pipeline.py --full       # of the size of FLUX.1, at 1024 x 1024

Weights are random and nothing is downloaded.  Each rank makes the whole image, and the transformer's sequence is split.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.utils import logging
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

import torchtrt_md as md

logging.set_verbosity_error()  # it warns of every cast to bfloat16, which is meant here

# Arguments of the classes; their defaults are FLUX.1's where FULL does not say otherwise.
FULL: dict[str, dict[str, Any]] = {
    "transformer": {"guidance_embeds": True},
    "vae": {"channels": (128, 256, 512, 512), "norm_num_groups": 32, "layers_per_block": 2},
    "clip": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    "t5": {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
    "call": {"height": 1024, "width": 1024, "text_tokens": 512, "steps": 4},
}
SMALL: dict[str, dict[str, Any]] = {
    "transformer": {
        "guidance_embeds": True,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "axes_dims_rope": (4, 6, 6),
        "joint_attention_dim": 32,
        "pooled_projection_dim": 24,
    },
    "vae": {"channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1},
    "clip": {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    "call": {"height": 128, "width": 128, "text_tokens": 16, "steps": 2},
}


def make_pipeline(size: Mapping[str, dict[str, Any]]) -> FluxPipeline:
    """Without tokenizers, whose vocabularies would have to be downloaded."""
    vae = dict(size["vae"])
    channels = vae.pop("channels")
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            up_block_types=("UpDecoderBlock2D",) * len(channels),
            block_out_channels=channels,
            latent_channels=16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
            **vae,
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(**size["clip"])).eval(),
        tokenizer=None,
        text_encoder_2=T5EncoderModel(T5Config(**size["t5"])).eval(),
        tokenizer_2=None,
        transformer=FluxTransformer2DModel(**size["transformer"]).eval(),
    )


def make_image(pipe: FluxPipeline, prompt: Mapping[str, Tensor], call: Mapping[str, int]) -> Tensor:
    """The image [1, 3, height, width] in [0, 1], of the same noise each time."""
    images = pipe(
        **prompt,
        height=call["height"],
        width=call["width"],
        num_inference_steps=call["steps"],
        generator=torch.Generator().manual_seed(0),  # equal on all ranks, as all inputs are
        output_type="pt",
    ).images
    assert isinstance(images, Tensor)
    return images


def main() -> None:
    parser = argparse.ArgumentParser(description="FLUX with its transformer compiled by torchtrt_md")
    parser.add_argument("--compute", choices=("tensorrt", "inductor"), help="by default TensorRT where there are GPUs")
    parser.add_argument("--full", action="store_true", help="the size of FLUX.1")
    options = parser.parse_args()
    size, on_gpu = FULL if options.full else SMALL, torch.cuda.is_available()
    device, dtype = torch.device("cpu"), torch.float32
    if on_gpu:
        device, dtype = torch.device("cuda", int(os.environ["LOCAL_RANK"])), torch.bfloat16
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)

    torch.manual_seed(0)  # weights, too, are equal on all ranks
    pipe = make_pipeline(size).to(device, dtype)
    pipe.set_progress_bar_config(disable=True)
    tokens = torch.randint(3, 1000, (1, size["call"]["text_tokens"]), device=device)
    with torch.no_grad():
        prompt = {
            "prompt_embeds": pipe.text_encoder_2(tokens).last_hidden_state,
            "pooled_prompt_embeds": pipe.text_encoder(tokens[:, :77]).pooler_output,
        }

    # The arguments that the pipeline gives its transformer are the example arguments.
    calls: list[dict[str, Any]] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(kwargs)

    hook = pipe.transformer.register_forward_pre_hook(record, with_kwargs=True)
    dense = make_image(pipe, prompt, size["call"])
    hook.remove()

    runner = md.compile(
        pipe.transformer,
        kwargs=calls[0],
        mesh=md.Mesh(cp=dist.get_world_size()),
        parallel=md.ContextParallel("cp", "ulysses"),
        compute=options.compute or ("auto" if on_gpu else "inductor"),
        check=not options.full,  # in fp64 it would need more memory than a GPU has
    )
    with runner:
        pipe.transformer = runner.as_module(pipe.transformer)
        image = make_image(pipe, prompt, size["call"])
    error = (torch.linalg.vector_norm(image - dense) / torch.linalg.vector_norm(dense)).item()
    if dist.get_rank() == 0:
        print(f"image {list(image.shape)}, {len(calls)} steps; relative error against the dense pipeline {error:.1e}")
    dist.destroy_process_group()
    allowed = 1e-5 if dtype is torch.float32 else 5e-2
    if not error <= allowed:
        raise SystemExit(f"the error is {error:.1e}, and {allowed} is rounding")


if __name__ == "__main__":
    main()
