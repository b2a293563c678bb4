"""A model on meta is compared in whole, with its weights read as they are used; and what is not right is found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import nn

import torchtrt_md as md
from torchtrt_md.checkpoint import Checkpoint
from torchtrt_md.errors import VerificationError
from torchtrt_md.program import ShardedProgram, UnevenSharding, Weight
from torchtrt_md.verification.dense import dense_reference, run, weights_of
from torchtrt_md.verification.private import ReadWhenUsed

MESH = md.Mesh(tp=2)


def on_meta(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A model of the same class and config, whose parameters are on meta."""
    with init_empty_weights():
        made = type(model)(model.config)
    return made.to(dtype).eval()


def lowered(model: nn.Module, args: Any, kwargs: Any, weights: Any = None) -> ShardedProgram:
    return md.lower(
        md.capture(model, args, kwargs, mesh=MESH, parallel=md.TensorParallel("tp"), weights=weights), placement="split"
    )


def numbers(report: Any) -> Any:
    return replace(report, seconds=0.0, notes=())


def test_what_is_measured_is_what_the_real_model_gives(tmp_path: Path) -> None:
    dtype = torch.bfloat16
    model, args, kwargs = models.llama(dtype)
    for p in model.parameters():
        if p.ndim == 1:  # as trained ones are; those of memory are drawn where they are all ones
            nn.init.uniform_(p, 0.5, 1.5)
    model.save_pretrained(tmp_path, max_shard_size="200KB")  # type: ignore[operator]
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    meta = on_meta(model, dtype)
    found = md.verify(lowered(meta, args, kwargs, tmp_path), meta, args, kwargs)
    expected = md.verify(lowered(model, args, kwargs), model, args, kwargs)
    assert numbers(found) == numbers(expected)
    (note,) = found.notes
    assert note == (
        f"LlamaForCausalLM is on meta: the whole of it was compared, its weights read one at a time from {tmp_path}"
    )
    assert expected.notes == ()
    assert all(p.is_meta for p in meta.parameters())


def test_a_program_of_other_weights_is_found(tmp_path: Path) -> None:
    model, args, kwargs = models.llama()
    tensors = {name: t.clone() for name, t in model.state_dict().items()}
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    meta = on_meta(model, torch.float32)
    program = lowered(meta, args, kwargs, tmp_path)
    with pytest.raises(VerificationError, match=r"weight 'model\.layers.*down_proj.weight' of the program is not"):
        md.verify(program, model, args, kwargs)
    # Another part of a weight, of the same shape.
    name, source = next((n, s) for n, s in program.sources.items() if s.name == "model.layers.1.mlp.down_proj.weight")  # type: ignore[union-attr]
    assert isinstance(source, Weight)
    wrong = replace(source, shardings=(UnevenSharding(1, "tp", (1, 1)),))
    with pytest.raises(VerificationError, match="the program does not compute what LlamaForCausalLM computes"):
        md.verify(replace(program, sources={**program.sources, name: wrong}), meta, args, kwargs)


def test_an_op_reads_a_weight_and_lets_go_of_it() -> None:
    reads: list[str] = []
    value = torch.randn(8, 8)

    def read() -> torch.Tensor:
        reads.append("weight")
        return value

    lazy = ReadWhenUsed(torch.empty(8, 8, device="meta"), torch.device("cpu"), read)
    assert (lazy.shape, lazy.dtype, lazy.device, lazy.is_meta) == (value.shape, value.dtype, value.device, False)
    assert reads == []
    x = torch.randn(3, 8)
    result = nn.functional.linear(x, lazy)
    assert type(result) is torch.Tensor
    assert torch.equal(result, nn.functional.linear(x, value))
    assert reads == ["weight"]


def test_the_reference_of_a_run_reads_the_checkpoint(tmp_path: Path) -> None:
    model, args, kwargs = models.llama()
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    meta = on_meta(model, torch.float32)

    def flat(result: Any) -> dict[str, torch.Tensor]:
        return {"logits": result.logits}

    cpu = torch.device("cpu")
    found = dense_reference(meta, args, kwargs, flat, cpu, tmp_path)
    expected = dense_reference(model, args, kwargs, flat, cpu)
    assert torch.equal(found.outputs["logits"], expected.outputs["logits"])
    assert torch.equal(found.samples["logits"].value, expected.samples["logits"].value)
    with pytest.raises(md.CaptureError, match="is on meta and has no value"):
        dense_reference(meta, args, kwargs, flat, cpu)


def test_a_weight_that_cannot_be_read_any_more_is_named(tmp_path: Path) -> None:
    model, args, kwargs = models.llama()
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    meta = on_meta(model, torch.float32)
    weights = replace(weights_of(meta), given={n: n for n in model.state_dict()}, checkpoint=Checkpoint(tmp_path))
    with torch.no_grad():
        assert torch.equal(run(meta, args, kwargs, weights).logits, model(*args, **kwargs).logits)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(md.WeightsError, match=r"model\.safetensors is not a whole safetensors file"):
        run(meta, args, kwargs, weights)
