"""Each example by the first command of its docstring, on two processes and without a GPU."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import sys
from pathlib import Path

import models
import pytest
from rank_processes import run_script

from torchtrt_md.bundle import read_manifest

ROOT = Path(__file__).resolve().parents[2]


def commands(example: str) -> list[str]:
    """The commands in an example's docstring, without their comments."""
    docstring = ast.get_docstring(ast.parse((ROOT / "examples" / f"{example}.py").read_text())) or ""
    lines = [line.split("  #")[0].strip() for line in docstring.splitlines() if line.startswith("    ")]
    return [line for line in lines if line.startswith(("torchrun ", "torchtrt-md "))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the commands of the docstrings run."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


@pytest.mark.parametrize("example", sorted(path.stem for path in (ROOT / "examples").glob("*.py")))
def test_the_docstring_says_how_to_run_it(example: str) -> None:
    assert commands(example)
    for command in commands(example):
        assert f"examples/{example}.py" in command or f"{example}.mdtrt" in command


@pytest.mark.parametrize(
    ("example", "mesh", "op", "least"),
    [
        ("llama", {"tp": 4}, "all_reduce", 4),  # two for each of two layers
        ("vit", {"tp": 4}, "all_reduce", 4),
        ("wan", {"cp": 4}, "all_to_all", 4),
        ("wan_guidance", {"cfg": 2, "cp": 2}, "all_to_all", 4),
        ("cosmos3", {"cp": 4}, "all_to_all", 4),
    ],
)
def test_a_model_file_becomes_a_bundle(
    example: str,
    mesh: dict[str, int],
    op: str,
    least: int,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    for name, size in models.SMALL_EXAMPLES.items():
        monkeypatch.setenv(name, size)
    monkeypatch.setattr(sys, "argv", shlex.split(commands(example)[0]))
    with pytest.raises(SystemExit) as done:  # here and not in a process of its own, which would import all anew
        runpy.run_module("torchtrt_md", run_name="__main__")
    printed = capsys.readouterr().out
    assert not done.value.code, printed
    manifest = read_manifest(folder / f"{example}.mdtrt")
    assert manifest.mesh == mesh
    for segments in manifest.ranks:
        assert sum(c.op == op for segment in segments for c in segment.collectives) >= least
    assert "is it the same function" in printed  # it was compared with the dense model
    # TensorRT has no scatter_add, of which Cosmos 3 has one in front of its layers for vision and one for sound.
    assert ("In PyTorch" in printed) == (example == "cosmos3")


@pytest.mark.parametrize(
    ("example", "compiled"),
    [("flux_pipeline", "FluxTransformer2DModel on Mesh(cp=2)"), ("bert", "BertModel on Mesh(tp=2)")],
)
def test_a_launch(example: str, compiled: str, folder: Path) -> None:
    program, ranks, script, *arguments = shlex.split(commands(example)[0])
    assert (program, ranks) == ("torchrun", "--nproc_per_node=2")
    ended = run_script(folder / script, arguments, folder, {"CUDA_VISIBLE_DEVICES": ""}, 2)
    printed = "".join(output for _, output in ended)
    assert [code for code, _ in ended] == [0, 0], printed
    assert compiled in printed
    found = re.search(r"relative error against the dense \w+ (\S+)", printed)
    assert found is not None, printed
    assert float(found[1]) <= 1e-5
