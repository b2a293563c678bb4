"""Every configuration of transformers with a tensor-parallel plan that no causal language model covers, and a call.

Which configurations there are, and which class the plan of each is for, the library says.  What is listed here are the
inputs, by the names that ``forward`` gives them, and which of them decide sizes.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import without_loops
from benchmarks.small_configs import TOKENS, WIDTH, small
from benchmarks.small_diffusers import Holding

ROWS, COLUMNS = 4, 4  # patches of a picture, each a token
PLACEHOLDER = 200  # a token
CONTEXT = 7  # tokens of a model that another continues
HELD = "what decides sizes is held"
UNCHECKED = "no checks of values"
ALONE = "no cache in the result"
_SIZES = ("grid_thw", "image_grid_thw", "pixel_position_ids")  # inputs whose values decide sizes


def configurations(covered: Sequence[str]) -> list[str]:
    """The configurations with a plan that are not those of the models named."""
    import transformers

    language = {getattr(transformers, name).config_class for name in covered}
    found = {name: getattr(transformers, name, None) for name in dir(transformers) if name.endswith("Config")}
    return [
        name
        for name, c in sorted(found.items())
        if isinstance(c, type)
        and issubclass(c, transformers.PreTrainedConfig)
        and getattr(c, "base_model_tp_plan", None)
        and c not in language
    ]


def is_one(name: str) -> bool:
    """Whether this is the name of a configuration."""
    import transformers

    c = getattr(transformers, name, None)
    return isinstance(c, type) and issubclass(c, transformers.PreTrainedConfig)


def calls(name: str) -> list[str]:
    """What calls of a configuration's class are named by: itself, and what is different about the call."""
    try:
        c, whole = _class_of(name)
    except LookupError:  # which the table tells
        return [name]
    ways = [HELD] * any(size in _parameters(c) for size in _SIZES)
    ways += [UNCHECKED] * bool(_parts(whole) and "pixel_values" in _parameters(c))
    listed = [what for known, what in (*_WANTED, *_MORE) if known == name and what]
    listed += [", ".join(ways)] if ways else []
    return [name, *(f"{name}, {what}" for what in listed), *without_loops.calls(name)]


def class_named(name: str) -> str:
    """The class that the plan of a configuration is for; "" where there is none."""
    try:
        return _class_of(name)[0].__name__
    except LookupError:
        return ""


@functools.cache
def _class_of(name: str) -> tuple[type[Any], type[Any]]:
    """The class that the plan of a configuration is for, and the configuration that it is made from.

    The base model of its own, or of the configuration of which it is another name; what the library maps it to; or the
    base model of a configuration that has it as a part.
    """
    import transformers

    config: type[Any] = getattr(transformers, name)
    package = importlib.import_module(config.__module__.rpartition(".")[0])
    modules = [
        importlib.import_module(f"{package.__name__}.{found.name}")
        for found in pkgutil.iter_modules(package.__path__)
        if found.name.startswith("modeling_")
    ]
    classes: list[Any] = [
        c
        for module in modules
        for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, transformers.PreTrainedModel) and c.__module__ == module.__name__
    ]
    # A class without a forward of its own is there to derive from, and one derived from another has its older name.
    classes = [c for c in classes if c.forward is not torch.nn.Module.forward]
    classes = [c for c in classes if not any(other is not c and issubclass(c, other) for other in classes)]
    for of in (c for c in config.__mro__ if getattr(c, "base_model_tp_plan", None)):
        if own := [c for c in classes if c.config_class is of]:
            return min(own, key=_how_far_from_base), config
    if (mapped := _mapped(config)) is not None:
        return mapped, config
    for whole in dict.fromkeys(c.config_class for c in classes):
        if config in _parts(whole):
            return min((c for c in classes if c.config_class is whole), key=_how_far_from_base), whole
    raise LookupError(f"the library has no class for {name}")


def _how_far_from_base(c: type[Any]) -> tuple[bool, bool]:
    return "For" in c.__name__, not c.__name__.endswith("Model")


def _mapped(config: type[Any]) -> type[Any] | None:
    """The class for causal language modelling that the library maps a configuration to."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(getattr(config, "model_type", ""))
    return getattr(transformers, found, None) if found else None


def _parts(config: type[Any]) -> list[Any]:
    """The configurations that one has as parts."""
    import transformers

    return [type(part) for part in vars(config()).values() if isinstance(part, transformers.PreTrainedConfig)]


def made(call: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The model, small, and a call of it."""
    name, _, what = call.partition(", ")
    c, whole = _class_of(name)
    torch.manual_seed(0)
    config = small(whole(), **(_GIVEN[name]() if name in _GIVEN else {}))
    model = c(config, **_BESIDE.get(name, {})).eval()
    for parameter in model.parameters():  # what is ones or zeros when it is made would hide faults
        if parameter.is_floating_point():
            parameter.data.add_(0.02 * torch.randn_like(parameter))
    kwargs = _inputs(name, what, c, config)
    if what == without_loops.WITHOUT:
        without_loops.replace(model)
    if ways := {HELD, UNCHECKED, ALONE} & set(what.split(", ")):
        held = {n: kwargs.pop(n) for n in _SIZES if n in kwargs and HELD in ways}
        model = Around(model, held, checked=UNCHECKED not in ways, alone=ALONE in ways).eval()
    return model, (), kwargs


class Around(Holding):
    """A model some of whose arguments have the same values in all calls, called otherwise.

    ``checked``: let it look whether there are as many places for images as images, as the library does unless it is
    told not to.  ``alone``: leave out of the result what the model keeps for its next call.
    """

    def __init__(self, model: Any, held: dict[str, Tensor], checked: bool = True, alone: bool = False) -> None:
        super().__init__(model, held)
        self.checked, self.alone = checked, alone

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        switch = {} if self.checked else {"TRANSFORMERS_DISABLE_TORCH_CHECK": "1"}
        with mock.patch.dict(os.environ, switch):
            result = super().forward(*args, **kwargs)
        return result.last_hidden_state if self.alone else result


def _parameters(c: type[Any]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(c.forward).parameters)


def _inputs(name: str, what: str, c: type[Any], config: Any) -> dict[str, Any]:
    """What is listed for a call; or what the class must be given, or its main input, and of a whole model an image."""
    parameters = {n: p for n, p in _parameters(c).items() if n not in ("self", "kwargs")}
    wanted = [n for n, p in parameters.items() if p.default is inspect.Parameter.empty] or [c.main_input_name]
    wanted += [n for n in _OF_WHOLES if n in parameters and n not in wanted and _parts(type(config))]
    found = {n: (_OF_ONE.get((name, n)) or _INPUTS[n])(config) for n in _WANTED.get((name, what), wanted)}
    return {**found, "use_cache": False} if "use_cache" in parameters else found


def _tokens(config: Any) -> Tensor:
    # Beside special tokens, which the rules of small_configs keep at both ends.
    text = config.get_text_config()
    tokens = torch.randint(8, text.vocab_size - 8, (1, TOKENS))
    if (image := getattr(config, "vision_config", None)) is not None:
        tokens[:, 4 : 4 + ROWS * COLUMNS // _merged(image)] = config.image_token_id
    return tokens


def _with_placeholder(config: Any) -> Tensor:
    tokens = _tokens(config)
    tokens[:, -2] = PLACEHOLDER
    return tokens


def _merged(config: Any) -> int:
    """How many patches of a picture make a token of the text."""
    side = getattr(config, "merge_size", None) or round(1 / config.pixel_shuffle_ratio)
    return int(side * side)


def _hidden(config: Any) -> Tensor:
    return torch.randn(1, TOKENS, config.hidden_size)


def _grid(config: Any) -> Tensor:
    return torch.tensor([[1, ROWS, COLUMNS]])


def _image(config: Any) -> Tensor:
    """[batch, channels, height, width] where a size is given, else patches in rows: [patches, their numbers]."""
    config = getattr(config, "vision_config", config)
    if size := getattr(config, "image_size", None):
        return torch.randn(1, config.num_channels, size, size)
    frames = getattr(config, "patch_temporal", 1)
    return torch.randn(ROWS * COLUMNS, frames * 3 * config.patch_size**2)


def _cells(config: Any) -> Tensor:
    """[1, patches, 2]"""
    return torch.cartesian_prod(torch.arange(ROWS), torch.arange(COLUMNS))[None]


def _sections(*shares: int, **more: Any) -> Callable[[], dict[str, Any]]:
    """Rotary frequencies shared among three kinds of positions; the library's own sizes are for larger heads."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(shares), **more}
    return lambda: {"rope_parameters": rope}


def _llama4_vision() -> Any:
    from transformers import Llama4VisionConfig

    shuffled = {"intermediate_size": 4 * WIDTH, "projector_input_dim": 96, "projector_output_dim": 96}
    return small(Llama4VisionConfig(), image_size=ROWS * 14, vision_output_dim=96, **shuffled)


def _muse(name: str) -> Callable[[], dict[str, Any]]:
    """A whole model of the Muse family: its parts take what the others give."""

    def given() -> dict[str, Any]:
        import transformers

        whole = getattr(transformers, name)
        vision = small(whole.sub_configs["vision_config"](), **_MUSE_VISION)
        sizes = {"out_hidden_size": 4 * WIDTH, "projector_hidden_size": 96, "vision_config": vision}
        audio = whole.sub_configs.get("audio_config")
        heard = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "out_hidden_size": WIDTH}
        return {**sizes, "audio_config": audio(**heard)} if audio else sizes

    return given


_MUSE_VISION = {"pos_emb_height": 2 * ROWS, "pos_emb_width": 2 * ROWS, "max_position_embeddings": 4 * ROWS * ROWS}
_OF_WHOLES = ("decoder_input_ids", "pixel_values", "image_grid_thw")  # inputs that are given where they are taken
_INPUTS: dict[str, Callable[[Any], Any]] = {
    "input_ids": _tokens,
    "decoder_input_ids": _tokens,
    "inputs_embeds": _hidden,
    "encoder_hidden_states": _hidden,
    "noise_embeds": _hidden,
    "context_hidden_states": lambda config: torch.randn(1, CONTEXT, config.hidden_size * len(config.target_layer_ids)),
    "attention_mask": lambda config: (torch.arange(CONTEXT + TOKENS) > 1)[None],
    "hidden_states": _image,
    "pixel_values": _image,
    "pixel_position_ids": _cells,
    "grid_thw": _grid,
    "image_grid_thw": _grid,
    "num_patches": lambda config: ROWS * COLUMNS,
    "audio_input_ids": lambda config: torch.randint(config.codebook_size, (1, TOKENS, config.num_codebooks)),
    "t_cond": lambda config: torch.randn(1, 1, config.hidden_size),
}
# The same, of one configuration.
_OF_ONE: dict[tuple[str, str], Callable[[Any], Any]] = {
    ("Gemma4VisionConfig", "pixel_values"): lambda config: _image(config)[None],
    ("T5Gemma2DecoderConfig", "input_ids"): _with_placeholder,
    ("T5Gemma2TextConfig", "input_ids"): _with_placeholder,
}
# What a call is made of where it is not what the class must be given.
_WANTED: dict[tuple[str, str], list[str]] = {
    ("HiggsAudioV2Config", "audio alone"): ["audio_input_ids"],
    ("MuseGlimmerAssistantConfig", ""): ["noise_embeds", "context_hidden_states", "attention_mask"],
    ("Qwen3OmniMoeTalkerCodePredictorConfig", ""): ["inputs_embeds"],
    ("Qwen3OmniMoeTalkerTextConfig", ""): ["inputs_embeds"],
    ("T5Gemma2DecoderConfig", ""): ["input_ids", "encoder_hidden_states"],
    ("VoxtralRealtimeTextConfig", ""): ["input_ids", "t_cond"],
}
# What a class takes beside its configuration: the number of a token that has an embedding of its own.
_BESIDE = {
    "T5Gemma2DecoderConfig": {"eoi_token_index": PLACEHOLDER},
    "T5Gemma2TextConfig": {"eoi_token_index": PLACEHOLDER},
}
# What else is tried.
_MORE = [("DiffusionGemmaTextConfig", ALONE)]
# Fields without which a class cannot be made small, or the library's own default does not run.
_GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "Cosmos3EdgeTextConfig": _sections(2, 3, 3),
    "DeepseekOcr2TextConfig": lambda: {"mlp_layer_types": ["dense", "sparse"]},
    "DiffusionGemmaTextConfig": lambda: {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 96},
    "Dots3NoteVisionConfig": lambda: {
        "adapter_in_dim": WIDTH,
        "adapter_out_dim": WIDTH,
        "mlp_layer_types": ["dense", "sparse"],
        "num_hidden_layers": 2,
    },
    "Ernie4_5_VLMoeTextConfig": _sections(3, 3, 2),
    "Ernie4_5_VL_MoeTextConfig": _sections(3, 3, 2),
    "Gemma4VisionConfig": lambda: {"pooling_kernel_size": 2},
    "Glm4vMoeTextConfig": _sections(1, 1, 2),
    "Glm4vTextConfig": _sections(2, 3, 3),
    "Glm5NextTextConfig": lambda: {"index_topk": 8, "index_kpool": 4},
    "GlmImageTextConfig": _sections(2, 3, 3),
    "GlmOcrTextConfig": _sections(2, 3, 3),
    "Llama4Config": lambda: {"vision_config": _llama4_vision()},
    "Llama4VisionConfig": lambda: {
        name: getattr(_llama4_vision(), name)
        for name in ("image_size", "intermediate_size", "projector_input_dim", "projector_output_dim")
    },
    "MuseGlimmerConfig": _muse("MuseGlimmerConfig"),
    "MuseGlimmerVisionConfig": lambda: _MUSE_VISION,
    "MuseSparkConfig": _muse("MuseSparkConfig"),
    "PaddleOCRTextConfig": _sections(2, 3, 3),
    "Qwen2VLTextConfig": _sections(2, 3, 3),
    "Qwen2_5OmniTextConfig": _sections(2, 3, 3),
    "Qwen2_5_VLTextConfig": _sections(2, 3, 3),
    "Qwen3OmniMoeTalkerTextConfig": lambda: {"shared_expert_intermediate_size": 96},
    "Step3p7TextConfig": lambda: {
        "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse"],
    },
    "T5Gemma2DecoderConfig": lambda: {"dropout_rate": 0.0},
    "T5Gemma2TextConfig": lambda: {"dropout_rate": 0.0},
}
