"""The cases of the suite.

doors     one launch: md.compile and torch.compile; at its end a rank hangs
bundles   another: what was exported beside the first; ranks that do something wrong; at its end a rank is killed
"""

from __future__ import annotations

import functools
import gc
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import torchtrt_md as md
from gpu.case import ROOT, TIMEOUT, Call, Case, Found, Rank, first_tensor
from gpu.networks import Explicit, example, make, parallel
from torchtrt_md.bundle.read import rank_files, read_manifest
from torchtrt_md.errors import BundleError, InputError, LaunchError, MDError, MeshError
from torchtrt_md.launch.watchdog import EXIT_CODE

__all__ = ["cases", "export", "make"]

SHORT = 6.0  # the timeout of ranks that misbehave
CALLS = 500


# --- md.compile and torch.compile ---


@dataclass(frozen=True)
class Door:
    """A way in, a model and how it is compiled.

    ``check`` compares with the dense model while compiling, too; ``how`` is a torch.compile model's form.
    """

    door: str
    model: str
    strategy: str
    placement: str = "split"
    compute: str = "tensorrt"
    graph: bool = True
    transport: str = "nccl"
    tune: bool = False
    check: bool = False
    how: str = "plan"

    @property
    def name(self) -> str:
        extras = [self.transport] if self.transport != "nccl" else []
        extras += ["tuned"] if self.tune else []
        extras += ["graph"] if self.graph else []
        what = [self.model, self.how] if self.how != "plan" else [self.model]
        return " ".join([f"{self.door}:", *what, self.strategy, self.placement, self.compute, *extras])

    def options(self, size: int) -> dict[str, Any]:
        found = {
            "placement": self.placement,
            "compute": self.compute,
            "cuda_graph": self.graph,
            "transport": self.transport,
            "tune": self.tune,
            "check": self.check,
            "timeout": TIMEOUT,
            "report": False,
        }
        return found | parallel(self.model, self.strategy, size) if self.how == "plan" else found


def through(door: Door, at: Rank) -> Found:
    """Compile, call four times, compare.  The calls after the first replay a CUDA graph where there is one."""
    model, args, kwargs = at.model(door.model)
    found = Found()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if door.door == "md.compile":
            runner = md.compile(model, args, kwargs, **door.options(at.size))
            results = [first_tensor(runner(*args, **kwargs)).clone() for _ in range(4)]
            found.expect(runner.captured == int(door.graph), f"it holds {runner.captured} CUDA graphs")
            ran = {segment.runs for segment in runner.manifest.ranks[at.rank]}
            if not door.tune:  # which may find either faster
                found.expect(("engine" in ran) == (door.compute == "tensorrt"), f"it runs as {sorted(ran)}")
                found.expect(("inductor" in ran) == (door.compute == "inductor"), f"it runs as {sorted(ran)}")
            found.message = f"runs as {', '.join(sorted(ran))}"
        else:
            runner = None
            compiled = torch.compile(sharded(model, door.how, at), backend="torchtrt_md", options=door.options(at.size))
            with torch.no_grad():
                results = [first_tensor(compiled(*args, **kwargs)).clone() for _ in range(4)]
    at.synchronize()
    found.compare(results, *at.reference(door.model))
    told = [str(w.message) for w in caught if "CUDA graph" in str(w.message)]
    found.expect(not told, "; ".join(told))
    if runner is not None:
        runner.close()
    return found


def sharded(model: nn.Module, how: str, at: Rank) -> nn.Module:
    """The model in the form in which torch.compile gets it."""
    if how == "DTensor":
        return parallelize_module(model, at.mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if how == "collectives":
        return Explicit(model, at.rank, at.size)  # type: ignore[arg-type]
    return model


DOORS = [
    Door("md.compile", "flux", "ulysses", check=True),
    Door("md.compile", "flux", "ulysses", "engine"),
    Door("md.compile", "flux", "ulysses", "engine", graph=False),
    Door("md.compile", "flux", "ulysses", transport="copy"),
    Door("md.compile", "flux", "ulysses", compute="inductor"),
    Door("md.compile", "flux", "allgather_kv"),
    Door("md.compile", "flux", "allgather_kv", "engine"),
    Door("md.compile", "flux", "ring"),
    Door("md.compile", "flux", "ring", compute="inductor"),
    Door("md.compile", "llama", "tp", check=True),
    Door("md.compile", "llama", "tp", "engine"),
    Door("md.compile", "decoder", "ring", check=True),
    Door("md.compile", "decoder", "ring", compute="inductor", graph=False),
    Door("md.compile", "block", "tp", "engine"),
    Door("torch.compile", "flux", "ulysses"),
    Door("torch.compile", "flux", "ulysses", "engine"),
    Door("torch.compile", "flux", "allgather_kv", "engine"),
    Door("torch.compile", "llama", "tp", check=True),
    Door("torch.compile", "decoder", "ring"),
    Door("torch.compile", "block", "tp", check=True, how="DTensor"),
    Door("torch.compile", "block", "tp", "engine", how="DTensor"),
    Door("torch.compile", "block", "tp", compute="inductor", how="DTensor", graph=False),
    Door("torch.compile", "block", "tp", check=True, how="collectives"),
    Door("torch.compile", "block", "tp", "engine", how="collectives"),
    Door("md.compile", "attention", "ulysses", tune=True),
]
CPU_DOORS = [
    Door("md.compile", "product", "tp", compute="inductor", graph=False),
    Door("torch.compile", "product", "tp", compute="inductor", how="DTensor", graph=False),
]


# --- what else torch.compile must do ---


def backend(at: Rank, **more: Any) -> dict[str, Any]:
    """The arguments of torch.compile."""
    gpu = at.device.type == "cuda"
    options = {"compute": "tensorrt" if gpu else "inductor", "report": False, "timeout": TIMEOUT, "cuda_graph": gpu}
    return {"backend": "torchtrt_md", "options": {**options, **more}}


@torch.no_grad()
def two_models(at: Rank) -> Found:
    """Two models of one class, each with its own weights."""
    found, compiled = Found(), {}
    for name in ("block", "other block"):
        model, args, _ = at.model(name)
        compiled[name] = torch.compile(sharded(model, "DTensor", at), **backend(at)), args
    for name in ("block", "other block", "block"):  # the first again, after the other's weights
        call, args = compiled[name]
        found.compare([call(*args).clone() for _ in range(3)], *at.reference(name))
    return found


@torch.no_grad()
def one_by_one(form: str, at: Rank) -> Found:
    """Layers of one class, each compiled by itself: dense, sharded, or put back in the list that holds them."""
    model, args, _ = at.model("layers")
    layers: Any = model.layers
    for index, layer in enumerate(layers):
        if form == "sharded":
            sharded(layer, "DTensor", at)
        if form == "replaced":
            layers[index] = torch.compile(layer, **backend(at))
        else:
            layer.compile(**backend(at))
    found = Found()
    found.compare([model(*args).clone() for _ in range(3)], *at.reference("layers"))
    return found


@torch.no_grad()
def ranks_differ(what: str, at: Rank) -> Found:
    """Ranks that take different cached graphs all raise the same, and go on after it."""
    model, (x,), _ = at.model("attention")
    options = {**parallel("attention", "ulysses", at.size), "votes": "always"}
    call = torch.compile(model, dynamic=False, **backend(at, **options))
    first: Any = (x, 1.0)
    other = (x, 2.0) if what == "flag" else (x[:, :128].contiguous(), 1.0)
    expected = call(*first).clone()
    call(*other)
    found = Found()
    found.must_refuse(MDError, lambda: call(*(other if at.rank == 1 else first)), "rank 1")
    found.compare([call(*first), expected], *at.reference("attention"))
    return found


# --- weights, memory, time, graphs, rings ---


@torch.no_grad()
def weights_once(at: Rank) -> Found:
    """A model on the GPU whose weights TensorRT takes transposed, and joined, is there once."""
    at.clean_up()
    before = torch.cuda.memory_allocated()
    model, args, _ = at.model("wide decoder")
    size = sum(p.nbytes for p in model.parameters())
    options = {**Door("md.compile", "wide decoder", "allgather_kv").options(at.size), "cuda_graph": False}
    runner = md.compile(model, args, **options)
    runner(*args)
    at.synchronize()
    gc.collect()
    ratio = (torch.cuda.memory_allocated() - before) / size
    found = Found(message=f"{ratio:.3f} times its {size / 1e6:.0f} MB of weights")
    found.expect(ratio < 1.25, "more than 1.25 times the weights are allocated")
    runner.close()
    return found


def vote_cost(at: Rank) -> Found:
    """What the votes of a call cost the host; told, not judged."""
    told = []
    for votes in ("always", "first"):
        model, args, _ = at.model("decoder")
        options = Door("md.compile", "decoder", "ring").options(at.size) | {"votes": votes}
        if at.device.type == "cpu":
            options |= {"compute": "inductor", "cuda_graph": False}
        runner = md.compile(model, args, **options)
        times = []
        for _ in range(200):
            start = time.perf_counter()
            runner(*args)
            times.append(time.perf_counter() - start)
            at.synchronize()
        told.append(f"{statistics.median(times) * 1e6:.0f} us with votes={votes!r}")
        runner.close()
    return Found(message=f"host time of a call, median of 200: {', '.join(told)}")


def many_calls(at: Rank) -> Found:
    """Memory and files stay as they are, and so do the bits."""
    model, args, kwargs = at.model("flux")
    runner = md.compile(model, args, kwargs, **Door("md.compile", "flux", "ulysses", graph=False).options(at.size))
    results = [first_tensor(runner(*args, **kwargs)).clone() for _ in range(20)]
    del results[1:]

    def held() -> tuple[int, int, int]:
        at.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), len(os.listdir("/proc/self/fd"))

    before, start, same = held(), time.perf_counter(), True
    for number in range(CALLS):
        result = first_tensor(runner(*args, **kwargs))
        if number % 50 == 49:
            same &= torch.equal(result, results[0])
    del result
    after, seconds = held(), time.perf_counter() - start
    found = Found(message=f"{CALLS} calls, {seconds / CALLS * 1e3:.2f} ms each")
    found.compare(results, *at.reference("flux"))
    found.expect(same, "later calls gave other bits than the first")
    found.expect(after == before, f"bytes allocated, bytes reserved, open files: {before}, then {after}")
    runner.close()
    return found


def graphs(at: Rank) -> Found:
    """CUDA graphs of calls, on each GPU by itself."""
    from torchtrt_md.runtime.graphs import Budget, Graphs
    from torchtrt_md.segment import Wire

    x, y = Wire("input", "x"), Wire("output", "y")
    found = Found()

    def double(inputs: Any) -> Any:
        return {y: inputs[x] * 2}

    def waits(inputs: Any) -> Any:
        torch.cuda.current_stream().synchronize()  # which no capture allows
        return double(inputs)

    def of(size: int) -> Any:
        return {x: torch.randn(size, device=at.device)}

    def right(made: Graphs, size: int) -> bool:
        inputs = of(size)
        return torch.equal(made(inputs)[y], inputs[x] * 2)

    stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for static in (False, True):
            made = Graphs(double, Budget(1), at.device, static_outputs=static)
            found.expect(all(right(made, 4) for _ in range(4)), "a replay on new inputs is wrong")
            result = made(of(4))[y]
            kept, inputs = result.clone(), of(4)
            made(inputs)
            found.expect(torch.equal(result, inputs[x] * 2 if static else kept), "whose memory the results are")
        for run, sizes, words in ((double, (2, 3, 4), "max_graphs"), (waits, (4, 4), "could not be captured")):
            made = Graphs(run, Budget(2), at.device)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found.expect(all(right(made, size) for size in (*sizes, sizes[-1])), "a call without a graph is wrong")
            told = [str(w.message) for w in caught]
            found.expect(len(told) == 1 and words in told[0], f"one warning of {words!r}, but {told}")
    torch.cuda.synchronize()
    return found


def ring_self_test(at: Rank) -> Found:
    """The self-test of rings inside engines refuses GPUs without kernels for them, once the gate on them is opened."""
    from torchtrt_md.build import flavour
    from torchtrt_md.launch import Launch
    from torchtrt_md.runtime.selftest import check_ring

    launch = Launch.join(TIMEOUT, device=at.device)
    group = launch.connect(md.Mesh(cp=at.size))["cp"]
    sizes = ("cp", at.size, torch.bfloat16, 128, 8, 8, 256)
    if torch.cuda.get_device_capability() >= (10, 0):
        return Found(message=f"error {check_ring(*sizes, group=group, launch=launch):.3g}")
    gate, found = flavour._RING_CAPABILITY, Found()
    flavour._RING_CAPABILITY = (8, 0)
    try:
        found.must_refuse(LaunchError, lambda: check_ring(*sizes, group=group, launch=launch, target="sm80"), "ring")
    finally:
        flavour._RING_CAPABILITY = gate
    return found


OTHERS: list[tuple[str, Callable[[Rank], Found]]] = [
    ("torch.compile: two models of one class", two_models),
    ("torch.compile: layers one by one, dense", functools.partial(one_by_one, "dense")),
    ("torch.compile: layers one by one, sharded", functools.partial(one_by_one, "sharded")),
    ("torch.compile: layers one by one, replaced", functools.partial(one_by_one, "replaced")),
    ("torch.compile: ranks in different graphs, a flag", functools.partial(ranks_differ, "flag")),
    ("torch.compile: ranks in different graphs, a shape", functools.partial(ranks_differ, "shape")),
    ("md.compile: weights held once", weights_once),
    ("md.compile: the cost of a vote", vote_cost),
    (f"md.compile: {CALLS} calls", many_calls),
    ("CUDA graphs: replays, budget, failures", graphs),
    ("ring inside an engine: the self-test", ring_self_test),
]


# --- bundles ---


@dataclass(frozen=True)
class Bundle:
    """A model that the suite exports, without a launch."""

    model: str
    strategy: str
    placement: str = "split"
    compute: str = "tensorrt"

    @property
    def name(self) -> str:
        return f"{self.model}-{self.strategy}-{self.placement}-{self.compute}"


BUNDLES = [
    Bundle("flux", "ulysses", "engine"),
    Bundle("flux", "ulysses"),
    Bundle("flux", "allgather_kv", "engine"),
    Bundle("llama", "tp", "engine"),
    Bundle("decoder", "ring"),
    Bundle("decoder", "ring", compute="inductor"),
]
CPU_BUNDLES = [Bundle("product", "tp", compute="inductor")]
LARGER = "larger"  # a bundle for twice as many ranks


def export(device: str, ranks: int, folder: Path) -> None:
    """Export all bundles; beside one that cannot be is a file that says why."""
    wanted = [(b, b.name, ranks) for b in (CPU_BUNDLES if device == "cpu" else BUNDLES)]
    wanted.append((CPU_BUNDLES[0], LARGER, 2 * ranks))
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
    runner = md.load(bundle_of(at, bundle.name), **{"timeout": TIMEOUT, **options})
    try:
        yield runner, at.model(bundle.model)
    finally:
        runner.close()


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
    command += ["--verify", example("flux"), "--iterations", "20", "--timeout", "60", "--cuda-graph"]
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in launched}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    found.expect(done.returncode == 0, f"exit code {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    if report.exists():
        told = json.loads(report.read_text())
        found.error = max(error for rank in told["ranks"] for error in rank["errors"].values())
        found.dense_error = max(told["dense_errors"].values())
        found.message = f"{told['median_ms']:.2f} ms a call, median of {told['iterations']}"
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
    """A rank that comes too late is an error on all, in time, and the next call is right."""
    found = Found()
    with loaded(at, bundle, timeout=SHORT) as (runner, (_, args, kwargs)):
        expected = first_tensor(runner(*args, **kwargs)).clone()
        if at.rank == 1:
            time.sleep(SHORT + 2)
        start = time.perf_counter()
        found.must_refuse(LaunchError, lambda: runner(*args, **kwargs), "rank 1", "did not come")
        found.expect(time.perf_counter() - start < SHORT + 4, "the error came late")
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


# --- all of them ---


def cases(device: str) -> list[Case]:
    """All cases, in the order in which they run."""
    gpu = device == "cuda"
    bundles = BUNDLES if gpu else CPU_BUNDLES
    doors = DOORS if gpu else CPU_DOORS
    found = [Case(d.name, functools.partial(through, d), seconds=150 if d.tune else 90) for d in doors]
    if gpu:
        found += [Case(name, run) for name, run in OTHERS]
        words = ("all_to_all", "axis 'cp'")
        found.append(Case("rank 1: alone in a collective", hang, ends=(1, EXIT_CODE), says=words))
    found += [Case(f"bundle: {b.name}", functools.partial(from_bundle, b), "bundles") for b in bundles]
    if gpu:
        found.append(Case("bundle: python -m torchtrt_md.run", by_module, "bundles", 120))
        found.append(Case("rank 1: a skipped call", functools.partial(skipped_call, bundles[0]), "bundles"))
    found += [
        Case("rank 1: a wrong input", functools.partial(wrong_input, bundles[0]), "bundles"),
        Case("rank 1: a damaged file", functools.partial(damaged, bundles[0]), "bundles"),
        Case("a bundle for more ranks", larger, "bundles"),
        Case("rank 1: killed", functools.partial(killed, bundles[0]), "bundles", ends=(1, -signal.SIGKILL)),
    ]
    return found
