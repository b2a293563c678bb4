"""The speed benchmark, as far as a CPU can tell: block, plan, peers, timing, and the script from end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_processes import WORLD, Ranks

import torchtrt_md as md
from torchtrt_md.parallel import Placement
from torchtrt_md.program import Sharding

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import block_speed, blocks, measure, peers, whole_models  # noqa: E402

EXACT = 1e-5


@pytest.mark.parametrize("placement", ["engine", "split"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_block_goes_through_and_stays_split(size: int, placement: Placement) -> None:
    block, args = blocks.make(blocks.SMALL, 0, "cpu")
    parallel = md.ContextParallel("cp", strategy="ulysses", plan=blocks.PLAN)
    program = md.capture(block, args, mesh=md.Mesh(cp=size), parallel=parallel)
    lowered = md.lower(program, placement=placement)
    assert lowered.outputs[0].sharding == ((Sharding(1, "cp"),) if size > 1 else ())
    assert md.verify(lowered, block, args).structure_error < 1e-12


def test_equal_seeds_give_equal_blocks() -> None:
    (one, some), (two, others) = (blocks.make(blocks.SMALL, seed, "cpu") for seed in (3, 3))
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert all(map(torch.equal, some, others))
    assert not torch.equal(some[0], blocks.make(blocks.SMALL, 4, "cpu")[1][0])


def test_the_result_depends_on_the_attention() -> None:
    """Where attention changed little, its errors would not show."""
    block, args = blocks.make(blocks.SMALL, 0, "cpu")
    with torch.no_grad():
        right = block(*args)
        wrong = block(args[0], args[1], -args[2], args[3])  # rotated the other way
    assert (right - wrong).norm() / right.norm() > 1e-2


def test_reference_rows_are_the_blocks_own() -> None:
    block, args = blocks.make(blocks.SMALL, 0, "cpu")
    rows = torch.tensor([0, 3, 17, 31, 8])
    with torch.no_grad():
        dense = block(*args)[:, rows]
    assert relative(blocks.reference_rows(block, args, rows, at_once=2), dense) < EXACT


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


EAGER = [peers.Form(), peers.Form(fused_qkv=True)]
COMPILED = [peers.Form(compiled=True), peers.Form(compiled=True, fused_qkv=True)]


@pytest.mark.parametrize("form", [*EAGER, *COMPILED], ids=str)
def test_peers_on_one_rank(form: peers.Form) -> None:
    block, args = blocks.make(blocks.SMALL, 0, "cpu")
    local = peers.local_args(args, 0, 1)
    with torch.no_grad():
        assert relative(peers.UlyssesBlock(block, form, None)(*local), block(*args)) < EXACT


def peer(rank: int, form: peers.Form) -> tuple[float, int]:
    """The error of this rank's chunk, and how many all-to-alls a call had."""
    block, args = blocks.make(blocks.SMALL, 0, "cpu")
    group = dist.group.WORLD
    assert group is not None
    local = peers.local_args(args, rank, WORLD)
    own = peers.UlyssesBlock(block, form, group)
    with torch.profiler.profile() as profiler, torch.no_grad():
        chunk = own(*local)
    exchanges = sum("all_to_all" in event.name and event.name.startswith("gloo") for event in profiler.events())
    with torch.no_grad():
        return relative(chunk, block(*args).chunk(WORLD, dim=1)[rank]), exchanges


@pytest.mark.parametrize("form", [*EAGER, *COMPILED], ids=str)
def test_peers_compute_the_dense_blocks_chunk(ranks: Ranks, form: peers.Form) -> None:
    for outcome in ranks(peer, form):
        assert not outcome.error, outcome.message
        error, exchanges = outcome.value
        assert error < EXACT
        assert exchanges == 2, "one packed exchange there and one back"


def compiled_peer(rank: int) -> tuple[float, int]:
    """As ``peer``, traced into one graph: Inductor would get the whole block.  And the graph's number of exchanges."""
    block, args = blocks.make(blocks.SMALL, 0, "cpu")
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph.code)
        return graph

    own = peers.UlyssesBlock(block, peers.Form(compiled=True, fused_qkv=True), dist.group.WORLD)
    run = torch.compile(own, backend=backend, fullgraph=True, dynamic=False)
    with torch.no_grad():
        chunk = run(*peers.local_args(args, rank, WORLD))
        error = relative(chunk, block(*args).chunk(WORLD, dim=1)[rank])
    assert len(graphs) == 1
    return error, graphs[0].count("all_to_all_single(")


def test_the_compiled_peer_is_one_graph(ranks: Ranks) -> None:
    for outcome in ranks(compiled_peer):
        assert not outcome.error, outcome.message
        error, exchanges = outcome.value
        assert error < EXACT
        assert exchanges == 2


def in_turn(rank: int) -> tuple[dict[str, dict[str, Any]], list[str]]:
    made: list[str] = []

    def call(name: str) -> torch.Tensor:
        made.append(name)
        return torch.zeros(1)

    clock = measure.Clock(torch.device("cpu"))
    calls = {"a": lambda: call("a"), "b": lambda: call("b")}
    return measure.interleaved(clock, calls, 20, {"a": 2, "b": 1}), made


def test_candidates_take_turns_and_ranks_agree_on_the_times(ranks: Ranks) -> None:
    (times, made), (same, _) = (outcome.value for outcome in ranks(in_turn))
    assert times == same
    assert made[:6] == ["a", "a", "b", "b", "a", "a"]
    assert len(made) == 60
    for name in "ab":
        assert 0 < times[name]["p10"] <= times[name]["median"] <= times[name]["p90"]
        assert times[name]["rounds"] == 20


def kernel(name: str, start: float, us: float, stream: int = 7) -> dict[str, Any]:
    return {"cat": "kernel", "name": name, "ts": start, "dur": us, "args": {"stream": stream}}


def test_a_timeline_starts_behind_the_mark_and_knows_idle_from_overlapped() -> None:
    events = [
        kernel("nvjet_first_call", 0, 500),
        kernel("at::cuda::(anonymous namespace)::spin_kernel(long)", 900, 100),
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 950, "dur": 5},
        kernel("nvjet_hsh_128x256", 1010, 100),
        kernel("_store", 1100, 50, stream=9),  # 10 of them beside the product
        kernel("triton_poi_fused__scaled_dot_product_cudnn_attention_0", 1150.5, 9.5),
        kernel("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", 1170, 30),
    ]
    seen = measure.analysed(events)
    assert [k["name"] for k in seen["kernels"]] == [e["name"] for e in events[3:]]
    assert seen["kernels"][1]["start"] == 90
    assert seen["kernels"][1]["stream"] == 9
    assert seen["span_us"] == 190
    assert seen["busy_us"] == pytest.approx(190 - 0.5 - 10)
    assert seen["class_us"] == {"exchange": 50, "attention": 30, "gemm": 100, "other": 9.5}
    assert seen["exposed_us"] == pytest.approx(40)
    assert seen["sum_us"] == 189.5
    assert seen["gaps"] == [{"start": 150.0, "us": 10.0, "after": events[5]["name"], "before": events[6]["name"]}]


def test_kernels_are_counted_by_name() -> None:
    ran = measure.analysed([kernel("a", 0, 5), kernel("b", 5, 20), kernel("a", 25, 5)])["kernels"]
    assert list(measure.by_name(ran).items()) == [("b", {"times": 1, "us": 20}), ("a", {"times": 2, "us": 10})]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ncclDevKernel_SendRecv", "exchange"),
        ("_store", "exchange"),
        ("void c10d::symmetric_memory::(anonymous namespace)::barrier_kernel(unsigned int**)", "exchange"),
        ("vectorized_elementwise_kernel<8, CUDAFunctor_add<BFloat16>>", "other"),
        ("triton_poi_fused_add_store_0", "other"),
        ("triton_tem_fused_mm_3", "gemm"),
    ],
)
def test_kernels_have_a_class(name: str, kind: str) -> None:
    assert measure.classified(name) == kind


def test_whole_models_tell_what_ran() -> None:
    seen = measure.analysed([kernel("nvjet", 0, 600), kernel("_store", 600, 300), kernel("x", 910, 90)])
    row = whole_models._timelines({"ours": {"timeline": seen | {"kernels": 3}}, "theirs": {"timeline": {}}})[-1]
    assert row == "| ours | 1.00 | 0.60 | 0.00 | 0.30 | 0.09 | 0.30 | 0.01 | 3 |"


def test_waiting_in_a_collective_is_not_its_own_time() -> None:
    seen = measure.analysed(
        [kernel("nvjet", 0, 600), kernel("ncclDevKernel_SendRecv", 600, 300), kernel("x", 900, 100)]
    )
    alone = {"attention": 9.0, "exchange there": 0.1, "exchange back": 0.05}
    own = block_speed.own_sum(seen, alone, ms=1.02)
    assert own["own_ms"] == pytest.approx(0.6 + 0.1 + 0.15)
    assert own["step_over_own"] == pytest.approx(1.2)
    assert own["step_over_sum"] == pytest.approx(1.02)
    record = {**block_speed.Candidate("ours", "").record(), "relative_error": 2e-3, "timeline": own}
    record |= {"ms": {"median": 1.02, "p10": 1.0, "p90": 1.1}, "over_best_peer": 0.95, "efficiency": None}
    assert block_speed.row("split", record) == (
        "| split | 1.020 | 1.000-1.100 | 0.950 | 2.00e-03 | 1.200 | 0.600, 0.000, 0.300, 0.100 | 0.000 |  |"
    )


def test_no_kernels_no_timeline() -> None:
    assert measure.analysed([]) == {}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("speed") / "two.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={WORLD}"),
            *(ROOT / "benchmarks" / "block_speed.py", "--device", "cpu", "--block", "small", "--out", out),
            *("--no-peer-search", "--only", "torch eager", "--deadline", "120"),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=out.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "small on 2: best peer 'torch eager'" in done.stdout
    return out


def test_the_script_writes_what_it_measured(report: Path) -> None:
    result = json.loads(report.read_text())["blocks"]["small"]
    eager = result["candidates"]["torch eager"]
    assert list(result["candidates"]) == ["torch eager"]
    assert eager["relative_error"] < EXACT
    assert eager["ms"]["rounds"] >= 20
    assert (eager["over_best_peer"], eager["efficiency"]) == (1.0, None)
    assert set(result["alone_ms"]) == {"attention", "exchange there", "exchange back"}
    assert "| torch eager | " in report.with_suffix(".md").read_text()


def test_whole_models_are_timed_beside_peers(tmp_path: Path) -> None:
    out = tmp_path / "llama.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={WORLD}"),
            *(ROOT / "benchmarks" / "whole_models.py", "--device", "cpu", "--size", "small", "--model", "llama"),
            *("--out", out, "--only", "dense, eager", "--only", "DTensor, eager", "--only", "ours, TensorRT"),
            *("--deadline", "120", "--commit", "abc"),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )
    assert done.returncode == 1, "there are no GPUs for TensorRT"
    found = json.loads(out.read_text())["models"]["llama"]["candidates"]
    assert list(found) == ["ours, TensorRT", "dense, eager", "DTensor, eager"], done.stderr[-3000:]
    assert "has no CUDA GPU" in found["ours, TensorRT"]["error"]
    for name in ("dense, eager", "DTensor, eager"):
        assert found[name]["ms"]["rounds"] >= 20, found[name]["error"]
        assert 0 < found[name]["relative_error"] < 0.02
    table = out.with_suffix(".md").read_text()
    assert "Commit abc." in table
    assert "| dense, eager | 1 | " in table
    assert "| ours, TensorRT | 2 | rank 0: LaunchError: " in table


def test_a_deadline_holds_whatever_torchtrt_md_waits_for_meanwhile() -> None:
    """Its waits set and clear faulthandler's timer, of which a process has one."""
    code = "import faulthandler, time; from benchmarks import measure; measure.end_after(1.0);"
    code += (
        "faulthandler.dump_traceback_later(60, exit=True); faulthandler.cancel_dump_traceback_later(); time.sleep(60)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 1
    assert "most recent call first" in done.stderr
