"""Dense models with a plan under torch.compile: the whole model is captured, or it is refused."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import models
import pytest
import torch
import torch._dynamo
from in_pytorch import InPyTorch, compiled, error, message_of
from rank_processes import Ranks
from torch import Tensor, nn

from torchtrt_md import ContextParallel, Gather, Mesh, Split, TensorParallel
from torchtrt_md.doors.dynamo import compile_graph


class Attentions(nn.Module):
    """Several results of one shape, an argument that is not used, one that nests, and a plain one."""

    _cp_plan: Mapping[str, Any] = {
        "": {"x": Split(1)},
        "out": Gather(1),
        "first": Gather(1),
    }

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(32, 32)
        self.attention = models.SelfAttention()
        self.out = nn.Linear(32, 32)

    def forward(self, x: Tensor, ignored: Tensor | None = None, *, scales: Any, shift: float = 0.0) -> dict[str, Any]:
        first = self.first(x)
        last = self.out(self.attention(x * scales["s"]) + shift)
        return {"last": last, "first": first, "again": first, "shift": shift, "none": None}


def with_plan(rank: int, check: bool) -> tuple[list[float], list[list[str]], int]:
    model = Attentions().eval()
    x, scales = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0)), {"s": torch.tensor([2.0])}
    build = InPyTorch()
    call = compiled(model, build, mesh=Mesh(cp=2), parallel=ContextParallel("cp"), check=check)
    errors = []
    with torch.no_grad():
        for shift in (0.5, 0.25, 0.125):
            ours = call(x, torch.ones(3), scales=scales, shift=shift)
            dense = model(x, torch.ones(3), scales=scales, shift=shift)
            assert ours["shift"] == shift
            assert ours["none"] is None
            errors += [error(ours[name], dense[name]) for name in ("last", "first", "again")]
    collectives = [str(n.target) for n in build.programs[0].graphs[0].graph.nodes if "all_to_all" in str(n.target)]
    return errors, [[v.name for v in program.inputs] for program in build.programs], len(collectives)


@pytest.mark.parametrize("check", [True, False])
def test_a_dense_model_with_a_plan(ranks: Ranks, check: bool) -> None:
    for outcome in ranks(with_plan, check):
        assert not outcome.error, outcome.message
        errors, inputs, exchanges = outcome.value
        assert max(errors) < 1e-5
        assert inputs == [["x", "ignored", "scales.s"]] * 3
        assert exchanges == 2


def tensor_parallel_plan(rank: int) -> float:
    model, (ids,), kwargs = models.llama()
    call = compiled(model, InPyTorch(), mesh=Mesh(tp=2), parallel=TensorParallel("tp"))
    with torch.no_grad():
        return error(call(ids, **kwargs).logits, model(ids, **kwargs).logits)


def test_a_dense_model_with_tensor_parallelism(ranks: Ranks) -> None:
    for outcome in ranks(tensor_parallel_plan):
        assert not outcome.error, outcome.message
        assert outcome.value < 1e-5


class Twice(nn.Module):
    """A model of which a module gives a result of the shape of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = models.MLP(), nn.Linear(32, 32)

    def forward(self, x: Tensor, case: str) -> Any:
        if case == "break":
            y = self.a(x)
            torch._dynamo.graph_break()
            return self.b(y)
        if case == "outside":  # the frame of self.a is compiled, that of the model is not
            return self.b(skipped(self.a, x))
        if case == "twins":
            y = self.a(x)
            return y, y + 0.0
        return self.b(self.a(x))


def _skipped(module: nn.Module, x: Tensor) -> Any:
    return module(x)


skipped: Any = torch._dynamo.disable(_skipped, recursive=False)  # type: ignore[no-untyped-call]


def refused(rank: int, case: str) -> str:
    model = Twice().eval()
    x = torch.randn(2, 8, 32)
    plan = {"": {"x": Split(1)}, "b": Gather(1), "a": Gather(1)} if case == "twins" else {"": {"x": Split(1)}}
    options: dict[str, Any] = {"mesh": Mesh(cp=2), "parallel": ContextParallel("cp", plan=plan)}
    if case == "mesh":
        del options["mesh"]
    target: Any = (lambda x, case: model(x, case)) if case == "function" else model
    call = compiled(target, InPyTorch(), **options)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        return message_of(lambda: call(x, case))


AROUND = "has what torch.compile runs around the function that it compiles: "


@pytest.mark.parametrize(
    ("case", "kind", "problem", "fix"),
    [
        ("function", "PlanError", "names modules, and what was compiled is a function", "nn.Module itself"),
        ("mesh", "OptionError", "the option 'parallel' needs the option 'mesh'", "Mesh(cp=2)"),
        ("break", "CaptureError", "Twice is not one graph", "torchtrt_md.compile"),
        (
            "split",
            "CaptureError",
            "output 0 of the graph of torch.compile, torch.float32 [2, 8, 32], is none",
            "gather",
        ),
        ("outside", "CaptureError", f"Twice {AROUND}_skipped (", "torchtrt_md.compile"),
        ("twins", "CaptureError", "two outputs of Twice have the same shape and values", "torchtrt_md.compile"),
        ("autocast", "CaptureError", "Twice was called under autocast", "check=False"),
    ],
)
def test_dense_models_that_are_refused(ranks: Ranks, case: str, kind: str, problem: str, fix: str) -> None:
    for outcome in ranks(refused, case):
        assert outcome.value.startswith(f"{kind}: every rank: "), outcome
        assert problem in outcome.value, outcome
        assert fix in outcome.value


class Around(nn.Module):
    """A model that does something beside its only module, of which the frame of that module knows nothing.

    All of it is the identity on small numbers, so that no values tell.
    """

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.how = models.MLP(), how
        if how == "hook":
            self.register_forward_hook(lambda module, args, y: y.clamp(max=1e3))
        if how == "hook in front":
            self.register_forward_pre_hook(lambda module, args: (args[0].clamp(max=1e3),))

    def forward(self, x: Tensor) -> Any:
        if self.how == "skipped":
            return skipped(self.a, x).clamp(max=1e3)
        y = self.a(x)
        if self.how == "keeps":
            self.last = y
            return y.clamp(max=1e3)
        return y


class Plain(nn.Module):
    """Returns its result twice, the second as a tensor of its own in Dynamo's graph."""

    def __init__(self) -> None:
        super().__init__()
        self.a = models.MLP()

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        return y, y.float()


def not_around(rank: int, how: str) -> list[float]:
    torch.compiler.reset()
    model: Any = Plain().eval() if how == "twice" else nn.Sequential(models.MLP()).eval()
    inside = {"twice": "a", "a GraphModule": "0.down"}.get(how, "0")
    if how == "hook of PyTorch's own":  # Dynamo compiles its whole call
        model.register_forward_hook(lambda module, args, y: y.clamp(max=1e-3))
    if how == "a GraphModule":
        model = torch.fx.symbolic_trace(model, concrete_args=None)
    plan = {"": {"x" if how == "twice" else "input": Split(1)}, inside: Gather(1)}
    call = compiled(model, InPyTorch(), mesh=Mesh(cp=2), parallel=ContextParallel("cp", plan=plan))
    x = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = ((y if isinstance(y, tuple) else (y,)) for y in (call(x), model(x)))
        return [error(a, b) for a, b in zip(ours, theirs, strict=True)]


@pytest.mark.parametrize("how", ["twice", "hook of PyTorch's own", "a GraphModule"])
def test_a_whole_model_is_taken_for_one(ranks: Ranks, how: str) -> None:
    for outcome in ranks(not_around, how):
        assert not outcome.error, outcome.message
        assert max(outcome.value) < 1e-5


def around(rank: int, how: str, check: bool) -> str:
    torch.compiler.reset()
    plan = {"": {"x": Split(1)}, "a": Gather(1)}
    options: dict[str, Any] = {"mesh": Mesh(cp=2), "parallel": ContextParallel("cp", plan=plan), "check": check}
    call = compiled(Around(how).eval(), InPyTorch(), **options)
    with torch.no_grad():
        return message_of(lambda: call(torch.randn(2, 8, 32)))


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ("skipped", f"Around {AROUND}_skipped ("),
        ("hook", f"Around {AROUND}hooks of its own"),
        ("hook in front", f"Around {AROUND}hooks of its own"),
        ("keeps", "Around keeps a tensor beside what it returns"),
    ],
)
def test_a_part_is_not_taken_for_the_model(ranks: Ranks, how: str, problem: str, check: bool) -> None:
    for outcome in ranks(around, how, check):
        assert outcome.value.startswith("CaptureError: every rank: "), outcome
        assert problem in outcome.value, outcome


def compiled_forward(rank: int) -> list[float]:
    torch.compiler.reset()
    model = Attentions().eval()
    x, scales = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0)), {"s": torch.tensor([2.0])}
    options: Any = {"mesh": Mesh(cp=2), "parallel": ContextParallel("cp")}
    with torch.no_grad():
        want = model(x, scales=scales)["last"]
        build = partial(compile_graph, build=InPyTorch())
        model.forward = torch.compile(model.forward, backend=build, options=options)  # type: ignore[method-assign]
        return [error(model(x, scales=scales)["last"], want) for _ in range(2)]


def test_a_compiled_forward(ranks: Ranks) -> None:
    """The usual form in transformers: ``model.forward = torch.compile(model.forward)``."""
    for outcome in ranks(compiled_forward):
        assert not outcome.error, outcome.message
        assert max(outcome.value) < 1e-5


def test_errors_ask_for_no_report_to_pytorch(ranks: Ranks) -> None:
    for outcome in ranks(refused, "split"):
        assert "TORCHDYNAMO_VERBOSE" not in outcome.value
        assert "reporting a bug" not in outcome.value
