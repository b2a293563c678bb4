"""Bundles, exported without a launch and loaded in one; and ranks that do something wrong with them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import torchtrt_md as md
from gpu.case import ROOT, TIMEOUT, Call, Found, Rank, first_tensor
from gpu.doors import Door
from gpu.networks import example, make, parallel
from torchtrt_md.bundle.read import rank_files, read_manifest
from torchtrt_md.errors import BundleError, InputError, LaunchError, MeshError
from torchtrt_md.launch.board import board

SHORT = 6.0  # the timeout of ranks that misbehave


@dataclass(frozen=True)
class Bundle:
    """A model that the suite exports, without a launch."""

    model: str
    strategy: str
    placement: str = "split"
    compute: str = "tensorrt"
    streaming: bool = False
    strip: bool = False
    transport: str = "nccl"

    @property
    def name(self) -> str:
        more = ("-streamed" if self.streaming else "") + ("-stripped" if self.strip else "")
        more += f"-{self.transport}" if self.transport != "nccl" else ""
        return f"{self.model}-{self.strategy}-{self.placement}-{self.compute}{more}"


BUNDLES = [
    Bundle("flux", "ulysses", "engine"),
    Bundle("flux", "ulysses"),
    Bundle("flux", "allgather_kv", "engine"),
    Bundle("llama", "tp", "engine", strip=True),
    Bundle("llama", "tp", "engine"),
    Bundle("decoder", "ring"),
    Bundle("decoder", "ring", compute="inductor"),
]
CPU_BUNDLES = [
    Bundle("product", "tp", compute="inductor"),
    Bundle("product", "tp", compute="inductor", strip=True),
]
LARGER = "larger"  # a bundle for twice as many ranks


def export(device: str, ranks: int, folder: Path) -> None:
    """Export all bundles; beside one that cannot be is a file that says why."""
    wanted = [(b, b.name, ranks) for b in (CPU_BUNDLES if device == "cpu" else BUNDLES)]
    export_all([*wanted, (CPU_BUNDLES[0], LARGER, 2 * ranks)], folder)


def export_all(wanted: Sequence[tuple[Bundle, str, int]], folder: Path) -> None:
    """Export each bundle under its name, for so many ranks."""
    for bundle, name, size in wanted:
        torch.manual_seed(0)
        try:
            model, args, kwargs = make(bundle.model)
            md.export(
                model,
                args,
                kwargs,
                **parallel(bundle.model, bundle.strategy, size),
                placement=bundle.placement,  # type: ignore[arg-type]
                compute=bundle.compute,  # type: ignore[arg-type]
                transport=bundle.transport,  # type: ignore[arg-type]
                weight_streaming=bundle.streaming,
                strip_weights=bundle.strip,
                out=folder / f"{name}.mdtrt",
                check=False,
            )
        except Exception:  # the cases that need it fail, and say why
            (folder / f"{name}.failed").write_text(traceback.format_exc())


def bundle_of(at: Rank, name: str) -> Path:
    failed = at.work / f"{name}.failed"
    if failed.exists():
        raise AssertionError(f"it was not exported: {failed.read_text()}")
    return at.work / f"{name}.mdtrt"


@contextmanager
def loaded(at: Rank, bundle: Bundle, **options: Any) -> Iterator[tuple[md.Runner, Call]]:
    """The runner of a bundle, and the dense model with its arguments."""
    model = at.model(bundle.model)
    weights = model[0].state_dict() if bundle.strip else None
    runner = md.load(bundle_of(at, bundle.name), **{"timeout": TIMEOUT, "weights": weights, **options})
    try:
        yield runner, model
    finally:
        runner.close()


@torch.no_grad()
def from_bundle(bundle: Bundle, at: Rank) -> Found:
    """On the default stream with a CUDA graph of its own, on the user's stream, and in a CUDA graph of the user's."""
    gpu, found = at.device.type == "cuda", Found()
    with loaded(at, bundle, cuda_graph=gpu) as (runner, (_, args, kwargs)):
        inputs = runner.signature.bind(args, kwargs, at.device)
        results = [first_tensor(runner(*args, **kwargs)).clone() for _ in range(3)]
        if gpu:
            found.expect(runner.captured == 1, f"it holds {runner.captured} CUDA graphs")
            stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                results.append(first_tensor(runner(*args, **kwargs)).clone())
            at.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                captured = runner.enqueue({name: t.contiguous() for name, t in inputs.items()}, graphs=False)
            for tensor in captured.values():
                tensor.zero_()
            graph.replay()
            at.synchronize()
            results.append(first_tensor(captured).clone())
            del graph, captured, tensor  # an engine's context waits for the graphs that hold its collectives
        found.compare(results, *at.reference(bundle.model))
    return found


def by_module(at: Rank) -> Found:
    """``python -m torchtrt_md.run BUNDLE --verify FILE`` under torchrun, on the GPUs of this launch, which wait."""
    found = Found()
    if at.rank != 0:
        return found
    bundle, report = bundle_of(at, BUNDLES[0].name), at.work / "run.json"  # of the example that it is compared with
    command = ["timeout", "--kill-after=5", "100", sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={at.size}", "-m", "torchtrt_md.run", str(bundle), "--report", str(report)]
    command += ["--verify", example("flux"), "--iterations", "20", "--timeout", "60", "--cuda-graph", "--timing"]
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in launched}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    found.expect(done.returncode == 0, f"exit code {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    if report.exists():
        told = json.loads(report.read_text())
        found.error = max(error for rank in told["ranks"] for error in rank["errors"].values())
        found.dense_error = max(told["dense_errors"].values())
        found.message = f"{told['median_ms']:.2f} ms a call, median of {told['iterations']}"
        found.expect(all(rank["steps"] for rank in told["ranks"]), "its report has no times of steps")
        found.expect(told["passed"] and len(told["ranks"]) == at.size, "its report says that it failed")
    return found


# --- ranks that misbehave ---


def wrong_input(bundle: Bundle, at: Rank) -> Found:
    """A wrong input on one rank is refused on all, and the next call is right."""
    found = Found()
    with loaded(at, bundle, timeout=SHORT) as (runner, (_, args, kwargs)):
        inputs = dict(runner.signature.bind(args, kwargs, at.device))
        expected = first_tensor(runner(**inputs)).clone()
        name = next(iter(inputs))
        wrong = {**inputs, name: inputs[name][..., :-1].contiguous()} if at.rank == 1 else inputs
        found.must_refuse(InputError, lambda: runner(**wrong), "rank 1", name)
        found.compare([first_tensor(runner(**inputs)), expected], *at.reference(bundle.model))
    return found


def skipped_call(bundle: Bundle, at: Rank) -> Found:
    """A rank that comes too late is an error on all, in time, and so is every call from then on."""
    found = Found()
    with loaded(at, bundle, timeout=SHORT) as (runner, (_, args, kwargs)):
        expected = first_tensor(runner(*args, **kwargs)).clone()
        if at.rank == 1:
            time.sleep(SHORT + 2)
        start = time.perf_counter()
        found.must_refuse(LaunchError, lambda: runner(*args, **kwargs), "rank 1", "did not come")
        found.expect(time.perf_counter() - start < SHORT + 4, "the error came late")
        found.must_refuse(LaunchError, lambda: runner(*args, **kwargs), "rank 1", "may not match any more")
        board(SHORT).given_up = ""  # here no rank has left a call out, and the other cases are of this launch, too
        found.compare([first_tensor(runner(*args, **kwargs)), expected], *at.reference(bundle.model))
    return found


def damaged(bundle: Bundle, at: Rank) -> Found:
    """One byte of one rank's copy."""
    whole = bundle_of(at, bundle.name)
    largest = max(rank_files(read_manifest(whole), 1), key=lambda name: (whole / name).stat().st_size)
    folder = whole
    if at.rank == 1:
        folder = at.work / "damaged.mdtrt"
        shutil.copytree(whole, folder)
        with (folder / largest).open("r+b") as file:
            file.seek((folder / largest).stat().st_size // 2)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
    found = Found()
    found.must_refuse(BundleError, lambda: md.load(folder, timeout=SHORT), "rank 1", largest)
    return found


def larger(at: Rank) -> Found:
    """A bundle for more ranks than the launch has."""
    found = Found()
    words = (f"the launch has {at.size}", f"--nproc_per_node={2 * at.size}")
    found.must_refuse(MeshError, lambda: md.load(bundle_of(at, LARGER), timeout=SHORT), *words)
    return found


def killed(bundle: Bundle, at: Rank) -> Found:
    """A rank whose process ends is an error on the others, at once."""
    found = Found()
    with loaded(at, bundle, timeout=TIMEOUT) as (runner, (_, args, kwargs)):
        runner(*args, **kwargs)
        at.synchronize()
        if at.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        start = time.perf_counter()
        found.must_refuse(LaunchError, lambda: runner(*args, **kwargs), "rank 1", "ended")
        found.expect(time.perf_counter() - start < 5, "the error came late")
    return found


def hang(at: Rank) -> Found:
    """A rank alone in an engine's collective is ended by its watchdog; the other never comes."""
    model, args, kwargs = at.model("flux")
    door = Door("md.compile", "flux", "ulysses", "engine", graph=False)
    runner = md.compile(model, args, kwargs, **door.options(at.size) | {"votes": "first", "timeout": SHORT})
    runner(*args, **kwargs)
    at.synchronize()
    if at.rank != 1:
        time.sleep(3 * SHORT)  # longer than the watchdog takes
        return Found()
    runner(*args, **kwargs)
    at.synchronize()
    return Found(problems=["the call came to an end"])
