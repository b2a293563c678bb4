"""Engines that hold their weights are built once, as those that take them as inputs are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchtrt_md as md
from torchtrt_md.build import builder, cache, part
from torchtrt_md.build.decompose import decompose
from torchtrt_md.whole_file import link_or_copy

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


def test_what_a_users_converter_made_is_no_other_builds(
    built: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It may depend on anything: a number in its file, a function that it calls."""
    before = [md.build(program(linear()), tmp_path / str(n))[0].file.read_bytes() for n in range(2)]
    assert len(built) == 1
    monkeypatch.setattr(part, "user_converters", lambda: {"aten.relu.default"})  # of another op
    md.build(program(linear()), tmp_path / "2")
    ops = {str(n.target) for n in decompose(program(linear()).graphs[0]).graph.nodes if n.op == "call_function"}
    monkeypatch.setattr(part, "user_converters", lambda: ops)
    already = len(built)
    for n in (3, 4):
        md.build(program(linear()), tmp_path / str(n))
    assert len(built) == already + 2
    assert before[0] == before[1]


def test_without_a_cache_that_can_be_written_engines_are_built_all_the_same(
    built: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHTRT_MD_CACHE", "/proc/nowhere")
    for out in ("a.mdtrt", "b.mdtrt"):
        md.export(linear(), (X,), mesh=md.Mesh(tp=1), check=False, out=tmp_path / out)
    md.build(program(linear()), tmp_path / "built")
    assert len(built) == 3


def test_a_name_that_others_have_linked_is_replaced_and_not_written_into(tmp_path: Path) -> None:
    kept, other, named = (tmp_path / name for name in ("kept", "other", "named"))
    kept.write_bytes(b"kept")
    other.write_bytes(b"other")
    for source in (kept, kept, other, kept):
        link_or_copy(source, named)
        assert named.read_bytes() == source.read_bytes()
    assert (kept.read_bytes(), other.read_bytes()) == (b"kept", b"other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "named", "other"]
