"""Time DiT blocks with Ulysses: every way to compile them here beside the best of plain PyTorch, in one run.

    torchrun --nproc_per_node=P benchmarks/block_speed.py --block flux --block wan --out FILE.json

writes FILE.json (all that was measured, with the kernels of one call of each) and FILE.md (its table).  Efficiency
needs the times of one GPU: ``--baseline`` takes the file of such a run.  With ``--device cpu --block small`` the script
can be tried where there is no GPU.  A candidate that fails is recorded and the others go on; the exit code is then 1.

What is timed: calls in a row on this rank's chunk of the tokens, the slowest rank of each round, the candidates taking
turns.  Peers get their chunk; ours get the whole input and cut their chunk inside the timed call.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from fnmatch import fnmatch
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import torch.distributed as dist
import typer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torchtrt_md as md
from benchmarks import blocks, measure, peers
from torchtrt_md.lowering.passes import Exchange
from torchtrt_md.verification.compare import limit, relative_error

T = TypeVar("T")

_SEED = 0
_FEWEST_ROUNDS = 20
_REFERENCE_ROWS = 4608  # of a rank's tokens, evenly spread; all of them for FLUX
_SPAN_MS = 6.0  # short calls are timed some in a row, for about this long
_MOST_IN_A_ROW = 10
_COLUMN = ("gemm", "attention", "exchange", "other")  # classes of kernels, in the order of the table's column


@dataclass(frozen=True)
class Launch:
    """This rank's place in the launch."""

    rank: int
    ranks: int
    device: torch.device
    clock: measure.Clock
    votes: dist.ProcessGroup

    @property
    def group(self) -> dist.ProcessGroup | None:
        return dist.group.WORLD if self.ranks > 1 else None

    def gather(self, value: T) -> list[T]:
        """Every rank's value, over gloo."""
        values: list[Any] = [None] * self.ranks
        dist.all_gather_object(values, value, group=self.votes)
        return values

    def attempt(self, step: Callable[[], T]) -> tuple[T | None, str]:
        """The step's result and no error, or None and the first failing rank's error: the same for all ranks."""
        value, error = None, ""
        try:
            value = step()
            self.clock.synchronize()
        except Exception as problem:
            traceback.print_exc()
            error = f"rank {self.rank}: {type(problem).__name__}: {problem}"[:2000]
        first = next(filter(None, self.gather(error)), "")
        if first:
            value = None
            release()
        return value, first


@dataclass
class Candidate:
    """One way to compute the block, and what was measured of it.

    Attributes:
        kind: ``peer`` or ``ours``.
        made_of: the form or the options.
        summary: what ours says of itself: what runs where, and the times that decided.
        call: computes this rank's chunk of the result; None after an error.
        error: why there is nothing to time.
        relative_error: against float32, the worst rank's.
        wrong: the relative error is above what the dense block's own allows.
        ms: median, p10, p90 of a call.
        timeline: the kernels of one call on rank 0.
    """

    kind: str
    made_of: str
    summary: str = ""
    call: peers.Timed | None = None
    error: str = ""
    relative_error: float | None = None
    wrong: bool = False
    ms: dict[str, Any] = field(default_factory=dict)
    timeline: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        return asdict(replace(self, call=None))


@dataclass(frozen=True)
class Reference:
    """What a rank's chunk of the result should be, at some of its tokens."""

    rows: Tensor
    outputs: Tensor
    dense_error: float

    def error(self, chunk: Tensor) -> float:
        return relative_error(chunk[:, self.rows], self.outputs)


def main(
    out: Annotated[Path, typer.Option(help="the report, FILE.json")],
    block: Annotated[list[str], typer.Option(help="flux, wan or small; may be repeated")],
    iterations: Annotated[int, typer.Option(min=_FEWEST_ROUNDS, help="rounds, at most")] = 30,
    seconds_per_candidate: Annotated[float, typer.Option(help="of timing; 20 rounds are made in any case")] = 6.0,
    only: Annotated[list[str] | None, typer.Option(help="names of candidates, with wildcards; may be repeated")] = None,
    ablations: Annotated[bool, typer.Option(help="also ours with one thing changed at a time")] = False,
    baseline: Annotated[Path | None, typer.Option(help="FILE.json of the same on one GPU, for the efficiency")] = None,
    peer_search: Annotated[bool, typer.Option(help="try how the peers are best written, and take that")] = True,
    peer_mode: Annotated[str, typer.Option(help="torch.compile's mode for the peers")] = "default",
    deadline: Annotated[int, typer.Option(help="seconds after which the run is ended, with what was written")] = 580,
    device: Annotated[str, typer.Option(help="cuda, or cpu for a trial of the script")] = "cuda",
) -> None:
    measure.end_after(deadline)
    launch = join(device)
    # Each form is a compilation of the same code.
    torch._dynamo.config.recompile_limit = 64
    report: dict[str, Any] = {"command": " ".join(sys.orig_argv), "machine": machine(launch), "blocks": {}}
    before = json.loads(baseline.read_text())["blocks"] if baseline else {}
    for name in block:
        torch._dynamo.reset()
        bench = Bench(launch, blocks.SIZES[name], only or ["*"])
        trials = bench.add_peers(peer_mode, peer_search)
        for ours, options in our_options(ablations).items():
            bench.add_ours(ours, options)
        measured = bench.measure(iterations, seconds_per_candidate, before.get(name, {}))
        report["blocks"][name] = {**measured, "peer_trials": trials}
        del bench
        release()
        if launch.rank == 0:
            write(report, out)
    if launch.rank == 0:
        print(table(report), *(summary(name, r) for name, r in report["blocks"].items()), sep="\n")
    launch.gather(None)
    failed = any(c["error"] or c["wrong"] for r in report["blocks"].values() for c in r["candidates"].values())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(failed))  # destructors of graphs and communicators wait on peers that may have ended


def join(device: str) -> Launch:
    """Join torchrun's launch."""
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    limits = timedelta(seconds=240)
    if device == "cpu":
        place = torch.device("cpu")
        dist.init_process_group("gloo", timeout=limits)
    else:
        place = torch.device("cuda", local)
        torch.cuda.set_device(place)
        # For good: on the default stream TensorRT would add synchronizations.
        torch.cuda.set_stream(torch.cuda.Stream(place))  # type: ignore[no-untyped-call]
        dist.init_process_group("nccl", device_id=place, timeout=limits)
    votes = dist.new_group(backend="gloo", timeout=limits)
    assert isinstance(votes, dist.ProcessGroup)
    return Launch(rank, dist.get_world_size(), place, measure.Clock(place), votes)


class Bench:
    """All candidates of one block.

    Args:
        wanted: patterns of the names of those that are made.
    """

    def __init__(self, launch: Launch, size: blocks.Size, wanted: list[str]) -> None:
        self.launch, self.size, self.wanted = launch, size, wanted
        with torch.no_grad():
            self.dense, self.args = blocks.make(size, _SEED, launch.device)
            self.reference = make_reference(launch, self.dense, self.args)
        self.allowed = limit(size.dtype, self.reference.dense_error)
        self.local = peers.local_args(self.args, launch.rank, launch.ranks)
        self.candidates: dict[str, Candidate] = {}
        self.runners: list[Any] = []

    def add(self, name: str, kind: str, made_of: object, make: Callable[[], peers.Timed]) -> None:
        """Make a candidate, if it is wanted, and see whether it is right."""
        if not chosen(name, self.wanted):
            return
        candidate = self.candidates[name] = Candidate(kind, str(made_of))
        print_once(self.launch, f"{self.size.name}: {name}")
        call, candidate.error = self.launch.attempt(make)
        if call is None:
            return
        error, candidate.error = self.launch.attempt(lambda: self.reference.error(call()))
        if error is not None:
            candidate.call, candidate.relative_error = call, max(self.launch.gather(error))
            candidate.wrong = not candidate.relative_error <= self.allowed

    def add_peers(self, mode: str, search: bool) -> list[dict[str, Any]]:
        """The peers as they are best written; returns the trials that found out."""
        if not any(chosen(name, self.wanted) for name in _PEERS):
            return []
        forms, trials = choose_forms(self.launch, self.dense, self.local, mode, search)
        for family, form in forms.items():
            call = peers.make(self.dense, self.local, form, self.launch.group)  # for both: compiled once
            self.add(family, "peer", form, partial(_same, call))
            if self.launch.clock.cuda:
                self.add(f"{family}, graph", "peer", form, partial(peers.captured, call))
        return trials

    def add_ours(self, name: str, options: Mapping[str, Any]) -> None:
        made: list[Any] = []

        def make() -> peers.Timed:
            runner = compile_ours(self.launch, self.size, self.dense, self.args, options)
            made.append(runner)
            return call_in_place(runner, self.args) if options.get("cuda_graph") else lambda: runner(*self.args)

        self.add(name, "ours", dict(options), make)
        for runner in made:
            self.candidates[name].summary = runner.summary
        self.runners += made

    def measure(self, most_rounds: int, seconds: float, baseline: Mapping[str, Any]) -> dict[str, Any]:
        """Time all candidates, profile ours and the best peer, and close ours."""
        time_all(self.launch, self.candidates, most_rounds, seconds)
        alone = time_alone(self.launch, self.size)
        best = best_peer(self.candidates)
        for name, candidate in self.candidates.items():
            if candidate.call is not None and not candidate.wrong and (candidate.kind == "ours" or name == best):
                seen, error = self.launch.attempt(partial(measure.timeline, self.launch.clock, candidate.call))
                candidate.timeline = own_sum(seen, alone, candidate.ms["median"]) if seen else {"error": error}
        for runner in self.runners:
            runner.close()
        return {
            "size": {**asdict(self.size), "dtype": str(self.size.dtype)},
            "ranks": self.launch.ranks,
            "dense_error": self.reference.dense_error,
            "allowed_error": self.allowed,
            "reference_rows_per_rank": len(self.reference.rows),
            "alone_ms": alone,
            "best_peer": best,
            "candidates": {
                name: described(candidate, name, self.candidates, best, baseline, self.launch)
                for name, candidate in self.candidates.items()
            },
        }


def _same(call: peers.Timed) -> peers.Timed:
    return call


def make_reference(launch: Launch, dense: blocks.Block, args: blocks.Args) -> Reference:
    """The dense block in float32 on this rank's GPU, at as many of its tokens as take a few seconds."""
    count = args[0].shape[1] // launch.ranks
    rows = torch.linspace(0, count - 1, min(count, _REFERENCE_ROWS), device=launch.device).round().long()
    outputs = blocks.reference_rows(dense, args, rows + launch.rank * count)
    own = relative_error(dense(*args)[:, rows + launch.rank * count], outputs)
    release()
    return Reference(rows, outputs, max(launch.gather(own)))


_PEERS = ("torch eager", "torch eager, graph", "torch.compile", "torch.compile, graph")


def choose_forms(
    launch: Launch, dense: blocks.Block, local: tuple[Tensor, ...], mode: str, search: bool
) -> tuple[dict[str, peers.Form], list[dict[str, Any]]]:
    """The fastest way to write the eager and the compiled peer, and the trials that say so.

    One option after the other is tried and kept where it is faster.  Trials are CUDA graphs, where the kernels
    decide and not the host.
    """
    trials: list[dict[str, Any]] = []

    def trial(form: peers.Form) -> float:
        def made() -> peers.Timed:
            call = peers.make(dense, local, form, launch.group)
            return peers.captured(call) if launch.clock.cuda else call

        call, error = launch.attempt(made)
        ms, failed = launch.attempt(partial(measure.quick, launch.clock, call)) if call else (None, error)
        trials.append({"form": str(form), "ms": ms, "error": error or failed})
        return float("inf") if ms is None else ms

    backend = choose_backend(launch, dense, local, trials)
    forms = {
        "torch eager": peers.Form(fused_qkv=True, backend=backend),
        "torch.compile": peers.Form(compiled=True, fused_qkv=True, mode=mode, backend=backend),
    }
    for family, form in forms.items():
        changes: list[dict[str, Any]] = [{"fused_qkv": False}]
        changes += [{"gelu_epilogue": True}] if launch.clock.cuda else []
        changes += [{"pieces": True}] if form.compiled and launch.ranks > 1 else []
        if search:
            fastest = trial(form)
            for change in changes:
                other = replace(forms[family], **change)
                ms = trial(other)
                if ms < fastest:
                    forms[family], fastest = other, ms
    torch._dynamo.reset()  # calls of the forms chosen must not look through the compilations of the others
    release()
    return forms, trials


def choose_backend(
    launch: Launch, dense: blocks.Block, local: tuple[Tensor, ...], trials: list[dict[str, Any]]
) -> SDPBackend | None:
    """The faster of flash attention and cuDNN on queries, keys and values as the exchange leaves them."""
    if not launch.clock.cuda:
        return None
    times: dict[SDPBackend, float] = {}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        call = attention_call(launch, local[0].shape[1] * launch.ranks, dense.heads, local[1].shape[1], local[0].dtype)

        def limited(call: peers.Timed = call, backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return call()

        ms, error = launch.attempt(partial(measure.quick, launch.clock, limited))
        trials.append({"form": f"attention alone, {backend.name}", "ms": ms, "error": error})
        times[backend] = float("inf") if ms is None else ms
    fastest = min(times, key=lambda backend: times[backend])
    return fastest if times[fastest] < float("inf") else None


def attention_call(launch: Launch, tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> peers.Timed:
    """Attention over all tokens for this rank's heads, operands strided as they come from the packed exchange."""
    shape = (tokens, 3, heads // launch.ranks, head_dim)
    q, k, v = torch.randn(shape, device=launch.device).to(dtype).unbind(1)
    return lambda: peers.attention(q[None], k[None], v[None])


def time_alone(launch: Launch, size: blocks.Size) -> dict[str, float]:
    """Milliseconds of the attention and of the two exchanges of one call, each alone.

    Attention is PyTorch's choice of kernel.  An exchange of one rank does not exist.
    """
    calls = {"attention": attention_call(launch, size.tokens, size.heads, size.head_dim, size.dtype)}
    for name, count in (("exchange there", 3), ("exchange back", 1)):
        if launch.ranks > 1:
            shape = (launch.ranks, size.tokens // launch.ranks, count, size.heads // launch.ranks, size.head_dim)
            calls[name] = exchange_call(torch.randn(shape, device=launch.device).to(size.dtype))
    times, error = launch.attempt(lambda: {n: alone_ms(launch, call) for n, call in calls.items()})
    if times is None:
        print_once(launch, f"{size.name}: attention and exchanges alone were not timed: {error}")
    return times or {}


def alone_ms(launch: Launch, call: peers.Timed) -> float:
    return measure.quick(launch.clock, peers.captured(call) if launch.clock.cuda else call, _MOST_IN_A_ROW)


def exchange_call(sent: Tensor) -> peers.Timed:
    received = torch.empty_like(sent)

    def call() -> Tensor:
        dist.all_to_all_single(received, sent)
        return received

    return call


def our_options(ablations: bool) -> dict[str, dict[str, Any]]:
    """Name -> options of ``md.compile``."""
    ways: dict[str, dict[str, Any]] = {
        "engine": {"placement": "engine"},
        "split": {"placement": "split"},
        "split inductor": {"placement": "split", "compute": "inductor"},
        "tuned": {"tune": True, "strategy": "auto"},
        "tuned tensorrt": {"tune": True, "compute": "tensorrt", "strategy": "auto"},
    }
    options = {}
    for name, way in ways.items():
        options[name] = way
        options[f"{name}, graph"] = {**way, "cuda_graph": True}
    if ablations:
        changes: dict[str, dict[str, Any]] = {
            "packed": {"exchange": Exchange("ulysses")},
            "values first": {"exchange": Exchange("ulysses", values_first=True)},
            "2 head groups": {"exchange": Exchange("ulysses", head_groups=2)},
            "values first, 2 head groups": {"exchange": Exchange("ulysses", head_groups=2, values_first=True)},
            "packed, stores": {"exchange": Exchange("ulysses"), "transport": "store"},
            "values first, stores": {"exchange": Exchange("ulysses", values_first=True), "transport": "store"},
            "2 head groups, stores": {"exchange": Exchange("ulysses", head_groups=2), "transport": "store"},
            "values first, 2 head groups, stores": {
                "exchange": Exchange("ulysses", head_groups=2, values_first=True),
                "transport": "store",
            },
            "packed, no overlap": {"exchange": Exchange("ulysses"), "overlap": False},
            "values first, no overlap": {"exchange": Exchange("ulysses", values_first=True), "overlap": False},
        }
        for name in ("split, graph", "split inductor, graph"):
            options |= {f"{name}, {change}": {**options[name], **o} for change, o in changes.items()}
        for name in ("engine, graph", "split, graph"):
            options[f"{name}, weights [N,K]"] = {**options[name], "transpose_weights": False}
    return options


def call_in_place(runner: Any, args: blocks.Args) -> peers.Timed:
    """Calls on the tensors that the CUDA graph reads, as the peers' graphs are called."""
    for _ in range(2):
        runner(*args)
    held = runner.graph_inputs()
    return lambda: runner(**held)


def compile_ours(
    launch: Launch, size: blocks.Size, dense: blocks.Block, args: blocks.Args, options: Mapping[str, Any]
) -> Any:
    """A runner; the one place that knows ``md.compile``."""
    rest = dict(options)
    strategy = rest.pop("strategy", "ulysses")
    return md.compile(
        dense,
        args,
        mesh=md.Mesh(cp=launch.ranks),
        parallel=md.ContextParallel("cp", strategy=strategy, plan=blocks.PLAN),
        check=size is blocks.SMALL,  # in fp64 in a simulator: hours at full width; tests prove it at the small one
        timeout=240.0,
        report=False,
        votes="first",  # peers do not vote on the inputs of every call either
        static_outputs=bool(options.get("cuda_graph")),  # nor do their graphs copy their results
        **{"tune": False, **rest},
    )


def time_all(launch: Launch, candidates: Mapping[str, Candidate], most_rounds: int, seconds: float) -> None:
    """Fill in ``ms`` of all candidates that compute what they should."""
    calls = {name: c.call for name, c in candidates.items() if c.call is not None and not c.wrong}
    rough: dict[str, float] = {}
    for name in list(calls):
        ms, error = launch.attempt(partial(measure.quick, launch.clock, calls[name], 1))
        if ms is None:
            candidates[name].call, candidates[name].error = None, error
            del calls[name]
        else:
            rough[name] = ms
    if not calls:
        return
    in_a_row = {name: min(max(round(_SPAN_MS / ms), 1), _MOST_IN_A_ROW) for name, ms in rough.items()}
    round_ms = sum(rough[name] * in_a_row[name] for name in calls)
    rounds = min(max(int(seconds * len(calls) * 1e3 / round_ms), _FEWEST_ROUNDS), most_rounds)
    for name, ms in measure.interleaved(launch.clock, calls, rounds, in_a_row).items():
        candidates[name].ms = {**ms, "calls_in_a_row": in_a_row[name]}


def best_peer(candidates: Mapping[str, Candidate]) -> str | None:
    times = {name: c.ms["median"] for name, c in candidates.items() if c.kind == "peer" and c.ms}
    return min(times, key=lambda name: times[name]) if times else None


def own_sum(timeline: Mapping[str, Any], alone: Mapping[str, float], ms: float) -> dict[str, Any]:
    """The timeline with the step's time over the sum of its kernels.

    A rank's kernels of exchanges last until the other ranks come, so ``own_ms`` has the exchanges' times alone in their
    place.
    """
    waiting = timeline["class_us"]["exchange"]
    exchanges = alone.get("exchange there", 0.0) + alone.get("exchange back", 0.0) if waiting else 0.0
    own = (timeline["sum_us"] - waiting) / 1e3 + exchanges
    return {"own_ms": own, "step_over_own": ms / own, "step_over_sum": ms * 1e3 / timeline["sum_us"], **timeline}


def described(
    candidate: Candidate,
    name: str,
    candidates: Mapping[str, Candidate],
    best: str | None,
    baseline: Mapping[str, Any],
    launch: Launch,
) -> dict[str, Any]:
    """The candidate's record, with its ratio to the best peer and its efficiency."""
    record = candidate.record()
    median = candidate.ms.get("median")
    alone = baseline.get("candidates", {}).get(name, {}).get("ms", {}).get("median")
    record["over_best_peer"] = median / candidates[best].ms["median"] if median and best else None
    record["efficiency"] = alone / (launch.ranks * median) if median and alone else None
    return record


def chosen(name: str, wanted: list[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in wanted)


def print_once(launch: Launch, line: str) -> None:
    if launch.rank == 0:
        print(line, flush=True)


def release() -> None:
    """Give back what is no longer referred to."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def machine(launch: Launch) -> dict[str, Any]:
    cuda = launch.clock.cuda
    return {
        "gpus": launch.gather(torch.cuda.get_device_name(launch.device) if cuda else "no GPU"),
        "ranks": launch.ranks,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,  # type: ignore[no-untyped-call]
        "tensorrt": {name: version(name) for name in ("tensorrt_rtx", "tensorrt")},
    }


def version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def write(report: Mapping[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    out.with_suffix(".md").write_text(table(report))


def table(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    its = report["machine"]
    flavours = ", ".join(f"{name} {v}" for name, v in its["tensorrt"].items() if v)
    lines = [f"{its['ranks']} x {its['gpus'][0]}, torch {its['torch']}, NCCL {its['nccl']}, {flavours}", ""]
    lines += [f"Made by `{report['command']}`."]
    for name, result in report["blocks"].items():
        size = result["size"]
        lines += [
            "",
            f"**{name}**: d {size['d']}, {size['heads']} heads, {size['tokens']} tokens, {result['ranks']} ranks."
            f" The dense block's own error is {result['dense_error']:.2e} ({result['reference_rows_per_rank']} tokens"
            f" of each rank, against float32); alone: "
            + ", ".join(f"{what} {ms:.3f} ms" for what, ms in result["alone_ms"].items())
            + ".",
            "",
            f"| candidate | ms | 10-90 % | over best peer | error | over own kernels | {', '.join(_COLUMN)}, ms"
            " | idle, ms | efficiency |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [row(candidate, c) for candidate, c in result["candidates"].items()]
        forms = {candidate: c["made_of"] for candidate, c in result["candidates"].items() if c["kind"] == "peer"}
        lines += ["", *(f"{candidate}: {form}." for candidate, form in forms.items() if "graph" not in candidate)]
    return "\n".join(lines) + "\n"


def row(name: str, c: Mapping[str, Any]) -> str:
    if c["error"] or c["wrong"]:
        why = c["error"].splitlines()[0][:120] if c["error"] else f"wrong, error {c['relative_error']:.2e}"
        return f"| {name} | {why} | | | | | | | |"
    ms, seen = c["ms"], c["timeline"]
    classes = ", ".join(f"{seen['class_us'][k] / 1e3:.3f}" for k in _COLUMN) if "class_us" in seen else ""
    idle = f"{(seen['span_us'] - seen['busy_us']) / 1e3:.3f}" if "span_us" in seen else ""
    cells = [
        name,
        f"{ms['median']:.3f}",
        f"{ms['p10']:.3f}-{ms['p90']:.3f}",
        shown(c["over_best_peer"]),
        f"{c['relative_error']:.2e}",
        shown(seen.get("step_over_own")),
        classes,
        idle,
        shown(c["efficiency"]),
    ]
    return f"| {' | '.join(cells)} |"


def shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def summary(name: str, result: Mapping[str, Any]) -> str:
    """One line: the best peer, the best of ours, and what failed."""
    all_of = result["candidates"]
    ours = {n: c["ms"]["median"] for n, c in all_of.items() if c["kind"] == "ours" and c["ms"]}
    failed = [n for n, c in all_of.items() if c["error"] or c["wrong"]]
    peer = result["best_peer"]
    words = [f"{name} on {result['ranks']}:"]
    words += [f"best peer {peer!r} {all_of[peer]['ms']['median']:.3f} ms;"] if peer else []
    if ours:
        best = min(ours, key=lambda n: ours[n])
        words += [f"ours {best!r} {ours[best]:.3f} ms ({shown(all_of[best]['over_best_peer'])} of it);"]
    return " ".join([*words, f"{len(failed)} of {len(all_of)} failed" + (f": {', '.join(failed)}" if failed else "")])


if __name__ == "__main__":
    typer.run(main)
