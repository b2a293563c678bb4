"""The backend of torch.compile, its programs run in PyTorch over two real ranks in place of engines."""

from __future__ import annotations

import gc
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch._dynamo
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from rank_processes import Ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from torchtrt_md import ContextParallel, Gather, MDError, Mesh, Split, TensorParallel
from torchtrt_md.doors.dynamo import Verify, compile_graph, run_rank
from torchtrt_md.doors.flat_call import Compiled
from torchtrt_md.errors import CaptureError, InputError, OptionError, VerificationError
from torchtrt_md.launch.agree import Agreement
from torchtrt_md.lowering import lower
from torchtrt_md.options import Options
from torchtrt_md.program import ShardedProgram, Weights
from torchtrt_md.runtime.graphs import Budget

TP_PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(tmp_path_factory.mktemp("ranks") / "store")
    yield started
    started.close()


class InPyTorch:
    """Lowers, verifies and runs programs, all in PyTorch; ``programs`` are those that it was given, lowered."""

    def __init__(self, change: Callable[[ShardedProgram], None] = lambda program: None) -> None:
        self.programs: list[ShardedProgram] = []
        self.budgets: list[Budget | None] = []
        self.names: list[str] = []
        self.verified = self.closed = 0
        self.change = change

    def __call__(
        self,
        captured: Callable[[], ShardedProgram],
        options: Options,
        /,
        *,
        verify: Verify,
        name: str,
        budget: Budget | None,
    ) -> Compiled:
        lowered = lower(together("capture", captured))
        self.change(lowered)
        if options.check:
            together("comparison", partial(verify, lowered))
            self.verified += 1
        self.programs.append(lowered)
        self.budgets.append(budget)
        self.names.append(name)
        return _InPyTorch(lowered, self)


class _InPyTorch:
    def __init__(self, program: ShardedProgram, build: InPyTorch) -> None:
        self.program, self.build = program, build

    def call(
        self, bind: Callable[[], Mapping[str, Tensor]], /, *, weights: Any = None, about: str = ""
    ) -> dict[str, Tensor]:
        inputs = together(f"a call{about}", bind)
        assert set(inputs) == {value.name for value in self.program.inputs}
        names = [value.name for value in self.program.outputs]
        return dict(zip(names, run_rank(weights or self.program, inputs, None), strict=True))

    def with_weights(self, weight_of: Callable[[str], Tensor], /) -> ShardedProgram:
        """The program with these; ``weight_of`` gives this rank's parts."""
        held = self.program.weights
        shards = {name: weight_of(name) for name in (held.shards or held.whole)}
        rank = dist.get_rank() if dist.is_initialized() else 0
        new = Weights({}, shards, rank) if held.shards else Weights(shards)
        return replace(self.program, weights=new)

    def close(self) -> None:
        self.build.closed += 1


def together(about: str, step: Callable[[], Any]) -> Any:
    """A step whose failure on one rank is that of all."""
    if not dist.is_initialized():
        return step()
    return Agreement(30.0).together(about, step)


def compiled(model: Any, build: InPyTorch, **options: Any) -> Any:
    torch.compiler.reset()
    return torch.compile(model, backend=partial(compile_graph, build=build), options=options)


def error(ours: Tensor, dense: Tensor) -> float:
    return float((ours - dense).norm() / dense.norm())


def message_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except MDError as raised:
        return f"{type(raised).__name__}: {raised}"
    return ""


# --- models that communicate by themselves ---


def sharded_model(rank: int) -> tuple[list[float], int, list[str]]:
    torch.manual_seed(0)
    model, dense = models.MLP().eval(), models.MLP().eval()
    dense.load_state_dict(model.state_dict())
    x = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    build = InPyTorch()
    parallelize_module(model, mesh, TP_PLAN)
    call = compiled(model, build)
    with torch.no_grad():
        errors = [error(call(t), dense(t)) for t in (x, x + 1, x[:, :4], x[:, :6], x)]
        states = [message_of(lambda: call(x))]
        model.up.weight.mul_(2)
        states.append(message_of(lambda: call(x)))
        torch.compiler.reset()
        dense.up.weight.mul_(2)
        errors.append(error(call(x), dense(x)))
    return errors, build.verified, states


def test_a_parallelized_model_and_its_weights(ranks: Ranks) -> None:
    for outcome in ranks(sharded_model):
        assert not outcome.error, outcome.message
        errors, verified, (fine, changed) = outcome.value
        assert max(errors) < 1e-5
        assert verified == 4, "three shapes, and once more after the reset"
        assert fine == ""
        assert changed.startswith(
            "InputError: every rank: 'up.weight' was changed or replaced after the model was compiled"
        )


def wrong_lowering(rank: int) -> str:
    def change(program: ShardedProgram) -> None:
        (node,) = program.graphs[0].graph.find_nodes(
            op="call_function", target=torch.ops.torchtrt_md.all_reduce.default
        )
        node.replace_all_uses_with(node.args[0])
        program.graphs[0].recompile()

    world: Any = torch.distributed.group.WORLD
    call = compiled(lambda x: funcol.all_reduce(x, "sum", world) + 1, InPyTorch(change))
    with torch.no_grad():
        return message_of(lambda: call(torch.ones(4)))


def test_the_lowered_graph_is_compared_with_dynamos(ranks: Ranks) -> None:
    for outcome in ranks(wrong_lowering):
        assert outcome.value.startswith("VerificationError: every rank: output0 of the lowered graph is not what")


def one_rank_fails(rank: int) -> str:
    def function(x: Tensor) -> Tensor:
        if rank:
            x.add_(1)
        return x * 2

    call = compiled(function, InPyTorch())
    with torch.no_grad():
        return message_of(lambda: call(torch.ones(4)))


def test_a_capture_that_fails_on_one_rank_fails_on_all(ranks: Ranks) -> None:
    for outcome in ranks(one_rank_fails):
        assert outcome.value.startswith("CaptureError: rank 1: the model writes to an input"), outcome


# --- dense models with a plan ---


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


def tensor_parallel_plan(rank: int) -> list[float]:
    model, args, kwargs = models.llama()
    parallel = TensorParallel("tp")
    call = compiled(model, InPyTorch(), mesh=Mesh(tp=2), parallel=parallel)
    with torch.no_grad():
        return [error(call(ids, **kwargs).logits, model(ids, **kwargs).logits) for ids in (args[0], args[0][:, :8])]


def test_a_dense_model_with_tensor_parallelism(ranks: Ranks) -> None:
    for outcome in ranks(tensor_parallel_plan):
        assert not outcome.error, outcome.message
        assert max(outcome.value) < 1e-5


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


LACKS = "which the graph of torch.compile does not have: it is a part of the model"


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
        ("outside", "CaptureError", f"Twice uses 'b.weight', {LACKS}", "torchtrt_md.compile"),
        ("twins", "CaptureError", "two outputs of Twice have the same shape and values", "torchtrt_md.compile"),
        ("autocast", "CaptureError", "Twice was called under autocast", "check=False"),
    ],
)
def test_dense_models_that_are_refused(ranks: Ranks, case: str, kind: str, problem: str, fix: str) -> None:
    for outcome in ranks(refused, case):
        assert outcome.value.startswith(f"{kind}: every rank: "), outcome
        assert problem in outcome.value, outcome
        assert fix in outcome.value


class Doubled(nn.Module):
    """A model that does something after its only module, of which the frame of that module knows nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.a = models.MLP()

    def forward(self, x: Tensor) -> Any:
        return skipped(self.a, x) * 2


def part_of_the_model(rank: int) -> str:
    plan = {"": {"x": Split(1)}, "a": Gather(1)}
    call = compiled(Doubled().eval(), InPyTorch(), mesh=Mesh(cp=2), parallel=ContextParallel("cp", plan=plan))
    with torch.no_grad():
        return message_of(lambda: call(torch.randn(2, 8, 32)))


def test_a_part_with_all_weights_is_not_taken_for_the_model(ranks: Ranks) -> None:
    for outcome in ranks(part_of_the_model):
        assert outcome.value.startswith("CaptureError: every rank: output 0 of the graph of torch.compile"), outcome


# --- one process ---


def test_an_unknown_option_is_our_own_error() -> None:
    call = compiled(nn.Linear(2, 2), InPyTorch(), placment="split")
    with (
        torch.no_grad(),
        pytest.raises(OptionError, match="there is no option 'placment'; the options are mesh") as got,
    ):
        call(torch.ones(2))
    assert "did you mean 'placement'?" in got.value.fix
    assert got.traceback[-1].name != "compile_graph" or len(got.traceback) < 12, "Dynamo's frames are cut off"


def test_a_mode_is_refused() -> None:
    torch.compiler.reset()
    call = torch.compile(nn.Linear(2, 2), backend=partial(compile_graph, build=InPyTorch(), options={}), mode="x")
    with torch.no_grad(), pytest.raises(OptionError, match="takes no mode"):
        call(torch.ones(2))


def test_gradients_are_refused_where_they_would_be_lost() -> None:
    model, (x,), _ = models.mlp()
    call = compiled(model, InPyTorch())
    with pytest.raises(CaptureError, match="called with gradients on") as got:
        call(x)
    assert "torch.no_grad()" in got.value.fix
    with torch.inference_mode():
        assert error(call(x), model(x)) < 1e-5
    model.requires_grad_(False)
    assert error(call(x), model(x)) < 1e-5


def test_weights_that_were_replaced_are_used() -> None:
    model, other, x = models.MLP(), models.MLP(), torch.ones(2, 32)
    call = compiled(model, InPyTorch())
    with torch.no_grad():
        call(x)
        model.load_state_dict(other.state_dict(), assign=True)
        assert error(call(x), other(x)) < 1e-5


@pytest.mark.parametrize("change", ["written", "moved"])
def test_a_weight_that_changed_is_refused(change: str) -> None:
    model, x = models.MLP(), torch.ones(2, 32)
    call = compiled(model, InPyTorch())
    with torch.no_grad():
        call(x)
        if change == "written":
            model.load_state_dict(models.MLP().state_dict())
        else:
            model.up.weight.data = model.up.weight.data.clone()
        with pytest.raises(InputError, match="was changed or replaced after the model was compiled"):
            call(x)


def test_what_is_no_parameter_is_an_input() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.state = torch.ones(2)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.state

    model = Model()
    build = InPyTorch()
    call = compiled(model, build)
    with torch.no_grad():
        for number in range(3):
            model.state = torch.full((2,), float(number))
            assert torch.equal(call(torch.zeros(2)), model.state)
    assert len(build.programs) == 1


def test_a_graph_of_numbers_is_left_to_pytorch() -> None:
    build = InPyTorch()
    call = compiled(lambda x: x.shape[0] * 2, build)
    for size in (2, 3, 4):
        assert call(torch.ones(size)) == size * 2
    assert not build.programs


def test_graph_breaks_make_several_programs() -> None:
    def function(x: Tensor) -> Tensor:
        y = x.sin()
        torch._dynamo.graph_break()
        return y + 1

    build = InPyTorch()
    call = compiled(function, build)
    with torch.no_grad():
        assert torch.equal(call(torch.ones(3)), torch.ones(3).sin() + 1)
    assert len(build.programs) == 2


def test_a_wrong_program_is_found_before_it_is_built() -> None:
    def change(program: ShardedProgram) -> None:
        (node,) = program.graphs[0].graph.find_nodes(op="call_function", target=torch.ops.aten.sin.default)
        node.target = torch.ops.aten.cos.default
        program.graphs[0].recompile()

    with torch.no_grad(), pytest.raises(VerificationError, match="output0 of the lowered graph"):
        compiled(lambda x: x.sin(), InPyTorch(change))(torch.ones(3))
    with torch.no_grad():
        unchecked = compiled(lambda x: x.sin(), InPyTorch(change), check=False)(torch.ones(3))
    assert torch.equal(unchecked, torch.ones(3).cos())


def test_autocast_is_in_the_graph_and_off_around_it() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            half = self.a(x)
            with torch.autocast("cpu", enabled=False):
                result: Tensor = self.b(half.float())
            return result

    model, x, build = Model(), torch.randn(4, 8), InPyTorch()
    call = compiled(model, build)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        result, dense = call(x), model(x)
        assert result.dtype == dense.dtype == torch.float32
        assert torch.equal(result, dense), "the second product is not rounded"
        assert torch.is_autocast_enabled("cpu")
    with torch.no_grad():
        assert error(call(x), model(x)) < 1e-5
    assert len(build.programs) == 2


def test_programs_of_one_model_share_a_budget_and_end_with_it() -> None:
    build = InPyTorch()
    call = compiled(nn.Linear(2, 2), build, cuda_graph=True, max_graphs=3)
    with torch.no_grad():
        for size in (1, 2, 3):
            call(torch.ones(size, 2))
    (budget,) = {id(b): b for b in build.budgets}.values()
    assert budget is not None
    assert budget.left == 3
    assert build.names == ["Linear"] * 3
    torch.compiler.reset()
    gc.collect()
    assert build.closed == 3


def by_name(rank: int) -> tuple[list[float], list[str]]:
    """The backend itself, by its name, with Inductor in place of TensorRT."""
    torch.compiler.reset()
    torch.manual_seed(0)
    options: dict[str, Any] = {"compute": "inductor", "report": False}
    sharded, dense = models.MLP().eval(), models.MLP().eval()
    sharded.load_state_dict(dense.state_dict())
    parallelize_module(sharded, init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), TP_PLAN)
    plan: dict[str, Any] = {"": {"x": Split(1)}, "out": Gather(1)}
    dense_options = {"mesh": Mesh(cp=2), "parallel": ContextParallel("cp", plan=plan)}
    attention = models.SelfAttention().eval()
    errors = []
    for model, whole, more in ((sharded, dense, {}), (attention, attention, dense_options)):
        call = torch.compile(model, backend="torchtrt_md", options={**options, **more})
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                errors += [error(call(x), whole(x)) for x in (torch.ones(2, 8, 32), torch.ones(2, 4, 32))]
    wrong = torch.compile(nn.Linear(2, 2), backend="torchtrt_md", options={"placment": "split"})
    return errors, [message_of(lambda: wrong(torch.ones(2, 2)))]


def test_the_backend_by_its_name(ranks: Ranks) -> None:
    for outcome in ranks(by_name):
        assert not outcome.error, outcome.message
        errors, (message,) = outcome.value
        assert max(errors) < 1e-5
        assert message.startswith("OptionError: there is no option 'placment'")


def test_the_entry_point() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    entry = project["project"]["entry-points"]["torch_dynamo_backends"]
    assert entry == {"torchtrt_md": "torchtrt_md.doors.dynamo:backend"}
    assert "torchtrt_md" in torch._dynamo.list_backends(exclude_tags=())


# --- weights in sets, waits, and ranks that differ ---


def blocks(count: int, mesh: Any) -> nn.Sequential:
    """Equal layers, each sharded by itself."""
    torch.manual_seed(0)
    return nn.Sequential(*(parallelize_module(models.MLP(), mesh, TP_PLAN) for _ in range(count))).eval()


def equal_modules(rank: int, how: str) -> tuple[list[float], int]:
    torch.compiler.reset()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    build, x = InPyTorch(), torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
    backend = partial(compile_graph, build=build)
    model = blocks(3, mesh)
    with torch.no_grad():
        want = model(x)
        if how == "layer.compile()":
            for layer in model:
                layer.compile(backend=backend)
            calls: list[Callable[[], Any]] = [lambda: model(x)] * 2
            wants = [want] * 2
        elif how == "layers replaced":
            for i, layer in enumerate(model):
                model[i] = torch.compile(layer, backend=backend)  # type: ignore[assignment]
            calls, wants = [lambda: model(x)] * 2, [want] * 2
        else:
            wants = [layer(x) for layer in model] * 2
            compiled_layers = [torch.compile(layer, backend=backend) for layer in model]
            calls = [*(partial(c, x) for c in compiled_layers)] * 2
        return [error(call(), w) for call, w in zip(calls, wants, strict=True)], len(build.programs)


@pytest.mark.parametrize("how", ["layer.compile()", "layers replaced", "models"])
def test_equal_modules_share_a_program_and_keep_their_own_weights(ranks: Ranks, how: str) -> None:
    for outcome in ranks(equal_modules, how):
        assert not outcome.error, outcome.message
        errors, programs = outcome.value
        assert max(errors) < 1e-5
        assert programs == 1


def changed_on_one_rank(rank: int) -> str:
    torch.compiler.reset()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = parallelize_module(models.MLP(), mesh, TP_PLAN).eval()
    call = compiled(model, InPyTorch())
    x = torch.ones(2, 8, 32)
    with torch.no_grad():
        call(x)
        if rank == 1:
            model.get_submodule("down").get_parameter("bias").to_local().add_(1)  # type: ignore[attr-defined]
        return message_of(lambda: call(x))


def test_a_weight_that_changes_on_one_rank_is_an_error_on_all(ranks: Ranks) -> None:
    first, second = ranks(changed_on_one_rank)
    assert first == second
    assert first.value.startswith("InputError: rank 1: 'down.bias' was changed or replaced"), first


def in_flight(rank: int) -> tuple[list[float], list[float]]:
    """A graph that waits for an input, and one whose input is what an eager layer has still under way."""
    torch.compiler.reset()
    world: Any = dist.group.WORLD
    ops = torch.ops._c10d_functional

    def waits(reduced: Tensor, x: Tensor) -> Tensor:
        result: Tensor = ops.wait_tensor(reduced) + x
        return result

    call, errors = compiled(waits, InPyTorch(), check=False), []
    with torch.no_grad():
        for size in (256, 512):
            x = torch.ones(size, size) + rank
            want = waits(ops.all_reduce(x, "sum", world.group_name), x)
            errors.append(error(call(ops.all_reduce(x, "sum", world.group_name), x), want))
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        first, second = blocks(2, mesh)
        x = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
        want = second(first(x))
        layer = compiled(second, InPyTorch())
        return errors, [error(layer(first(x)), want) for _ in range(2)]


def test_a_wait_is_a_wait(ranks: Ranks) -> None:
    for outcome in ranks(in_flight):
        assert not outcome.error, outcome.message
        waited, async_inputs = outcome.value
        assert max(*waited, *async_inputs) < 1e-5


def unwritten(rank: int) -> float:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.empty_like(x)
        torch._dynamo.graph_break()
        return x * 2, torch.where(x == x, x, y)

    torch.compiler.reset()
    call = compiled(function, InPyTorch())
    with torch.no_grad():
        x = torch.randn(64, 64)
        twice, same = call(x)
        return max(error(twice, x * 2), error(same, x))


def test_memory_that_is_returned_unwritten_is_no_wrong_program(ranks: Ranks) -> None:
    for outcome in ranks(unwritten):
        assert not outcome.error, outcome.message
        assert outcome.value < 1e-6


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
