"""What NVIDIA's Model Optimizer has quantized, through ``md.compile`` on two ranks, and in bundles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import model_optimizer as mo
import models
import pytest
import torch
from fresh_python import fresh_python
from rank_processes import Ranks

import torchtrt_md as md
from torchtrt_md.bundle.read import read_manifest
from torchtrt_md.bundle.weights import rank_weights
from torchtrt_md.errors import InputError
from torchtrt_md.verification.compare import relative_error

TENSOR_PLAN = {"up": "colwise", "down": "rowwise"}
PLAN = {"": {"x": md.Split(1)}, "out": md.Gather(1)}
OPTIONS: dict[str, Any] = {"compute": "inductor", "report": False, "timeout": 120.0}


def quantized_call(how: str, strategy: Any) -> tuple[mo.Call, dict[str, Any]]:
    how, _, held = how.partition(", ")
    quantize = mo.compressed if held else mo.quantized
    if strategy == "tp":
        call = quantize(models.mlp(), how)
        return call, {"mesh": md.Mesh(tp=2), "parallel": md.TensorParallel("tp", TENSOR_PLAN)}
    call = quantize(models.attention(), how)
    return call, {"mesh": md.Mesh(cp=2), "parallel": md.ContextParallel("cp", strategy, PLAN)}


def compile_and_compare(rank: int, how: str, strategy: str) -> tuple[list[float], str, str]:
    """Of two calls the errors, what ran, and what a scale that was changed since is refused with."""
    (model, args, kwargs), parallel = quantized_call(how, strategy)
    with torch.no_grad(), md.compile(model, args, kwargs, **OPTIONS, **parallel) as runner:
        errors = [relative_error(runner(x), model(x)) for x in (args[0], args[0].flip(1))]
        last = model.down if strategy == "tp" else model.out
        scale = "_scale" if "compressed" in how else "_amax"
        getattr(last.weight_quantizer, scale).mul_(2)
        with pytest.raises(InputError) as refused:
            runner(*args)
        return errors, runner.summary, str(refused.value)


@pytest.mark.parametrize(
    ("how", "strategy"),
    [
        ("float8", "ulysses"),
        ("int8", "allgather_kv"),
        ("int8", "tp"),
        ("float8, compressed", "tp"),
        ("int8, compressed", "ulysses"),
    ],
)
def test_what_is_compiled_computes_what_the_quantized_model_computes(how: str, strategy: str, ranks: Ranks) -> None:
    for outcome in ranks(compile_and_compare, how, strategy):
        assert not outcome.error, outcome.message
        errors, summary, refused = outcome.value
        assert max(errors) < 1e-5
        assert "nothing runs in TensorRT" in summary
        assert f"weight_quantizer.{'_scale' if 'compressed' in how else '_amax'}' was changed" in refused


def test_a_bundle_is_read_without_model_optimizer(tmp_path: Path) -> None:
    """Its graphs have the op of this package, and its weights the parts of the scales."""
    (model, args, kwargs), parallel = quantized_call("int8", "tp")
    bundle = tmp_path / "int8.mdtrt"
    md.export(model, args, kwargs, **parallel, compute="inductor", out=bundle)
    for rank in range(2):
        stored = rank_weights(bundle, read_manifest(bundle), rank, "cpu")
        half = model.up.weight_quantizer._amax.chunk(2)[rank]
        assert torch.equal(stored["up.weight_quantizer._amax"], half)
        assert torch.equal(stored["down.weight_quantizer._amax"], model.down.weight_quantizer._amax)
    fresh_python(
        f"""
import sys, pathlib
from torchtrt_md.bundle.read import read_manifest
from torchtrt_md.graph.json import graph_from_json
folder = pathlib.Path({str(bundle)!r})
graphs = [graph_from_json((folder / s.file).read_bytes()) for s in read_manifest(folder).ranks[0]]
called = [str(n.target) for g in graphs for n in g.graph.nodes]
assert called.count("torchtrt_md.fake_quantize.default") == 4, called
assert "modelopt" not in sys.modules
"""
    )


def test_a_bundle_of_engines_has_nothing_in_pytorch(tmp_path: Path) -> None:
    (model, args, kwargs), parallel = quantized_call("float8", "ulysses")
    exported = md.export(model, args, kwargs, **parallel, out=tmp_path / "float8.mdtrt")
    assert not exported.kept
    assert [s.runs for s in read_manifest(tmp_path / "float8.mdtrt").ranks[0]] == ["engine"]


def test_the_engine_of_a_flux_has_all_quantizers(tmp_path: Path) -> None:
    """One op of PyTorch's between engines would show in what is kept."""
    model, args, kwargs = mo.quantized(models.flux(torch.bfloat16), "float8")
    parallel: Any = md.ContextParallel("cp", "ulysses")
    exported = md.export(
        model, args, kwargs, mesh=md.Mesh(cp=2), parallel=parallel, out=tmp_path / "flux.mdtrt", check=False
    )
    assert not exported.kept
    assert len(exported.engines) == 1


@pytest.mark.parametrize("how", ["float8", "int8", "int8 weights"])
@pytest.mark.parametrize("strategy", ["ulysses", "tp"])
def test_a_bundle_holds_compressed_weights_in_8_bits(how: str, strategy: str, tmp_path: Path) -> None:
    """By Inductor as they are, and by TensorRT in engines with nothing in PyTorch between them."""
    (model, args, kwargs), parallel = quantized_call(f"{how}, compressed", strategy)
    bundle = tmp_path / "8.mdtrt"
    md.export(model, args, kwargs, **parallel, compute="inductor", out=bundle)
    stored = rank_weights(bundle, read_manifest(bundle), 0, "cpu")
    name = "down.weight" if strategy == "tp" else "out.weight"
    assert stored[name].element_size() == 1
    exported = md.export(model, args, kwargs, **parallel, out=tmp_path / "engines.mdtrt")
    assert not exported.kept
    assert [s.runs for s in read_manifest(tmp_path / "engines.mdtrt").ranks[0]] == ["engine"]
