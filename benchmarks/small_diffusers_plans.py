"""Every transformer of diffusers without a plan for a split sequence, small, with a plan of a few lines given by hand.

Which classes there are, the library says.  What are listed here are the calls, as small_diffusers.py has them, and the
plans.  Most are one: split what the first block is called with, and gather what the last projection gives.  Tables of
positions, masks and text need no entries: what is not named follows what is split, or stays whole.

A tensor-parallel plan is made of the names that diffusers' layers have, for every class without a plan of that kind.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

import torchtrt_md as md
from benchmarks import small_diffusers
from benchmarks.small_diffusers import (
    COLUMNS,
    FRAMES,
    HEAD_DIM,
    HEADS,
    IMAGE,
    LAYERS,
    ROWS,
    TEXT,
    WIDTH,
    PipelineCall,
    _kept,
)

HEIGHT, BREADTH = 5, 3  # of a picture, in tokens: no ranks divide them
PICTURE = HEIGHT * BREADTH
STRATEGIES = ["ulysses", "allgather_kv", "ring"]
TEXT_WIDTH = 32
HALF = torch.tensor([0.5])
STEP = torch.tensor([500])
SPLIT, GATHER = md.Split(1), md.Gather(1)
AXES = (4, 6, 6)
LAST = LAYERS - 1


def classes() -> dict[str, type[Any]]:
    """The transformers of the installed diffusers without a plan for a split sequence, by name."""
    import diffusers

    found = {name: getattr(diffusers, name, None) for name in dir(diffusers) if "Transformer" in name or "DiT" in name}
    return {
        name: c
        for name, c in sorted(found.items())
        if isinstance(c, type)
        and c.__module__.startswith("diffusers.models.transformers.")
        and issubclass(c, torch.nn.Module)
        and not getattr(c, "_cp_plan", None)
    }


def calls(name: str) -> list[str]:
    """What calls of a class are named by: itself, and what is different about the call."""
    return [f"{name}, {what}" if what else name for what in CALLS.get(name, {})]


def listed(call: str) -> tuple[PipelineCall, dict[str, Any]]:
    """A call, and the plan of its class."""
    name, _, what = call.partition(", ")
    found, plan = CALLS[name][what], PLANS[name]
    return found, {f"model.{path}".rstrip("."): entry for path, entry in plan.items()} if found.held else plan


def made(call: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The model, small, and a call of it."""
    found, _ = listed(call)
    return small_diffusers.make(classes()[call.partition(", ")[0]], found)


def tensor_plan(model: torch.nn.Module) -> dict[str, Any]:
    """Each rank some heads of every attention, and a part of every feed-forward layer.

    Models count their heads themselves, so attention runs on DTensors.
    """
    linear = {path: m for path, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    plan: dict[str, Any] = {}
    attentions = set()
    for path in linear:
        owner, _, name = path.rpartition(".")
        if re.fullmatch(r"to_[qkv]|add_[qkv]_proj", name):
            plan[path] = ColwiseParallel(use_local_output=False)
            attentions.add(owner)
    for owner in attentions:
        results = [f"{owner}.{name}" for name in ("to_out.0", "to_out", "to_add_out")]
        plan |= {path: RowwiseParallel() for path in results if path in linear}
    for path, last in linear.items():
        first = re.sub(r"net\.2$", "net.0.proj", path)
        if first in plan or first not in linear or first == path:
            continue
        gated = linear[first].out_features == 2 * last.in_features  # two layers in one
        plan |= {first: "packed_colwise" if gated else "colwise", path: "rowwise"}
    if not plan:
        raise LookupError("no layer has a name by which a plan can be made")
    return plan


def _picture(config: Any, channels: int = 0) -> Tensor:
    patch = config.patch_size
    height, width = patch[-2:] if isinstance(patch, (tuple, list)) else (patch, patch)
    return torch.randn(1, channels or config.in_channels, HEIGHT * height, BREADTH * width)


def _video(config: Any, channels: int = 0) -> Tensor:
    """[batch, channels, frames, height, width]"""
    patch = config.patch_size
    height, width = patch[-2:] if isinstance(patch, (tuple, list)) else (patch, patch)
    return torch.randn(1, channels or config.in_channels, FRAMES, ROWS * height, COLUMNS * width)


def _text(width: int = TEXT_WIDTH) -> Tensor:
    return torch.randn(1, TEXT, width)


def _sizes() -> dict[str, Tensor]:
    size = torch.tensor([[64.0, 48.0]])
    return {"original_size": size, "target_size": size, "crop_coords": torch.zeros(1, 2)}


def _grid(first: float = 0.0) -> Tensor:
    return torch.cartesian_prod(torch.full((1,), first), torch.arange(float(HEIGHT)), torch.arange(float(BREADTH)))


def _pixart(config: Any) -> dict[str, Any]:
    return {
        "hidden_states": _picture(config),
        "encoder_hidden_states": _text(),
        "encoder_attention_mask": _kept().long(),
        "timestep": STEP,
        "added_cond_kwargs": {"resolution": torch.tensor([[64.0, 48.0]]), "aspect_ratio": torch.tensor([[1.33]])},
    }


def _sd3(config: Any) -> dict[str, Any]:
    return {
        "hidden_states": _picture(config),
        "timestep": STEP,
        "encoder_hidden_states": _text(),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim),
        "joint_attention_kwargs": None,
    }


def _aura_flow(config: Any) -> dict[str, Any]:
    return {"hidden_states": _picture(config), "encoder_hidden_states": _text(), "timestep": HALF}


def _sana(config: Any) -> dict[str, Any]:
    return {
        "hidden_states": _picture(config),
        "encoder_hidden_states": _text(),
        "encoder_attention_mask": _kept().long(),
        "timestep": STEP,
    }


def _sana_video(config: Any) -> dict[str, Any]:
    return {**_sana(config), "hidden_states": _video(config)}


def _cogvideox(config: Any) -> dict[str, Any]:
    angles = torch.randn(IMAGE, config.attention_head_dim)
    return {
        "hidden_states": _video(config).transpose(1, 2),
        "encoder_hidden_states": _text(),
        "timestep": STEP,
        "image_rotary_emb": (angles.cos(), angles.sin()),
        "attention_kwargs": None,
    }


def _consisid(config: Any) -> dict[str, Any]:
    face = [torch.randn(1, 6, config.LFE_vit_dim) for _ in range(config.LFE_num_scale)]
    return {**_cogvideox(config), "id_cond": torch.randn(1, config.LFE_id_dim), "id_vit_hidden": face}


def _cogview(config: Any) -> dict[str, Any]:
    return {"hidden_states": _picture(config), "encoder_hidden_states": _text(), "timestep": STEP, **_sizes()}


def _mochi(config: Any) -> dict[str, Any]:
    return {
        "hidden_states": _video(config),
        "encoder_hidden_states": _text(),
        "timestep": STEP,
        "encoder_attention_mask": _kept(),
        "attention_kwargs": None,
    }


def _allegro(config: Any) -> dict[str, Any]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    extent = (ROWS, COLUMNS)
    *axes, steps, rows, columns = get_3d_rotary_pos_embed_allegro(
        config.attention_head_dim, ((0, 0), extent), extent, FRAMES
    )
    places = torch.cartesian_prod(steps.long(), rows.long(), columns.long()).T[:, None]
    return {
        "hidden_states": _video(config),
        "encoder_hidden_states": _text(),
        "timestep": STEP,
        "encoder_attention_mask": _kept().long(),
        "image_rotary_emb": (tuple(axes), tuple(places)),
    }


def _latte(config: Any) -> dict[str, Any]:
    return {"hidden_states": _video(config), "encoder_hidden_states": _text(), "timestep": STEP}


def _hidream(config: Any) -> dict[str, Any]:
    return {
        "hidden_states": _picture(config),
        "timesteps": STEP,
        "encoder_hidden_states_t5": _text(),
        "encoder_hidden_states_llama3": torch.randn(2 * LAYERS, 1, TEXT, TEXT_WIDTH),
        "pooled_embeds": torch.randn(1, config.text_emb_dim),
    }


def _easy_animate(config: Any) -> dict[str, Any]:
    return {"hidden_states": _video(config), "timestep": STEP, "encoder_hidden_states": _text()}


def _dit(config: Any) -> dict[str, Any]:
    side = 5 * config.patch_size
    return {
        "hidden_states": torch.randn(1, config.in_channels, side, side),
        "timestep": STEP,
        "class_labels": torch.tensor([3]),
    }


def _in_a_unet(config: Any) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, config.in_channels, HEIGHT, BREADTH),
        "encoder_hidden_states": _text(),
        "encoder_attention_mask": None,
    }


def _temporal(config: Any) -> dict[str, Any]:
    return {"hidden_states": torch.randn(4, config.in_channels, HEIGHT, BREADTH), "num_frames": 4}


def _lumina2(config: Any) -> dict[str, Any]:
    return {
        "hidden_states": _picture(config),
        "timestep": HALF,
        "encoder_hidden_states": _text(),
        "encoder_attention_mask": _kept(),
    }


def _flux(config: Any) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, PICTURE, config.in_channels),
        "timestep": HALF,
        "encoder_hidden_states": _text(),
        "txt_ids": torch.zeros(TEXT, 3),
        "img_ids": _grid(),
    }


def _chroma(config: Any) -> dict[str, Any]:
    mask = torch.cat([_kept(), torch.ones(1, PICTURE, dtype=torch.bool)], 1)
    return {**_flux(config), "attention_mask": mask, "joint_attention_kwargs": None}


def _bria(config: Any) -> dict[str, Any]:
    return {**_flux(config), "timestep": STEP}


def _bria_fibo(config: Any) -> dict[str, Any]:
    count = config.num_layers + config.num_single_layers
    mask = torch.cat([_kept(), torch.ones(1, PICTURE, dtype=torch.bool)], 1).float()
    scores = torch.where(torch.einsum("bi,bj->bij", mask, mask) == 1, 0.0, -torch.inf)
    return {
        **_bria(config),
        "text_encoder_layers": [_text() for _ in range(count)],
        "joint_attention_kwargs": {"attention_mask": scores.clamp(min=-1e4)[:, None]},
    }


def _bria_fibo2(config: Any) -> dict[str, Any]:
    return {
        "hidden_states": _picture(config),
        "timestep": HALF,
        "encoder_hidden_states": torch.randn(1, 1 + len(config.injection_layer_ids), TEXT, TEXT_WIDTH),
        "encoder_attention_mask": _kept(),
    }


def _flux3(config: Any) -> dict[str, Any]:
    zeros = torch.zeros(PICTURE, 1)
    return {
        **_flux(config),
        "img_ids": torch.cat([_grid(), zeros], 1),
        "txt_ids": torch.cartesian_prod(*[torch.zeros(1)] * 3, torch.arange(float(TEXT))),
        "attention_kwargs": None,
    }


def _hunyuan_video(config: Any) -> dict[str, Any]:
    return {
        "hidden_states": _video(config),
        "timestep": STEP,
        "encoder_hidden_states": _text(),
        "encoder_attention_mask": _kept(),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim),
        "guidance": torch.tensor([6000.0]),
        "attention_kwargs": None,
    }


def _framepack(config: Any) -> dict[str, Any]:
    shape = (ROWS * config.patch_size, COLUMNS * config.patch_size)
    return {
        **_hunyuan_video(config),
        "image_embeds": torch.randn(1, 5, config.image_proj_dim),
        "indices_latents": torch.arange(8, 8 + FRAMES),
        "latents_clean": torch.randn(1, config.in_channels, 2, *shape),
        "indices_latents_clean": torch.tensor([0, 7]),
        "latents_history_2x": torch.randn(1, config.in_channels, 2, *shape),
        "indices_latents_history_2x": torch.arange(5, 7),
        "latents_history_4x": torch.randn(1, config.in_channels, 4, *shape),
        "indices_latents_history_4x": torch.arange(1, 5),
    }


def _hunyuan_video15(config: Any) -> dict[str, Any]:
    return {
        "hidden_states": _video(config),
        "timestep": STEP.float(),
        "encoder_hidden_states": _text(),
        "encoder_attention_mask": _kept().long(),
        "encoder_hidden_states_2": torch.randn(1, 4, config.text_embed_2_dim),
        "encoder_attention_mask_2": torch.ones(1, 4, dtype=torch.long),
        "image_embeds": torch.zeros(1, 5, config.image_embed_dim),
    }


def _hunyuan_image(config: Any) -> dict[str, Any]:
    return {
        "hidden_states": _picture(config),
        "timestep": STEP.float(),
        "encoder_hidden_states": _text(),
        "encoder_attention_mask": _kept().long(),
        "attention_kwargs": None,
    }


def _hunyuan_image_glyphs(config: Any) -> dict[str, Any]:
    return {
        **_hunyuan_image(config),
        "encoder_hidden_states_2": torch.randn(1, 4, config.text_embed_2_dim),
        "encoder_attention_mask_2": torch.ones(1, 4, dtype=torch.long),
    }


def _hunyuan_dit(config: Any) -> dict[str, Any]:
    angles = torch.randn(PICTURE, config.attention_head_dim)
    return {
        "hidden_states": _picture(config),
        "timestep": STEP.float(),
        "encoder_hidden_states": torch.randn(1, TEXT, config.cross_attention_dim),
        "text_embedding_mask": _kept().long(),
        "encoder_hidden_states_t5": torch.randn(1, 6, config.cross_attention_dim_t5),
        "text_embedding_mask_t5": torch.ones(1, 6, dtype=torch.long),
        "image_meta_size": torch.tensor([[64.0, 48.0, 64.0, 48.0, 0.0, 0.0]]),
        "style": torch.zeros(1, dtype=torch.long),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def _lumina_next(config: Any) -> dict[str, Any]:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    return {
        "hidden_states": _picture(config),
        "timestep": HALF,
        "encoder_hidden_states": torch.randn(1, TEXT, config.cross_attention_dim),
        "encoder_mask": _kept().long(),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(HEAD_DIM, 16, 16),
        "cross_attention_kwargs": {},
    }


def _stable_audio(config: Any) -> dict[str, Any]:
    angles = torch.randn(PICTURE + 1, config.attention_head_dim // 2)
    return {
        "hidden_states": torch.randn(1, config.in_channels, PICTURE),
        "timestep": HALF,
        "encoder_hidden_states": torch.randn(1, TEXT, config.cross_attention_input_dim),
        "global_hidden_states": torch.randn(1, 1, config.global_states_input_dim),
        "rotary_embedding": (angles.cos(), angles.sin()),
    }


def _cosmos(config: Any) -> dict[str, Any]:
    video = _video(config)
    return {
        "hidden_states": video,
        "timestep": HALF,
        "encoder_hidden_states": _text(),
        "fps": 30,
        "padding_mask": torch.zeros(1, 1, *video.shape[-2:]),
    }


def _prx(config: Any) -> dict[str, Any]:
    return {
        "hidden_states": _picture(config),
        "timestep": HALF,
        "encoder_hidden_states": _text(),
        "attention_mask": _kept(),
    }


def _skyreels(config: Any) -> dict[str, Any]:
    return {"hidden_states": _video(config), "timestep": STEP, "encoder_hidden_states": _text()}


def _skyreels_forcing(config: Any) -> dict[str, Any]:
    steps = torch.tensor([[0, 250, 500]])
    return {**_skyreels(config), "timestep": steps, "enable_diffusion_forcing": True, "fps": torch.tensor([0])}


def _any_flow(config: Any) -> dict[str, Any]:
    return {
        "hidden_states": _video(config).transpose(1, 2),
        "timestep": torch.full((1, FRAMES), 500.0),
        "r_timestep": torch.full((1, FRAMES), 400.0),
        "encoder_hidden_states": _text(),
    }


def _vace(config: Any) -> dict[str, Any]:
    return {
        "hidden_states": _video(config),
        "timestep": STEP,
        "encoder_hidden_states": _text(),
        "control_hidden_states": _video(config, config.vace_in_channels),
        "control_hidden_states_scale": torch.ones(len(config.vace_layers)),
    }


def _wan_animate(config: Any) -> dict[str, Any]:
    video, pose = _video(config), _video(config, config.latent_channels)
    return {
        "hidden_states": video,
        "timestep": STEP,
        "encoder_hidden_states": _text(),
        "encoder_hidden_states_image": torch.randn(1, 5, config.image_dim),
        "pose_hidden_states": pose[:, :, 1:],
        "face_pixel_values": torch.randn(1, 3, 8, config.motion_encoder_size, config.motion_encoder_size),
    }


def _kandinsky5(config: Any) -> dict[str, Any]:
    _, height, width = config.patch_size
    return {
        "hidden_states": torch.randn(1, FRAMES, ROWS * height, COLUMNS * width, config.in_visual_dim),
        "encoder_hidden_states": _text(),
        "timestep": STEP.float(),
        "pooled_projections": torch.randn(1, config.in_text_dim2),
        "visual_rope_pos": [torch.arange(FRAMES), torch.arange(ROWS), torch.arange(COLUMNS)],
        "text_rope_pos": torch.arange(TEXT),
    }


def _kandinsky6(config: Any) -> dict[str, Any]:
    _, height, width = config.patch_size
    channels = 2 * config.in_visual_dim + 1
    return {
        "hidden_states": torch.randn(1, FRAMES, ROWS * height, COLUMNS * width, channels),
        "encoder_hidden_states": _text(),
        "timestep": STEP.float(),
        "pooled_projections": torch.randn(1, config.in_text_dim2),
        "audio_hidden_states": torch.randn(1, 5, config.in_audio_dim),
        "encoder_attention_mask": _kept(),
    }


def _z_image(config: Any) -> dict[str, Any]:
    return {
        "x": [torch.randn(config.in_channels, 1, 2 * HEIGHT, 2 * BREADTH)],
        "t": HALF,
        "cap_feats": [torch.randn(TEXT, TEXT_WIDTH)],
    }


def _ace_step(config: Any) -> dict[str, Any]:
    length = 2 * PICTURE
    return {
        "hidden_states": torch.randn(1, length, config.audio_acoustic_hidden_dim),
        "timestep": HALF,
        "timestep_r": HALF,
        "encoder_hidden_states": _text(),
        "context_latents": torch.randn(1, length, config.in_channels - config.audio_acoustic_hidden_dim),
    }


def _glm_image(config: Any) -> dict[str, Any]:
    sizes = _sizes()
    return {
        "hidden_states": _picture(config),
        "encoder_hidden_states": _text(),
        "prior_token_id": torch.arange(PICTURE)[None],
        "prior_token_drop": torch.zeros(1, PICTURE, dtype=torch.bool),
        "timestep": STEP,
        "target_size": sizes["target_size"],
        "crop_coords": sizes["crop_coords"],
    }


def _ernie(config: Any) -> dict[str, Any]:
    return {"hidden_states": _picture(config), "timestep": STEP, "text_bth": _text(), "text_lens": torch.tensor([5])}


def _ideogram4(config: Any) -> dict[str, Any]:
    from diffusers.models.transformers import transformer_ideogram4 as module

    total = TEXT + PICTURE
    kinds = torch.tensor([module.LLM_TOKEN_INDICATOR] * TEXT + [module.OUTPUT_IMAGE_INDICATOR] * PICTURE)
    before = torch.arange(TEXT)[:, None].expand(-1, 3)
    return {
        "hidden_states": torch.randn(1, total, config.in_channels),
        "timestep": HALF,
        "encoder_hidden_states": torch.randn(1, total, TEXT_WIDTH),
        "position_ids": torch.cat([before, _grid(float(TEXT)).long()])[None],
        "segment_ids": torch.cat([torch.full((2,), -1), torch.ones(total - 2)]).long()[None],
        "indicator": kinds[None],
    }


def _joy_image(config: Any) -> dict[str, Any]:
    return {"hidden_states": _video(config), "timestep": STEP, "encoder_hidden_states": _text()}


def _joy_image_plus(config: Any) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 21, config.in_channels, *config.patch_size),
        "timestep": STEP,
        "encoder_hidden_states": _text(),
        "encoder_hidden_states_mask": _kept().float(),
        "shape_list": [[(1, 3, 3), (1, 3, 3)]],
    }


def _krea2(config: Any) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, PICTURE, config.in_channels),
        "encoder_hidden_states": torch.randn(1, TEXT, config.num_text_layers, config.text_hidden_dim),
        "timestep": HALF,
        "position_ids": torch.cat([torch.zeros(TEXT, 3), _grid()]),
        "encoder_attention_mask": _kept(),
    }


def _music3(config: Any) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, config.in_channels, PICTURE),
        "timestep": HALF,
        "encoder_hidden_states": torch.randn(1, PICTURE, config.condition_dim),
    }


def _motif(config: Any) -> dict[str, Any]:
    return {
        "hidden_states": _video(config),
        "timestep": STEP,
        "encoder_hidden_states": _text(),
        "encoder_attention_mask": _kept(),
    }


def _nucleus(config: Any) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, PICTURE, config.in_channels),
        "img_shapes": [(1, HEIGHT, BREADTH)],
        "encoder_hidden_states": _text(),
        "encoder_hidden_states_mask": _kept(),
        "timestep": HALF,
    }


def _omnigen(config: Any) -> dict[str, Any]:
    total = TEXT + 1 + PICTURE
    mask = torch.ones(total, total).tril()
    mask[TEXT + 1 :, TEXT + 1 :] = 1
    mask[:, :2] = 0  # padding on the left
    mask[:2, :2] = torch.eye(2)
    return {
        "hidden_states": _picture(config),
        "timestep": HALF,
        "input_ids": torch.arange(TEXT)[None],
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": mask[None],
        "position_ids": torch.arange(total)[None],
    }


def _prior(config: Any) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, config.embedding_dim),
        "timestep": STEP[0],
        "proj_embedding": torch.randn(1, config.embedding_dim),
        "encoder_hidden_states": _text(config.embedding_dim),
        "attention_mask": _kept(),
    }


def _audio_dit(config: Any) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, PICTURE, config.latent_dim),
        "encoder_hidden_states": _text(config.dit_text_dim),
        "encoder_attention_mask": _kept(),
        "timestep": HALF,
        "attention_mask": torch.ones(1, PICTURE, dtype=torch.bool),
        "latent_cond": torch.randn(1, PICTURE, config.latent_dim),
    }


_PIXART = {"attention_head_dim": 24, "cross_attention_dim": 96, "caption_channels": TEXT_WIDTH}
_COG = {"text_embed_dim": TEXT_WIDTH, "sample_height": 6, "sample_width": 6, "sample_frames": 9}
_ROTARY = {"use_rotary_positional_embeddings": True}
_HUNYUAN = {"text_embed_dim": TEXT_WIDTH, "rope_axes_dim": AXES}

# Class -> what is different about a call -> the call.
CALLS: dict[str, dict[str, PipelineCall]] = {
    "AceStepTransformer1DModel": {
        "": PipelineCall(
            _ace_step,
            {
                "num_hidden_layers": LAYERS,
                "num_key_value_heads": 2,
                "head_dim": HEAD_DIM,
                "intermediate_size": 96,
                "encoder_hidden_size": TEXT_WIDTH,
                "sliding_window": 4,
            },
        )
    },
    "AllegroTransformer3DModel": {"": PipelineCall(_allegro, _PIXART)},
    "AnyFlowTransformer3DModel": {"": PipelineCall(_any_flow)},
    "AuraFlowTransformer2DModel": {
        "": PipelineCall(
            _aura_flow,
            {
                "num_mmdit_layers": LAYERS,
                "num_single_dit_layers": LAYERS,
                "caption_projection_dim": WIDTH,
                "pos_embed_max_size": 64,
            },
        )
    },
    "BriaFibo2Transformer2DModel": {
        "": PipelineCall(
            _bria_fibo2,
            {
                "in_channels": 8,
                "dim": WIDTH,
                "n_layers": LAYERS,
                "n_heads": HEADS,
                "cap_feat_dim": TEXT_WIDTH,
                "injection_layer_ids": (1,),
                "axes_dims": AXES,
                "axes_lens": (64, 16, 16),
                "min_num_gist_tokens": 4,
                "max_num_gist_tokens": 8,
                "gist_step": 2,
                "gist_min_text_len": 4,
                "gist_max_text_len": 8,
            },
        )
    },
    "BriaFiboTransformer2DModel": {"": PipelineCall(_bria_fibo, {"text_encoder_dim": TEXT_WIDTH})},
    "BriaTransformer2DModel": {"": PipelineCall(_bria)},
    "ChromaTransformer2DModel": {"": PipelineCall(_chroma, {"approximator_hidden_dim": 32, "approximator_layers": 2})},
    "CogVideoXTransformer3DModel": {"": PipelineCall(_cogvideox, {**_COG, **_ROTARY})},
    "CogView3PlusTransformer2DModel": {
        "": PipelineCall(_cogview, {"text_embed_dim": TEXT_WIDTH, "condition_dim": 16, "pos_embed_max_size": 8})
    },
    "CogView4Transformer2DModel": {
        "": PipelineCall(_cogview, {"text_embed_dim": TEXT_WIDTH, "condition_dim": 16, "rope_axes_dim": (16, 16)})
    },
    "ConsisIDTransformer3DModel": {
        "": PipelineCall(
            _consisid,
            {
                **_COG,
                **_ROTARY,
                "attention_head_dim": 24,
                "is_train_face": True,
                "cross_attn_dim_head": 16,
                "cross_attn_num_heads": HEADS,
                "LFE_id_dim": 16,
                "LFE_vit_dim": 1024,
                "LFE_depth": 5,
                "LFE_dim_head": 16,
                "LFE_num_heads": 2,
                "LFE_num_querie": 6,
                "LFE_output_dim": 64,
                "LFE_ff_mult": 2,
            },
        )
    },
    "CosmosTransformer3DModel": {
        "": PipelineCall(
            _cosmos,  # without the padding mask, which torchvision resizes
            {"text_embed_dim": TEXT_WIDTH, "max_size": (8, 12, 12), "adaln_lora_dim": 16, "concat_padding_mask": False},
        )
    },
    "DiTTransformer2DModel": {"": PipelineCall(_dit, {"num_embeds_ada_norm": 10})},
    "DreamLiteTransformer2DModel": {
        "": PipelineCall(_in_a_unet, {"in_channels": WIDTH, "num_layers": LAYERS, "cross_attention_dim": TEXT_WIDTH})
    },
    "EasyAnimateTransformer3DModel": {
        "": PipelineCall(
            _easy_animate,
            {
                "in_channels": 16,
                "out_channels": 16,
                "patch_size": 2,
                "text_embed_dim": TEXT_WIDTH,
            },
        )
    },
    "ErnieImageTransformer2DModel": {
        "": PipelineCall(
            _ernie, {"ffn_hidden_size": 96, "in_channels": 8, "text_in_dim": TEXT_WIDTH, "rope_axes_dim": AXES}
        )
    },
    "Flux3Transformer2DModel": {"": PipelineCall(_flux3)},
    "GlmImageTransformer2DModel": {
        "": PipelineCall(
            _glm_image,
            {"text_embed_dim": TEXT_WIDTH, "condition_dim": 16, "prior_vq_quantizer_codebook_size": 32},
        )
    },
    "HiDreamImageTransformer2DModel": {
        "": PipelineCall(
            _hidream,
            {
                "patch_size": 2,
                "in_channels": 4,
                "caption_channels": [TEXT_WIDTH, TEXT_WIDTH],
                "text_emb_dim": TEXT_WIDTH,
                "axes_dims_rope": AXES,
                "llama_layers": list(range(2 * LAYERS)),
            },
        )
    },
    "HunyuanDiT2DModel": {
        "": PipelineCall(
            _hunyuan_dit,
            {
                "num_layers": 4,
                "patch_size": 2,
                "in_channels": 4,
                "cross_attention_dim": TEXT_WIDTH,
                "cross_attention_dim_t5": 48,
                "pooled_projection_dim": 16,
                "text_len": TEXT,
                "text_len_t5": 6,
                "activation_fn": "gelu-approximate",
            },
        )
    },
    "HunyuanImageTransformer2DModel": {
        "": PipelineCall(_hunyuan_image, {"text_embed_dim": TEXT_WIDTH, "rope_axes_dim": (8, 8)}),
        "glyphs": PipelineCall(
            _hunyuan_image_glyphs, {"text_embed_dim": TEXT_WIDTH, "rope_axes_dim": (8, 8), "text_embed_2_dim": 48}
        ),
    },
    "HunyuanVideo15Transformer3DModel": {
        "": PipelineCall(_hunyuan_video15, {**_HUNYUAN, "text_embed_2_dim": 48, "image_embed_dim": 24})
    },
    "HunyuanVideoFramepackTransformer3DModel": {
        "": PipelineCall(
            _framepack, {**_HUNYUAN, "has_image_proj": True, "image_proj_dim": 24, "has_clean_x_embedder": True}
        )
    },
    "HunyuanVideoTransformer3DModel": {"": PipelineCall(_hunyuan_video, _HUNYUAN)},
    "Ideogram4Transformer2DModel": {
        "": PipelineCall(
            _ideogram4,
            {
                "in_channels": 8,
                "intermediate_size": 96,
                "adaln_dim": 32,
                "llm_features_dim": TEXT_WIDTH,
                "mrope_section": (4, 2, 2),
            },
        )
    },
    "JoyImageEditPlusTransformer3DModel": {
        "": PipelineCall(_joy_image_plus, {"text_dim": TEXT_WIDTH, "rope_dim_list": list(AXES)})
    },
    "JoyImageEditTransformer3DModel": {
        "": PipelineCall(_joy_image, {"text_dim": TEXT_WIDTH, "rope_dim_list": list(AXES)})
    },
    "Kandinsky5Transformer3DModel": {
        "": PipelineCall(
            _kandinsky5,
            {
                "in_text_dim": TEXT_WIDTH,
                "in_text_dim2": 24,
                "time_dim": 32,
                "model_dim": WIDTH,
                "ff_dim": 96,
                "num_text_blocks": 1,
                "num_visual_blocks": LAYERS,
                "axes_dims": AXES,
            },
        )
    },
    "Kandinsky6Transformer3DModel": {
        "": PipelineCall(
            _kandinsky6,
            {
                "in_visual_dim": 4,
                "out_visual_dim": 4,
                "in_text_dim": TEXT_WIDTH,
                "in_text_dim2": 24,
                "time_dim": 32,
                "model_dim": WIDTH,
                "ff_dim": 96,
                "num_text_blocks": 1,
                "num_visual_blocks": LAYERS,
                "axes_dims": AXES,
            },
        )
    },
    "Krea2Transformer2DModel": {
        "": PipelineCall(
            _krea2,
            {
                "in_channels": 8,
                "num_key_value_heads": 2,
                "intermediate_size": 96,
                "timestep_embed_dim": 32,
                "text_hidden_dim": TEXT_WIDTH,
                "num_text_layers": 3,
                "text_num_attention_heads": 2,
                "text_num_key_value_heads": 2,
                "text_intermediate_size": 48,
                "num_layerwise_text_blocks": 1,
                "num_refiner_text_blocks": 1,
            },
        )
    },
    "LatteTransformer3DModel": {
        "": PipelineCall(
            _latte,
            {
                "num_layers": LAYERS,
                "in_channels": 4,
                "out_channels": 8,
                "patch_size": 2,
                "sample_size": 16,
                "cross_attention_dim": WIDTH,
                "caption_channels": TEXT_WIDTH,
                "norm_type": "ada_norm_single",
                "num_embeds_ada_norm": 1000,
                "norm_elementwise_affine": False,
                "attention_bias": True,
                "activation_fn": "gelu-approximate",
                "video_length": FRAMES,
            },
        )
    },
    "LongCatAudioDiTTransformer": {
        "": PipelineCall(
            _audio_dit,
            {"dit_dim": WIDTH, "dit_depth": LAYERS, "dit_heads": HEADS, "dit_text_dim": TEXT_WIDTH, "latent_dim": 8},
        )
    },
    "LongCatImageTransformer2DModel": {"": PipelineCall(_flux)},
    "Lumina2Transformer2DModel": {
        "": PipelineCall(
            _lumina2,
            {
                "num_kv_heads": 2,
                "multiple_of": 32,
                "axes_dim_rope": AXES,
                "axes_lens": (64, 16, 16),
                "cap_feat_dim": TEXT_WIDTH,
            },
        )
    },
    "LuminaNextDiT2DModel": {
        "": PipelineCall(
            _lumina_next,
            {"num_kv_heads": 2, "multiple_of": 32, "cross_attention_dim": TEXT_WIDTH, "sample_size": 16},
        )
    },
    "MiniMaxMusic3Transformer1DModel": {
        "": PipelineCall(_music3, {"in_channels": 8, "condition_dim": 16, "ff_inner_dim": 96, "rotary_dim": 8})
    },
    "MochiTransformer3DModel": {"": PipelineCall(_mochi, {"text_embed_dim": TEXT_WIDTH})},
    "MotifVideoTransformer3DModel": {
        "": PipelineCall(_motif, _HUNYUAN),
        "cross-attention and a decoder": PipelineCall(
            _motif,
            {
                **_HUNYUAN,
                "num_single_layers": 3,
                "num_decoder_layers": 1,
                "enable_text_cross_attention_dual": True,
                "enable_text_cross_attention_single": True,
            },
        ),
    },
    "NucleusMoEImageTransformer2DModel": {
        "": PipelineCall(
            _nucleus,
            {
                "in_channels": 16,
                "num_layers": 5,
                "num_experts": 4,
                "moe_intermediate_dim": 32,
                "num_key_value_heads": 2,
                "capacity_factors": 2.0,
            },
        )
    },
    "OmniGenTransformer2DModel": {
        "": PipelineCall(
            _omnigen,
            {
                "num_key_value_heads": HEADS,
                "intermediate_size": 96,
                "vocab_size": 64,
                "pad_token_id": 0,
                "pos_embed_max_size": 8,
                "rope_scaling": {"long_factor": [1.0] * (HEAD_DIM // 2), "short_factor": [1.0] * (HEAD_DIM // 2)},
            },
        )
    },
    "OvisImageTransformer2DModel": {"": PipelineCall(_flux)},
    "PRXTransformer2DModel": {"": PipelineCall(_prx, {"num_heads": HEADS, "depth": LAYERS, "axes_dim": [8, 8]})},
    "PixArtTransformer2DModel": {"": PipelineCall(_pixart, _PIXART)},
    "PriorTransformer": {"": PipelineCall(_prior, {"embedding_dim": TEXT_WIDTH, "num_embeddings": TEXT})},
    "QwenImage21Transformer2DModel": small_diffusers.CALLS["QwenImage21Transformer2DModel"],
    "SD3Transformer2DModel": {
        "": PipelineCall(_sd3, {"caption_projection_dim": WIDTH, "sample_size": 16, "pos_embed_max_size": 16}),
        "dual attention": PipelineCall(
            _sd3,
            {
                "caption_projection_dim": WIDTH,
                "sample_size": 16,
                "pos_embed_max_size": 16,
                "dual_attention_layers": (0,),
                "qk_norm": "rms_norm",
            },
        ),
    },
    "SanaTransformer2DModel": {
        "": PipelineCall(
            _sana, {"num_cross_attention_heads": HEADS, "cross_attention_head_dim": HEAD_DIM, "in_channels": 8}
        )
    },
    "SanaVideoTransformer3DModel": {
        "": PipelineCall(_sana_video, {"num_cross_attention_heads": HEADS, "cross_attention_head_dim": HEAD_DIM})
    },
    "SkyReelsV2Transformer3DModel": {
        "": PipelineCall(_skyreels),
        "diffusion forcing": PipelineCall(_skyreels_forcing, {"inject_sample_info": True}),
    },
    "StableAudioDiTModel": {
        "": PipelineCall(
            _stable_audio,
            {
                "in_channels": 8,
                "num_key_value_attention_heads": 2,
                "out_channels": 8,
                "cross_attention_input_dim": 48,
                "global_states_input_dim": 24,
            },
        )
    },
    "Transformer2DModel": {
        "": PipelineCall(_in_a_unet, {"in_channels": WIDTH, "num_layers": LAYERS, "cross_attention_dim": TEXT_WIDTH}),
        "linear": PipelineCall(
            _in_a_unet,
            {
                "in_channels": WIDTH,
                "num_layers": LAYERS,
                "cross_attention_dim": TEXT_WIDTH,
                "use_linear_projection": True,
            },
        ),
    },
    "TransformerTemporalModel": {"": PipelineCall(_temporal, {"in_channels": WIDTH})},
    "WanAnimateTransformer3DModel": {
        "": PipelineCall(
            _wan_animate,
            {
                "image_dim": 48,
                "added_kv_proj_dim": WIDTH,
                "motion_encoder_channel_sizes": {"4": 8, "8": 8},
                "motion_encoder_size": 8,
                "motion_style_dim": 16,
                "motion_dim": 4,
                "motion_encoder_dim": 16,
                "face_encoder_hidden_dim": 32,
                "inject_face_latents_blocks": 2,
            },
        )
    },
    "WanVACETransformer3DModel": {"": PipelineCall(_vace, {"vace_layers": [0, 1]})},
    "ZImageTransformer2DModel": {
        "": PipelineCall(
            _z_image,
            {
                "dim": WIDTH,
                "n_layers": LAYERS,
                "n_refiner_layers": 1,
                "n_heads": HEADS,
                "n_kv_heads": HEADS,
                "cap_feat_dim": TEXT_WIDTH,
                "axes_dims": list(AXES),
                "axes_lens": [128, 32, 32],
            },
        )
    },
}

# What these classes compute of the values of a mask, or of positions, decides sizes.
for _name, _what, _held in (
    ("BriaFibo2Transformer2DModel", "", ("encoder_attention_mask",)),
    ("HunyuanImageTransformer2DModel", "glyphs", ("encoder_attention_mask", "encoder_attention_mask_2")),
    (
        "HunyuanVideo15Transformer3DModel",
        "",
        ("encoder_attention_mask", "encoder_attention_mask_2", "image_embeds"),
    ),
    ("HunyuanVideoFramepackTransformer3DModel", "", ("encoder_attention_mask",)),
    ("Lumina2Transformer2DModel", "", ("encoder_attention_mask",)),
    ("MochiTransformer3DModel", "", ("encoder_attention_mask",)),
    ("OmniGenTransformer2DModel", "", ("input_ids", "attention_mask", "position_ids")),
    ("QwenImage21Transformer2DModel", "", ("img_mask",)),
):
    _variant = ", ".join(filter(None, (_what, "what decides sizes is held")))
    CALLS[_name] = {**CALLS[_name], _variant: replace(CALLS[_name][_what], held=_held)}

_BLOCKS = {"transformer_blocks.0": {"hidden_states": SPLIT}, "proj_out": GATHER}
_WAN = {"blocks.0": {"hidden_states": SPLIT}, "proj_out": GATHER}
_FLUX = {"": {"hidden_states": SPLIT, "img_ids": md.Split(0)}, "proj_out": GATHER}
_UNET = {"transformer_blocks.0": {"hidden_states": SPLIT}, f"transformer_blocks.{LAST}": GATHER}
# Linear attention sums over keys and values, and a convolution reads its neighbors: these are gathered before.
_SANA = {
    **_BLOCKS,
    "transformer_blocks.*.attn1.to_k": GATHER,
    "transformer_blocks.*.attn1.to_v": GATHER,
    "transformer_blocks.*.norm2": GATHER,
}
_VISUAL = {"visual_transformer_blocks.0": {"visual_embed": SPLIT}, f"visual_transformer_blocks.{LAST}": GATHER}

# Class -> its plan.  The names of the last block have the number that a small model has.
PLANS: dict[str, dict[str, Any]] = {
    "AceStepTransformer1DModel": {"layers.0": {"hidden_states": SPLIT}, "norm_out": GATHER},
    "AllegroTransformer3DModel": _BLOCKS,
    "AnyFlowTransformer3DModel": _WAN,
    "AuraFlowTransformer2DModel": {"joint_transformer_blocks.0": {"hidden_states": SPLIT}, "proj_out": GATHER},
    "BriaFibo2Transformer2DModel": {"layers.0": {"x": SPLIT}, f"layers.{LAST}": GATHER},
    "BriaFiboTransformer2DModel": _FLUX,
    "BriaTransformer2DModel": _FLUX,
    "ChromaTransformer2DModel": _FLUX,
    "CogVideoXTransformer3DModel": _BLOCKS,
    "CogView3PlusTransformer2DModel": _BLOCKS,
    "CogView4Transformer2DModel": _BLOCKS,
    "ConsisIDTransformer3DModel": _BLOCKS,
    "CosmosTransformer3DModel": _BLOCKS,
    "DiTTransformer2DModel": {"transformer_blocks.0": {"hidden_states": SPLIT}, "proj_out_2": GATHER},
    "DreamLiteTransformer2DModel": _UNET,
    "EasyAnimateTransformer3DModel": _BLOCKS,
    "ErnieImageTransformer2DModel": {"layers.0": {"x": md.Split(0)}, "final_linear": md.Gather(0)},
    "Flux3Transformer2DModel": _FLUX,
    "GlmImageTransformer2DModel": _BLOCKS,
    "HiDreamImageTransformer2DModel": {"double_stream_blocks.0": {"hidden_states": SPLIT}, "final_layer": GATHER},
    "HunyuanDiT2DModel": {"blocks.0": {"hidden_states": SPLIT}, "proj_out": GATHER},
    "HunyuanImageTransformer2DModel": _BLOCKS,
    "HunyuanVideo15Transformer3DModel": _BLOCKS,
    # What it generates stands behind its history, and is cut out of both.
    "HunyuanVideoFramepackTransformer3DModel": {
        "transformer_blocks.0": {"hidden_states": SPLIT},
        f"single_transformer_blocks.{LAST}": [GATHER, None],
    },
    "HunyuanVideoTransformer3DModel": _BLOCKS,
    "Ideogram4Transformer2DModel": {"layers.0": {"hidden_states": SPLIT}, "final_layer": GATHER},
    "JoyImageEditPlusTransformer3DModel": {"double_blocks.0": {"hidden_states": SPLIT}, "proj_out": GATHER},
    "JoyImageEditTransformer3DModel": {"double_blocks.0": {"hidden_states": SPLIT}, "proj_out": GATHER},
    "Kandinsky5Transformer3DModel": _VISUAL,
    "Kandinsky6Transformer3DModel": {
        "visual_transformer_blocks.0": {"vis": SPLIT},
        f"visual_transformer_blocks.{LAST}": [GATHER, None],
    },
    "Krea2Transformer2DModel": {"": {"hidden_states": SPLIT}, "final_layer": GATHER},
    "LatteTransformer3DModel": _BLOCKS,
    "LongCatAudioDiTTransformer": _WAN,
    "LongCatImageTransformer2DModel": _FLUX,
    "Lumina2Transformer2DModel": {"layers.0": {"hidden_states": SPLIT}, "norm_out": GATHER},
    "LuminaNextDiT2DModel": {"layers.0": {"hidden_states": SPLIT}, "norm_out": GATHER},
    "MiniMaxMusic3Transformer1DModel": _UNET,
    "MochiTransformer3DModel": _BLOCKS,
    "MotifVideoTransformer3DModel": {"x_embedder": {0: md.Split(1, output=True)}, "proj_out": GATHER},
    # Its experts choose among all tokens: what they read is gathered.
    "NucleusMoEImageTransformer2DModel": {**_BLOCKS, "transformer_blocks.*.pre_mlp_norm": GATHER},
    "OmniGenTransformer2DModel": {"layers.0": {"hidden_states": SPLIT}, "norm": GATHER},
    "OvisImageTransformer2DModel": _FLUX,
    "PRXTransformer2DModel": {"blocks.0": {"hidden_states": SPLIT}, "final_layer": GATHER},
    "PixArtTransformer2DModel": _BLOCKS,
    "PriorTransformer": _UNET,
    "QwenImage21Transformer2DModel": _BLOCKS,
    "SD3Transformer2DModel": _BLOCKS,
    "SanaTransformer2DModel": _SANA,
    "SanaVideoTransformer3DModel": _SANA,
    "SkyReelsV2Transformer3DModel": _WAN,
    "StableAudioDiTModel": _UNET,
    "Transformer2DModel": _UNET,
    # Each place of a picture attends over time by itself: the places are split, and nothing is exchanged.
    "TransformerTemporalModel": {"proj_in": {"input": md.Split(0)}, "proj_out": md.Gather(0)},
    # For each frame by itself, queries of the video attend to the face: they are gathered before.
    "WanAnimateTransformer3DModel": {**_WAN, "face_adapter.*.to_q": GATHER},
    "WanVACETransformer3DModel": {
        **_WAN,
        "vace_blocks.*": {"hidden_states": SPLIT},
        "vace_blocks.0": {"control_hidden_states": SPLIT},
    },
    "ZImageTransformer2DModel": {"layers.0": {"x": SPLIT}, "all_final_layer.2-1": GATHER},
}
