"""The report of a run: a JSON file to keep, and a table to look at."""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import msgspec
import torch

from torchtrt_md.bundle.manifest import Manifest, Versions, to_json
from torchtrt_md.runtime.runner import Runner
from torchtrt_md.runtime.timing import StepTime
from torchtrt_md.segment import Collective


class Timing(msgspec.Struct, frozen=True):
    """Milliseconds of one call on one rank's GPU, over the iterations."""

    median_ms: float
    min_ms: float
    max_ms: float

    @classmethod
    def of(cls, milliseconds: list[float]) -> Timing:
        return cls(median(milliseconds), min(milliseconds), max(milliseconds))


class RankReport(msgspec.Struct, frozen=True):
    """One rank.  ``errors`` are relative, by output, and ``places`` where; empty where nothing was compared.

    ``steps`` are those of a call with their times, where they were asked for.
    """

    rank: int
    host: str
    gpu: str
    engine_bytes: int
    errors: dict[str, float]
    timing: Timing | None
    places: dict[str, str] = {}
    steps: list[StepTime] = []


class RunReport(msgspec.Struct, frozen=True):
    """A run of a bundle.

    ``reference`` is the dtype that the dense model was run in to compare with, ``dense_errors`` the dense model's
    own errors against it, ``limits`` the errors allowed; all by output, null or empty where nothing was compared.
    ``median_ms`` is that of the slowest rank.
    """

    passed: bool
    command: str
    bundle: str
    manifest_sha256: str
    mesh: dict[str, int]
    target: str
    built_with: Versions
    torch: str
    cuda: str
    nccl: str
    driver: str
    iterations: int
    median_ms: float | None
    reference: str | None
    dense_errors: dict[str, float]
    limits: dict[str, float]
    schedule: list[Collective]
    ranks: list[RankReport]

    def write(self, path: Path) -> None:
        """Write the JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self, enc_hook=to_json), indent=2) + b"\n")

    def show(self) -> None:
        """Print the table."""
        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"{self.bundle}: {' x '.join(f'{n}={s}' for n, s in self.mesh.items())}")
        for title in ("rank", "GPU", "engines, MiB", "worst error", "median ms", "min ms"):
            table.add_column(title, justify="left" if title == "GPU" else "right")
        for r in self.ranks:
            worst = f"{max(r.errors.values()):.3g}" if r.errors else "not compared"
            times = (f"{r.timing.median_ms:.3f}", f"{r.timing.min_ms:.3f}") if r.timing else ("", "")
            table.add_row(str(r.rank), r.gpu, f"{r.engine_bytes / 2**20:.1f}", worst, *times)
        console = Console()
        console.print(table)
        for name, dense in self.dense_errors.items():
            console.print(
                f"{name}: dense model's own error {dense:.3g} against {self.reference}, allowed {self.limits[name]:.3g}"
            )
        if self.median_ms is not None:
            console.print(f"slowest rank: {self.median_ms:.3f} ms, median of {self.iterations}")


def show_steps(steps: Sequence[StepTime]) -> None:
    """Print how long each step takes, equal ones together, and the layers of engines."""
    from rich.console import Console
    from rich.table import Table

    table = Table("kind", "step", title="Steps of a call on rank 0, one after the other", title_justify="left")
    for name in ("how many", "ms together", "ms each"):
        table.add_column(name, justify="right")
    for (kind, name), times in step_groups(steps).items():
        table.add_row(kind, name, str(len(times)), f"{sum(times):.3f}", f"{sum(times) / len(times):.4f}")
    table.add_section()
    table.add_row("", "", str(len(steps)), f"{sum(step.ms for step in steps):.3f}", "")
    console = Console()
    console.print(table)
    for step in steps:
        if step.layers:
            table = Table("layer", title=f"Layers of {step.name}, by TensorRT's profiler", title_justify="left")
            table.add_column("ms", justify="right")
            for layer, ms in step.layers.items():
                table.add_row(layer, f"{ms:.4f}")
            console.print(table)


def step_groups(steps: Sequence[StepTime]) -> dict[tuple[str, str], list[float]]:
    """(kind, name without what numbers it) -> the times of such steps, those that take longest together first."""
    groups: dict[tuple[str, str], list[float]] = {}
    for step in steps:
        groups.setdefault((step.kind, step.name.rstrip("0123456789_ ")), []).append(step.ms)
    return dict(sorted(groups.items(), key=lambda group: -sum(group[1])))


def rank_report(
    runner: Runner,
    folder: Path,
    errors: dict[str, float],
    timing: Timing | None,
    places: dict[str, str],
    steps: list[StepTime],
) -> RankReport:
    """This rank's part."""
    engines = {s.file for s in runner.manifest.ranks[runner.rank] if s.runs == "engine"}
    return RankReport(
        rank=runner.rank,
        host=socket.gethostname(),
        gpu=torch.cuda.get_device_name(runner.device),
        engine_bytes=sum((folder / engine).stat().st_size for engine in engines),
        errors=errors,
        timing=timing,
        places=places,
        steps=steps,
    )


def report(
    manifest: Manifest,
    folder: Path,
    digest: str,
    ranks: list[RankReport],
    *,
    iterations: int,
    reference: str | None,
    dense_errors: dict[str, float],
    limits: dict[str, float],
) -> RunReport:
    """All ranks' parts together."""
    times = [r.timing.median_ms for r in ranks if r.timing is not None]
    return RunReport(
        passed=all(error <= limits[name] for r in ranks for name, error in r.errors.items()),
        command=" ".join(sys.orig_argv),
        bundle=folder.name,
        manifest_sha256=digest,
        mesh=manifest.mesh,
        target=manifest.target,
        built_with=manifest.versions,
        torch=str(torch.__version__),
        cuda=torch.version.cuda or "",
        nccl=_nccl(),
        driver=_driver(),
        iterations=iterations,
        median_ms=max(times) if times else None,
        reference=reference,
        dense_errors=dense_errors,
        limits=limits,
        schedule=[c for segment in manifest.ranks[0] for c in segment.collectives],
        ranks=ranks,
    )


def _nccl() -> str:
    """The version of the NCCL that PyTorch has loaded, and engines use."""
    version: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return ".".join(map(str, version))


def _driver() -> str:
    """The NVIDIA driver's version, from the kernel module's own file."""
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:  # no such driver, or a container that hides it
        return ""
