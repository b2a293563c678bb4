"""A small configuration of any causal language model of transformers, by what its fields are called.

No model is named here.  A rule takes the fields whose names it fits and says how large they shall be; what no rule
takes stays as the library has it.  Layers are as many as show every kind of layer that the default has.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

HEADS, HEAD_DIM, TOKENS, VOCABULARY = 8, 16, 24, 256
WIDTH = HEADS * HEAD_DIM
MOST_LAYERS = 8

# Name of a field of whole numbers -> its small size.  The first that fits holds.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"hidden_size|ple_embed_dim|dim_model_base", WIDTH),
    (r"query_pre_attn_scalar|(swa_|v_|global_)?head_dim|rotary_dim|qk_(rope|nope)_head_dim", HEAD_DIM),
    (r"index_head_dim|linear_(key_|value_)?head_dim|mamba_(d_head|head_dim)", HEAD_DIM),
    (r"qk_head_dim", 2 * HEAD_DIM),
    (r"hidden_size_per_layer_input|laurel_rank|gated_norm_rank|hc_lowrank|d_rel", HEAD_DIM),
    (r".*lora_rank", 2 * HEAD_DIM),
    (r".*intermediate_size(_mlp)?|.*ffn_hidden_size", 96),
    (r"vocab_size(_.*)?|unpadded_vocab_size|ngram_vocab_size_base", VOCABULARY),
    (r"(num|n)_(local_|routed_)?experts|moe_num_experts", 8),
    (r"n_group|num_expert_group", 2),
    (r"topk_group", 1),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k", 2),
    (r"zero_expert_num", 4),
    (r"index_topk(_blocks)?", 4),
    (r"index_block_size|attention_chunk_size|block_size|(mamba_)?chunk_size", 8),
    (r"sliding_window(_size)?|keep_window_size|rel_extent", 8),
    (r"max_position_embeddings|model_max_length|original_max_position_embeddings", 4 * TOKENS),
    (r"mamba_d_state|ssm_state_size|mamba_dt_rank", 8),
    (r"split_ngram_parts|make_ngram_vocab_size_divisible_by", 8),
    (r"floor_scale|log_scaling_n_floor", TOKENS),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"num_kv_shared_layers", 0),
)
# The same, for fields that may become larger, or have no value of their own.
_COUNTS: tuple[tuple[str, int], ...] = (
    (r"(swa_)?num_attention_heads|index_n_heads|linear_num_(value_)?heads", HEADS),
    (r"mamba_(n|num)_heads", 2 * HEADS),
)
_FILLED = {
    "head_dim": HEAD_DIM,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "num_key_value_heads": HEADS // 2,
}
_LAYERS = r"num_hidden_layers|num_layers(_per_stack)?"
# Fields that count the same as another, in a ratio that says what kind of attention it is.
_SHARES = {
    "num_key_value_heads": "num_attention_heads",
    "num_global_key_value_heads": "num_attention_heads",
    "swa_num_key_value_heads": "swa_num_attention_heads",
    "linear_num_key_heads": "linear_num_value_heads",
}


def small(default: Any, **given: Any) -> Any:
    """The default configuration of a class, as small as its fields allow.

    Args:
        default: an instance of a ``PretrainedConfig`` with the library's own values.
        given: fields as they shall be.

    Returns:
        another of the same class.
    """
    # From its __dict__: some refuse to be asked for what may differ between layers.
    fields = {f.name: vars(default).get(f.name, f.default) for f in dataclasses.fields(default) if f.init}
    fields = {name: None if value is dataclasses.MISSING else value for name, value in fields.items()}
    deep = next((v for name, v in fields.items() if re.fullmatch(_LAYERS, name) and isinstance(v, int)), 0)
    layers = _layers(fields, deep)
    changes = {name: _small(name, value, fields, deep, layers) for name, value in fields.items()}
    # A number of heads that is small already is given, too: by default it may follow from another field.
    changed = {n: v for n, v in changes.items() if v is not fields[n] or (n in _SHARES and v is not None)}
    return type(default)(**{**changed, **given})


def _small(name: str, value: Any, fields: dict[str, Any], deep: int, layers: list[int]) -> Any:
    if dataclasses.is_dataclass(value):  # the configuration of a part
        return small(value)
    if value is None:
        return _FILLED.get(name)
    if isinstance(value, bool):
        return value
    if name.endswith(("token_id", "token_index")):
        ids = [i for i in (value if isinstance(value, list) else [value]) if i is not None]
        return value if all(i < VOCABULARY for i in ids) else VOCABULARY - 1
    if isinstance(value, (list, tuple)):
        return _per_layer(name, value, deep, layers)
    if not isinstance(value, int):
        return value
    if re.fullmatch(_LAYERS, name):
        return len(layers)
    if name in _SHARES:
        whole = fields.get(_SHARES[name]) or value
        return HEADS if value >= whole else 1 if value == 1 else HEADS // 2
    for pattern, size in _COUNTS:
        if re.fullmatch(pattern, name):
            return size
    return next((min(size, value) for pattern, size in _SIZES if re.fullmatch(pattern, name)), value)


def _per_layer(name: str, values: Any, deep: int, layers: list[int]) -> Any:
    """A list that has an entry for each layer, for fewer layers."""
    if re.fullmatch(r"num_.*heads_per_layer", name):
        return [HEADS] * len(layers)
    if name in ("moe_layers", "mlp_only_layers", "ple_layer_ids"):  # numbers of layers
        return type(values)(at for at, layer in enumerate(layers) if layer in values)
    return type(values)(values[layer] for layer in layers) if len(values) == deep else values


def _layers(fields: dict[str, Any], deep: int) -> list[int]:
    """Which layers to keep: the first of every kind, and at least 2."""
    kept: set[int] = set()
    least = 2
    for name, value in fields.items():
        if isinstance(value, (list, tuple)) and len(value) == deep and all(isinstance(v, (str, int)) for v in value):
            kept |= {list(value).index(kind) for kind in set(value)}
        elif isinstance(value, int) and name.endswith("layer_offset"):
            least = max(least, value + 1)
    for layer in range(deep):
        if len(kept) < least:
            kept.add(layer)
    return sorted(kept)[:MOST_LAYERS]
