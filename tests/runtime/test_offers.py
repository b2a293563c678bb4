"""What TensorRT offers at load: what may be asked, what is refused by name, and the files of kernels."""

from __future__ import annotations

import logging
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from bundle import bundle_samples
from fresh_python import fresh_python
from rank_processes import Ranks
from typer.testing import CliRunner

from torchtrt_md import load
from torchtrt_md.build.flavour import Flavour
from torchtrt_md.doors.run import budget_of
from torchtrt_md.errors import LaunchError, OptionError
from torchtrt_md.runtime import offers
from torchtrt_md.runtime.bring_up import _load_engines
from torchtrt_md.runtime.inspect import layers_of
from torchtrt_md.runtime.kernels import default_folder, kernel_file, store, stored
from torchtrt_md.runtime.offers import Offers

CPU = torch.device("cpu")
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")


def test_what_may_be_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert Offers.of(None, False) == Offers()
    assert Offers.of(0, "here") == Offers(0, Path("here"))
    assert Offers.of("auto", tmp_path) == Offers("auto", tmp_path)
    monkeypatch.setenv("TORCHTRT_MD_CACHE", str(tmp_path))
    assert Offers.of(None, True) == Offers(None, tmp_path / "kernels") == Offers(None, default_folder())


@pytest.mark.parametrize(
    ("weight_budget", "kernel_cache", "name"),
    [
        *((budget, False, "weight_budget") for budget in (-1, True, 1.5, "all")),
        *((None, cache, "kernel_cache") for cache in (None, 3)),
    ],
)
def test_what_may_not_be_asked(weight_budget: Any, kernel_cache: Any, name: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=f"{name} cannot be"):
        load(tmp_path / "never looked at", weight_budget=weight_budget, kernel_cache=kernel_cache)


def test_the_command_line_s_budget() -> None:
    assert (budget_of(""), budget_of("auto"), budget_of("0"), budget_of("1048576")) == (None, "auto", 0, 1 << 20)
    for wrong in ("-1", "1e9", "1 GB", "²"):
        with pytest.raises(OptionError, match="--weight-budget cannot be"):
            budget_of(wrong)


@pytest.mark.parametrize(
    ("asked", "name"), [(Offers(weight_budget=0), "weight_budget"), (Offers(kernel_cache=Path("x")), "kernel_cache")]
)
def test_a_program_without_engines_has_no_use_for_it(asked: Offers, name: str) -> None:
    with pytest.raises(LaunchError, match=f"{name} is for engines, and this program has none"):
        _load_engines([], CPU, "portable", asked)
    assert _load_engines([], CPU, "portable", Offers()) == {}


def test_a_flavour_that_compiles_nothing_when_engines_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offers, "flavour", lambda: Flavour("TensorRT", "11.4.0.106", ModuleType("tensorrt")))
    with pytest.raises(LaunchError, match=r"TensorRT 11\.4\.0\.106 compiles no kernels when engines run"):
        Offers(kernel_cache=Path("x")).check(engines=1)
    Offers(weight_budget=0).check(engines=1)


def load_asking(rank: int, folder: str) -> None:
    load(folder, timeout=20.0, weight_budget=[0, None][rank])


@NO_GPU
def test_each_rank_may_ask_for_a_budget_of_its_own_up_to_the_gpu(ranks: Ranks, tmp_path: Path) -> None:
    folder = str(bundle_samples.bundle(tmp_path / "model"))
    for outcome in ranks(load_asking, folder):
        assert "has no CUDA GPU that PyTorch can use" in outcome.message, "and nothing about different budgets"


# --- kernels ---


def test_a_file_of_kernels_appears_whole(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "a.kernels"
    assert stored(file) == b""
    for data in (b"first", b"second"):
        store(file, data)
        assert stored(file) == data
    assert [path.name for path in file.parent.iterdir()] == ["a.kernels"]


def test_what_cannot_be_read_is_refused_and_what_cannot_be_written_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.kernels").mkdir()
    with pytest.raises(LaunchError, match=r"the kernels in .*a\.kernels cannot be read"):
        stored(tmp_path / "a.kernels")
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        store(tmp_path / "file" / "b.kernels", b"data")
        store(tmp_path / "a.kernels", b"data")
    assert len(caplog.records) == 2
    assert all("cannot be kept" in record.message for record in caplog.records)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.kernels", "file"]


def test_the_file_is_another_for_all_that_kernels_depend_on(tmp_path: Path) -> None:
    one, two = Path("x/1.engine"), Path("x/2.engine")
    same = kernel_file(tmp_path, [one, two], "1.6.1", "H200")
    assert same == kernel_file(tmp_path, [Path("y/2.engine"), Path("y/1.engine"), one], "1.6.1", "H200")
    others = [([one], "1.6.1", "H200"), ([one, two], "1.7.1", "H200"), ([one, two], "1.6.1", "L4")]
    assert len({same, *(kernel_file(tmp_path, *other) for other in others)}) == 4


# --- layers ---


@NO_GPU
def test_layers_without_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="TensorRT shows the layers of an engine on a GPU only"):
        layers_of(tmp_path / "x.engine", "portable")


@NO_GPU
def test_inspect_layers(tmp_path: Path) -> None:
    from torchtrt_md.doors.cli import app

    folder = bundle_samples.bundle(tmp_path / "model")
    for arguments, message in (
        (["--layers"], "TensorRT shows the layers of an engine on a GPU only"),
        (["--layers", "--rank", "2"], "the bundle has 2 ranks, and no rank 2"),
    ):
        done = CliRunner().invoke(app, ["inspect", str(folder), *arguments])
        assert isinstance(done.exception, LaunchError)
        assert message in str(done.exception)


def test_asking_loads_no_tensorrt() -> None:
    code = (
        "import sys; from torchtrt_md.runtime.offers import Offers; Offers.of(0, False);"
        "assert not {'tensorrt', 'tensorrt_rtx', 'torch_tensorrt'} & set(sys.modules)"
    )
    fresh_python(code)
