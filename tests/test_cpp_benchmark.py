"""benchmarks/cpp_runner.py, whose judgement can be tried without a GPU: Python's side runs for real, over gloo."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torchtrt_md as md
from torchtrt_md.bundle.read import read_manifest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import cpp_runner  # noqa: E402

# Stands where mdtrt_run does: it takes its options, and gives as outputs those that Python's ranks gave.
STAND_IN = """#!{python}
import argparse, json, os, shutil, time
from pathlib import Path
parser = argparse.ArgumentParser()
parser.add_argument("bundle")
for name in ("--inputs", "--outputs", "--report", "--repeat"):
    parser.add_argument(name)
parser.add_argument("--cuda-graph", action="store_true")
options = parser.parse_args()
folder = Path(options.outputs).parent
assert Path(options.inputs).is_file() and int(os.environ["LOCAL_RANK"]) == int(os.environ["RANK"])
if os.environ["RANK"] == "0":
    of = "Python_graph" if options.cuda_graph else "Python"
    shutil.copy(folder / f"{{of}}.outputs.rank0.safetensors", options.outputs)
    ranks = [json.loads((folder / f"{{of}}.rank{{rank}}.json").read_text()) for rank in range(2)]
    for rank in ranks:
        rank["first_answer_monotonic"] = time.monotonic()
    Path(options.report).write_text(json.dumps({{"ranks": ranks}}))
"""


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj_out = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.proj_out(x)
        return y


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    parallel = md.ContextParallel("cp", plan={"": {"x": md.Split(1)}, "proj_out": md.Gather(1)})
    path = tmp_path_factory.mktemp("bundle") / "small.mdtrt"
    arguments = (torch.randn(1, 8, 8),)
    md.export(Model().eval(), arguments, {}, mesh=md.Mesh(cp=2), parallel=parallel, compute="inductor", out=path)
    return path


def test_what_differs_is_found(bundle: Path, tmp_path: Path) -> None:
    binary, out = tmp_path / "mdtrt_run", tmp_path / "out"
    binary.write_text(STAND_IN.format(python=sys.executable))
    binary.chmod(0o755)
    command = [sys.executable, str(ROOT / "benchmarks/cpp_runner.py"), "--bundle", str(bundle), "--binary", str(binary)]
    ended = subprocess.run(
        [*command, "--out", str(out), "--repeat", "3", "--timeout", "240", "--no-torchrun"],
        cwd=ROOT, capture_output=True, text=True, timeout=550,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "All outputs are equal, byte by byte." in (out / "report.md").read_text()
    report = json.loads((out / "report.json").read_text())
    assert [row["run"] for row in report["rows"]] == ["Python", "C++", "Python_graph", "C++_graph"]
    assert all(row["first_answer_seconds"] > 0 and row["median_ms"] > 0 for row in report["rows"])

    manifest, reports = read_manifest(bundle), report["reports"]
    assert cpp_runner.differences(manifest, out, "Python", "C++", reports) == []
    reports["C++"][1]["first_outputs"] = {"output0": "0" * 64}
    (told,) = cpp_runner.differences(manifest, out, "Python", "C++", reports)
    assert told == "C++: first_outputs of rank 1, 'output0', are not those of Python"
    file = out / "C++_graph.outputs.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    told, _ = cpp_runner.differences(manifest, out, "Python_graph", "C++_graph", reports)
    assert told == "C++_graph: 'output0' in its file is not what rank 0 has in Python_graph"
    report["differences"] = [told]
    assert f"- {told}" in cpp_runner.markdown(report)


def test_a_rank_that_fails_ends_the_others_and_says_why(tmp_path: Path) -> None:
    command = ["sh", "-c", "test $RANK = 0 && sleep 100; echo LaunchError: no GPU; exit 1"]
    with pytest.raises(SystemExit, match=r"(?s)rank 1, exit code 1\nLaunchError: no GPU"):
        cpp_runner.launch(command, 2, tmp_path / "C++", timeout=5)
