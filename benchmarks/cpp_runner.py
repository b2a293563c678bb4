"""The same bundle in Python and in C++, on the same inputs: bytes, time per call, start-up and memory.

    python benchmarks/cpp_runner.py --bundle flux.mdtrt --ranks 2 --binary build/cpp/mdtrt_run --out DIR

It starts the ranks itself, one process for each GPU of this host, first of Python and then of C++, each without and
with CUDA graphs; and once more in C++ under ``torchrun --no-python``.  It writes report.json and report.md into the
folder, and ends with exit code 1 where a byte differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

import torchtrt_md as md
from torchtrt_md.bundle.manifest import Manifest
from torchtrt_md.bundle.read import manifest_digest, read_manifest
from torchtrt_md.bundle.structure import mesh_of
from torchtrt_md.bundle.weights import save_weights
from torchtrt_md.program import Value, part
from torchtrt_md.runtime.timing import call_times

WARM_UP = 5  # calls, as in mdtrt_run


# A rank of Python ----------------------------------------------------------------------------------------------------


def worker(bundle: Path, folder: Path, name: str, repeat: int, cuda_graph: bool) -> None:
    """What ``mdtrt_run`` does, by ``md.load``: this rank's report and outputs, written into the folder."""
    rank, cuda = int(os.environ["RANK"]), torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    before = 0
    if cuda:
        torch.cuda.set_device(device)
        free, total = torch.cuda.mem_get_info()
        before = total - free
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    began = time.perf_counter()
    runner = md.load(bundle, device=device if cuda else None, votes="first", cuda_graph=cuda_graph, static_outputs=True)
    loaded = time.perf_counter() - began
    whole = load_file(folder / "inputs.safetensors")
    mesh = mesh_of(runner.manifest)
    inputs = {
        v.name: part(whole[v.name], v.sharding, mesh, rank).contiguous().to(device) for v in runner.manifest.inputs
    }

    def outputs(returned: Any) -> dict[str, Tensor]:
        return {name: t.cpu().contiguous() for name, t in runner.signature.flat(returned).items()}

    first = outputs(runner(**inputs))
    answered = time.monotonic()
    # Where a graph reads them they need no copy, as in C++.
    times, last = timed(runner, runner.graph_inputs() or inputs, repeat, device)
    found = outputs(last) if repeat else first
    save_weights(found, folder / f"{name}.outputs.rank{rank}.safetensors")
    free, total = torch.cuda.mem_get_info() if cuda else (0, 0)
    text = {
        "rank": rank,
        "load_seconds": loaded,
        "first_answer_monotonic": answered,
        "cuda_graph": runner.captured > 0,
        "times_ms": times,
        "first_outputs": hashes(first),
        "outputs": hashes(found),
        "gpu_memory_bytes": total - free - before,
        "host_memory_kib": host_memory(),
        "versions": {"torch": torch.__version__, "GPU": torch.cuda.get_device_name(device) if cuda else "none"},
    }
    (folder / f"{name}.rank{rank}.json").write_text(json.dumps(text))
    runner.agreement.vote(None, "the end of the run")
    (folder / f"{name}.rank{rank}.done").touch()
    deadline = time.monotonic() + 60
    while rank == 0 and time.monotonic() < deadline:  # it holds the store that the others read their votes from
        if len(list(folder.glob(f"{name}.rank*.done"))) == runner.agreement.size:
            break
        time.sleep(0.05)
    sys.stdout.flush()
    os._exit(0)  # the destructors of CUDA and NCCL wait on peers that may be gone


def timed(runner: Any, inputs: Mapping[str, Tensor], repeat: int, device: torch.device) -> tuple[list[float], Any]:
    """Milliseconds of each of ``repeat`` calls that are enqueued back to back, and what the last one returned."""
    last = None
    if device.type == "cpu":
        times = []
        for _ in range(repeat):
            began = time.perf_counter()
            last = runner(**inputs)
            times.append((time.perf_counter() - began) * 1e3)
        return times, last

    def call() -> None:
        nonlocal last
        last = runner(**inputs)

    def begin() -> None:
        runner.agreement.vote(None, "the start of the timing")

    return call_times(call, repeat, warm_up=WARM_UP if repeat else 0, begin=begin, device=device), last


def hashes(outputs: Mapping[str, Tensor]) -> dict[str, str]:
    """sha256 of the bytes of each output, in the order of its elements."""
    return {name: hashlib.sha256(bytes_of(t)).hexdigest() for name, t in outputs.items()}


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def host_memory() -> dict[str, int]:
    """KiB of this process: the most it ever held, what it holds, and what of that is no file's."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        name: int(lines[field].split()[0])
        for name, field in (("peak", "VmHWM"), ("now", "VmRSS"), ("anonymous", "RssAnon"))
    }


# The whole comparison ------------------------------------------------------------------------------------------------


def launch(command: Sequence[str], ranks: int, log: Path, timeout: float) -> float:
    """Run a command as all ranks of one host; the time (``time.monotonic``) at which they were started.

    Raises:
        SystemExit: a rank failed or took too long, with what it wrote.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = time.monotonic()
    processes, files = [], []
    for rank in range(ranks):
        ranked = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        environment = os.environ | {name: str(value) for name, value in ranked.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        files.append(log.with_suffix(f".rank{rank}.log").open("w+"))
        processes.append(subprocess.Popen(command, env=environment, stdout=files[-1], stderr=subprocess.STDOUT))
    wait_for(processes, files, command, timeout)
    return began


def wait_for(
    processes: Sequence[subprocess.Popen[bytes]], files: Sequence[Any], command: object, timeout: float
) -> None:
    """Until all have ended well; else end the others and say what they wrote."""
    deadline = time.monotonic() + timeout
    while any(process.poll() is None for process in processes):
        failed = any(process.poll() not in (None, 0) for process in processes)
        if failed:
            deadline = min(deadline, time.monotonic() + 30)  # the others say what they make of it
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.05)
    codes = [process.returncode for process in processes]
    if any(codes):
        texts = []
        for rank, file in enumerate(files):
            file.seek(0)
            texts.append(f"--- rank {rank}, exit code {codes[rank]}\n{file.read()[-3000:]}")
        raise SystemExit(f"{command} failed\n" + "\n".join(texts))


def random_inputs(values: Sequence[Value]) -> dict[str, Tensor]:
    """Whole inputs: normal, False, or 0, which any embedding can look up."""
    generator = torch.Generator().manual_seed(0)
    return {
        v.name: torch.randn(v.shape, generator=generator).to(v.dtype)
        if v.dtype.is_floating_point
        else torch.zeros(v.shape, dtype=v.dtype)
        for v in values
    }


def python_ranks(folder: Path, name: str, ranks: int, began: float) -> list[dict[str, Any]]:
    found = [json.loads((folder / f"{name}.rank{rank}.json").read_text()) for rank in range(ranks)]
    return [with_start(report, began) for report in found]


def with_start(report: dict[str, Any], began: float) -> dict[str, Any]:
    """With the seconds from the start of the process to its first answer."""
    return report | {"first_answer_seconds": report["first_answer_monotonic"] - began}


def differences(manifest: Manifest, folder: Path, python: str, cpp: str, reports: Mapping[str, Any]) -> list[str]:
    """What differs between a run in Python and one in C++: by rank and output, nothing where all bytes are equal."""
    mesh, whole, found = mesh_of(manifest), load_file(folder / f"{cpp}.outputs.safetensors"), []
    for rank in range(mesh.size):
        mine = load_file(folder / f"{python}.outputs.rank{rank}.safetensors")
        for v in manifest.outputs:
            expected = hashlib.sha256(bytes_of(mine[v.name])).hexdigest()
            for which in ("first_outputs", "outputs"):
                for name in (python, cpp):
                    if reports[name][rank][which][v.name] != expected:
                        found.append(f"{name}: {which} of rank {rank}, {v.name!r}, are not those of {python}")
            if bytes_of(part(whole[v.name], v.sharding, mesh, rank)) != bytes_of(mine[v.name]):
                found.append(f"{cpp}: {v.name!r} in its file is not what rank {rank} has in {python}")
    return found


def row(name: str, reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One line of the table: of times the slowest rank's, of memory the largest."""
    return {
        "run": name,
        "cuda_graph": all(report["cuda_graph"] for report in reports),
        "median_ms": max((statistics.median(r["times_ms"]) for r in reports if r["times_ms"]), default=None),
        "fastest_ms": max((min(r["times_ms"]) for r in reports if r["times_ms"]), default=None),
        "first_answer_seconds": max(r["first_answer_seconds"] for r in reports),
        "host_peak_mib": max(r["host_memory_kib"]["peak"] for r in reports) / 1024,
        "host_anonymous_mib": max(r["host_memory_kib"]["anonymous"] for r in reports) / 1024,
        "gpu_mib": max(r["gpu_memory_bytes"] for r in reports) / 2**20,
    }


def markdown(report: Mapping[str, Any]) -> str:
    def cell(value: Any) -> str:
        return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)

    columns = list(report["rows"][0])
    lines = [
        f"# {report['bundle']} in Python and in C++",
        "",
        f"{report['ranks']} ranks on {report['gpu']}, {report['repeat']} timed calls of each.",
        "Times are the slowest rank's, memory the largest; the first answer is from the start of the processes. With a",
        "graph, Python captures it before its first answer and C++ behind it: compare start-up without graphs.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(cell(r[c]) for c in columns) + " |" for r in report["rows"]),
        "",
        "All outputs are equal, byte by byte." if not report["differences"] else "**Outputs differ:**",
        *(f"- {difference}" for difference in report["differences"]),
        "",
        "    " + report["command"],
        "",
    ]
    return "\n".join(lines)


def compare(options: argparse.Namespace) -> int:
    bundle, folder, ranks = options.bundle, options.out, options.ranks
    manifest = read_manifest(bundle)
    mesh_of(manifest).check_launch(ranks)
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    for old in folder.glob("*.done"):
        old.unlink()
    save_weights(random_inputs(manifest.inputs), folder / "inputs.safetensors")
    reports: dict[str, list[dict[str, Any]]] = {}

    def python(name: str, graph: bool) -> None:
        command = [sys.executable, __file__, "--worker", name, "--bundle", str(bundle), "--out", str(folder)]
        command += ["--repeat", str(options.repeat), *(["--cuda-graph"] if graph else [])]
        began = launch(command, ranks, folder / name, options.timeout)
        reports[name] = python_ranks(folder, name, ranks, began)

    def cpp(name: str, graph: bool, torchrun: bool = False) -> None:
        command = [str(options.binary.resolve()), str(bundle), "--inputs", str(folder / "inputs.safetensors")]
        command += ["--outputs", str(folder / f"{name}.outputs.safetensors"), "--report", str(folder / f"{name}.json")]
        command += ["--repeat", str(options.repeat), *(["--cuda-graph"] if graph else [])]
        for library in ("tensorrt", "nccl"):
            command += [f"--{library}", str(getattr(options, library))] if getattr(options, library) else []
        if torchrun:
            before = [sys.executable, "-m", "torch.distributed.run", "--no-python", f"--nproc_per_node={ranks}"]
            began = time.monotonic()
            with (folder / f"{name}.log").open("w+") as log:
                process = subprocess.Popen([*before, *command], stdout=log, stderr=subprocess.STDOUT)
                wait_for([process], [log], command, options.timeout)
        else:
            began = launch(command, ranks, folder / name, options.timeout)
        told = json.loads((folder / f"{name}.json").read_text())
        reports[name] = [with_start(report, began) for report in told["ranks"]]

    pairs = []
    for mode, graph in (("", False), (" graph", True)):
        python(f"Python{mode}".replace(" ", "_"), graph)
        cpp(f"C++{mode}".replace(" ", "_"), graph)
        pairs.append((f"Python{mode}".replace(" ", "_"), f"C++{mode}".replace(" ", "_")))
    if options.torchrun:
        cpp("C++_torchrun", True, torchrun=True)
        pairs.append(("Python_graph", "C++_torchrun"))
    report = {
        "bundle": bundle.name,
        "manifest_sha256": manifest_digest(bundle),
        "mesh": dict(manifest.mesh),
        "versions": reports["C++"][0].get("versions", {}) | reports["Python"][0]["versions"],
        "gpu": reports["Python"][0]["versions"]["GPU"],
        "ranks": ranks,
        "repeat": options.repeat,
        "command": " ".join(["python", "benchmarks/cpp_runner.py", *sys.argv[1:]]),
        "rows": [row(name, found) for name, found in reports.items()],
        "differences": [d for py, c in pairs for d in differences(manifest, folder, py, c, reports)],
        "reports": reports,
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "report.md").write_text(markdown(report))
    print(markdown(report))
    return 1 if report["differences"] else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--binary", type=Path, help="mdtrt_run")
    parser.add_argument("--out", type=Path, required=True, help="the folder for reports, inputs, outputs and logs")
    parser.add_argument("--repeat", type=int, default=50, help="timed calls")
    parser.add_argument("--timeout", type=float, default=170.0, help="seconds for each run")
    parser.add_argument("--tensorrt", type=Path, help="TensorRT's library, for mdtrt_run")
    parser.add_argument("--nccl", type=Path, help="NCCL's library, for mdtrt_run")
    parser.add_argument("--torchrun", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--cuda-graph", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        worker(options.bundle, options.out, options.worker, options.repeat, options.cuda_graph)
    if options.binary is None or not options.binary.is_file():
        parser.error("--binary: give the mdtrt_run that make cpp built")
    return compare(options)


if __name__ == "__main__":
    raise SystemExit(main())
