"""What torchao has quantized, through ``md.compile`` on two ranks, and in bundles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
import quantized
import torch
from rank_processes import Ranks
from torch.utils import _pytree as pytree

import torchtrt_md as md
from torchtrt_md.bundle.given import given_checkpoint, given_weights
from torchtrt_md.bundle.read import read_manifest
from torchtrt_md.bundle.weights import rank_weights
from torchtrt_md.errors import InputError
from torchtrt_md.graph.json import check_bindings, graph_from_json
from torchtrt_md.options import Options
from torchtrt_md.road import Road
from torchtrt_md.verification.compare import relative_error
from torchtrt_md.wrappers import named_weights

aten = torch.ops.aten
PLAN = {"": {"x": md.Split(1)}, "out": md.Gather(1)}
TENSOR_PLAN = {"up": "colwise", "down": "rowwise"}
OPTIONS: dict[str, Any] = {"compute": "inductor", "report": False, "timeout": 120.0}


def compile_and_compare(rank: int, config: str, strategy: str) -> tuple[list[float], float, str, str]:
    """Of two calls the errors, how far off the model was before it was quantized, what ran, and a refusal."""
    dtype = torch.bfloat16 if config == "float8 by row" else torch.float32  # torchao wants it so
    plain = models.mlp(dtype) if strategy == "tp" else models.attention(dtype)
    if strategy == "tp":
        model, args, kwargs = quantized.mlp(config, dtype)
        how: dict[str, Any] = {"mesh": md.Mesh(tp=2), "parallel": md.TensorParallel("tp", TENSOR_PLAN)}
    else:
        model, args, kwargs = quantized.attention(config, dtype)
        how = {"mesh": md.Mesh(cp=2), "parallel": md.ContextParallel("cp", strategy, PLAN)}  # type: ignore[arg-type]
    last = model.down if strategy == "tp" else model.out
    with torch.no_grad(), md.compile(model, args, kwargs, **OPTIONS, **how) as runner:
        errors = [relative_error(runner(x), model(x)) for x in (args[0], args[0].flip(1))]
        before = relative_error(plain[0](*args), model(*args))
        last.weight.scale.mul_(2)
        with pytest.raises(InputError) as refused:
            runner(*args)
        return errors, before, runner.summary, str(refused.value)


@pytest.mark.parametrize(
    ("config", "strategy"),
    [
        ("float8 by row", "ulysses"),
        ("float8 by tensor", "ring"),
        ("int8 weights", "allgather_kv"),
        ("int8 by row", "tp"),
    ],
)
def test_what_is_compiled_computes_what_the_quantized_model_computes(config: str, strategy: str, ranks: Ranks) -> None:
    for outcome in ranks(compile_and_compare, config, strategy):
        assert not outcome.error, outcome.message
        errors, before, summary, refused = outcome.value
        # What is rounded otherwise before falls to the other side of some steps of eight bits.
        assert max(errors) < (before / 2 if config == "float8 by row" else 1e-5)
        assert "nothing runs in TensorRT" in summary
        assert f"the weight '{'down' if strategy == 'tp' else 'out'}.weight.scale' was changed" in refused


def refuse_the_graph_of_dynamo(rank: int) -> None:
    model, args, _ = quantized.mlp("float8 by row")
    with torch.no_grad():
        torch.compile(model, backend="torchtrt_md", options={"compute": "inductor"})(*args)


def test_the_backend_of_torch_compile_refuses_quantized_weights(ranks: Ranks) -> None:
    for outcome in ranks(refuse_the_graph_of_dynamo):
        assert outcome.error == "CaptureError"
        assert "the graph of torch.compile takes 'up.weight', a Float8Tensor" in outcome.message
        assert "use torchtrt_md.compile" in outcome.message


@pytest.mark.parametrize("config", ["float8 by row", "int8 by row"])
def test_a_bundle_has_the_plain_tensors(config: str, tmp_path: Path) -> None:
    """Each rank's part of them, bit for bit, in the file or given at load."""
    model, args, kwargs = quantized.mlp(config)
    how: dict[str, Any] = {"mesh": md.Mesh(tp=2), "parallel": md.TensorParallel("tp", TENSOR_PLAN)}
    how |= {"compute": "inductor"}
    whole, stripped = tmp_path / "whole.mdtrt", tmp_path / "stripped.mdtrt"
    md.export(model, args, kwargs, **how, out=whole)
    md.export(model, args, kwargs, **how, out=stripped, strip_weights=True, check=False)
    manifest = read_manifest(stripped)
    assert {"up.weight.qdata", "down.weight.scale"} <= manifest.given_names
    for rank in range(2):
        stored = rank_weights(whole, read_manifest(whole), rank, "cpu")
        given = given_weights(manifest, rank, given_checkpoint(manifest, model.state_dict()), "cpu")
        assert stored.keys() == given.keys() <= named_weights(model).keys()
        for name, tensor in stored.items():
            assert tensor.dtype == given[name].dtype == named_weights(model)[name].dtype
            assert torch.equal(tensor, given[name]), name
        half = model.up.weight.qdata.chunk(2)[rank]
        assert torch.equal(stored["up.weight.qdata"], half)
    called = set()
    for segment in read_manifest(whole).ranks[0]:
        graph = graph_from_json((whole / segment.file).read_bytes())
        check_bindings(graph, segment)
        called |= {node.target for node in graph.graph.nodes}
    assert (aten._scaled_mm.default if "float8" in config else aten._int_mm.default) in called


@pytest.mark.parametrize("config", ["float8 weights", "int8 by row"])
def test_engines_have_nothing_of_eight_bits_in_them(config: str) -> None:
    """TensorRT would refuse it, or take it for numbers that it scales itself."""
    model, args, kwargs = quantized.attention(config)
    program = md.capture(model, args, kwargs, mesh=md.Mesh(cp=2), parallel=md.ContextParallel("cp", "ulysses", PLAN))
    road = Road(program, Options(mesh=md.Mesh(cp=2), target="portable"), ranks=range(2))
    choices = road.default()
    built = road.build(road.lower(choices), choices)
    narrow = {torch.int8, torch.float8_e4m3fn}
    assert any(part.runs == "engine" for part in built.parts[0])
    for part in built.parts[0]:
        if part.runs == "engine" and part.graph is not None:
            values = [v for node in part.graph.graph.nodes for v in pytree.tree_leaves(node.meta.get("val"))]
            assert not {v.dtype for v in values if v is not None} & narrow
    kept = {(kept.op, kept.reason) for kept in built.placed.kept}
    if config == "float8 weights":
        assert kept == {("aten._to_copy.default", "it takes float8_e4m3fn, which an engine cannot be given")}
    else:
        assert ("aten._int_mm.default", "it takes int8, which an engine cannot be given") in kept
        assert ("aten.add.Tensor", "TensorRT scales int8 in layers of its own only") in kept
