"""What TensorRT offers, seen on GPUs: the times of steps, layers, weights that are streamed, kernels that are kept.

python tests/gpu/suite.py --cases gpu.offers --ranks 2 --out FOLDER
"""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

import torch

import torchtrt_md as md
from gpu.bundles import Bundle, bundle_of, export_all, from_bundle, loaded
from gpu.case import TIMEOUT, Case, Found, Rank, first_tensor
from gpu.networks import make
from torchtrt_md.bundle.read import read_manifest
from torchtrt_md.errors import LaunchError

__all__ = ["cases", "export", "make"]

WHOLE, SPLIT, KEPT = Bundle("flux", "ulysses", "engine"), Bundle("flux", "ulysses"), Bundle("decoder", "ring")
STREAMED = Bundle("flux", "ulysses", "engine", streaming=True)
ITERATIONS = 5


def cases(device: str, ranks: int) -> list[Case]:
    """All of them, for GPUs."""
    assert device == "cuda", "TensorRT runs on GPUs alone"
    return [
        Case("the times of steps", functools.partial(step_times, SPLIT), "offers"),
        Case(f"bundle: {STREAMED.name}", functools.partial(from_bundle, STREAMED), "offers"),
        Case("weights that are streamed", streamed_weights, "offers"),
        Case("kernels that are kept", kept_kernels, "offers"),
        Case("layers of an engine", engine_layers, "offers"),
    ]


def export(device: str, ranks: int, folder: Path) -> None:
    """Export their bundles."""
    export_all([(bundle, bundle.name, ranks) for bundle in (SPLIT, STREAMED, WHOLE, KEPT)], folder)


@torch.no_grad()
def step_times(bundle: Bundle, at: Rank) -> Found:
    """Every step has a time, engines have layers, and calls are right before and after."""
    found = Found()
    with loaded(at, bundle) as (runner, (_, args, kwargs)):
        results = [first_tensor(runner(*args, **kwargs)).clone()]
        inputs = runner.signature.bind(args, kwargs, at.device)
        steps = runner.time_steps(inputs, ITERATIONS)
        results.append(first_tensor(runner(*args, **kwargs)).clone())
        found.expect(all(step.ms > 0 for step in steps), f"a step takes no time: {steps}")
        segments = runner.manifest.ranks[at.rank]
        engines = sum(s.runs == "engine" for s in segments)
        told = [step.kind for step in steps].count("engine")
        found.expect(told == engines, f"{told} engines were timed, of {engines}")
        found.expect(
            all(step.layers for step in steps if step.kind == "engine"),
            "TensorRT's profiler told no layer of an engine",
        )
        collectives = sum(len(s.collectives) for s in segments if s.runs == "eager")
        told = [step.kind for step in steps].count("collective")
        found.expect(told == collectives, f"{told} collectives were timed, of {collectives}")
        slowest = max(steps, key=lambda step: step.ms)
        layers = {name: round(ms, 4) for step in steps[:1] for name, ms in list(step.layers.items())[:3]}
        found.message = (
            f"{len(steps)} steps, slowest {slowest.kind} {slowest.name} {slowest.ms:.3f} ms; layers {layers}"
        )
        found.compare(results, *at.reference(bundle.model))
    return found


@torch.no_grad()
def streamed_weights(at: Rank) -> Found:
    """The same bits whatever stays on the GPU, with a budget of its own on each rank; less memory for less."""
    found, told, results = Found(), [], []
    manifest = read_manifest(bundle_of(at, STREAMED.name))
    size = (bundle_of(at, STREAMED.name) / manifest.ranks[at.rank][0].file).stat().st_size
    taken: dict[Any, int] = {}
    for budget in (None, "auto", size // (2 + at.rank), 0):
        at.clean_up()
        at.synchronize()
        free = torch.cuda.mem_get_info()[0]
        with loaded(at, STREAMED, weight_budget=budget) as (runner, (_, args, kwargs)):
            start = time.perf_counter()
            results.append(first_tensor(runner(*args, **kwargs)).clone())
            at.synchronize()
            seconds = time.perf_counter() - start
            taken[budget] = free - torch.cuda.mem_get_info()[0]
            told.append(f"{budget}: {taken[budget] / 2**20:.0f} MiB, first call {seconds:.2f} s")
    found.expect(taken[0] < taken[None], f"with nothing kept on the GPU it takes {taken[0]} bytes, else {taken[None]}")
    found.compare(results, *at.reference(STREAMED.model))
    whole = bundle_of(at, WHOLE.name)  # was not built for it
    found.must_refuse(
        LaunchError, lambda: md.load(whole, timeout=TIMEOUT, weight_budget=0), "no weights that could be streamed"
    )
    found.message = f"engine of {size / 2**20:.0f} MiB; {'; '.join(told)}"
    return found


@torch.no_grad()
def kept_kernels(at: Rank) -> Found:
    """Kernels are kept in a file, a damaged one is not used, and the bits stay; times are told, not judged."""
    bundle, folder = KEPT, at.work / "kernels"
    found, told, results = Found(), [], []

    def files() -> list[Path]:
        return sorted(folder.glob("*.kernels"))

    for what in ("compiled", "kept", "damaged"):
        if what == "damaged":
            torch.distributed.barrier()
            for file in files() if at.rank == 0 else []:
                file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
            torch.distributed.barrier()
        at.clean_up()
        start = time.perf_counter()
        with loaded(at, bundle, kernel_cache=folder) as (runner, (_, args, kwargs)):
            ready = time.perf_counter()
            results.append(first_tensor(runner(*args, **kwargs)).clone())
            at.synchronize()
            end = time.perf_counter()
        told.append(f"{what}: load {ready - start:.2f} s, first call {end - ready:.2f} s")
        torch.distributed.barrier()  # whoever is the last to write
        found.expect(len(files()) >= 1, f"no file of kernels after the run that is {what}")
    found.message = f"{'; '.join(told)}; {sum(f.stat().st_size for f in files()) / 1e6:.1f} MB"
    found.compare(results, *at.reference(bundle.model))
    return found


def engine_layers(at: Rank) -> Found:
    """TensorRT tells the layers of an engine."""
    from torchtrt_md.runtime.inspect import layers_of

    folder = bundle_of(at, WHOLE.name)
    manifest = read_manifest(folder)
    lines = layers_of(folder / manifest.ranks[at.rank][0].file, manifest.target)
    found = Found(message=f"{len(lines)} layers, the first: {lines[0][:100] if lines else ''}")
    found.expect(bool(lines) and all(lines), "there is a layer without a line")
    return found
