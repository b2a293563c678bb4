"""Models through md.compile and torch.compile, and what torch.compile must do besides."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import torchtrt_md as md
from gpu.case import TIMEOUT, Found, Rank, first_tensor
from gpu.networks import Explicit, parallel
from torchtrt_md.errors import MDError


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
    tune: bool | str = False
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
            "tune_seconds": 15.0,
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
            if door.compute != "auto":  # which may find either faster
                found.expect(("engine" in ran) == (door.compute == "tensorrt"), f"it runs as {sorted(ran)}")
                found.expect(("inductor" in ran) == (door.compute == "inductor"), f"it runs as {sorted(ran)}")
            found.message = f"runs as {', '.join(sorted(ran))}"
            engines = "engine" in ran
        else:
            runner, engines = None, door.compute == "tensorrt"
            compiled = torch.compile(sharded(model, door.how, at), backend="torchtrt_md", options=door.options(at.size))
            with torch.no_grad():
                results = [first_tensor(compiled(*args, **kwargs)).clone() for _ in range(4)]
    at.synchronize()
    found.compare(results, *at.reference(door.model, engines))
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
    Door("md.compile", "flux", "ulysses"),
    Door("md.compile", "flux", "ulysses", "engine"),
    Door("md.compile", "flux", "ulysses", transport="store"),
    Door("md.compile", "flux", "ulysses", compute="inductor"),
    Door("md.compile", "flux", "allgather_kv"),
    Door("md.compile", "flux", "allgather_kv", "engine"),
    Door("md.compile", "flux", "ring"),
    Door("md.compile", "llama", "tp", check=True),
    Door("md.compile", "llama", "tp", transport="store"),
    Door("md.compile", "llama", "tp", "engine"),
    Door("md.compile", "decoder", "ring", check=True),
    Door("md.compile", "decoder", "ring", compute="inductor", graph=False),
    Door("md.compile", "block", "tp", "engine"),
    Door("torch.compile", "flux", "ulysses"),
    Door("torch.compile", "flux", "ulysses", "engine"),
    Door("torch.compile", "llama", "tp", check=True),
    Door("torch.compile", "decoder", "ring"),
    Door("torch.compile", "block", "tp", check=True, how="DTensor"),
    Door("torch.compile", "block", "tp", "engine", how="DTensor"),
    Door("torch.compile", "block", "tp", compute="inductor", how="DTensor", graph=False),
    Door("torch.compile", "block", "tp", check=True, how="collectives"),
    Door("torch.compile", "block", "tp", "engine", how="collectives"),
    # As by default: all is left to timing.
    Door("md.compile", "attention", "ulysses", "auto", "auto", transport="auto", tune="auto"),
    Door("md.compile", "llama", "tp", "auto", "auto", transport="auto", tune="auto"),
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
    options = {**parallel("attention", "ulysses", at.size), "votes": "always", "compute": "inductor"}
    call = torch.compile(model, dynamic=False, **backend(at, **options))
    first: Any = (x, 1.0)
    other = (x, 2.0) if what == "flag" else (x[:, :128].contiguous(), 1.0)
    expected = call(*first).clone()
    call(*other)
    found = Found()
    found.must_refuse(MDError, lambda: call(*(other if at.rank == 1 else first)), "rank 1")
    found.compare([call(*first), expected], *at.reference("attention"))
    return found
