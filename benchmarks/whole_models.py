"""Time whole models at full size: ours beside what their users have without us, in one run on the same GPUs.

    torchrun --nproc_per_node=P benchmarks/whole_models.py --model flux --out FILE.json

writes FILE.json and FILE.md.  ``--only`` names candidates, with wildcards; ``--size small --device cpu`` is a trial of
the script where there is no GPU.  A candidate that fails is recorded and the others go on; the exit code is then 1.

xDiT is a peer of FLUX.1 where ``xfuser`` is installed, with ``yunchang``, ``distvae`` and ``einops``.  With
``--quantized`` all candidates are of one model that torchao has quantized: ours, and those of its library.

Weights are random and made on each GPU, equal on all.  What is timed: calls on inputs that lie on the GPU, the slowest
rank of each round, candidates taking turns.  Errors are relative, by L2 norms, against float32.  Where that of all, or
of a slice along a dim, as a token, is larger than the dense model's own rounding allows, the candidate is not timed.
The first call includes capture, compilation and building, with empty caches where the caches are.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torchtrt_md as md
from benchmarks import measure, xdit
from benchmarks.block_speed import Launch, chosen, join, machine, print_once, release
from benchmarks.peers import captured, quantize_blocks
from benchmarks.workloads import WORKLOADS
from torchtrt_md.lowering.passes import Exchange
from torchtrt_md.verification.compare import ROUNDING_RATIO

_ROUNDS = 20
_GIB = 2**30
Timed = Callable[[], Tensor]


@dataclass
class Candidate:
    """One way to run the model, and what was measured of it.

    Attributes:
        peer: it is not ours.
        ranks: how many GPUs one call takes; 1 for the dense model, which each rank runs by itself.
        error: why it is not timed.
        relative_error: of all of the result, the worst rank's.
        first_call_s: from the model to the first result.
        extra_gib: of the GPU, with what the first calls left, beside the dense model and what others hold.
        alone_ms: a call, before other candidates are there.
        ms: median, p10 and p90 of a call, in turns with the others.
        timeline: what the GPU of rank 0 did in one call, of :func:`measure.analysed`, with its kernels by name.
    """

    peer: bool
    ranks: int
    call: Timed | None = None
    error: str = ""
    relative_error: float | None = None
    first_call_s: float | None = None
    extra_gib: float | None = None
    summary: str = ""
    alone_ms: float | None = None
    ms: dict[str, Any] = field(default_factory=dict)
    timeline: dict[str, Any] = field(default_factory=dict)


class Bench:
    """All candidates of one workload.

    Args:
        wanted: patterns of the names of those that are made.
        quantized: what torchao quantizes the linear layers of the blocks to, of all of them and the dense model.
        keep: called with what is known, whenever more is.
    """

    def __init__(
        self,
        launch: Launch,
        name: str,
        *,
        small: bool,
        wanted: list[str],
        quantized: str,
        keep: Callable[[dict[str, Any]], None],
    ) -> None:
        self.launch, self.small, self.wanted, self.quantized, self.keep = launch, small, wanted, quantized, keep
        self.name, self.workload = name, WORKLOADS[name](small)
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with launch.device:
                self.model = self.workload.make().eval().requires_grad_(False)
                self.kwargs = self.workload.kwargs()
        finally:
            torch.set_default_dtype(before)
        self.model.to(torch.bfloat16)
        self.reference = self._reference()
        if quantized:
            quantize_blocks(self.model, quantized)
        self.dense_error, self.dense_worst = errors(first_tensor(self.model(**self.kwargs)), self.reference)
        self.candidates: dict[str, Candidate] = {}

    def _reference(self) -> Tensor:
        wide = copy.deepcopy(self.model).float()
        kwargs = pytree.tree_map(lambda x: x.float() if _floating(x) else x, self.kwargs)
        with _HeadByHead():
            result = first_tensor(wide(**kwargs)).clone()
        del wide
        release()
        return result

    def twin(self) -> nn.Module:
        """The model again, of the same tensors."""
        held = {id(t): t for t in (*self.model.parameters(), *self.model.buffers())}
        return copy.deepcopy(self.model, held)

    def add(self, name: str, make: Callable[[], Timed], *, peer: bool = True, ranks: int = 0) -> Timed | None:
        """Make a candidate, if it is wanted, and see whether it is right."""
        if not chosen(name, self.wanted):
            return None
        found = self.candidates[name] = Candidate(peer, ranks or self.launch.ranks)
        print_once(self.launch, name)
        release()
        held, start = self._used(), time.perf_counter()

        def first() -> tuple[Timed, tuple[float, float]]:
            call = make()
            return call, errors(first_tensor(call()), self.reference)

        made, found.error = self.launch.attempt(first)
        if made is None:
            return None
        found.first_call_s = max(self.launch.gather(time.perf_counter() - start))
        found.relative_error, worst = map(max, zip(*self.launch.gather(made[1]), strict=True))
        release()
        found.extra_gib = max(self.launch.gather(self._used() - held)) / _GIB
        if found.relative_error <= ROUNDING_RATIO * self.dense_error and worst <= ROUNDING_RATIO * self.dense_worst:
            found.call = made[0]
            found.alone_ms = measure.quick(self.launch.clock, found.call, 3)
        else:
            found.error = (
                f"wrong: {found.relative_error:.2e} off and {worst:.2e} in a slice, where the dense model is"
                f" {self.dense_error:.2e} and {self.dense_worst:.2e} off"
            )
        self.keep(self.found())
        return found.call

    def _used(self) -> int:
        if not self.launch.clock.cuda:
            return 0
        free, whole = torch.cuda.mem_get_info(self.launch.device)
        return whole - free

    def with_graph(self, name: str, make: Callable[[], Timed], **about: Any) -> None:
        """A candidate, and the same in a CUDA graph made by hand."""
        call = self.add(name, make, **about)
        if self.launch.clock.cuda and (call is not None or name not in self.candidates):
            self.add(f"{name}, graph", lambda: captured(call or make()), **about)

    def add_dense(self) -> None:
        """The model on one GPU."""
        self.with_graph("dense, eager", lambda: self.call_of(self.twin()), ranks=1)
        self.with_graph("dense, compiled", lambda: self.call_of(self.compiled(self.twin())), ranks=1)
        if hasattr(self.model, "compile_repeated_blocks"):
            whole = partial(self.compiled, whole=True)
            self.with_graph("dense, compiled whole", lambda: self.call_of(whole(self.twin())), ranks=1)

    def add_peers(self, backends: list[str]) -> None:
        """What the model's own library has for several GPUs, and xDiT where it is installed."""
        if self.launch.ranks == 1 or self.workload.plan is not None:
            return
        if self.workload.parallel == "tp":
            self.with_graph("DTensor, eager", lambda: self.call_of(self.tensor_parallel()))
            self.with_graph("DTensor, compiled", lambda: self.call_of(self.compiled(self.tensor_parallel())))
            no_mask = partial(self.tensor_parallel, masked=False)
            self.with_graph("DTensor, no mask, compiled", lambda: self.call_of(self.compiled(no_mask())))
            return
        for strategy in ("ulysses", "ring"):
            for backend in backends:
                of = partial(self.context_parallel, strategy, backend)
                name = f"diffusers {strategy}, {backend.strip('_')}"
                self.with_graph(f"{name}, eager", lambda of=of: self.call_of(of()))  # type: ignore[misc]
                self.with_graph(f"{name}, compiled", lambda of=of: self.call_of(self.compiled(of())))  # type: ignore[misc]
                self.with_graph(
                    f"{name}, compiled whole",
                    lambda of=of: self.call_of(self.compiled(of(), whole=True)),  # type: ignore[misc]
                )
        if self.name in ("flux", "flux2048") and self.launch.clock.cuda and xdit.is_there():
            name = f"xDiT ulysses, {xdit.BACKEND}"
            self.with_graph(f"{name}, eager", lambda: self.call_of(self.by_xdit()))
            self.with_graph(f"{name}, compiled", lambda: self.call_of(self.compiled(self.by_xdit())))

    def add_ours(self) -> None:
        graph = {"cuda_graph": self.launch.clock.cuda}
        stores = {"placement": "split", "compute": "inductor", "transport": "store"}
        ways: dict[str, dict[str, Any]] = {
            "ours, Inductor": {"placement": "split", "compute": "inductor"},
            "ours, Inductor, no overlap": {"placement": "split", "compute": "inductor", "overlap": False},
            "ours, Inductor, stores": stores,
            "ours, Inductor, stores, float8 exchanges": {**stores, "exchange_dtype": "float8"},
            **{
                f"ours, Inductor, stores, {n} groups of heads": {**stores, "exchange": Exchange("ulysses", n)}
                for n in self.workload.groups
            },
            "ours, TensorRT": {"placement": "split"},
            "ours, TensorRT, one engine": {"placement": "engine"},
            "ours, tuned": {"tune": True},
            "ours, tuned, TensorRT alone": {"tune": True, "compute": "tensorrt"},
        }
        for name, way in ways.items():
            self.add(name, partial(self.compile_ours, name, {"tune": False, **way, **graph}), peer=False)

    def compile_ours(self, name: str, options: Mapping[str, Any]) -> Timed:
        tp = self.workload.parallel == "tp"
        mesh = md.Mesh({"tp" if tp else "cp": self.launch.ranks})
        strategy: Any = "auto" if options["tune"] else self.workload.parallel
        parallel = md.TensorParallel("tp") if tp else md.ContextParallel("cp", strategy, self.workload.plan)
        # Engines store weights in a layout of their own, as which other candidates would read them.
        model = self.twin() if options.get("compute") == "inductor" else copy.deepcopy(self.model)
        runner = md.compile(
            model,
            (),
            self.kwargs,
            mesh=mesh,
            parallel=parallel,
            check=self.small,  # in fp64 on a CPU: hours at full size
            timeout=240.0,
            report=False,
            votes="first",  # peers do not vote on the inputs of every call either
            static_outputs=options["cuda_graph"],  # nor do their graphs copy their results
            **options,
        )
        self.candidates[name].summary = runner.summary
        for _ in range(2):
            runner(**self.kwargs)
        return lambda: first_tensor(runner(**self.kwargs))

    def context_parallel(self, strategy: str, backend: str) -> nn.Module:
        from diffusers import ContextParallelConfig

        model: Any = self.twin()
        model.set_attention_backend(backend)
        model.enable_parallelism(config=ContextParallelConfig(**{f"{strategy}_degree": self.launch.ranks}))
        parallel: nn.Module = model
        return parallel

    def by_xdit(self) -> nn.Module:
        return xdit.ulysses(self.twin(), self.kwargs["encoder_hidden_states"].shape[1])

    def tensor_parallel(self, *, masked: bool = True) -> nn.Module:
        """The model by DTensor.

        Args:
            masked: as transformers has it under ``torch.compile``: it passes attention the causal mask as a tensor.
                Else attention is told that it is causal, by transformers' own registry.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor.parallel import (
            ColwiseParallel,
            ParallelStyle,
            RowwiseParallel,
            parallelize_module,
        )

        styles = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 0, "up_proj": 0, "down_proj": 1}
        plan: dict[str, ParallelStyle] = {
            f"model.layers.*.{'mlp' if name in ('gate_proj', 'up_proj', 'down_proj') else 'self_attn'}.{name}": (
                RowwiseParallel() if row else ColwiseParallel()
            )
            for name, row in styles.items()
        }
        mesh = init_device_mesh(self.launch.device.type, (self.launch.ranks,))
        model: Any = copy.deepcopy(self.model)
        if not masked:
            from transformers import AttentionInterface, AttentionMaskInterface
            from transformers.integrations.sdpa_attention import sdpa_attention_forward

            AttentionInterface.register("sdpa_no_mask", sdpa_attention_forward)
            AttentionMaskInterface.register("sdpa_no_mask", lambda *args, **kwargs: None)
            model.set_attn_implementation("sdpa_no_mask")
        return parallelize_module(model, mesh, plan)

    def compiled(self, model: Any, *, whole: bool = False) -> nn.Module:
        """As the library's documentation says, by its blocks where it has repeated ones; or the ``whole``."""
        if hasattr(model, "compile_repeated_blocks") and not whole:
            model.compile_repeated_blocks()  # without fullgraph, which PyTorch 2.11 refuses where a block has hooks
        else:
            model.compile()
        return model  # type: ignore[no-any-return]

    def call_of(self, model: nn.Module) -> Timed:
        for _ in range(2):
            model(**self.kwargs)
        return lambda: first_tensor(model(**self.kwargs))

    def measure(self, rounds: int) -> dict[str, Any]:
        calls = {name: c.call for name, c in self.candidates.items() if c.call is not None}
        times = measure.interleaved(self.launch.clock, calls, rounds, dict.fromkeys(calls, 1)) if calls else {}
        for name, ms in times.items():
            self.candidates[name].ms = ms
        self.keep(self.found())
        for name, call in calls.items():
            seen, _ = self.launch.attempt(partial(measure.timeline, self.launch.clock, call))
            if seen:
                kernels, gaps = seen.pop("kernels"), seen.pop("gaps")
                its = {**seen, "gaps": len(gaps), "kernels": len(kernels), "by_name": measure.by_name(kernels)}
                self.candidates[name].timeline = its
        return self.found()

    def found(self) -> dict[str, Any]:
        """What is known."""
        return {
            "about": self.workload.about,
            "ranks": self.launch.ranks,
            "numbers": f"{self.quantized} by torchao in the linear layers of the blocks, else bfloat16"
            if self.quantized
            else "bfloat16",
            "dense_error": self.dense_error,
            "candidates": {name: asdict(replace(c, call=None)) for name, c in self.candidates.items()},
        }


class _HeadByHead(TorchFunctionMode):
    """Attention without a mask one head after another: PyTorch may hold all scores of all heads in float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or kwargs.get("attn_mask") is not None or len(args) > 3:
            return func(*args, **kwargs)
        q, k, v = (x if x is not None else kwargs.pop(name) for x, name in zip_longest(args, ("query", "key", "value")))
        kwargs.pop("enable_gqa", None)
        repeated = q.shape[1] // k.shape[1]
        heads = [
            func(q[:, h : h + 1], k[:, h // repeated, None], v[:, h // repeated, None], **kwargs)
            for h in range(q.shape[1])
        ]
        return torch.cat(heads, 1)


def errors(value: Tensor, reference: Tensor) -> tuple[float, float]:
    """The relative error of all, and of the worst slice along any one dim, by L2 norms."""
    wrong, right = (value.float() - reference).square_(), reference.square()
    found = [(wrong.sum() / right.sum()).sqrt()]
    for dim in range(reference.dim()):
        others = [d for d in range(reference.dim()) if d != dim]
        # A sum of nothing wrong over nothing right is right.
        found.append((wrong.sum(others) / right.sum(others)).nan_to_num(0.0, torch.inf).max().sqrt())
    whole, *slices = torch.stack(found).tolist()
    return (whole, max(slices)) if bool(value.isfinite().all()) else (float("inf"), float("inf"))


def first_tensor(result: Any) -> Tensor:
    return next(leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor))


def _floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


@torch.no_grad()
def main(
    out: Annotated[Path, typer.Option(help="the report, FILE.json")],
    model: Annotated[list[str], typer.Option(help=f"{', '.join(WORKLOADS)}; may be repeated")],
    only: Annotated[list[str] | None, typer.Option(help="names of candidates, with wildcards; may be repeated")] = None,
    backend: Annotated[list[str] | None, typer.Option(help="attention backends of diffusers' peers")] = None,
    rounds: Annotated[int, typer.Option(min=_ROUNDS)] = _ROUNDS,
    quantized: Annotated[str, typer.Option(help="float8 or int8: of the blocks' linear layers, for all")] = "",
    size: Annotated[str, typer.Option(help="full, or small for a trial")] = "full",
    deadline: Annotated[int, typer.Option(help="seconds after which the run is ended, with what was written")] = 580,
    commit: Annotated[str, typer.Option(help="that is timed")] = "",
    device: Annotated[str, typer.Option(help="cuda, or cpu for a trial of the script")] = "cuda",
) -> None:
    measure.end_after(deadline)
    launch = join(device)
    torch._dynamo.config.recompile_limit = 64
    report: dict[str, Any] = {
        "command": shlex.join(["python3", *sys.orig_argv[1:]]),
        "commit": commit,
        "machine": machine(launch),
    }
    report["models"] = {}

    def keep(name: str, found: dict[str, Any]) -> None:
        report["models"][name] = found
        if launch.rank == 0:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(report, indent=1) + "\n")
            out.with_suffix(".md").write_text(table(report))

    if launch.rank == 0:  # what the stages take
        logging.basicConfig(format="%(asctime)s %(name)s %(message)s")
        logging.getLogger("torchtrt_md").setLevel(logging.INFO)
    for name in model:
        bench = Bench(
            launch, name, small=size == "small", wanted=only or ["*"], quantized=quantized, keep=partial(keep, name)
        )
        # Ours first: it may join weights, which moves them, and the graphs of peers hold their addresses.
        bench.add_ours()
        bench.add_dense()
        bench.add_peers(backend or ["native", "_native_cudnn"])
        keep(name, bench.measure(rounds))
        del bench
        release()
    print_once(launch, table(report))
    launch.gather(None)
    failed = any(c["error"] for m in report["models"].values() for c in m["candidates"].values())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(failed))  # destructors of graphs and communicators wait on peers that may have ended


def table(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    its = report["machine"]
    flavours = ", ".join(f"{name} {v}" for name, v in its["tensorrt"].items() if v)
    lines = [
        f"{its['ranks']} x {its['gpus'][0]}, torch {its['torch']}, NCCL {its['nccl']}, {flavours}."
        f" Commit {report['commit'] or 'unknown'}.",
        "",
        f"Made by `{report['command']}`.",
    ]
    for found in report["models"].values():
        candidates = found["candidates"]
        peers = {n: c["ms"]["median"] for n, c in candidates.items() if c["peer"] and c["ms"]}
        best = min(peers, key=lambda n: peers[n]) if peers else ""
        lines += [
            "",
            f"**{found['about']}**, {found['numbers']}, {found['ranks']} ranks. The dense model's own error is"
            f" {found['dense_error']:.2e} against float32."
            + (f" The best peer is {best!r}." if best else "")
            + " Extra GiB are of one GPU, beside the dense model.",
            "",
            "| candidate | GPUs | ms, median | 10-90 % | over the best peer | error | first call, s | extra GiB |",
            "|---|---:|---:|---|---:|---:|---:|---:|",
        ]
        lines += [_row(name, c, peers.get(best)) for name, c in candidates.items()]
        lines += _timelines(candidates)
        told = [f"{name}:\n\n```\n{c['summary']}\n```" for name, c in candidates.items() if c["summary"]]
        lines += ["", *told]
    return "\n".join(lines) + "\n"


def _timelines(candidates: Mapping[str, Any]) -> list[str]:
    """A table of what the GPU did in a call of each, where that was seen."""
    seen = {name: c["timeline"] for name, c in candidates.items() if c["timeline"]}
    if not seen:
        return []
    lines = [
        "",
        "The kernels of one call on rank 0, ms; *alone* is exchanges with nothing beside them, *idle* no kernel:",
        "",
        "| candidate | call | products | attention | exchanges | other | alone | idle | kernels |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, its in seen.items():
        of = its["class_us"]
        us = [its["span_us"], of["gemm"], of["attention"], of["exchange"], of["other"]]
        us += [its["exposed_us"], its["span_us"] - its["busy_us"]]
        lines.append(f"| {name} | {' | '.join(f'{t / 1e3:.2f}' for t in us)} | {its['kernels']} |")
    return lines


def _row(name: str, c: Mapping[str, Any], best: float | None) -> str:
    if not c["ms"]:
        told = f"alone {c['alone_ms']:.1f}, not timed in turns" if c["alone_ms"] else "not timed"
        return f"| {name} | {c['ranks']} | {(c['error'] or told).splitlines()[0][:160]} | | | | | |"
    ms = c["ms"]
    ratio = f"{ms['median'] / best:.3f}" if best else ""
    return (
        f"| {name} | {c['ranks']} | {ms['median']:.1f} | {ms['p10']:.1f}-{ms['p90']:.1f} | {ratio}"
        f" | {c['relative_error']:.2e} | {c['first_call_s']:.1f} | {c['extra_gib']:.1f} |"
    )


if __name__ == "__main__":
    typer.run(main)
