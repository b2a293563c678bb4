"""Blocks of diffusers' models are written down again, and no block of a model that has code of the user's in it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from models import flux
from torch import nn
from whole_traces import MODULE, is_that_of_the_whole_trace

import torchtrt_md as md
from torchtrt_md.verification import verify

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import small_diffusers, small_diffusers_plans


def captured_flux(model: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> md.ShardedProgram:
    return md.capture(model, args, given, mesh=md.Mesh(cp=2), parallel=md.ContextParallel("cp", "ulysses"))


def test_a_model_of_diffusers(again: list[object]) -> None:
    model, args, given = flux(layers=4, single_layers=4)
    program = captured_flux(model, args, given)
    assert len(again) == 3, "of the single blocks the first has text in a layout of its own"
    assert verify(md.lower(program), model, args, given).error < 1e-5


@pytest.mark.parametrize(
    "call",
    [
        "AuraFlowTransformer2DModel",
        "ConsisIDTransformer3DModel",
        "Flux2Transformer2DModel",
        "Flux3Transformer2DModel",
        "HunyuanVideoTransformer3DModel",
        "Kandinsky6Transformer3DModel",
        "LTX2VideoTransformer3DModel",
        "WanTransformer3DModel, an image",
    ],
)
def test_models_of_diffusers_with_one_of_each_kind_traced(
    call: str, monkeypatch: pytest.MonkeyPatch, again: list[object]
) -> None:
    monkeypatch.setitem(MODULE, "_TRACED", 1)  # they are small, with two or three blocks of a kind
    planned = call.partition(", ")[0] in small_diffusers_plans.classes()
    model, args, kwargs = (small_diffusers_plans if planned else small_diffusers).made(call)
    is_that_of_the_whole_trace(model, *args, **kwargs)
    assert again


class Processor:
    """Of the user's, in place of diffusers' own."""

    def __init__(self, own: Any) -> None:
        self.own, self.calls = own, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.own(*args, **kwargs)


def hooked(model: Any) -> None:
    model.transformer_blocks[1].attn.register_forward_hook(lambda module, args, result: None)


def processed(model: Any) -> None:
    for block in model.transformer_blocks:
        block.attn.processor = Processor(block.attn.processor)


def replaced(model: Any) -> None:
    model.single_transformer_blocks[2].forward = model.single_transformer_blocks[2].forward


@pytest.mark.parametrize("change", [hooked, processed, replaced])
def test_with_code_of_the_users_in_it_all_is_traced(change: Any, again: list[object]) -> None:
    model, args, given = flux(layers=4, single_layers=4)
    change(model)
    captured_flux(model, args, given)
    assert not again


def test_with_hooks_on_all_modules_all_is_traced(again: list[object]) -> None:
    model, args, given = flux(layers=4, single_layers=4)
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, result: None)
    try:
        captured_flux(model, args, given)
    finally:
        hook.remove()
    assert not again


def test_functions_put_into_the_library_are_seen(monkeypatch: pytest.MonkeyPatch, again: list[object]) -> None:
    from diffusers.models.transformers import transformer_flux

    own = transformer_flux.apply_rotary_emb
    monkeypatch.setattr(transformer_flux, "apply_rotary_emb", lambda *args, **kwargs: own(*args, **kwargs))
    captured_flux(*flux(layers=4, single_layers=4))
    assert not again
