"""The models of the GPU proof, how they are exported, and how their bundles are launched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# The width of the real models, with fewer blocks; the examples' own defaults are small.
FULL = {
    "FLUX_HEADS": "24",
    "FLUX_LAYERS": "4",
    "FLUX_SINGLE_LAYERS": "8",
    "FLUX_IMAGE_TOKENS": "4096",
    "FLUX_TEXT_TOKENS": "512",
    "LLAMA_HIDDEN": "4096",
    "LLAMA_INTERMEDIATE": "14336",
    "LLAMA_HEADS": "32",
    "LLAMA_KV_HEADS": "8",
    "LLAMA_LAYERS": "8",
    "LLAMA_TOKENS": "2048",
    "LLAMA_VOCABULARY": "32000",
}


@dataclass(frozen=True)
class Case:
    """A model file, an axis and a strategy."""

    model: str
    axis: str
    strategy: str = ""

    @property
    def name(self) -> str:
        return f"{self.model}-{self.strategy or self.axis}"

    @property
    def file(self) -> Path:
        return Path("examples") / f"{self.model}.py"  # from ROOT, where children run


CASES = (Case("flux", "cp", "ulysses"), Case("flux", "cp", "allgather_kv"), Case("llama", "tp"))


def environment(full: bool, gpu: int | None = None) -> dict[str, str]:
    """The environment of a child process."""
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if full:
        env |= FULL
    if gpu is not None:
        env["CUDA_VISIBLE_DEVICES"] = str(gpu)
    return env


def export_command(
    case: Case, ranks: int, bundle: Path, *, model_device: str = "cpu", verify: bool = True
) -> list[str]:
    """The command that makes the bundle, and its report beside it."""
    command = [sys.executable, "-m", "torchtrt_md", "export", str(case.file), "--mesh", f"{case.axis}={ranks}"]
    if case.strategy:
        command += ["--strategy", case.strategy]
    command += ["--out", str(bundle), "--model-device", model_device, "--report", f"{bundle}.export.json"]
    return command if verify else [*command, "--no-verify"]


def launch(ranks: int, arguments: list[str], *, full: bool, seconds: int) -> subprocess.CompletedProcess[str]:
    """Run a module or script under torchrun, for a bounded time."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *arguments]
    # timeout(1) ends torchrun and, through it, all ranks; a kill follows where they hang.
    return subprocess.run(
        ["timeout", "--kill-after=20", str(seconds), *command],
        env=environment(full),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def run(
    case: Case, ranks: int, bundle: Path, *, full: bool, seconds: int, iterations: int = 30, model_device: str = "cpu"
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any] | None]:
    """Run a bundle against the dense model; the finished process and its report."""
    report = Path(f"{bundle}.run.json")
    report.unlink(missing_ok=True)
    arguments = ["-m", "torchtrt_md.run", str(bundle), "--verify", str(case.file), "--report", str(report)]
    arguments += ["--iterations", str(iterations), "--timeout", "120", "--model-device", model_device]
    done = launch(ranks, arguments, full=full, seconds=seconds)
    return done, json.loads(report.read_text()) if report.exists() else None
