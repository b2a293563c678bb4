"""One rank of a launch that runs models through the doors: torch.compile, md.compile and a bundle.

    torchrun --nproc_per_node=2 tests/gpu/doors.py [PATTERN ...]

Each rank prints a line ``SAID {json}`` for each case: its error against the dense model in fp64, the dense bf16 model's
own, and whether later calls, which replay a CUDA graph where there is one, gave the same bits as the first.
"""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import sys
import tempfile
import traceback
import warnings
from dataclasses import dataclass
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import torchtrt_md as md
from torchtrt_md.verification.compare import relative_error

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 120.0
Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A door, a model and how it is compiled."""

    door: str
    model: str
    strategy: str
    placement: str
    compute: str = "tensorrt"
    graph: bool = False
    tune: Any = False

    @property
    def name(self) -> str:
        graph = "-graph" if self.graph else ""
        tune = f"-tuned-{self.tune}" if self.tune else ""
        return f"{self.door}-{self.model}-{self.strategy}-{self.placement}-{self.compute}{graph}{tune}"


def cases() -> list[Case]:
    """All combinations that there are."""
    found = []
    ways = [("flux", s) for s in ("ulysses", "allgather_kv", "ring")] + [("llama", "tp"), ("decoder", "ring")]
    for (model, strategy), door, placement, graph in product(
        ways, ("md.compile", "torch.compile", "bundle"), ("engine", "split"), (False, True)
    ):
        if placement == "engine" and strategy == "ring":
            continue  # compute capability 10.0 and later
        found.append(Case(door, model, strategy, placement, graph=graph))
    found += [
        Case("torch.compile", "dtensor", "tp", placement, graph=graph)
        for placement in ("engine", "split")
        for graph in (False, True)
    ]
    found += [Case("torch.compile", "collectives", "tp", "split", graph=graph) for graph in (False, True)]
    found += [Case("md.compile", "flux", s, "split", "inductor", graph=True) for s in ("ulysses", "ring")]
    found += [Case("md.compile", "flux", "auto", "auto", graph=True, tune=tune) for tune in (True, "tensorrt")]
    return found


class Decoder(nn.Module):
    """Two causal blocks with rotary positions that are passed in, as a long-context decoder has them."""

    def __init__(self, width: int = 512, heads: int = 8, kv_heads: int = 4) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.q = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(2))
        self.kv = nn.ModuleList(nn.Linear(width, 2 * kv_heads * self.head_dim, bias=False) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(2))
        self.head = nn.Linear(width, 64)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        for norm, to_q, to_kv, out in zip(self.norms, self.q, self.kv, self.out, strict=True):
            y = norm(x)
            q = to_q(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            k, v = to_kv(y).unflatten(-1, (2 * self.kv_heads, -1)).transpose(1, 2).chunk(2, 1)
            q, k = (
                t * cos + torch.cat((-t[..., t.shape[-1] // 2 :], t[..., : t.shape[-1] // 2]), -1) * sin for t in (q, k)
            )
            a = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = x + out(a.transpose(1, 2).flatten(2))
        result: Tensor = self.head(x)
        return result


DECODER_PLAN = {"": {"x": md.Split(1), "cos": md.Split(0), "sin": md.Split(0)}, "head": md.Gather(1)}


def decoder(tokens: int = 1024) -> Call:
    model = Decoder()
    angles = torch.arange(tokens)[:, None] / 100 ** (torch.arange(0, 64, 2) / 64)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    args = (torch.randn(1, tokens, 512), cos, sin)
    return model.to(torch.bfloat16).eval(), tuple(a.to(torch.bfloat16) for a in args), {}


class Block(nn.Module):
    """A feed-forward block for ``parallelize_module``."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(512, 2048), nn.Linear(2048, 512), nn.LayerNorm(512)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return result


class Explicit(nn.Module):
    """The same, its weights cut by hand and summed by a functional collective."""

    def __init__(self, dense: Block, rank: int, size: int) -> None:
        super().__init__()
        self.norm, width = dense.norm, 2048 // size
        rows = slice(rank * width, (rank + 1) * width)
        self.up_weight, self.up_bias = nn.Parameter(dense.up.weight[rows]), nn.Parameter(dense.up.bias[rows])
        self.down_weight, self.down_bias = nn.Parameter(dense.down.weight[:, rows].contiguous()), dense.down.bias

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.gelu(nn.functional.linear(self.norm(x), self.up_weight, self.up_bias))
        part = nn.functional.linear(y, self.down_weight)
        world: Any = dist.group.WORLD
        whole = torch.distributed._functional_collectives.all_reduce(part, "sum", world)
        result: Tensor = x + (whole + self.down_bias)
        return result


def load_model(name: str) -> Call:
    """The dense model, equal on all ranks, on the CPU."""
    torch.manual_seed(0)
    if name == "decoder":
        return decoder()
    if name in ("dtensor", "collectives"):
        return Block().to(torch.bfloat16).eval(), (torch.randn(1, 256, 512).to(torch.bfloat16),), {}
    sys.path.insert(0, str(ROOT / "examples"))
    os.environ.setdefault("FLUX_HEADS", "8")
    return __import__(name).model()  # type: ignore[no-any-return]


def to(value: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, dtype if dtype and value.is_floating_point() else value.dtype)
    if isinstance(value, dict):
        return {k: to(v, device, dtype) for k, v in value.items()}
    return tuple(to(v, device, dtype) for v in value) if isinstance(value, tuple) else value


def first_tensor(result: Any) -> Tensor:
    """The model's one output, however it is nested."""
    leaves = [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)]
    return leaves[0]


class Doors:
    """Runs cases in one process group."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.references: dict[str, tuple[Tensor, float]] = {}
        self.folder = tempfile.mkdtemp(prefix="doors-") if self.rank == 0 else ""
        told = [self.folder]
        dist.broadcast_object_list(told, src=0)
        self.folder = told[0]

    def reference(self, name: str) -> tuple[Tensor, float]:
        """The dense model's result in fp64, and its own error."""
        if name not in self.references:
            model, args, kwargs = load_model(name)
            with torch.no_grad():
                own = first_tensor(model.to(self.device)(*to(args, self.device), **to(kwargs, self.device)))
                wide = model.to(torch.float64)
                whole = first_tensor(
                    wide(*to(args, self.device, torch.float64), **to(kwargs, self.device, torch.float64))
                )
            self.references[name] = (whole, relative_error(own, whole))
        return self.references[name]

    def run(self, case: Case) -> dict[str, Any]:
        expected, dense_error = self.reference(case.model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call, close, told = self.open(case)
            results = [first_tensor(call()).clone() for _ in range(4)]
        torch.cuda.synchronize()
        said = {
            "case": case.name,
            "rank": self.rank,
            "error": relative_error(results[0], expected),
            "dense_error": dense_error,
            "same_bits": all(torch.equal(results[0], r) for r in results[1:]),
            "warnings": [str(w.message) for w in caught if "CUDA graph" in str(w.message)],
            **told(),
        }
        close()
        return said

    def open(self, case: Case) -> tuple[Any, Any, Any]:
        """What calls the model, what closes it, and what there is to tell."""
        model, args, kwargs = load_model(case.model)
        args, kwargs = to(args, self.device), to(kwargs, self.device)
        mesh, parallel = self.parallel(case)
        options = {
            "mesh": mesh,
            "parallel": parallel,
            "placement": case.placement,
            "compute": case.compute,
            "cuda_graph": case.graph,
            "tune": case.tune,
            "timeout": TIMEOUT,
            "report": False,
        }
        if case.door == "torch.compile":
            call, close, told = self.compiled(case, model.to(self.device), args, kwargs, options)
            return call, close, told
        if case.door == "md.compile":
            runner = md.compile(model.to(self.device), args, kwargs, **options)
        else:
            runner = self.bundle(case, args, kwargs, mesh, parallel)
        return (
            lambda: runner(*args, **kwargs),
            runner.close,
            lambda: {"summary": runner.summary, "graphs": runner.captured, "kinds": kinds(runner)},
        )

    def parallel(self, case: Case) -> tuple[md.Mesh, Any]:
        if case.strategy == "tp":
            return md.Mesh(tp=self.size), md.TensorParallel("tp")
        plan = DECODER_PLAN if case.model == "decoder" else None
        return md.Mesh(cp=self.size), md.ContextParallel("cp", case.strategy, plan)  # type: ignore[arg-type]

    def compiled(self, case: Case, model: nn.Module, args: Any, kwargs: Any, options: dict[str, Any]) -> Any:
        if case.model == "dtensor":
            mesh = init_device_mesh("cuda", (self.size,), mesh_dim_names=("tp",))
            model = parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
            options = {k: v for k, v in options.items() if k not in ("mesh", "parallel")}
        elif case.model == "collectives":
            model = Explicit(model, self.rank, self.size)  # type: ignore[arg-type]
            options = {k: v for k, v in options.items() if k not in ("mesh", "parallel")}
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="torchtrt_md", options=options)

        def call() -> Any:
            with torch.no_grad():
                return compiled(*args, **kwargs)

        return call, torch._dynamo.reset, dict

    def bundle(self, case: Case, args: Any, kwargs: Any, mesh: md.Mesh, parallel: Any) -> Any:
        path = Path(self.folder) / f"{case.model}-{case.strategy}-{case.placement}.mdtrt"
        if self.rank == 0 and not path.exists():
            dense, cpu_args, cpu_kwargs = load_model(case.model)
            md.export(
                dense,
                cpu_args,
                cpu_kwargs,
                mesh=mesh,
                parallel=parallel,
                placement=case.placement,  # type: ignore[arg-type]
                out=path,
                check=False,
            )
        dist.barrier()
        return md.load(path, cuda_graph=case.graph, timeout=TIMEOUT)


def kinds(runner: Any) -> list[str]:
    """What the segments of this rank run as."""
    return sorted({segment.runs for segment in runner.manifest.ranks[runner.rank]})


def main() -> None:
    patterns = sys.argv[1:] or ["*"]
    local = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(local)
    dist.init_process_group("nccl", device_id=torch.device("cuda", local), timeout=timedelta(seconds=300))
    doors = Doors()
    failed = False
    for case in cases():
        if not any(fnmatch.fnmatch(case.name, pattern) for pattern in patterns):
            continue
        try:
            said = doors.run(case)
        except Exception as error:  # told, and the next case goes on, as all ranks raise alike
            traceback.print_exc()
            said = {"case": case.name, "rank": doors.rank, "raised": f"{type(error).__name__}: {error}"}
            failed = True
        sys.stdout.write(f"SAID {json.dumps(said)}\n")  # in one piece: the ranks share the terminal
        sys.stdout.flush()
        torch.cuda.empty_cache()
    dist.barrier()
    if doors.rank == 0:
        shutil.rmtree(doors.folder, ignore_errors=True)
    sys.stdout.flush()
    os._exit(int(failed))


if __name__ == "__main__":
    main()
