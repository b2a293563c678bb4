"""``md.compile`` on two real ranks, Inductor in place of TensorRT; and real engines, built without a GPU."""

from __future__ import annotations

import subprocess
import sys
import time
import unittest.mock
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
from rank_processes import Ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers.modeling_outputs import CausalLMOutputWithPast

import torchtrt_md as md
from torchtrt_md.build.cache import EngineCache
from torchtrt_md.build.part import build_part, unconvertible, with_transposed_weights
from torchtrt_md.bundle.read import check_files, rank_files, read_manifest
from torchtrt_md.bundle.weights import rank_weights
from torchtrt_md.choices import Choices, Decision
from torchtrt_md.doors.compile import _times
from torchtrt_md.errors import BuildError, ConversionError, PlanError
from torchtrt_md.graph.json import check_bindings, graph_from_json
from torchtrt_md.lowering.passes import Exchange
from torchtrt_md.options import Options
from torchtrt_md.place import PlacedProgram, place
from torchtrt_md.place.choose import Choice, choose_compute, choose_placement
from torchtrt_md.program import ShardedProgram, Weight, placeholders, value_of
from torchtrt_md.road import Built, summary_of
from torchtrt_md.segment import Part
from torchtrt_md.verification.compare import relative_error

PLAN = {"": {"x": md.Split(1)}, "out": md.Gather(1)}
OPTIONS: dict[str, Any] = {"compute": "inductor", "report": False, "timeout": 120.0}


# --- on two ranks ---


def case_of(name: str) -> tuple[models.Call, dict[str, Any]]:
    """A model and how it is compiled."""
    if name == "llama":
        return models.llama(), {"mesh": md.Mesh(tp=2), "parallel": md.TensorParallel("tp"), "check": True}
    cp = {"mesh": md.Mesh(cp=2), "check": False}
    if name == "causal ring":
        call = models.attention(kv_heads=2, causal=True)
        return call, {**cp, "parallel": md.ContextParallel("cp", "ring", PLAN), "check": True}
    if name == "exchange":
        exchange = Exchange("ulysses", head_groups=2, values_first=True)
        return models.attention(), {**cp, "parallel": md.ContextParallel("cp", "ulysses", PLAN), "exchange": exchange}
    return models.attention(), {**cp, "parallel": md.ContextParallel("cp", name, PLAN)}  # type: ignore[arg-type]


def first_tensor(result: Any) -> Tensor:
    found = result if isinstance(result, Tensor) else result[0]
    assert isinstance(found, Tensor)
    return found


def compile_and_compare(rank: int, name: str) -> tuple[list[float], bool, bool, str, dict[str, int]]:
    """Of two calls: their errors, whether the results are of the model's own class, and left alone by the other call.

    And the summary, and what parts run as.
    """
    (model, args, kwargs), options = case_of(name)
    runner = md.compile(model, args, kwargs, **OPTIONS, **options)
    other = tuple(a.flip(1) for a in args)
    errors, same_class, results = [], True, []
    with torch.no_grad():
        for a in (args, other):
            want, found = model(*a, **kwargs), runner(*a, **kwargs)
            same_class &= type(found) is type(want) and (name != "llama" or isinstance(found, CausalLMOutputWithPast))
            errors.append(relative_error(first_tensor(found), first_tensor(want)))
            results.append((first_tensor(found), first_tensor(found).clone()))
    untouched = all(torch.equal(result, copy) for result, copy in results)
    runs = [segment.runs for segment in runner.manifest.ranks[rank]]
    summary = runner.summary
    runner.close()
    return errors, same_class, untouched, summary, {kind: runs.count(kind) for kind in set(runs)}


@pytest.mark.parametrize("name", ["ulysses", "allgather_kv", "llama", "causal ring", "exchange"])
def test_what_is_compiled_computes_what_the_model_computes(name: str, ranks: Ranks) -> None:
    for outcome in ranks(compile_and_compare, name):
        assert not outcome.error, outcome.message
        errors, same_class, untouched, summary, counts = outcome.value
        assert max(errors) < 1e-5
        assert same_class
        assert untouched, "a call wrote over what another returned"
        assert set(counts) == {"inductor", "eager"}
        assert f"({counts['inductor']} inductor, {counts['eager']} eager)" in summary
        assert "placement: split, nothing runs in TensorRT" in summary


class ScaledByATensor(nn.Module):
    """By a plain tensor, which is no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.scale = nn.Linear(32, 32), torch.ones(32)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(x * self.scale)
        return result


def change_what_is_no_weight(rank: int) -> str:
    torch.manual_seed(0)
    model, x = ScaledByATensor().eval(), torch.randn(1, 8, 32)
    how = {**OPTIONS, "mesh": md.Mesh(cp=2), "parallel": md.ContextParallel("cp", plan=PLAN), "check": False}
    with md.compile(model, (x,), **how) as runner, torch.no_grad():
        torch.testing.assert_close(runner(x), model(x))
        model.scale.mul_(2)
        runner(x)
    return "no error"


def test_what_a_model_holds_beside_its_weights_does_not_change(ranks: Ranks) -> None:
    for outcome in ranks(change_what_is_no_weight):
        assert outcome.error == "InputError"
        assert "the tensor 'scale', which is no parameter and no buffer, was changed" in outcome.message


def compile_a_sharded_model(rank: int, names: tuple[str, ...] | None) -> tuple[float, float, str]:
    """By md.compile and by torch.compile: their errors; and the mesh."""
    dense, (x,), _ = models.mlp()
    sharded = models.MLP().eval()
    sharded.load_state_dict(dense.state_dict())
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=names)
    parallelize_module(sharded, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    torch.compiler.reset()
    by_backend = torch.compile(sharded, backend="torchtrt_md", options=OPTIONS)
    with md.compile(sharded, (x,), **OPTIONS) as runner, torch.no_grad():
        want = dense(x)
        return relative_error(runner(x), want), relative_error(by_backend(x), want), str(runner.manifest.mesh)


@pytest.mark.parametrize(("names", "named"), [(("tp",), "tp"), (None, "dim0")])
def test_a_sharded_model_brings_its_mesh_with_names_or_without(
    names: tuple[str, ...] | None, named: str, ranks: Ranks
) -> None:
    for outcome in ranks(compile_a_sharded_model, names):
        assert not outcome.error, outcome.message
        *errors, mesh = outcome.value
        assert max(errors) < 1e-5
        assert mesh == f"{{'{named}': 2}}"


def deep(depth: int) -> nn.Module:
    torch.manual_seed(0)
    return models.Deep(depth).eval()


def compile_another_model(rank: int) -> None:
    parallel = md.ContextParallel("cp", "ulysses", PLAN)
    md.compile(deep(1 + rank), (torch.randn(1, 8, 32),), mesh=md.Mesh(cp=2), parallel=parallel, **OPTIONS)


def test_another_model_on_one_rank_is_the_same_error_on_all(ranks: Ranks) -> None:
    first, second = ranks(compile_another_model)
    assert first == second
    assert first.error == "RankMismatchError"
    assert "the ranks differ in their weights" in first.message
    assert "rank 0" in first.message
    assert "rank 1" in first.message


def compile_a_model_that_one_rank_cannot_trace(rank: int) -> None:
    model, args, _ = models.attention()
    if rank == 1:
        model.out = nn.Linear(7, 32)
    parallel = md.ContextParallel("cp", "ulysses", PLAN)
    md.compile(model, args, mesh=md.Mesh(cp=2), parallel=parallel, check=False, **OPTIONS)


def test_what_fails_on_one_rank_fails_on_all(ranks: Ranks) -> None:
    first, second = ranks(compile_a_model_that_one_rank_cannot_trace)
    assert first == second
    assert first.error
    assert "rank 1: " in first.message
    assert "rank 0" not in first.message


def compile_with_a_faulty_compiler(rank: int) -> None:
    real = torch._inductor.compile

    def faulty(module: Any, given: Any, **options: Any) -> Any:
        compiled = real(module, given, **options)
        return lambda *tensors: [result.flip(-1) for result in compiled(*tensors)]

    (model, args, kwargs), options = case_of("ulysses")
    with unittest.mock.patch.object(torch._inductor, "compile", faulty if rank == 1 else real):
        md.compile(model, args, kwargs, **OPTIONS, **options)


def test_a_part_that_a_rank_compiled_wrongly_is_refused_on_all(ranks: Ranks) -> None:
    for outcome in ranks(compile_with_a_faulty_compiler):
        assert outcome.error == "VerificationError"
        assert "rank 1: segment" in outcome.message
        assert "as Inductor compiled it, computes something else than its graph" in outcome.message


def compile_models_that_send_alike(rank: int) -> None:
    heads = 4 if rank == 0 else 3  # of which two ranks get four, one of them a copy: their exchanges are equal
    model, args, _ = models.attention(heads=heads, kv_heads=heads)
    parallel = md.ContextParallel("cp", "ulysses", PLAN)
    md.compile(model, args, mesh=md.Mesh(cp=2), parallel=parallel, check=False, **OPTIONS)


def test_models_of_other_sizes_that_would_meet_all_the_same(ranks: Ranks) -> None:
    """Also without a comparison of their values."""
    first, second = ranks(compile_models_that_send_alike)
    assert first == second
    assert first.error == "RankMismatchError"
    assert "the hash of their models' weights, inputs and outputs" in first.message


def compile_without_a_mesh(rank: int) -> None:
    model, args, _ = models.mlp()
    md.compile(model, args, **OPTIONS)


def compile_for_another_launch(rank: int) -> None:
    model, args, _ = models.mlp()
    md.compile(model, args, mesh=md.Mesh(tp=4), parallel=md.TensorParallel("tp", plan={"up": "colwise"}), **OPTIONS)


WITHOUT_TENSORRT = """
import os, sys
sys.modules.update(dict.fromkeys(("tensorrt", "tensorrt_rtx", "torch_tensorrt")))
import torch, torch.distributed as dist
import torchtrt_md as md
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
runner = md.compile(
    torch.nn.Identity(), (torch.ones(2),), mesh=md.Mesh(d=1), compute="inductor", placement="split", report=False
)
assert torch.equal(runner(torch.ones(2)), torch.ones(2))
"""


def test_inductor_needs_no_tensorrt() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TENSORRT], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr


def test_a_mesh_that_is_missing_or_does_not_fit(ranks: Ranks) -> None:
    for outcome in ranks(compile_without_a_mesh):
        assert outcome.error == "LaunchError"
        assert "compile needs a mesh" in outcome.message
    for outcome in ranks(compile_for_another_launch):
        assert outcome.error == "MeshError"
        assert "has 4 ranks and the launch has 2" in outcome.message


# What one rank alone gets wrong, in the arguments of md.compile.
WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "value": ({"placement": "splti"}, "OptionError", "'placement' cannot be 'splti'"),
    "name": ({"cudagraph": True}, "OptionError", "there is no option 'cudagraph'"),
    "timeout": ({"timeout": "long"}, "OptionError", "'timeout' cannot be 'long'"),
    "no mesh": ({"mesh": None}, "LaunchError", "compile needs a mesh"),
}


def compile_with_a_wrong_option(rank: int, name: str) -> tuple[list[str], float, float]:
    """What both doors said, in how many seconds, and the error of a compilation behind them."""
    model, (x,), _ = models.attention()
    fine: dict[str, Any] = {**OPTIONS, "mesh": md.Mesh(cp=2), "parallel": md.ContextParallel("cp", plan=PLAN)}
    wrong = {**fine, **(WRONG[name][0] if rank else {})}
    start, said = time.monotonic(), []
    for call in (
        lambda: md.compile(model, (x,), **wrong),
        lambda: torch.compile(model, backend="torchtrt_md", options=wrong)(x),
    ):
        torch.compiler.reset()
        try:
            with torch.no_grad():
                call()
        except md.MDError as error:
            said.append(f"{type(error).__name__}: {error}")
    seconds = time.monotonic() - start
    with md.compile(model, (x,), **fine) as runner, torch.no_grad():
        return said, seconds, relative_error(runner(x), model(x))


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_option_on_one_rank_is_the_same_error_on_all_at_once(name: str, ranks: Ranks) -> None:
    first, second = ranks(compile_with_a_wrong_option, name)
    assert not first.error, first.message
    assert first.value[0] == second.value[0]
    said, seconds, error = first.value
    _, kind, problem = WRONG[name]
    assert len(said) == 2
    assert said[0].startswith(f"{kind}: rank 1: {problem}")
    assert "rank 1" in said[1]
    assert seconds < 60, "nobody waits for the timeout"
    assert error < 1e-5, "the launch can be used behind it"


class Scaled(models.SelfAttention):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x) * scale


def compile_apart(rank: int, what: str) -> None:
    _, (x,), kwargs = models.attention()
    torch.manual_seed(0)
    model = Scaled().eval()
    options = {**OPTIONS, "mesh": md.Mesh(cp=2), "parallel": md.ContextParallel("cp", plan=PLAN)}
    if rank and what == "option":
        options["overlap"] = False
    if rank and what == "plan":
        options["parallel"] = md.ContextParallel("cp", plan={"": {"x": md.Split(1)}, "out": md.Gather(-2)})
    if rank and what == "shape":
        x = x[:, :8]
    if what == "value":
        kwargs = {"scale": 2.0 + rank}
    md.compile(model, (x,), kwargs, **options)


@pytest.mark.parametrize(
    ("what", "problem"),
    [
        ("option", "the ranks differ in their options: overlap: rank 0 has True, rank 1 has False"),
        (
            "plan",
            "the ranks differ in their options: parallel.plan['out']: rank 0 has Gather(dim=1), rank 1 has"
            " Gather(dim=-2)",
        ),
        (
            "shape",
            "the ranks differ in their example inputs: x: rank 0 has float32 [2, 16, 32], rank 1 has float32"
            " [2, 8, 32]",
        ),
        ("value", "the ranks differ in their example inputs: scale: rank 0 has 2.0, rank 1 has 3.0"),
    ],
)
def test_what_differs_between_ranks_is_said_and_nothing_else(what: str, problem: str, ranks: Ranks) -> None:
    for outcome in ranks(compile_apart, what):
        assert outcome.error == "RankMismatchError"
        assert outcome.message.splitlines()[0] == problem


# --- real engines, built on the CPU ---


def placed_blocks(depth: int = 2) -> PlacedProgram:
    """Two or more equal blocks in parts, for engines."""
    model = deep(depth).half()
    captured = md.capture(
        model, (torch.randn(1, 8, 32).half(),), mesh=md.Mesh(cp=2), parallel=md.ContextParallel("cp", "ulysses", PLAN)
    )
    return place(md.lower(captured, placement="split"), "split")


@pytest.fixture(scope="module")
def flux_parts() -> PlacedProgram:
    model, args, kwargs = models.flux(torch.float16)
    parallel = md.ContextParallel("cp", "ulysses")
    captured = md.capture(model, args, kwargs, mesh=md.Mesh(cp=2), parallel=parallel)
    return place(md.lower(captured, placement="split"), "split")


@pytest.fixture(scope="module")
def built(flux_parts: PlacedProgram, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Part], EngineCache]:
    cache = EngineCache(tmp_path_factory.mktemp("engines"))
    return build_parts(flux_parts.parts[0], cache), cache


def build_parts(parts: Sequence[Part], cache: EngineCache) -> list[Part]:
    return [build_part(part, "sm80", cache) for part in parts]


class TestParts:
    def test_equal_blocks_share_an_engine(self, tmp_path: Path) -> None:
        parts = build_parts(placed_blocks(3).parts[0], EngineCache(tmp_path))
        engines = [part.engine for part in parts if part.engine is not None]
        assert len(engines) == 4  # into the first attention, between two, and out of the last
        assert len(set(engines)) == 3
        assert engines[1] == engines[2]
        between = [part for part in parts if part.engine == engines[1]]
        assert between[0].segment.inputs != between[1].segment.inputs  # each has its own weights

    def test_flux_is_built(self, built: tuple[list[Part], EngineCache]) -> None:
        parts, cache = built
        engines = {part.engine for part in parts if part.runs == "engine"}
        assert all(engine is not None and engine.stat().st_size > 0 for engine in engines)
        assert cache.misses == len(engines)
        assert len(engines) == len({part.digest for part in parts if part.runs == "engine"})
        for part in parts:
            assert (part.engine is not None) == (part.runs == "engine")
            assert part.segment.axis is None  # all collectives are between engines

    def test_a_second_build_takes_all_from_the_cache(
        self, flux_parts: PlacedProgram, built: tuple[list[Part], EngineCache]
    ) -> None:
        parts, first = built
        cache = EngineCache(first.folder)
        again = build_parts(flux_parts.parts[1], cache)
        assert (cache.hits, cache.misses) == (first.hits + first.misses, 0)
        assert [part.engine for part in again] == [part.engine for part in parts]

    def test_another_target_is_another_engine(self, built: tuple[list[Part], EngineCache]) -> None:
        cache = EngineCache(built[1].folder)
        part = next(part for part in placed_blocks(1).parts[0] if part.runs == "engine")
        for target in ("sm80", "sm89", "sm80"):
            build_part(part, target, cache)
        assert (cache.hits, cache.misses) == (1, 2)

    def test_weights_are_taken_transposed(self, flux_parts: PlacedProgram) -> None:
        part = next(part for part in flux_parts.parts[0] if part.runs == "engine")
        turned = with_transposed_weights(part)
        assert part.graph is not None
        assert turned.graph is not None
        transposed = [b.transposed for b in turned.segment.inputs]
        assert any(transposed)
        for before, after, node in zip(
            part.segment.inputs, turned.segment.inputs, placeholders(turned.graph), strict=True
        ):
            assert after.source_shape == before.shape
            assert after.shape == tuple(value_of(node).shape)
            assert after.weight is not None or not after.transposed
        feeds = [torch.randn(b.shape, dtype=b.dtype) for b in part.segment.inputs]
        given = [x.t() if turn else x for turn, x in zip(transposed, feeds, strict=True)]
        for old, new in zip(part.graph(*feeds), turned.graph(*given), strict=True):
            torch.testing.assert_close(new, old)

    def test_a_weight_that_is_read_both_ways_stays(self) -> None:
        class Both(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.once, self.both = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))

            def forward(self, x: Tensor) -> Tensor:
                return x @ self.once.t() @ self.both.t() + self.both

        captured = md.capture(Both().eval(), (torch.randn(8, 8),), mesh=md.Mesh(cp=1))
        (part,) = place(md.lower(captured), "engine").parts[0]
        assert [b.source.name for b in with_transposed_weights(part).segment.inputs if b.transposed] == ["once"]


class Unusual(nn.Module):
    """An op between others that TensorRT has no layer for."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(x)
        z = torch.lgamma(y + 1)
        return z * y


@pytest.fixture(scope="module")
def unusual() -> ShardedProgram:
    return md.lower(md.capture(Unusual(), (torch.rand(4, 4),), mesh=md.Mesh(cp=1)))


class TestUnconvertible:
    def test_it_names_the_node_and_the_op(self, unusual: ShardedProgram) -> None:
        found = unconvertible(unusual.graphs[0])
        (name,) = found
        (node,) = [node for node in unusual.graphs[0].graph.nodes if node.name == name]
        assert node.target is torch.ops.aten.lgamma.default
        assert found[name] == "Torch-TensorRT has no converter for aten.lgamma.default"

    def test_it_stays_in_pytorch_between_engines(self, unusual: ShardedProgram, tmp_path: Path) -> None:
        placed = place(unusual, "engine", keep=unconvertible(unusual.graphs[0]))
        parts = build_parts(placed.parts[0], EngineCache(tmp_path))
        assert [part.runs for part in parts] == ["engine", "eager", "engine"]
        (kept,) = placed.kept
        assert (kept.op, kept.count) == ("aten.lgamma.default", 1)
        assert "z = torch.lgamma(y + 1)" in kept.at

    def test_fullgraph_names_the_op_and_the_users_line(self, unusual: ShardedProgram) -> None:
        with pytest.raises(BuildError, match="lgamma") as error:
            place(unusual, "engine", keep=unconvertible(unusual.graphs[0]), fullgraph=True)
        assert "test_compile.py" in error.value.at
        assert "z = torch.lgamma(y + 1)" in error.value.at
        assert "fullgraph" in error.value.fix

    def test_building_it_all_the_same_names_the_node(self, unusual: ShardedProgram, tmp_path: Path) -> None:
        with pytest.raises(ConversionError, match=r"aten\.lgamma\.default") as error:
            build_parts(place(unusual, "engine").parts[0], EngineCache(tmp_path))
        assert error.value.node in unconvertible(unusual.graphs[0])


# --- choices and what is told of them ---


@pytest.mark.parametrize(
    ("tune", "device", "given", "shares", "timed"),
    [
        ("auto", "cuda", [False, False], False, True),
        ("auto", "cuda", [False, False], True, False),
        ("auto", "cpu", [False, False], False, False),
        ("auto", "cuda", [False, True], False, False),
        (True, "cpu", [True, True], False, True),
        (True, "cuda", [False, False], True, True),
        (False, "cuda", [False, False], False, False),
    ],
)
def test_what_is_timed_by_default(tune: Any, device: str, given: list[bool], shares: bool, timed: bool) -> None:
    agreement = SimpleNamespace(gather=lambda value, about: given)
    launch: Any = SimpleNamespace(device=torch.device(device), agreement=agreement, shares_gpus=shares)
    program: Any = SimpleNamespace(weights=SimpleNamespace(given={"w": "w"} if given[0] else {}))
    assert _times(Options(tune=tune), launch, program) == timed


GPU_CHOICES = [
    # strategy, flavour, capability, rings in engines for the target -> placement
    ("ulysses", "TensorRT-RTX", (9, 0), False, "split", "no attention kernels for Hopper"),
    ("ulysses", "TensorRT-RTX", (8, 9), False, "engine", "one engine"),
    ("ulysses", "TensorRT-RTX", (12, 0), True, "engine", "one engine"),
    ("ulysses", "TensorRT", (9, 0), False, "engine", "one engine"),
    ("allgather_kv", "TensorRT-RTX", None, False, "engine", "one engine"),
    ("ring", "TensorRT", (9, 0), True, "split", "10.0 or later"),
    ("ring", "TensorRT", None, True, "split", "10.0 or later"),
    ("ring", "TensorRT", (10, 0), False, "split", "10.0 or later, as GPU and as target"),
    ("ring", "TensorRT", (10, 0), True, "engine", "one engine"),
    ("ring", "TensorRT-RTX", (9, 0), False, "split", "10.0 or later"),
]


def choose(asked: str, strategy: str = "ulysses", compute: str = "tensorrt", **of: Any) -> Choice:
    about = {"flavour": "TensorRT-RTX", "capability": (9, 0), "rings": False, **of}
    return choose_placement(asked, strategies={strategy}, compute=compute, **about)


class TestChoosePlacement:
    @pytest.mark.parametrize(("strategy", "flavour", "capability", "rings", "placement", "why"), GPU_CHOICES)
    def test_auto(
        self, strategy: str, flavour: str, capability: tuple[int, int] | None, rings: bool, placement: str, why: str
    ) -> None:
        found = choose("auto", strategy, flavour=flavour, capability=capability, rings=rings)
        assert found.placement == placement
        assert why in found.why

    @pytest.mark.parametrize("asked", ["engine", "split"])
    def test_what_is_asked_for_is_done(self, asked: str) -> None:
        assert choose(asked) == (asked, "as asked for")

    def test_inductor_has_no_engine(self) -> None:
        assert choose("auto", compute="inductor", capability=(8, 9)).placement == "split"
        with pytest.raises(PlanError, match="leaves nothing for an engine to hold"):
            choose("engine", compute="inductor")


@pytest.mark.parametrize(
    ("asked", "placement", "flavour", "capability", "runs"),
    [
        ("auto", "auto", "TensorRT-RTX", (9, 0), "inductor"),
        ("auto", "split", "TensorRT-RTX", (9, 0), "inductor"),
        ("auto", "engine", "TensorRT-RTX", (9, 0), "engine"),
        ("auto", "auto", "TensorRT-RTX", (8, 9), "engine"),
        ("auto", "auto", "TensorRT-RTX", None, "engine"),
        ("auto", "auto", "TensorRT", (9, 0), "engine"),
        ("tensorrt", "auto", "TensorRT-RTX", (9, 0), "engine"),
        ("inductor", "auto", "TensorRT-RTX", (8, 9), "inductor"),
    ],
)
def test_what_computes_where_nothing_is_timed(
    asked: str, placement: str, flavour: str, capability: tuple[int, int] | None, runs: str
) -> None:
    found, why = choose_compute(asked, placement, flavour=flavour, capability=capability)
    assert found == runs
    assert bool(why) == (asked == "auto" and runs == "inductor"), "what was asked for needs no reason"


def test_the_summary_tells_what_runs_where_and_why(tmp_path: Path) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.last = deep(3), Unusual()

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.last(self.blocks(x))
            return result

    program = md.lower(md.capture(Both().eval(), (torch.randn(1, 8, 32),), mesh=md.Mesh(cp=1)), placement="split")
    placed = place(program, "split", keep=unconvertible(program.graphs[0]))
    parts = build_parts(placed.parts[0], EngineCache(tmp_path))
    timed = Decision("attention", "ulysses", "the fastest", {"ulysses": 1.0, "ring": 2.25})
    choices = Choices("split", decisions=(Decision("placement", "split", "as asked for"), timed), tuned_on="a GPU")
    lines = summary_of(
        "Both",
        Built(placed, choices, (tuple(parts),), hits=2, misses=1),
        rank=0,
    ).splitlines()
    engines, eager = ([part for part in parts if part.runs == runs] for runs in ("engine", "eager"))
    different = len({part.engine for part in engines})
    assert lines[0] == (
        f"Both on Mesh(cp=1), placement split: {len(parts)} parts ({len(engines)} engine, {len(eager)} eager);"
        f" {different} different engines, 2 of them from the cache"
    )
    assert lines[1:4] == [
        "  timed on a GPU",
        "  placement: split, as asked for",
        "  attention: ulysses, the fastest (ulysses 1.000 ms, ring 2.250 ms)",
    ]
    assert lines[4].startswith(
        "  in PyTorch: 1 x aten.lgamma.default: Torch-TensorRT has no converter for aten.lgamma.default, at "
    )
    assert len(lines) == 5


# --- bundles of parts ---


def test_a_bundle_of_parts_reads_back(tmp_path: Path) -> None:
    out = tmp_path / "deep.mdtrt"
    model, args = deep(3).half(), (torch.randn(1, 8, 32).half(),)
    parallel = md.ContextParallel("cp", "ulysses", PLAN)
    exported = md.export(
        model, args, mesh=md.Mesh(cp=2), parallel=parallel, placement="split", out=out, target="sm80", check=False
    )
    manifest = read_manifest(out)  # which checks its structure
    assert manifest == exported.manifest
    check_files(out, manifest)
    assert manifest.placement == "split"
    assert [(d.what, d.chosen, d.why) for d in manifest.decisions] == [("placement", "split", "as asked for")]
    program = exported.program  # lowering may have joined some of the model's weights
    sources = [source for source in program.sources.values() if isinstance(source, Weight)]
    for rank, segments in enumerate(manifest.ranks):
        kinds = [segment.runs for segment in segments]
        assert kinds.count("engine") == 4
        assert len({segment.file for segment in segments if segment.runs == "engine"}) == 3
        for segment in segments:
            assert segment.file in rank_files(manifest, rank)
            if segment.runs == "eager":
                check_bindings(graph_from_json((out / segment.file).read_bytes()), segment)
        weights = rank_weights(out, manifest, rank, "cpu")
        held = {source.name: program.weights.local(source, program.mesh, rank) for source in sources}
        read = {binding.weight for segment in segments for binding in segment.inputs} - {None}
        assert weights.keys() == read
        assert all(torch.equal(weights[name], held[name]) for name in weights)
    assert manifest.weights[0] == manifest.weights[1]  # context parallelism: equal on all ranks


def test_each_rank_of_a_tensor_parallel_bundle_has_its_part_of_the_weights(tmp_path: Path) -> None:
    out = tmp_path / "mlp.mdtrt"
    model, args, _ = models.mlp(torch.float16)
    plan = {"up": "colwise", "down": "rowwise"}
    parallel = md.TensorParallel("tp", plan=plan)
    md.export(
        model, args, mesh=md.Mesh(tp=2), parallel=parallel, placement="split", out=out, target="sm80", check=False
    )
    manifest = read_manifest(out)
    halves = model.get_parameter("up.weight").chunk(2, 0)
    for rank, half in enumerate(halves):
        assert torch.equal(rank_weights(out, manifest, rank, "cpu")["up.weight"], half)
    assert manifest.weights[0] != manifest.weights[1]
