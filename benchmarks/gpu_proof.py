"""The GPU proof: export every case, run it on 2 and on 4 GPUs against the dense model, and write a report.

    python benchmarks/gpu_proof.py --ranks 2 --ranks 4 --out benchmarks/results/NAME

makes NAME.json (all that was measured) and NAME.md (its table).  The bundles are exported at once, so their
build times are those of a busy machine.  Every child process has a time limit.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

ROOT = Path(__file__).resolve().parents[1]
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
_LOG_TAIL = 3000


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
    def file(self) -> str:
        return f"examples/{self.model}.py"  # from ROOT, where children run


CASES = (Case("flux", "cp", "ulysses"), Case("flux", "cp", "allgather_kv"), Case("llama", "tp"))


def main(
    out: Annotated[Path, typer.Option(help="the report, without its ending")],
    ranks: Annotated[list[int] | None, typer.Option(help="numbers of GPUs")] = None,
    small: Annotated[bool, typer.Option(help="the examples' own size, not the real width")] = False,
    verify: Annotated[
        bool, typer.Option(help="prove each program in the simulator, on a GPU, before it is built")
    ] = True,
    model_device: Annotated[str, typer.Option(help="where models are made")] = "cuda",
    iterations: Annotated[int, typer.Option(help="timed calls of each bundle")] = 30,
    export_only: Annotated[bool, typer.Option(help="stop before the runs")] = False,
) -> None:
    wanted = ranks or [2, 4]
    gpus = torch.cuda.device_count()
    jobs = [(case, count) for count in wanted for case in CASES]
    with tempfile.TemporaryDirectory(prefix="gpu-proof-") as folder:
        bundles = {job: Path(folder) / f"{job[0].name}-{job[1]}.mdtrt" for job in jobs}
        exports = _export_all(bundles, gpus, full=not small, verify=verify, model_device=model_device)
        print(f"exported {sum(e['passed'] for e in exports.values())} of {len(jobs)}", flush=True)
        dense = (
            {} if export_only else {m: _dense(m, not small, model_device) for m in sorted({j[0].model for j in jobs})}
        )
        results = []
        for job, bundle in bundles.items():
            result: dict[str, Any] = {"case": job[0].name, "ranks": job[1], "export": exports[job], "run": None}
            if exports[job]["passed"] and not export_only:
                done, report = _run(
                    job[0],
                    job[1],
                    bundle,
                    full=not small,
                    seconds=150,
                    iterations=iterations,
                    model_device=model_device,
                )
                result["run"] = report
                if done.returncode:
                    result["log"] = (done.stdout + done.stderr)[-_LOG_TAIL:]
                print(f"{job[0].name} on {job[1]}: exit {done.returncode}", flush=True)
            results.append(result)
    whole = {
        "command": " ".join(sys.orig_argv),
        "machine": {
            "gpus": [torch.cuda.get_device_name(i) for i in range(gpus)],
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "torch": str(torch.__version__),
        },
        "size": "the examples' own" if small else FULL,
        "dense_ms_on_one_gpu": dense,
        "results": results,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(whole, indent=2) + "\n")
    out.with_suffix(".md").write_text(table(whole))
    print(table(whole))
    failed = [r for r in results if not r["export"]["passed"] or not (export_only or (r["run"] and r["run"]["passed"]))]
    for result in failed:
        print(f"FAILED {result['case']} on {result['ranks']}:\n{result.get('log') or result['export'].get('log')}")
    raise typer.Exit(1 if failed else 0)


def _environment(full: bool, gpu: int | None = None) -> dict[str, str]:
    """The environment of a child process."""
    env = {**os.environ, "PYTHONUNBUFFERED": "1"} | (FULL if full else {})
    return env if gpu is None else {**env, "CUDA_VISIBLE_DEVICES": str(gpu)}


def _export_command(case: Case, ranks: int, bundle: Path, *, model_device: str, verify: bool) -> list[str]:
    """The command that makes the bundle, and its report beside it."""
    command = [sys.executable, "-m", "torchtrt_md", "export", case.file, "--mesh", f"{case.axis}={ranks}"]
    if case.strategy:
        command += ["--strategy", case.strategy]
    command += ["--out", str(bundle), "--model-device", model_device, "--report", f"{bundle}.export.json"]
    return command if verify else [*command, "--no-verify"]


def _run(
    case: Case, ranks: int, bundle: Path, *, full: bool, seconds: int, iterations: int, model_device: str
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any] | None]:
    """Run a bundle against the dense model; the finished process and its report."""
    report = Path(f"{bundle}.run.json")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += ["-m", "torchtrt_md.run", str(bundle), "--verify", case.file, "--report", str(report)]
    command += ["--iterations", str(iterations), "--timeout", "120", "--model-device", model_device]
    # timeout(1) ends torchrun and, through it, all ranks; a kill follows where they hang.
    done = subprocess.run(
        ["timeout", "--kill-after=20", str(seconds), *command],
        env=_environment(full),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done, json.loads(report.read_text()) if report.exists() else None


def _export_all(
    bundles: dict[tuple[Case, int], Path], gpus: int, *, full: bool, verify: bool, model_device: str
) -> dict[tuple[Case, int], dict[str, Any]]:
    running = {}
    for index, ((case, ranks), bundle) in enumerate(bundles.items()):
        command = _export_command(case, ranks, bundle, model_device=model_device, verify=verify)
        with Path(f"{bundle}.log").open("w") as log:
            process = subprocess.Popen(
                ["timeout", "--kill-after=10", "330", *command],
                env=_environment(full, gpu=index % max(gpus, 1)),
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        running[case, ranks] = (process, time.perf_counter())
    results = {}
    for job, (process, start) in running.items():
        process.wait()
        result: dict[str, Any] = {"passed": process.returncode == 0, "wall_seconds": time.perf_counter() - start}
        report = Path(f"{bundles[job]}.export.json")
        if report.exists():
            result |= json.loads(report.read_text())
        if process.returncode:
            result["log"] = Path(f"{bundles[job]}.log").read_text()[-_LOG_TAIL:]
        results[job] = result
    return results


def _dense(model: str, full: bool, device: str) -> float | None:
    """Median milliseconds of the dense model in PyTorch eager on one GPU, for scale."""
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import gpu_proof
gpu_proof.time_dense({model!r}, {device!r})
"""
    done = subprocess.run(
        ["timeout", "120", sys.executable, "-c", code],
        env=_environment(full, gpu=0),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return float(done.stdout.split()[-1]) if done.returncode == 0 else None


def time_dense(model: str, device: str) -> None:
    """Print the median of 30 calls, each between two events."""
    from torchtrt_md.doors.user_file import load_user_file

    module, args, kwargs = load_user_file(ROOT / "examples" / f"{model}.py", 0, device)
    module.cuda()
    args = tuple(a.cuda() if isinstance(a, torch.Tensor) else a for a in args)
    kwargs = {k: a.cuda() if isinstance(a, torch.Tensor) else a for k, a in kwargs.items()}
    times = []
    with torch.no_grad():
        for _ in range(35):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            module(*args, **kwargs)
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
    print(statistics.median(times[5:]))


def table(whole: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    machine = whole["machine"]
    lines = [
        f"{len(machine['gpus'])} x {machine['gpus'][0] if machine['gpus'] else 'no GPU'}, torch {machine['torch']}",
        "",
        f"Made by `{whole['command']}`.",
        "",
        "| case | GPUs | worst error | dense model's own error | ms per call | dense eager, 1 GPU, ms"
        " | export, s (build) | engine, MB per rank |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in whole["results"]:
        run, export = result["run"], result["export"]
        model = result["case"].split("-")[0]
        dense = whole["dense_ms_on_one_gpu"].get(model)
        seconds = export.get("seconds", {})
        size = max(export.get("engine_bytes", [0])) / 1e6
        if run:
            worst = max(error for rank in run["ranks"] for error in rank["errors"].values())
            errors = f"{worst:.2e} | {max(run['dense_errors'].values()):.2e} | {run['median_ms']:.2f}"
        else:
            errors = "failed | | " if not export["passed"] else " | | "
        lines.append(
            f"| {result['case']} | {result['ranks']} | {errors} | {f'{dense:.2f}' if dense else ''} |"
            f" {sum(seconds.values()):.0f} ({seconds.get('build', 0):.0f}) | {size:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
