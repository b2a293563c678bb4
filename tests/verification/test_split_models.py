"""Models of diffusers that split a sequence, as their pipelines call them: through verification, on 2 and 4 ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import Cosmos3OmniTransformer, QwenImageTransformer2DModel
from models import Call, flux, ltx

import torchtrt_md as md

TEXT, SOUND, FRAMES, ROWS, COLUMNS = 5, 3, 2, 3, 3
# Cosmos 3: what is generated is split, the text is whole; or both are.
ONE_PATHWAY = {
    "layers.0": {"gen_seq": md.Split(0)},
    "layers.*": {"rotary_emb": (None, None, md.Split(0), md.Split(0))},
    "norm_moe_gen": md.Gather(0),
}
BOTH_PATHWAYS = {
    "layers.0": {"und_seq": md.Split(0), "gen_seq": md.Split(0)},
    "layers.*": {"rotary_emb": [md.Split(0)] * 4},
    "norm": md.Gather(0),
    "norm_moe_gen": md.Gather(0),
}


def cosmos3() -> Call:
    torch.manual_seed(0)
    model = Cosmos3OmniTransformer(
        head_dim=16,
        hidden_size=64,
        intermediate_size=96,
        latent_channel=4,
        patch_latent_dim=16,
        num_attention_heads=4,
        num_hidden_layers=2,
        num_key_value_heads=2,
        vocab_size=64,
        sound_gen=True,
        sound_dim=8,
        rope_axes_dim=(4, 2, 2),
    )
    vision = FRAMES * ROWS * COLUMNS
    positions = torch.arange(TEXT + vision + SOUND)
    return (
        model.eval(),
        (),
        {
            "input_ids": torch.randint(0, 64, (TEXT,)),
            "text_indexes": positions[:TEXT],
            "position_ids": positions.expand(3, -1),
            "und_len": TEXT,
            "sequence_length": len(positions),
            "vision_tokens": [torch.randn(1, 4, FRAMES, 2 * ROWS, 2 * COLUMNS - 1)],
            "vision_token_shapes": [(FRAMES, ROWS, COLUMNS)],
            "vision_sequence_indexes": positions[TEXT : TEXT + vision],
            "vision_mse_loss_indexes": positions[TEXT : TEXT + vision],
            "vision_timesteps": torch.full((vision,), 500.0),
            "vision_noisy_frame_indexes": [torch.arange(FRAMES)],
            "sound_tokens": [torch.randn(8, SOUND)],
            "sound_token_shapes": [(SOUND, 1, 1)],
            "sound_sequence_indexes": positions[-SOUND:],
            "sound_mse_loss_indexes": positions[-SOUND:],
            "sound_timesteps": torch.full((SOUND,), 500.0),
            "sound_noisy_frame_indexes": [torch.arange(SOUND)],
            "return_dict": False,
        },
    )


class Seamed(Cosmos3OmniTransformer):  # type: ignore[misc]
    """Its own seams, with md.split and md.gather in them."""

    def _cp_shard_fn(self, und: Any, gen: Any, tables: Any) -> Any:
        return und, md.split(gen, 0, "cp"), (*tables[:2], *(md.split(table, 0, "cp") for table in tables[2:]))

    def _cp_gather_fn(self, und: Any, gen: Any) -> Any:
        return und, md.gather(gen, 0, "cp")


def verified(call: Call, size: int, strategy: Any, plan: Any = None) -> None:
    model, args, kwargs = call
    parallel = md.ContextParallel("cp", strategy, plan=plan)
    program = md.capture(model, args, kwargs, mesh=md.Mesh(cp=size), parallel=parallel)
    lowered = md.lower(program, placement="split" if strategy == "ring" else "engine")
    assert md.verify(lowered, model, args, kwargs).error <= 1e-5


@pytest.mark.parametrize("strategy", ["ulysses", "allgather_kv", "ring"])
def test_cosmos3_with_whole_text(strategy: str) -> None:
    """37 tokens of vision and sound on 4 ranks; two key/value heads, so ulysses repeats each."""
    verified(cosmos3(), 4, strategy, ONE_PATHWAY)


def test_cosmos3_by_both_pathways_and_by_its_seams() -> None:
    verified(cosmos3(), 2, "ulysses", BOTH_PATHWAYS)
    model, args, kwargs = cosmos3()
    model.__class__ = Seamed
    verified((model, args, kwargs), 2, "allgather_kv", {})


def qwen_image() -> Call:
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(
        patch_size=1,
        in_channels=8,
        out_channels=8,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    kept = torch.ones(1, 7)
    kept[:, 5:] = 0
    return (
        model.eval(),
        (),
        {
            "hidden_states": torch.randn(1, 12, 8),
            "encoder_hidden_states": torch.randn(1, 7, 16),
            "encoder_hidden_states_mask": kept.bool(),
            "timestep": torch.tensor([0.5]),
            "img_shapes": [(1, 3, 4)],
            "return_dict": False,
        },
    )


@pytest.mark.parametrize(
    ("name", "strategy", "size"),
    [("ltx", "ulysses", 4), ("ltx", "ring", 2), ("qwen", "allgather_kv", 4), ("qwen", "ring", 2)],
)
def test_a_masked_prompt_of_an_odd_length(name: str, strategy: str, size: int) -> None:
    verified({"ltx": ltx, "qwen": qwen_image}[name](), size, strategy)


@pytest.mark.parametrize("strategy", ["ulysses", "allgather_kv", "ring"])
def test_flux_of_lengths_and_heads_that_do_not_divide(strategy: str) -> None:
    verified(flux(heads=6, image=30, text=37), 4, strategy)
