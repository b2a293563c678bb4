"""The command line, up to the GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from bundle import bundle_samples

from torchtrt_md.doors.run import Comparison, check_errors, check_example, main, random_inputs
from torchtrt_md.errors import InputError, VerificationError
from torchtrt_md.runtime.report import RankReport, Timing, report
from torchtrt_md.runtime.signature import Signature

CPU = torch.device("cpu")


@pytest.fixture
def no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert "--verify" in said
    assert "--report" in said


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["bundle", "--iterations", "-1"]) == 2


def test_without_torchrun_the_error_says_how_to_launch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], no_launch: None
) -> None:
    folder = bundle_samples.bundle(tmp_path / "model")
    assert main([str(folder)]) == 1
    said = capsys.readouterr().err
    assert "LaunchError: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR are not set" in said
    assert f"torchrun --nproc_per_node=2 -m torchtrt_md.run {folder}" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--report", "{}"), "'--report' cannot be {}, which is a folder"),
        (("--report", "{}/file/rep.json"), "{}/file is a file"),
        (("--verify", "{}/none.py"), "there is no model file '{}/none.py'"),
        (("--verify", "{}/file", "--model-device", "bogus"), "no model can be made on the device 'bogus'"),
    ],
)
def test_what_rank_0_reads_and_writes_is_looked_at_before_the_launch(
    arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_launch: None
) -> None:
    folder = bundle_samples.bundle(tmp_path / "model")
    (tmp_path / "file").write_text("")
    assert main([str(folder), *(argument.format(tmp_path) for argument in arguments)]) == 1
    said = capsys.readouterr().err
    assert message.format(tmp_path) in said
    assert "Traceback" not in said


def test_without_a_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str], no_launch: None) -> None:
    assert main([str(tmp_path / "nowhere")]) == 1
    assert "BundleError: there is no bundle at" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_launched_without_gpus_every_rank_fails_with_the_message(tmp_path: Path) -> None:
    folder = bundle_samples.bundle(tmp_path / "model")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    ended = subprocess.run(
        [*command, "-m", "torchtrt_md.run", str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode != 0
    assert "has no GPU of its own" in ended.stderr
    assert "exitcode  : 1" in ended.stderr


def test_random_inputs_are_chunks_of_the_same_whole() -> None:
    signature = Signature(bundle_samples.manifest())
    zero, one = (random_inputs(signature, rank, CPU, seed=1) for rank in range(2))
    assert zero["x"].shape == one["x"].shape == (2, 8)
    assert not torch.equal(zero["x"], one["x"])
    assert torch.equal(zero["mask.0"], one["mask.0"])
    signature.bind((), zero, CPU)
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(torch.cat([zero["x"], one["x"]]), torch.randn(4, 8, generator=generator))


def test_the_example_must_be_the_bundle_s() -> None:
    signature = Signature(bundle_samples.manifest())
    example = {"x": torch.randn(4, 8), "mask.0": torch.ones(4, dtype=torch.bool)}
    check_example(signature, example)
    with pytest.raises(InputError, match=r"'x' is torch.float32 \[2, 8\] in the file"):
        check_example(signature, {**example, "x": torch.randn(2, 8)})
    with pytest.raises(InputError, match="no input 'y'"):
        check_example(signature, {**example, "y": torch.randn(2, 8)})


def rank_reports(*errors: float) -> list[RankReport]:
    places = {"y": "at [0]"}
    return [
        RankReport(rank, "host", "H200", 1 << 20, {"y": error}, Timing.of([1.0 + rank, 2.0 + rank, 9.0]), places)
        for rank, error in enumerate(errors)
    ]


def test_the_worst_rank_is_named() -> None:
    compared = Comparison("float64", {"y": 4e-3}, {"y": 6e-3}, {}, {})
    check_errors(rank_reports(5e-3, 6e-3), compared)
    for wrong in (7e-3, float("inf")):
        with pytest.raises(VerificationError, match=r"output 'y' of rank 1 .* 0.006 is allowed.*; at \[0\]"):
            check_errors(rank_reports(5e-3, wrong), compared)


def test_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = report(
        bundle_samples.manifest(),
        tmp_path,
        "d1ge57",
        rank_reports(5e-3, 7e-3),
        iterations=3,
        reference="float64",
        dense_errors={"y": 4e-3},
        limits={"y": 6e-3},
    )
    written.write(tmp_path / "results" / "run.json")
    content = json.loads((tmp_path / "results" / "run.json").read_text())
    assert content["passed"] is False
    assert content["median_ms"] == 3.0, "of the slowest rank"
    assert content["built_with"] == msgspec.to_builtins(bundle_samples.installed())
    assert [r["errors"] for r in content["ranks"]] == [{"y": 5e-3}, {"y": 7e-3}]
    assert content["ranks"][0]["timing"] == {"median_ms": 2.0, "min_ms": 1.0, "max_ms": 9.0}
    assert content["schedule"][0]["op"] == "all_gather"
    written.show()
    said = capsys.readouterr().out
    assert "H200" in said
    assert "slowest rank: 3.000 ms" in said


def test_a_report_of_a_run_without_comparison_or_timing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranks = [RankReport(0, "host", "H200", 1 << 20, {}, None)]
    written = report(
        bundle_samples.manifest(), tmp_path, "d", ranks, iterations=0, reference=None, dense_errors={}, limits={}
    )
    assert written.passed
    assert written.median_ms is None
    written.show()
    assert "not compared" in capsys.readouterr().out
