"""Every entry of a context-parallel plan applies to something, or is refused or warned of by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import models
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel
from transformers.utils import ModelOutput

import torchtrt_md as md
from torchtrt_md.errors import PlanError, PlanWarning
from torchtrt_md.program import ShardedProgram

CP2 = md.Mesh(cp=2)
X = torch.randn(2, 8, 4)


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


class Block(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Pair:
        bias = kwargs.get("bias", 0.0)
        return Pair(x + 1, x * 2 + bias)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.proj = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x, bias=x * 3).second
        result: Tensor = self.proj(x)
        return result


def capture(plan: dict[str, Any], x: Tensor = X, mesh: md.Mesh = CP2) -> ShardedProgram:
    return md.capture(Model().eval(), (x,), mesh=mesh, parallel=md.ContextParallel("cp", plan=plan))


WHOLE = {"": {"x": md.Split(1)}, "proj": md.Gather(1)}


@pytest.mark.parametrize(
    ("plan", "problem", "fix"),
    [
        ({"": {"x": md.Split(1, output=True)}}, "result 'x' of the model, .* one tensor", "leave out output=True"),
        ({"": {0: md.Split(1)}}, "splits 0 of the model, which is no argument's name; it takes x, y", "output=True"),
        (
            {**WHOLE, "": {"x": md.Split(1), 5: md.Split(1, output=True)}},
            "result 5 of the model, .* one tensor",
            "only",
        ),
        ({**WHOLE, "proj": [None, md.Gather(1)]}, "gathers result 1 of module 'proj', .* one tensor", "only"),
        ({**WHOLE, "blocks.*": [None, None, md.Gather(1)]}, "result 2 of module 'blocks.0', .* 2 values", "from 0"),
        (
            {**WHOLE, "blocks.1": {"biass": md.Split(1)}},
            "argument 'biass' of module 'blocks.1', .* never passed",
            "x, m",
        ),
        ({"": {"x": md.Split(1, ndim=4)}, "proj": md.Gather(1)}, "nothing of Model; .*'x'.*: it has 3 dims", "split"),
        ({"": {"y": md.Split(1)}}, "splits nothing of Model; argument 'y' of the model: it is not passed", "split"),
        ({"proj": md.Gather(1)}, "the plan splits nothing of Model", "split"),
        (
            {"blocks.*": {"x": md.Split(1)}, "blocks.0": {"x": md.Split(1)}},
            r"argument 'x' of module 'blocks.0' twice: by 'blocks.\*' and by 'blocks.0'",
            "one of the two",
        ),
        ({"blocks.0": md.Gather(1), "*.0": md.Gather(1)}, "gathers result 0 of module 'blocks.0' twice", "one of the"),
        (
            {"": {"x": [md.Split(1), md.Split(1)]}},
            "'x' of the model is one tensor, and the plan has 2 splits",
            "for each",
        ),
        ({"": {"x": [md.Split(1, output=True)]}}, "does not say how to split a list", "one md.Split"),
        ({}, "the plan splits nothing of Model", 'md.split(x, dim, "cp")'),
        (
            {**WHOLE, "blocks.0": md.Split(1)},
            r"md.Split\(1\) for module 'blocks.0', and not for one of its arguments or results; it takes x, mask\n",
            'write {"blocks.0": {"x": md.Split(1)}} to split an argument, or {"blocks.0": {0: md.Split(1, output=True)',
        ),
        ({"": md.Split(1, ndim=3)}, r"for the model, .*; it takes x, y\n", '{"": {"x": md.Split(1, ndim=3)}}'),
        ({"": [None, md.Split(1)]}, r"for the model, .*; it takes x, y\n", 'or {"": {1: md.Split(1, output=True)}}'),
        (
            {**WHOLE, "blocks.*": md.Split(1, output=True)},
            r"module 'blocks.\*', and not",
            'write {"blocks.*": {0: md.Split(1, output=True)}} to split result 0',
        ),
        (
            {**WHOLE, "blocks.0": {"x": md.Split(1), 0: md.Gather(1)}},
            "gathers result 0 of module 'blocks.0' in a dict that splits others",
            "gather it at another module",
        ),
        ({**WHOLE, "proj": {"input": md.Gather(-2)}}, "gathers result 'input' of module 'proj'", "as {0: ...}"),
        (
            {"x": md.Split(1), "proj": md.Gather(1)},
            "a module 'x' that Model does not have; 'x' is an argument of the model",
            'write {"": {"x": md.Split(1)}}',
        ),
        ({"": {"x": 1}}, "the plan has 1 for argument 'x' of the model, which does not say how", "md.Split(dim)"),
        ({"": {"x": [md.Split(1), "y"]}}, "has 'y' for a part of argument 'x' of the model", "md.Split(dim)"),
        (
            {**WHOLE, "proj": 1},
            "the plan has 1 for module 'proj', which does not say where to gather",
            '{"proj": {"input": md.Split',
        ),
        ({**WHOLE, "blocks.0": {0: md.Split(1)}}, "is no argument's name; it takes x, mask\n", "output=True"),
    ],
)
def test_entries_that_cannot_apply(plan: dict[str, Any], problem: str, fix: str) -> None:
    with pytest.raises(PlanError, match=problem) as caught:
        capture(plan)
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    ("entries", "warning"),
    [
        ({"blocks.0": {"mask": md.Split(1)}}, "argument 'mask' of module 'blocks.0', .* it is not passed"),
        ({"unused": md.Gather(1)}, "gathers result 0 of module 'unused', .* its module is never called"),
        ({"": {"x": md.Split(1), "y": md.Split(1)}}, "argument 'y' of the model, .* it is not passed"),
        ({"blocks.*": {"mask": md.Split(1, ndim=2)}}, r"argument 'mask' of module 'blocks.\*'"),
    ],
)
def test_entries_that_did_not_apply_in_this_call_are_warned_of(entries: dict[str, Any], warning: str) -> None:
    with pytest.warns(PlanWarning, match=warning) as caught:
        capture({**WHOLE, **entries})
    assert len(caught) == 1


@dataclass
class Result(ModelOutput):  # type: ignore[misc]
    sample: Tensor | None = None
    aux: Tensor | None = None
    extra: Tensor | None = None


class Returning(nn.Module):
    """A linear layer whose result comes in a form."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.linear, self.form = nn.Linear(4, 4), form

    def forward(self, x: Tensor) -> Any:
        y = self.linear(x)
        forms = {
            "dict": {"sample": y, "aux": y * 2},
            "output": Result(sample=y, extra=y * 2),
            "tuple": (y, y * 2),
            "nested": ({"sample": y, "none": None}, [y * 2, {"a": y}]),
        }
        return forms[self.form]


class TwoForms(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.first, self.last = Returning(form), Returning(form)

    def forward(self, x: Tensor) -> Any:
        found = self.first(x)
        found = found[0] if isinstance(found, tuple) else found
        y = found if isinstance(found, Tensor) else found["sample"]
        return self.last(y - y.amax(1, True))


SPLIT = {"x": md.Split(1)}
FIRST = {0: md.Split(1, output=True)}


@pytest.mark.parametrize(
    ("form", "split", "gathers"),
    [
        ("dict", FIRST, [md.Gather(1), md.Gather(1)]),
        ("dict", {"sample": md.Split(1, output=True)}, {"sample": md.Gather(1), "aux": md.Gather(1)}),
        ("output", FIRST, {"sample": md.Gather(1), "extra": md.Gather(1)}),
        ("output", {"sample": md.Split(1, output=True)}, [md.Gather(1), md.Gather(1)]),
        ("tuple", FIRST, {0: md.Gather(1), 1: md.Gather(1)}),
        ("nested", SPLIT, [{"sample": md.Gather(1)}, [md.Gather(1), {"a": md.Gather(1)}]]),
        ("nested", SPLIT, {1: [md.Gather(1), {"a": md.Gather(1)}], 0: {"sample": md.Gather(1), "none": None}}),
    ],
)
def test_results_by_name_and_in_nests(form: str, split: Any, gathers: Any) -> None:
    model, mesh = TwoForms(form).eval(), CP2
    plan = {"first": split, "last": gathers}
    with warnings.catch_warnings():
        warnings.simplefilter("error", PlanWarning)
        program = md.capture(model, (X,), mesh=mesh, parallel=md.ContextParallel("cp", plan=plan))
    assert md.verify(program, model, (X,)).structure_error < 1e-12
    lowered = md.lower(program)
    assert not any(value.sharding for value in lowered.outputs)


@pytest.mark.parametrize(
    ("form", "gathers", "problem", "fix"),
    [
        (
            "dict",
            {"samples": md.Gather(1)},
            "'samples' of module 'last', which returns a dict of 'sample', 'aux'",
            "name",
        ),
        ("output", [None, None, md.Gather(1)], "result 2 .* a Result of 'sample', 'extra'", "name one of"),
        (
            "tuple",
            {"sample": md.Gather(1)},
            "gathers result 'sample' of module 'last', which returns 2 values",
            "as {0: ...}",
        ),
        ("nested", md.Gather(1), "result 0 of module 'last' is a dict, not a tensor", "name a tensor"),
        (
            "nested",
            [{"x": md.Gather(1)}],
            "is a dict of 'sample', 'none', and the plan gathers 'x' of it",
            "the result",
        ),
        ("nested", [None, [md.Gather(1)]], "result 1 of module 'last' is 2 values, and the plan has 1 gathers", "None"),
    ],
)
def test_results_that_are_not_there(form: str, gathers: Any, problem: str, fix: str) -> None:
    plan = {"first": SPLIT, "last": gathers}
    with pytest.raises(PlanError, match=problem) as caught:
        md.capture(TwoForms(form).eval(), (X,), mesh=CP2, parallel=md.ContextParallel("cp", plan=plan))
    assert fix in caught.value.fix


class Rotated(nn.Module):
    def forward(self, x: Tensor, tables: tuple[Any, ...], named: dict[str, Tensor]) -> Tensor:
        (whole, (cos, sin)), bias = tables, named["bias"]
        y: Tensor = x * cos + x.flip(-1) * sin + bias * whole[0] + named["whole"][0]
        return y


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Rotated(), Rotated()])
        self.norm = nn.Identity()

    def forward(self, x: Tensor, tables: list[Tensor]) -> Tensor:
        for layer in self.layers:
            x = layer(x, (tables[0], tables[1:]), {"bias": tables[1], "whole": tables[2]})
        result: Tensor = self.norm(x)
        return result


@pytest.mark.parametrize("size", [2, 4])
def test_an_entry_mirrors_a_nested_argument(size: int) -> None:
    """Layers take tables in a nest, of which some stay whole; and which are split is seen in the graph."""
    model, args = Nested().eval(), (torch.randn(8, 4), [torch.randn(8, 4) for _ in range(3)])
    nested = (None, [md.Split(0), md.Split(-2)])
    plan = {
        "layers.0": {"x": md.Split(0)},
        "layers.*": {"tables": nested, "named": {"bias": md.Split(0)}},
        "norm": md.Gather(0),
    }
    program = md.capture(model, args, mesh=md.Mesh(cp=size), parallel=md.ContextParallel("cp", plan=plan))
    marks = program.graphs[0].graph.find_nodes(op="call_function", target=torch.ops.torchtrt_md.split_sequence.default)
    assert len(list(marks)) == 1 + 2 * 2, "a table that is passed twice is split once in a call"
    assert md.verify(md.lower(program), model, args).error <= 1e-5


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ((None, md.Split(0)), "'tables' of module 'layers.0' is a .*, not a tensor"),
        ((None,), "'tables' of module 'layers.0' is 2 values, and the plan has 1 splits"),
        ((None, {"x": md.Split(0)}), "'tables' of module 'layers.0' is a list, and the plan splits 'x' of it"),
        ((None, [md.Split(0, output=True)]), "does not say how to split a list"),
    ],
)
def test_an_entry_in_another_form_than_its_argument_is_refused(entry: Any, problem: str) -> None:
    args = (torch.randn(8, 4), [torch.randn(8, 4) for _ in range(3)])
    parallel = md.ContextParallel("cp", plan={"layers.0": {"x": md.Split(0), "tables": entry}})
    with pytest.raises(PlanError, match=problem):
        md.capture(Nested().eval(), args, mesh=CP2, parallel=parallel)


def test_an_argument_that_only_kwargs_takes_may_be_split_where_it_is_passed() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        program = capture({"blocks.0": {"bias": md.Split(1), "x": md.Split(1)}, "proj": md.Gather(1)})
    shards = program.graphs[0].graph.find_nodes(op="call_function", target=torch.ops.torchtrt_md.split_sequence.default)
    assert len(list(shards)) == 2


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: float = 1.0, *more: Tensor, bias: float = 0.0) -> Tensor:
        result: Tensor = self.linear(x) * scale + bias + sum(more)
        return result


@pytest.mark.parametrize(
    ("passed", "seen"),
    [
        (lambda inner, x: inner(x=x, scale=2.0, bias=1.0), "() bias=1.0 scale=2.0 x"),
        (lambda inner, x: inner(x, scale=2.0), "(x) scale=2.0"),
        (lambda inner, x: inner(x, 2.0, x, x, bias=1.0), "(x, 2.0, x, x) bias=1.0"),
    ],
)
def test_arguments_stay_by_position_and_by_name(passed: Callable[[nn.Module, Tensor], Tensor], seen: str) -> None:
    """A hook of the user's finds them as the model passed them."""
    calls = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        of = ["x" if isinstance(a, Tensor) else str(a) for a in args]
        by_name = [name if isinstance(v, Tensor) else f"{name}={v}" for name, v in sorted(kwargs.items())]
        calls.append(" ".join([f"({', '.join(of)})", *by_name]))
        return args, {**kwargs, **({"scale": 3 * kwargs["scale"]} if "scale" in kwargs else {})}

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Scaled()

        def forward(self, x: Tensor) -> Tensor:
            return passed(self.inner, x)

    model = Outer().eval()
    model.inner.register_forward_pre_hook(hook, with_kwargs=True)
    program = md.capture(
        model, (X,), mesh=CP2, parallel=md.ContextParallel("cp", plan={"inner": {"x": md.Split(1)}, "": md.Gather(1)})
    )
    assert set(calls) == {seen}
    if "(x, 2.0" not in seen:  # more of x would have to be split too
        md.verify(program, model, (X,))


def test_a_named_tuple_of_results_stays_one() -> None:
    model = Model().eval()
    plan = {"": {"x": md.Split(1)}, "blocks.1": [None, md.Gather(1)]}
    program = md.lower(md.capture(model, (X,), mesh=CP2, parallel=md.ContextParallel("cp", plan=plan)))
    assert md.verify(program, model, (X,)).error <= 1e-5


def test_a_models_own_plan_may_have_entries_for_other_calls() -> None:
    model, args, kwargs = models.wan()
    with warnings.catch_warnings():
        warnings.simplefilter("error", PlanWarning)
        md.capture(model, args, kwargs, mesh=CP2, parallel=md.ContextParallel("cp"))


def test_on_one_rank_a_plan_is_checked_as_on_more() -> None:
    with pytest.raises(PlanError, match="gathers result 1 of module 'proj'"):
        capture({**WHOLE, "proj": [None, md.Gather(1)]}, mesh=md.Mesh(cp=1))
    capture(WHOLE, mesh=md.Mesh(cp=1))


def test_a_models_own_plan_may_name_modules_that_this_configuration_lacks() -> None:
    """As one that was written down for each of 40 layers; it has to split something all the same."""
    model, plan = Model().eval(), {**WHOLE, "blocks.2": md.Gather(1), "norm.*": {"x": md.Split(1)}}
    model._cp_plan = plan  # type: ignore[assignment]
    lowered = md.lower(md.capture(model, (X,), mesh=CP2, parallel=md.ContextParallel("cp")))
    assert md.verify(lowered, model, (X,)).error <= 1e-5
    with pytest.raises(PlanError, match=r"a module 'blocks\.2' that Model does not have"):
        capture(plan)
    model._cp_plan = {"blocks.2": {"x": md.Split(1)}}  # type: ignore[assignment]
    with pytest.raises(PlanError, match="the plan splits nothing of Model"):
        md.capture(model, (X,), mesh=CP2, parallel=md.ContextParallel("cp"))


def test_a_hint_in_the_models_own_names() -> None:
    model, args, _ = models.mlp()
    with pytest.raises(PlanError) as caught:
        md.capture(model, args, mesh=md.Mesh(seq=2), parallel=md.ContextParallel("seq"))
    assert 'ContextParallel("seq", plan={"": {"x": md.Split(1)}, "down": md.Gather(1)})' in caught.value.fix
    with pytest.raises(PlanError) as caught:
        md.capture(model, args, mesh=md.Mesh(tp=2), parallel=md.TensorParallel("tp"))
    assert 'TensorParallel("tp", plan={"up": "colwise", "down": "rowwise"})' in caught.value.fix


class Projections(nn.Module):
    """Layers of which no two are a pair for certain, but those that ``pair`` adds."""

    def __init__(self, pair: bool = False) -> None:
        super().__init__()
        self.qkv, self.q, self.k, self.out = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.gated = nn.ModuleDict({"gate": nn.Linear(8, 32), "up": nn.Linear(8, 32), "down": nn.Linear(32, 8)})
        self.mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8) if pair else nn.Linear(32, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_a_hint_names_two_layers_only_where_they_are_a_pair() -> None:
    for pair in (False, True):
        with pytest.raises(PlanError) as caught:
            md.capture(Projections(pair), (X,), mesh=md.Mesh(tp=2), parallel=md.TensorParallel("tp"))
        assert ('plan={"mlp.0": "colwise", "mlp.2": "rowwise"}' in caught.value.fix) == pair
        assert "qkv" not in caught.value.fix
        assert '"colwise"' in caught.value.fix


def test_the_class_of_a_style_is_no_style() -> None:
    parallel = md.TensorParallel("tp", plan={"proj": ColwiseParallel})
    with pytest.raises(PlanError, match="module 'proj' the class ColwiseParallel, and not a style") as caught:
        md.capture(Model(), (X,), mesh=md.Mesh(tp=2), parallel=parallel)
    assert "ColwiseParallel()" in caught.value.fix


class ClassToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.block, self.out = nn.Linear(4, 4), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
        result: Tensor = self.out(self.block(x))
        return result


@pytest.mark.parametrize("size", [2, 4])
def test_a_length_that_the_model_makes_need_not_divide(size: int) -> None:
    """A token that the model adds, split with the others or whole beside them."""
    for split in ({"block": {"input": md.Split(1)}}, {"": {"x": md.Split(1)}}):
        model, parallel = ClassToken().eval(), md.ContextParallel("cp", plan={**split, "out": md.Gather(1)})
        program = md.capture(model, (X,), mesh=md.Mesh(cp=size), parallel=parallel)
        assert md.verify(md.lower(program), model, (X,)).error <= 1e-5


@pytest.mark.parametrize(
    ("kind", "given", "problem"),
    [
        (md.Split, {"dim": "1"}, "a Split has the dim '1'"),
        (md.Split, {"dim": True}, "a Split has the dim True"),
        (md.Split, {"dim": 1, "output": 1}, "a Split has output=1"),
        (md.Split, {"dim": 1, "ndim": "3"}, "a Split has ndim='3'"),
        (md.Gather, {"dim": None}, "a Gather has the dim None"),
        (md.ContextParallel, {"axis": 0}, "the axis of ContextParallel is 0"),
        (md.ContextParallel, {"axis": "cp", "plan": ["x"]}, "the plan of ContextParallel.* is a list"),
        (md.TensorParallel, {"axis": "tp", "plan": {0: "colwise"}}, "names a module 0"),
        (md.DataParallel, {"axis": None}, "the axis of DataParallel is None"),
    ],
)
def test_wrong_types_in_a_plan(kind: type, given: dict[str, Any], problem: str) -> None:
    with pytest.raises(PlanError, match=problem):
        kind(**given)


# --- one module by several names ---


class Shared(nn.Module):
    """Two names for each of two modules, as T5 has for its embedding."""

    encoder: Any
    decoder: Any

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Module(), nn.Module()
        self.encoder.tokens = self.decoder.tokens = nn.Embedding(16, 8)
        self.encoder.up = self.decoder.up = nn.Linear(8, 32)
        self.down = nn.Linear(32, 8)

    def forward(self, ids: Tensor, others: Tensor) -> Tensor:
        wide = self.encoder.up(self.encoder.tokens(ids)) + self.decoder.up(self.decoder.tokens(others))
        result: Tensor = self.down(wide.relu())
        return result


@pytest.mark.parametrize(
    "plan",
    [
        {"*.tokens": "embedding_rowwise", "*.up": "colwise", "down": "rowwise"},
        {"encoder.tokens": "embedding_rowwise", "decoder.tokens": "embedding_rowwise"},
        {"decoder.up.weight": "colwise", "encoder.up": "colwise", "down": "rowwise"},
    ],
    ids=["by a pattern", "by both names", "and its parameter"],
)
def test_a_module_with_several_names_is_cut_once(plan: dict[str, str]) -> None:
    torch.manual_seed(0)
    model, ids = Shared().eval(), torch.arange(16).reshape(2, 8)
    call = (model, (ids, ids.flip(1)))
    program = md.capture(*call, mesh=md.Mesh(tp=2), parallel=md.TensorParallel("tp", plan=plan))
    md.verify(md.lower(program), *call)
    cut = {w.name: (w.shape, len(w.shardings)) for w in program.read()}
    if "*.tokens" in plan:
        assert cut["encoder.tokens.weight"] == ((16, 8), 1)


def test_a_module_with_several_names_has_one_style() -> None:
    plan = {"encoder.up": "colwise_gather_output", "decoder.up": "colwise"}
    with pytest.raises(PlanError, match="two styles for what is called 'encoder"):
        md.capture(
            Shared().eval(), (X[..., 0].long(),) * 2, mesh=md.Mesh(tp=2), parallel=md.TensorParallel("tp", plan=plan)
        )


class Calls(nn.Module):
    """Calls a block with what ``give`` makes of the input, and adds to its result what ``rest`` says."""

    def __init__(self, block: nn.Module, give: Any, rest: Any) -> None:
        super().__init__()
        self.block, self.give, self.rest, self.out = block, give, rest, nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        given = self.give(x * 1.0)
        y: Tensor = self.out(self.block(*given) + self.rest(given))
        return y


class Appends(nn.Module):
    def forward(self, x: list[Tensor]) -> Tensor:
        x.append(x[0] * 3)
        return x[0]


class Replaces(nn.Module):
    def forward(self, x: dict[str, Tensor]) -> Tensor:
        x["h"] = x["h"] * 2
        return x["h"]


class AsksWhich(nn.Module):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return x * 3 if c is x else x + c


@pytest.mark.parametrize(
    ("block", "give", "rest", "split"),
    [
        (Appends(), lambda h: ([h],), lambda given: sum(given[0]), [md.Split(1)]),
        (Replaces(), lambda h: ({"h": h},), lambda given: given[0]["h"], {"h": md.Split(1)}),
    ],
)
def test_a_list_or_dict_that_a_module_changes_is_refused(block: nn.Module, give: Any, rest: Any, split: Any) -> None:
    """Its caller has another, in which the entry is not marked."""
    plan = {"block": {"x": split}, "out": md.Gather(1)}
    with pytest.raises(PlanError, match=r"argument 'x' of module 'block' is a (list|dict) of which .* changes it"):
        md.capture(
            Calls(block, give, rest).eval(),
            (torch.randn(1, 8, 4),),
            mesh=md.Mesh(cp=2),
            parallel=md.ContextParallel("cp", plan=plan),
        )


def test_a_tensor_that_is_passed_twice_stays_one() -> None:
    model, x = Calls(AsksWhich(), lambda h: (h, h), lambda given: 0.0).eval(), torch.randn(1, 8, 4)
    plan = {"block": {"x": md.Split(1), "c": md.Split(1)}, "out": md.Gather(1)}
    program = md.capture(model, (x,), mesh=md.Mesh(cp=2), parallel=md.ContextParallel("cp", plan=plan))
    assert md.verify(program, model, (x,)).error <= 1e-6
