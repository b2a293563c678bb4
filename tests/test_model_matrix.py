"""The table of models: small configurations keep what makes a model what it is, and the page says what was found."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import pytest
import torch
from transformers import Gemma3TextConfig, JambaConfig, LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torchtrt_md as md
from benchmarks import model_matrix, small_diffusers, small_diffusers_plans, small_others
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


def test_the_models_are_those_of_the_libraries_and_the_page_counts_them() -> None:
    assert {"LlamaForCausalLM", "Qwen3MoeForCausalLM", "MixtralForCausalLM"} <= set(model_matrix.models())
    found = [model_matrix.outcome("LlamaForCausalLM", 2), model_matrix.outcome("LongcatFlashForCausalLM", 2)]
    assert [o.stage for o in found] == ["", "capture"]
    assert "aten.nonzero.default" in found[1].line
    flux = model_matrix.outcome("FluxTransformer2DModel, guidance", 2, "allgather_kv")
    page = model_matrix.page([*found, flux], "versions")
    assert "- 2 ranks: 1 of 2" in page
    assert "- 2 ranks: 1 of 1" in page
    assert "| LlamaForCausalLM | ok |" in page
    assert "| FluxTransformer2DModel, guidance | allgather_kv | ok |" in page


def test_every_other_configuration_with_a_plan_has_a_class_and_a_call() -> None:
    """The library says which there are, and of which class; those without one it says, too."""
    names = small_others.configurations(model_matrix.models())
    assert not {"LlamaConfig", "Llama4TextConfig"} & set(names)  # which have models for causal language modelling
    assert all(map(small_others.is_one, names))
    classes = {
        "Qwen2VLTextConfig": "Qwen2VLTextModel",
        "EuroBertConfig": "EuroBertModel",  # and not EuroBertForMaskedLM
        "Llama4Config": "Llama4ForConditionalGeneration",  # the library has no Llama4Model
        "Ernie4_5_VL_MoeTextConfig": "Ernie4_5_VLMoeTextModel",  # another name of the same
        "InternLM3Config": "LlamaForCausalLM",  # to which the library maps it
        "T5GemmaModuleConfig": "T5GemmaModel",  # a part of it
        "VoxtralRealtimeTextConfig": "VoxtralRealtimeTextModel",  # which is not exported
    }
    assert classes.items() <= {name: small_others.class_named(name) for name in names}.items()
    listed = {name for name, *_ in (*small_others._WANTED, *small_others._OF_ONE, *small_others._MORE)}
    assert listed | set(small_others._GIVEN) | set(small_others._BESIDE) <= set(names)
    tasks = model_matrix.tasks_of(names, [2, 4])
    assert ("MuseGlimmerVisionConfig, what decides sizes is held", 4, "tensor") in tasks
    assert ("Llama4Config, no checks of values", 2, "tensor") in tasks
    assert ("Step3p7TextConfig, experts without a loop", 2, "tensor") in tasks
    assert {name for name, *_ in tasks} >= set(names)
    assert len(tasks) == len(set(tasks))


def test_other_configurations_verify_and_stand_in_a_table_of_their_own() -> None:
    tried = [
        ("T5Gemma2DecoderConfig", 4),  # a token that has an embedding of its own, in the last rank's rows
        ("MuseGlimmerConfig", 2),
        ("MuseGlimmerConfig, what decides sizes is held, no checks of values", 2),  # an image between tokens
        ("EsmcConfig", 2),  # norms all heads, of which its plan gives a rank some
        ("Step3p7TextConfig, experts without a loop", 2),
    ]
    found = [model_matrix.outcome(*task) for task in tried]
    assert [o.stage for o in found] == ["", "capture", "", "capture", ""]
    page = model_matrix.page(found, "versions")
    assert "## transformers, beside causal language models" in page
    assert "## transformers\n" not in page
    assert "- 2 ranks, configurations that verify in a call: 2 of 3\n" in page
    assert "- 2 ranks: 2 of 4\n- 4 ranks: 1 of 1" in page
    assert "| T5Gemma2DecoderConfig | T5Gemma2Decoder |  | ok |" in page
    assert f"| {tried[2][0]} | MuseGlimmerModel | ok |  |" in page
    worse = [model_matrix.Outcome("EuroBertConfig", 2, "verify", "wrong")]
    assert model_matrix.differences(worse, page) == [
        "| configuration | class | 2 ranks |",
        "| EuroBertConfig | EuroBertModel | verify: wrong |",
    ]


def test_models_of_images_get_one_and_models_around_them_hold_what_decides_sizes() -> None:
    name = "MuseGlimmerConfig, what decides sizes is held, no checks of values"
    model, _, kwargs = small_others.made(name)
    assert set(kwargs) == {"input_ids", "pixel_values", "use_cache"}
    assert model.held["image_grid_thw"].tolist() == [[1, small_others.ROWS, small_others.COLUMNS]]
    plain, _, whole = small_others.made("MuseGlimmerConfig")
    with torch.no_grad():
        torch.testing.assert_close(model(**kwargs).last_hidden_state, plain(**whole).last_hidden_state)
        other = whole | {"pixel_values": -whole["pixel_values"]}
        assert not torch.allclose(plain(**other).last_hidden_state, plain(**whole).last_hidden_state)
        more = kwargs | {"input_ids": torch.full_like(kwargs["input_ids"], plain.config.image_token_id)}
        with pytest.raises(ValueError, match="Image features and image tokens do not match"):
            plain(**whole | more)
    assert "TRANSFORMERS_DISABLE_TORCH_CHECK" not in os.environ
    held = small_diffusers.Holding(plain, model.held)
    with pytest.raises(md.CaptureError, match="depends on the values of tensors") as refused:
        md.capture(held, (), kwargs, mesh=md.Mesh(n=2), parallel=md.TensorParallel("n"))
    assert "TRANSFORMERS_DISABLE_TORCH_CHECK=1 leaves it out" in refused.value.fix


def test_experts_that_loop_verify_without_the_loop() -> None:
    name = "LongcatFlashForCausalLM, experts without a loop"
    assert (name, 4, "tensor") in model_matrix.tasks_of(["LongcatFlashForCausalLM"], [4])
    with_loop, args, kwargs = model_matrix.made("LongcatFlashForCausalLM")
    without, *_ = model_matrix.made(name)
    torch.testing.assert_close(without(*args, **kwargs).logits, with_loop(*args, **kwargs).logits)
    found = model_matrix.outcome(name, 4)
    assert found.stage == "", found.line
    assert f"| {name} | ok |" in model_matrix.page([found], "versions")


def test_a_page_is_compared_row_by_row() -> None:
    found = [model_matrix.Outcome("LlamaForCausalLM", r, "", "1e-7", built="yes") for r in (2, 4)]
    page = model_matrix.page(found, "versions")
    assert "- built as TensorRT engines of rank 0, too: LlamaForCausalLM" in page
    assert model_matrix.differences(found, page) == []
    worse = [found[0], model_matrix.Outcome("LlamaForCausalLM", 4, "verify", "wrong", built="BuildError: too large")]
    assert model_matrix.differences(worse, page) == ["| LlamaForCausalLM | ok | verify: wrong |"]
    assert "- not built whole, by BuildError: too large: LlamaForCausalLM" in model_matrix.page(worse, "versions")


def test_some_models_go_on_to_engines() -> None:
    sampled = [name for name in model_matrix._names() if model_matrix._is_sampled(name)]
    of_each = len(model_matrix._classes()), len(model_matrix._configurations())
    assert len(sampled) == sum(-(-count // model_matrix.SAMPLE) for count in of_each)
    assert model_matrix.outcome("CohereForCausalLM", 2).built == "yes"
    assert model_matrix.outcome("LlamaForCausalLM", 2).built == ""


def test_a_model_whose_rows_alternate_in_the_checkpoint() -> None:
    found = model_matrix.outcome("Inkling2ForCausalLM", 4)
    assert (found.stage, found.graphs) == ("", 1)


def test_every_class_of_diffusers_with_a_plan_has_a_call() -> None:
    """One that a later version adds has none, and says so in the table."""
    classes = small_diffusers.classes()
    assert {"FluxTransformer2DModel", "WanTransformer3DModel", "QwenImage21Transformer2DModel"} <= set(classes)
    assert set(small_diffusers.CALLS) <= set(classes)
    tasks = model_matrix.tasks_of(["WanTransformer3DModel", "FluxTransformer2DModel"], [2, 4])
    assert ("WanTransformer3DModel, an image", 4, "ring") in tasks
    assert ("FluxTransformer2DModel", 2, "tensor") in tasks
    assert not any(call.startswith("Wan") and parallel == "tensor" for call, _, parallel in tasks)
    assert ("WanTransformer3DModel, an image", 4, model_matrix.BY_NAMES) in tasks
    assert not any(call.startswith("Flux") and parallel == model_matrix.BY_NAMES for call, _, parallel in tasks)


def test_classes_without_a_plan_are_those_of_the_library_and_have_plans_by_hand() -> None:
    classes = small_diffusers_plans.classes()
    assert {"SD3Transformer2DModel", "CogVideoXTransformer3DModel", "PixArtTransformer2DModel"} <= set(classes)
    assert not any(getattr(c, "_cp_plan", None) for c in classes.values())
    assert set(small_diffusers_plans.PLANS) == set(small_diffusers_plans.CALLS) <= set(classes)
    assert all(len(plan) <= 5 for plan in small_diffusers_plans.PLANS.values())
    tasks = model_matrix.tasks_of(["SD3Transformer2DModel", "QwenImage21Transformer2DModel"], [2, 4])
    assert ("SD3Transformer2DModel, dual attention", 4, "ring") in tasks
    both = {"tensor", *small_diffusers_plans.STRATEGIES}
    assert {parallel for call, _, parallel in tasks if call.startswith("Qwen")} == both
    assert len(tasks) == len(set(tasks))


def test_plans_by_hand_verify_and_stand_in_a_table_of_their_own() -> None:
    tried = [
        ("CogVideoXTransformer3DModel", 2, "ulysses"),  # writes turned positions into a part of the joint sequence
        ("SanaTransformer2DModel", 4, "allgather_kv"),  # linear attention and convolutions
        ("TransformerTemporalModel", 2, "ring"),
        ("MochiTransformer3DModel", 2, "ring"),
        ("OmniGenTransformer2DModel, what decides sizes is held", 4, "allgather_kv"),
    ]
    found = [model_matrix.outcome(*task) for task in tried]
    assert [o.stage for o in found] == ["", "", "", "capture", ""]
    page = model_matrix.page(found, "versions")
    assert "## Without a plan of their own" in page
    assert "- 2 ranks, classes that verify in every call: ring 1 of 2, ulysses 1 of 1" in page
    assert "| SanaTransformer2DModel | not tried | not tried | ok |  |" in page
    assert "PriorTransformer" not in page.partition("Not tried")[2].partition(".")[0]


def test_plans_made_of_names_verify_and_stand_in_a_table_of_their_own() -> None:
    tried = [
        ("WanTransformer3DModel", 4, model_matrix.BY_NAMES),  # norms over all heads, of which a rank has some
        ("PixArtTransformer2DModel", 2, model_matrix.BY_NAMES),
        ("PRXTransformer2DModel", 2, model_matrix.BY_NAMES),  # its names say nothing of queries
    ]
    found = [model_matrix.outcome(*task) for task in tried]
    assert [o.stage for o in found] == ["", "", "capture"]
    page = model_matrix.page(found, "versions")
    assert "## Tensor parallel without a plan of their own" in page
    assert "- 2 ranks: 1 of 2" in page
    assert "## diffusers" not in page
    assert "## Without a plan of their own" not in page


def test_a_class_without_a_call_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(small_diffusers.CALLS, "FluxTransformer2DModel")
    assert small_diffusers.calls("FluxTransformer2DModel") == ["FluxTransformer2DModel"]
    found = model_matrix.outcome("FluxTransformer2DModel", 2, "ring")
    assert (found.stage, found.parallel) == ("model", "ring")
    assert "lists no call of FluxTransformer2DModel" in found.line


def test_what_fails_is_run_in_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = model_matrix.Outcome("LlamaForCausalLM", 2, "verify", "VerificationError: wrong")
    monkeypatch.setattr(model_matrix, "_in_child", lambda *task: failed)
    found = model_matrix.tried("LlamaForCausalLM", 2, "tensor")
    assert found.library == "differs by rounding alone"  # a plan that is right
    assert f"wrong **In transformers itself:** {found.library} |" in model_matrix.page([found], "versions")
    part = "MuseGlimmerVisionConfig, what decides sizes is held"
    monkeypatch.setattr(model_matrix, "_in_child", lambda *task: dataclasses.replace(failed, model=part))
    found = model_matrix.tried(part, 2, "tensor")
    assert found.library == "differs by rounding alone"
