"""Engines that hold their weights are built once, as those that take them as inputs are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchtrt_md as md
from torchtrt_md.build import builder, cache, part

pytestmark = pytest.mark.usefixtures("own_cache")  # each test builds what it needs


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What TensorRT was asked to build, in order."""
    asked: list[str] = []
    real = builder.build_engine

    def noted(*args: Any, what: str, **named: Any) -> None:
        asked.append(what)
        real(*args, what=what, **named)

    monkeypatch.setattr(part, "build_engine", noted)
    return asked


X = torch.randn(2, 8)


def linear(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(8, 4).eval()


def program(model: nn.Module) -> Any:
    return md.capture(model, (X,), mesh=md.Mesh(tp=1))


def test_the_same_program_is_built_once(built: list[str], tmp_path: Path) -> None:
    (first,) = md.build(program(linear()), tmp_path / "a")
    (second,) = md.build(program(linear()), tmp_path / "b")
    assert built == ["rank 0"]
    assert [first.file.name, second.file.name] == ["rank0.engine"] * 2
    assert first.file.read_bytes() == second.file.read_bytes()
    assert first.segment == second.segment


def test_other_weights_are_another_engine_in_the_place_of_the_first(built: list[str], tmp_path: Path) -> None:
    (first,) = md.build(program(linear()), tmp_path)
    before = first.file.read_bytes()
    (second,) = md.build(program(linear(1)), tmp_path)
    assert built == ["rank 0"] * 2
    assert second.file == first.file
    assert second.file.read_bytes() != before


def test_another_name_of_an_input_is_another_engine(built: list[str], tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear()

        def forward(self, other: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.linear(other)
            return result

    (first,) = md.build(program(linear()), tmp_path / "a")
    (second,) = md.build(program(Named()), tmp_path / "b")
    assert len(built) == 2
    assert first.segment.inputs[0].name != second.segment.inputs[0].name == "other"


@pytest.mark.parametrize("streaming", [False, True])
def test_an_export_builds_nothing_that_is_there(streaming: bool, built: list[str], tmp_path: Path) -> None:
    options: dict[str, Any] = {"mesh": md.Mesh(tp=1), "check": False, "weight_streaming": streaming}
    first = md.export(linear(), (X,), out=tmp_path / "a.mdtrt", **options)
    second = md.export(linear(), (X,), out=tmp_path / "b.mdtrt", **options)
    assert built == ["rank 0"]
    assert first.manifest.files == second.manifest.files
    md.export(linear(), (X,), out=tmp_path / "b.mdtrt", **{**options, "weight_streaming": not streaming})
    assert len(built) == 2


def test_an_export_leaves_the_cache_what_it_has(built: list[str], tmp_path: Path) -> None:
    plan = {"up": "colwise", "down": "rowwise"}
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("up", nn.Linear(8, 16))
    model.add_module("down", nn.Linear(16, 8))
    parallel = md.TensorParallel("tp", plan=plan)
    for out in ("a.mdtrt", "b.mdtrt"):
        md.export(
            model, (X,), mesh=md.Mesh(tp=2), parallel=parallel, out=tmp_path / out, check=False, strip_weights=True
        )
    assert len(built) == 1


def test_an_engine_that_would_fill_the_cache_does_not_go_into_it(
    built: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cache.EngineCache.__init__, "__defaults__", (None, 100))  # bytes
    for _ in range(2):
        (engine,) = md.build(program(linear()), tmp_path)
        assert engine.file.stat().st_size > 100
    assert len(built) == 2
