"""The GPU suite without GPUs: its launches, what it makes of cases that go wrong, its report and its deadline."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu import faults
from gpu.case import Call, Case, Found, Rank
from gpu.cases import cases as real_cases
from gpu.report import FAILED, NOT_RUN, PASSED, REFUSED
from gpu.suite import Suite, write_dist_info

from torchtrt_md.errors import InputError

# --- cases of this file, which the suite's processes import: two launches end early, and the third ends well ---


def passes(at: Rank) -> Found:
    return Found(error=0.1 * (at.rank + 1), dense_error=0.5, message="fine")


def raises(at: Rank) -> Found:
    raise InputError("the same on all ranks")


def differs(at: Rank) -> Found:
    found = Found()
    found.expect(at.rank == 0, "rank 1 is not rank 0")
    return found


def refuses(at: Rank) -> Found:
    def step() -> None:
        raise InputError("as it must")

    found = Found()
    found.must_refuse(InputError, step, "must")
    return found


def dies(at: Rank) -> Found:
    if at.rank == 1:
        os._exit(7)
    time.sleep(60)
    return Found()


def is_silent(at: Rank) -> Found:
    time.sleep(60)
    return Found()


def ends(at: Rank) -> Found:
    if at.rank == 1:
        sys.stdout.write("these words\n")
        sys.stdout.flush()
        os._exit(70)
    return Found()


def cases(device: str, ranks: int) -> list[Case]:
    found = [Case(run.__name__, run) for run in (passes, raises, differs, refuses, dies)]
    found += [Case("is silent", is_silent, seconds=2.0), Case("ends", ends, ends={1: 70}, says=("these words",))]
    return found


def make(name: str) -> Call:
    raise AssertionError(f"no case here wants a model, not even {name!r}")


# --- the tests ---


def suite(folder: Path, monkeypatch: pytest.MonkeyPatch, deadline: float) -> Suite:
    monkeypatch.setattr("gpu.suite.GRACE_SECONDS", 1.0)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # so that ranks find this file
    (folder / "work").mkdir()
    return Suite(
        __name__, device="cpu", ranks=2, out=folder, work=folder / "work", deadline=deadline, only=(), commit="abc"
    )


def test_a_case_that_goes_wrong_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = suite(tmp_path, monkeypatch, 300.0)
    report = made.run()
    states = {result.name: (result.state, result.message) for result in report.results}
    assert states["passes"] == (PASSED, "fine")
    assert states["raises"] == (FAILED, "InputError: the same on all ranks")
    assert states["differs"] == (FAILED, "rank 1 is not rank 0")
    assert states["refuses"] == (REFUSED, "InputError: as it must")
    assert states["dies"] == (FAILED, "cut off: another process had ended (exit codes: rank 0: -9, rank 1: 7)")
    assert states["is silent"][0] == FAILED
    assert states["is silent"][1].startswith("cut off: nothing was heard for 2 s")
    assert states["ends"] == (PASSED, "rank 1 ended with 70")
    assert made.launches == 3
    assert report.exit_code == 1
    assert (report.results[0].error, report.results[0].dense_error) == (0.2, 0.5)  # of the worst rank
    written = json.loads((tmp_path / "report.json").read_text())
    assert [result["name"] for result in written["results"]] == list(states)
    assert written["commit"] == "abc"
    assert written["versions"]["torch"] == str(torch.__version__)
    assert "| passes | passed |" in (tmp_path / "report.md").read_text()
    assert "in is_silent" in (tmp_path / "log.txt").read_text()  # where it was


def test_what_is_not_run_by_the_deadline_is_in_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = suite(tmp_path, monkeypatch, 1.0).run()
    assert {result.state for result in report.results} == {NOT_RUN}
    assert report.exit_code == 2
    assert len(json.loads((tmp_path / "report.json").read_text())["results"]) == len(cases("cpu", 2))


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_names_are_unique_and_a_process_that_ends_does_so_last(device: str) -> None:
    found = real_cases(device, 2)
    assert len({case.name for case in found}) == len(found)
    last = {case.launch: case.name for case in found}
    assert [case.name for case in found if case.ends and last[case.launch] != case.name] == []


def test_the_entry_points_are_those_of_the_project(tmp_path: Path) -> None:
    write_dist_info(tmp_path)
    (found,) = importlib.metadata.distributions(path=[str(tmp_path)])
    assert found.metadata["Name"] == "torchtrt_md"
    (backend,) = found.entry_points.select(group="torch_dynamo_backends")
    assert (backend.name, backend.load().__name__) == ("torchtrt_md", "backend")


def test_all_cases_without_a_gpu_pass(tmp_path: Path) -> None:
    """Models in a launch, bundles that were exported beside it, ranks that misbehave."""
    command = [sys.executable, "tests/gpu/suite.py", "--device", "cpu", "--deadline", "400", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    report: dict[str, Any] = json.loads((tmp_path / "report.json").read_text())
    wrong = {r["name"]: r["message"] for r in report["results"] if r["state"] not in (PASSED, REFUSED)}
    assert (done.returncode, wrong) == (0, {}), done.stderr
    assert [r["name"] for r in report["results"]] == [case.name for case in real_cases("cpu", 2)]
    assert sum(r["state"] == REFUSED for r in report["results"]) == 4


def test_a_fault_without_a_gpu(tmp_path: Path) -> None:
    """The module of faults; tests/faults/ has the others that need no GPU."""
    command = [sys.executable, "tests/gpu/suite.py", "--device", "cpu", "--cases", "gpu.faults", "--only", "killed"]
    command += ["--deadline", "300", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    report: dict[str, Any] = json.loads((tmp_path / "report.json").read_text())
    assert [(r["name"], r["state"]) for r in report["results"]] == [("rank 1: killed in a step", REFUSED)], done.stdout


def test_faults_on_gpus_are_in_launches_of_their_own() -> None:
    found = faults.cases("cuda", 2)
    assert len({case.name for case in found}) == len(found)
    assert all(len({c.name for c in found if c.launch == case.launch}) == 1 for case in found if case.ends)
