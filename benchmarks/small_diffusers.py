"""Every model of diffusers with a plan of its own, small, and called as its pipeline calls it.

Which classes there are, and with which plans, the library says; how large their fields are, rules by the fields' names.
What is listed here are the calls, since nothing else says what a model is called with.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

HEADS, HEAD_DIM, LAYERS = 4, 16, 2
WIDTH = HEADS * HEAD_DIM
TEXT, KEPT = 7, 5  # tokens of a prompt, and how many of them are not padding
FRAMES, ROWS, COLUMNS = 3, 3, 3  # of what is generated, in tokens: no ranks divide them
IMAGE = FRAMES * ROWS * COLUMNS

# Name of a field -> its small value.  The first that fits holds; what none fits stays as the library has it.
_FIELDS: tuple[tuple[str, Any], ...] = (
    (r"num_layers|num_single_layers|num_refiner_layers", LAYERS),
    (r"(audio_)?num_attention_heads", HEADS),
    (r"attention_head_dim", HEAD_DIM),
    (r"audio_attention_head_dim", HEAD_DIM // 2),
    (r"cross_attention_dim|hidden_size", WIDTH),
    (r"audio_cross_attention_dim", WIDTH // 2),
    (r"axes_dims_rope|rope_dim", lambda dims: (4, 4, 4, 4) if len(dims) == 4 else (4, 6, 6)),
    (r"rope_freq_dim", HEAD_DIM // 6),
    (r"joint_attention_dim|pooled_projection_dim|text_dim|caption_channels|context_in_dim", 32),
    (r"ffn_dim|time_embed(_hidden)?_dim", 96),
    (r"freq_dim|timestep_guidance_channels", 32),
)


@dataclass(frozen=True)
class PipelineCall:
    """One way in which a pipeline calls a class: fields that differ from the defaults, and the inputs.

    ``held``: the inputs whose values are the same in all calls.  A module around the model has them.
    """

    inputs: Callable[[Any], dict[str, Any]]  # of the configuration
    given: dict[str, Any] = field(default_factory=dict)
    held: tuple[str, ...] = ()


def classes() -> dict[str, type[Any]]:
    """The classes of the installed diffusers with a plan, by name."""
    import diffusers

    found = {name: getattr(diffusers, name, None) for name in dir(diffusers)}
    return {
        name: c
        for name, c in sorted(found.items())
        if isinstance(c, type) and (getattr(c, "_cp_plan", None) or getattr(c, "_tp_plan", None))
    }


def parallels(name: str) -> list[str]:
    """Along what a class has a plan: the strategies of a split sequence, and "tensor"."""
    c = classes()[name]
    return ["ulysses", "allgather_kv", "ring"] * bool(c._cp_plan) + ["tensor"] * bool(c._tp_plan)


def calls(name: str) -> list[str]:
    """What calls of a class are named by: itself, and what is different about the call."""
    listed = CALLS.get(name, {"": None})
    return [f"{name}, {what}" if what else name for what in listed]


def made(call: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The model, small, and a call of it."""
    name, _, what = call.partition(", ")
    c = classes()[name]
    if name not in CALLS:
        raise LookupError(f"benchmarks/small_diffusers.py lists no call of {name}")
    return make(c, CALLS[name][what])


class Holding(torch.nn.Module):
    """A model some of whose arguments have the same values in all calls, such as the mask of prompts of one length."""

    def __init__(self, model: Any, held: dict[str, Tensor]) -> None:
        super().__init__()
        self.model, self.held = model, held
        self._tp_plan = {f"model.{path}": style for path, style in (getattr(model, "_tp_plan", None) or {}).items()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs, **self.held)


def make(c: type[Any], listed: PipelineCall) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A model of a class, small, and one call of it."""
    fields = inspect.signature(c.__init__).parameters
    small = {n: _small(n, p.default) for n, p in fields.items() if n != "self"}
    torch.manual_seed(0)
    with _Zeroed():
        model = c(**{**small, **listed.given}).eval()
    for parameter in model.parameters():  # what is ones or zeros when it is made would hide faults
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    kwargs = {**listed.inputs(model.config), "return_dict": False}
    if listed.held:
        model = Holding(model, {name: kwargs.pop(name) for name in listed.held}).eval()
    return model, (), kwargs


class _Zeroed(TorchFunctionMode):
    """What a class makes and leaves as it was in memory is zeros, in every process."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return (torch.zeros if func is torch.empty else func)(*args, **(kwargs or {}))


def _small(name: str, default: Any) -> Any:
    for pattern, value in _FIELDS:
        if default is not None and re.fullmatch(pattern, name):
            return value(default) if callable(value) else value
    return default


def _kept() -> Tensor:
    """The mask of a prompt whose last tokens are padding."""
    return (torch.arange(TEXT) < KEPT)[None]


def _flux(config: Any) -> dict[str, Any]:
    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(9.0), torch.arange(3.0))
    return {
        "hidden_states": torch.randn(1, len(grid), config.in_channels),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]) if config.guidance_embeds else None,
        "pooled_projections": torch.randn(1, config.pooled_projection_dim),
        "encoder_hidden_states": torch.randn(1, TEXT, config.joint_attention_dim),
        "txt_ids": torch.zeros(TEXT, 3),
        "img_ids": grid,
        "joint_attention_kwargs": None,
    }


def _flux2(config: Any) -> dict[str, Any]:
    one = torch.zeros(1, dtype=torch.long)
    return {
        "hidden_states": torch.randn(1, IMAGE, config.in_channels),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "encoder_hidden_states": torch.randn(1, TEXT, config.joint_attention_dim),
        "txt_ids": torch.cartesian_prod(one, one, one, torch.arange(TEXT))[None],
        "img_ids": torch.cartesian_prod(one, torch.arange(9), torch.arange(3), one)[None],
        "joint_attention_kwargs": None,
    }


def _qwen_image(config: Any) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 15, config.in_channels),
        "timestep": torch.tensor([0.5]),
        "guidance": None,
        "encoder_hidden_states_mask": _kept(),
        "encoder_hidden_states": torch.randn(1, TEXT, config.joint_attention_dim),
        "img_shapes": [[(1, 3, 5)]],
        "attention_kwargs": None,
    }


def _qwen_image21(config: Any) -> dict[str, Any]:
    """Text, a picture to go by of 2 x 4, and the picture that is made, of 4 x 4: a slot for each 2 x 2 of them."""
    slots = torch.tensor([[False] * 3 + [True] * 2 + [False] * 2 + [True] * 4])
    return {
        "hidden_states": torch.randn(1, 8 + 16, config.in_channels),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": torch.randn(1, TEXT, config.context_in_dim),
        "encoder_hidden_states_mask": torch.ones(1, TEXT, dtype=torch.bool),
        "img_shapes": [[(1, 2, 4), (1, 4, 4)]],
        "img_mask": slots,
        "attention_kwargs": None,
    }


def _wan(config: Any) -> dict[str, Any]:
    _, height, width = config.patch_size
    return {
        "hidden_states": torch.randn(1, config.in_channels, FRAMES, ROWS * height, COLUMNS * width),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, TEXT, config.text_dim),
        "attention_kwargs": None,
    }


def _wan_image(config: Any) -> dict[str, Any]:
    return {**_wan(config), "encoder_hidden_states_image": torch.randn(1, 5, config.image_dim)}


def _wan_timesteps(config: Any) -> dict[str, Any]:
    """As Wan 2.2 where the first frame is given: it is not noisy."""
    return {**_wan(config), "timestep": torch.tensor([0.0, 500.0, 500.0]).repeat_interleave(ROWS * COLUMNS)[None]}


def _helios(config: Any) -> dict[str, Any]:
    shape, frames = (ROWS * 2, COLUMNS * 2), {"short": 2, "mid": 2, "long": 4}
    found = {**_wan(config), "indices_hidden_states": torch.arange(8, 8 + FRAMES)[None]}
    first = 0
    for name in ("long", "mid", "short"):
        found[f"indices_latents_history_{name}"] = torch.arange(first, first + frames[name])[None]
        found[f"latents_history_{name}"] = torch.randn(1, config.in_channels, frames[name], *shape)
        first += frames[name]
    return found


def _ltx(config: Any) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, IMAGE, config.in_channels),
        "encoder_hidden_states": torch.randn(1, TEXT, config.caption_channels),
        "timestep": torch.tensor([500]),
        "encoder_attention_mask": _kept().long(),
        "num_frames": FRAMES,
        "height": ROWS,
        "width": COLUMNS,
        "rope_interpolation_scale": (8 / 25, 32, 32),
        "attention_kwargs": None,
    }


def _ltx2(config: Any) -> dict[str, Any]:
    sound = 5
    grid = torch.cartesian_prod(torch.arange(float(FRAMES)), torch.arange(float(ROWS)), torch.arange(float(COLUMNS))).T
    heard = torch.arange(float(sound))[None]
    return {
        "hidden_states": torch.randn(1, IMAGE, config.in_channels),
        "audio_hidden_states": torch.randn(1, sound, config.audio_in_channels),
        "encoder_hidden_states": torch.randn(1, TEXT, config.caption_channels),
        "audio_encoder_hidden_states": torch.randn(1, TEXT, config.caption_channels),
        "timestep": torch.tensor([500.0]),
        "sigma": torch.tensor([500.0]),
        "encoder_attention_mask": _kept().long(),
        "audio_encoder_attention_mask": _kept().long(),
        "num_frames": FRAMES,
        "height": ROWS,
        "width": COLUMNS,
        "fps": 24.0,
        "audio_num_frames": sound,
        "video_coords": torch.stack([grid, grid + 1], -1)[None],
        "audio_coords": torch.stack([heard, heard + 1], -1)[None],
        "isolate_modalities": False,
        "spatio_temporal_guidance_blocks": None,
        "perturbation_mask": None,
        "use_cross_timestep": False,
        "attention_kwargs": None,
    }


def _minimax_h3(config: Any) -> dict[str, Any]:
    sound = 5
    total = TEXT + sound + IMAGE
    kinds = torch.tensor([1] * TEXT + [2] * sound + [0] * IMAGE)
    text, audio, video = (torch.arange(total)[kinds == kind] for kind in (1, 2, 0))
    before = torch.arange(TEXT + sound)[:, None].expand(-1, 3)
    grid = torch.cartesian_prod(torch.arange(FRAMES), torch.arange(ROWS), torch.arange(COLUMNS)) + TEXT + sound
    return {
        "hidden_states": torch.randn(1, IMAGE, config.in_channels * 4),
        "audio_hidden_states": torch.randn(1, sound, config.audio_in_channels),
        "encoder_hidden_states": torch.randn(1, TEXT, config.text_dim),
        "timestep": torch.tensor([0.0, 0.5]),
        "timestep_indices": (kinds != 1).long(),
        "token_tags": kinds,
        "position_ids": torch.cat([before, grid]),
        "video_indices": video,
        "audio_indices": audio,
        "text_indices": text,
        "attention_kwargs": None,
    }


# Class -> what is different about a call -> the call.
CALLS: dict[str, dict[str, PipelineCall]] = {
    "ChronoEditTransformer3DModel": {"": PipelineCall(_wan_image, {"image_dim": 48, "added_kv_proj_dim": WIDTH})},
    "Flux2Transformer2DModel": {"": PipelineCall(_flux2)},
    "FluxTransformer2DModel": {"": PipelineCall(_flux), "guidance": PipelineCall(_flux, {"guidance_embeds": True})},
    "HeliosTransformer3DModel": {
        "": PipelineCall(_helios),
        "amplified history": PipelineCall(_helios, {"is_amplify_history": True}),
    },
    "LTX2VideoTransformer3DModel": {"": PipelineCall(_ltx2)},
    "LTXVideoTransformer3DModel": {"": PipelineCall(_ltx)},
    "MiniMaxH3Transformer3DModel": {"": PipelineCall(_minimax_h3)},
    "QwenImage21Transformer2DModel": {
        "": PipelineCall(_qwen_image21),
        "what decides sizes is held": PipelineCall(_qwen_image21, held=("img_mask",)),
    },
    "QwenImageTransformer2DModel": {"": PipelineCall(_qwen_image)},
    "WanTransformer3DModel": {
        "": PipelineCall(_wan),
        "an image": PipelineCall(_wan_image, {"image_dim": 48, "added_kv_proj_dim": WIDTH}),
        "a timestep for each token": PipelineCall(_wan_timesteps),
    },
}
