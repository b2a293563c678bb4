"""On real GPUs: every rank against the dense model through every door, and what happens when a rank misbehaves."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu import cases, doors

GPUS = torch.cuda.device_count()
RANKS = [
    pytest.param(ranks, marks=pytest.mark.skipif(ranks > GPUS, reason=f"needs {ranks} GPUs, this machine has {GPUS}"))
    for ranks in (2, 4)
]
pytestmark = pytest.mark.timeout(640)  # one launch has all cases of a number of ranks


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    """All bundles, exported at once."""
    folder = tmp_path_factory.mktemp("bundles")
    made: dict[tuple[str, int], Path] = {}
    processes = []
    for ranks in (r for r in (2, 4) if r <= GPUS):
        for case in cases.CASES:
            bundle = folder / f"{case.name}-{ranks}.mdtrt"
            made[case.name, ranks] = bundle
            processes.append(
                subprocess.Popen(
                    cases.export_command(case, ranks, bundle),
                    env=cases.environment(full=False),
                    cwd=cases.ROOT,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    return made


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("case", cases.CASES, ids=lambda c: c.name)
def test_every_rank_computes_what_the_dense_model_computes(
    case: cases.Case, ranks: int, bundles: dict[tuple[str, int], Path]
) -> None:
    done, report = cases.run(case, ranks, bundles[case.name, ranks], full=False, seconds=180)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert report is not None
    assert report["passed"]
    assert len(report["ranks"]) == ranks
    for rank in report["ranks"]:
        for name, error in rank["errors"].items():
            assert 0 < error <= 1.5 * report["dense_errors"][name]


@pytest.fixture(scope="module")
def said_by() -> Callable[[int, str], dict[str, list[dict[str, Any]]]]:
    """Number of ranks and door -> what they said of each of its cases, in one launch."""

    @functools.cache
    def launched(ranks: int, door: str) -> dict[str, list[dict[str, Any]]]:
        script = str(Path(__file__).parent / "doors.py")
        done = cases.launch(ranks, [script, f"{door}-*"], full=False, seconds=580)
        found: dict[str, list[dict[str, Any]]] = {case.name: [] for case in doors.cases()}
        for line in done.stdout.splitlines():
            if "SAID " in line:
                said = json.loads(line.split("SAID ", 1)[1])
                found[said["case"]].append(said)
        assert any(found.values()), done.stdout[-4000:] + done.stderr[-4000:]
        return found

    return launched


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("case", doors.cases(), ids=lambda c: c.name)
def test_every_door_leads_to_what_the_dense_model_computes(
    case: doors.Case, ranks: int, said_by: Callable[[int, str], dict[str, list[dict[str, Any]]]]
) -> None:
    said = said_by(ranks, case.door)[case.name]
    assert [s["raised"] for s in said if "raised" in s] == []
    assert sorted(s["rank"] for s in said) == list(range(ranks))
    for s in said:
        assert 0 < s["error"] <= 1.5 * s["dense_error"]
        assert s["same_bits"]
        assert s["warnings"] == []
        if case.door != "torch.compile":  # the others have a runner to ask
            assert s["graphs"] == int(case.graph)
            tensorrt = case.compute == "tensorrt" and not (case.tune and case.tune != "tensorrt")
            if tensorrt:  # tuning may find that Inductor is faster, where it is free to
                assert "engine" in s["kinds"]
                assert "inductor" not in s["kinds"]
            if case.compute == "inductor":
                assert "engine" not in s["kinds"]


def test_no_two_doors_have_one_name() -> None:
    names = [case.name for case in doors.cases()]
    assert len(set(names)) == len(names)
    assert {case.door for case in doors.cases()} == {"md.compile", "torch.compile", "bundle"}


def _misbehave(
    what: str, bundle: Path, ranks: int = 2, *more: str
) -> tuple[subprocess.CompletedProcess[str], list[Any]]:
    script = str(Path(__file__).parent / "misbehave.py")
    done = cases.launch(ranks, [script, what, str(bundle), *more], full=False, seconds=120)
    said = [json.loads(line.split("SAID ", 1)[1]) for line in done.stdout.splitlines() if "SAID " in line]
    return done, said


@pytest.mark.parametrize("ranks", RANKS[:1])
class TestMisbehaviour:
    def test_streams_and_graphs_give_the_same_bits(self, ranks: int, bundles: dict[tuple[str, int], Path]) -> None:
        for case in cases.CASES:
            done, said = _misbehave("same-bits", bundles[case.name, ranks])
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
            said.sort(key=lambda s: int(s["rank"]))
            assert said == [{"rank": rank, "side": True, "stream": True, "graph": True} for rank in range(ranks)]

    def test_a_wrong_input_on_one_rank_is_refused_on_all(
        self, ranks: int, bundles: dict[tuple[str, int], Path]
    ) -> None:
        done, said = _misbehave("wrong-input", bundles["flux-ulysses", ranks])
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert len(said) == ranks
        for s in said:
            assert s["error"] == "InputError"
            assert "rank 1" in s["message"]
            assert s["then"], "the runner must work again afterwards"

    def test_a_rank_that_does_not_come_is_an_error_in_time(
        self, ranks: int, bundles: dict[tuple[str, int], Path]
    ) -> None:
        done, said = _misbehave("absent", bundles["flux-ulysses", ranks])
        assert [s["error"] for s in said if s["rank"] == 0] == ["LaunchError"], done.stdout + done.stderr

    def test_a_rank_that_hangs_in_a_collective_is_ended(self, ranks: int, bundles: dict[tuple[str, int], Path]) -> None:
        done, said = _misbehave("hang", bundles["flux-ulysses", ranks])
        assert done.returncode != 0
        assert "all_to_all" in done.stderr
        assert "cp" in done.stderr
        assert not any(s.get("finished") for s in said if s["rank"] == 0)

    def test_a_changed_byte_on_one_rank_is_refused_on_all(
        self, ranks: int, bundles: dict[tuple[str, int], Path], tmp_path: Path
    ) -> None:
        damaged = tmp_path / "damaged.mdtrt"
        shutil.copytree(bundles["flux-ulysses", ranks], damaged)
        (engine,) = (damaged / "engines").iterdir()
        with engine.open("r+b") as file:
            file.seek(engine.stat().st_size // 2)
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 1]))
        done, said = _misbehave("load", bundles["flux-ulysses", ranks], ranks, str(damaged))
        assert {s["error"] for s in said} == {"BundleError"}, done.stdout + done.stderr
        assert all(engine.name in s["message"] for s in said)

    def test_a_mesh_of_another_size_than_the_launch(self, ranks: int, bundles: dict[tuple[str, int], Path]) -> None:
        done, said = _misbehave("load", bundles["flux-ulysses", ranks], 1)
        assert [s["error"] for s in said] == ["MeshError"], done.stdout + done.stderr
