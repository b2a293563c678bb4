"""Ranks that end, stop, or load what is not right: the others raise a named error in time, and no process is left."""

from pathlib import Path

import pytest

from faults import cases, injections


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Path:
    injections.export(folder / "exported")
    return injections.eager(folder / "exported", folder / "bundle.mdtrt")


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, cases.Outcome]:
    """All faults, run several at a time by the first test that asks."""
    return cases.run_all(folder / "faults")


@pytest.mark.parametrize("name", [fault.name for fault in cases.faults()])
def test_a_fault(name: str, outcomes: dict[str, cases.Outcome]) -> None:
    assert outcomes[name].problems == []


@pytest.fixture(scope="module")
def misled(bundle: Path, folder: Path) -> dict[str, cases.Outcome]:
    return cases.run_misled(bundle, folder / "misled")


@pytest.mark.parametrize("name", cases.MISLED)
def test_one_rank_loads(name: str, misled: dict[str, cases.Outcome]) -> None:
    assert misled[name].problems == []


def test_many_calls_and_loads(bundle: Path, folder: Path) -> None:
    assert cases.run_endurance(bundle, folder / "endurance", *cases.numbers()).problems == []
