"""The table of models: small configurations keep what makes a model what it is, and the page says what was found."""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import Gemma3TextConfig, JambaConfig, LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import model_matrix
from benchmarks.small_configs import small


def test_small_configurations_keep_the_kind_of_attention_and_of_layers() -> None:
    grouped, whole, one = (LlamaConfig(num_attention_heads=32, num_key_value_heads=kv) for kv in (8, 32, 1))
    assert [small(c).num_key_value_heads for c in (grouped, whole, one)] == [4, 8, 1]
    assert small(whole).hidden_size == 128
    gemma = small(Gemma3TextConfig())
    assert gemma.layer_types == ["sliding_attention", "full_attention"]
    assert gemma.num_hidden_layers == 2
    assert small(JambaConfig()).num_hidden_layers == 5  # the first attention is layer 4
    assert small(LlamaConfig(), vocab_size=77).vocab_size == 77


def test_the_models_are_those_of_the_library_and_the_page_counts_them() -> None:
    assert {"LlamaForCausalLM", "Qwen3MoeForCausalLM", "MixtralForCausalLM"} <= set(model_matrix.models())
    found = [model_matrix.outcome("LlamaForCausalLM", 2), model_matrix.outcome("LongcatFlashForCausalLM", 2)]
    assert [o.stage for o in found] == ["", "capture"]
    assert "aten.nonzero.default" in found[1].line
    page = model_matrix.page(found, "versions")
    assert "- 2 ranks: 1 of 2" in page
    assert "| LlamaForCausalLM | ok |" in page
