"""The backend of torch.compile: its graphs, options, autocast and name; programs run in PyTorch in place of engines."""

from __future__ import annotations

import gc
import tomllib
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch._dynamo
import torch.distributed._functional_collectives as funcol
from in_pytorch import TP_PLAN, InPyTorch, compiled, error, message_of
from rank_processes import Ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from torchtrt_md import ContextParallel, DataParallel, Gather, Mesh, PlanWarning, Split
from torchtrt_md.doors.dynamo import compile_graph
from torchtrt_md.errors import CaptureError, OptionError, VerificationError
from torchtrt_md.program import ShardedProgram

# --- models that communicate by themselves, on two ranks ---


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
    state: Any = nn.Module()
    state.register_buffer("calls", torch.zeros(4))

    def function(x: Tensor) -> Tensor:
        if rank:
            state.calls.add_(1)
        return x * 2

    call = compiled(function, InPyTorch())
    with torch.no_grad():
        return message_of(lambda: call(torch.ones(4)))


def test_a_capture_that_fails_on_one_rank_fails_on_all(ranks: Ranks) -> None:
    for outcome in ranks(one_rank_fails):
        assert outcome.value.startswith("CaptureError: rank 1: the model writes to an input"), outcome


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
        for mode, tokens in ((torch.no_grad, 8), (torch.no_grad, 4), (torch.inference_mode, 8)):
            with mode():
                errors.append(error(call(torch.ones(2, tokens, 32)), whole(torch.ones(2, tokens, 32))))
    wrong = torch.compile(nn.Linear(2, 2), backend="torchtrt_md", options={"placment": "split"})
    return errors, [message_of(lambda: wrong(torch.ones(2, 2)))]


def test_the_backend_by_its_name(ranks: Ranks) -> None:
    for outcome in ranks(by_name):
        assert not outcome.error, outcome.message
        errors, (message,) = outcome.value
        assert max(errors) < 1e-5
        assert message.startswith("OptionError: every rank: there is no option 'placment'")


def test_the_entry_point() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    entry = project["project"]["entry-points"]["torch_dynamo_backends"]
    assert entry == {"torchtrt_md": "torchtrt_md.doors.dynamo:backend"}
    assert "torchtrt_md" in torch._dynamo.list_backends(exclude_tags=())


class Broken(nn.Module):
    """A model in two graphs, of which the second communicates."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        torch._dynamo.graph_break()
        world: Any = torch.distributed.group.WORLD
        result: Tensor = funcol.all_reduce(self.b(y), "sum", world)
        return result


def launches_that_nothing_uses(rank: int) -> dict[str, tuple[list[str], str]]:
    """Of each case the warnings, and the error."""
    options: dict[str, Any] = {"compute": "inductor", "report": False}
    meshed = {**options, "mesh": Mesh(unused=2)}  # by any test of this session
    mlp, (x,), _ = models.mlp()
    sharded = parallelize_module(models.MLP().eval(), init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), TP_PLAN)
    each = {**options, "mesh": Mesh(dp=2), "parallel": DataParallel("dp")}
    shared = {**options, "mesh": Mesh(tp=2)}
    said = {}
    for name, model, given, example in (
        ("dense", mlp, options, x),
        ("dense, mesh", mlp, meshed, x),
        ("a function, mesh", lambda x: x * 2, dict(meshed), x),
        ("data", mlp, each, x),
        ("sharded", sharded, {**options, "mesh": Mesh(tp=2)}, x),
        ("broken, mesh", Broken().eval(), {**options, "mesh": Mesh(broken=2)}, torch.randn(2, 8)),
        ("a part, behind one that is sharded", sharded, shared, x),
        ("a part that is dense", models.MLP().eval(), shared, x),
    ):
        torch.compiler.reset()
        call: Any = torch.compile(model, backend="torchtrt_md", options=given)
        with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            message = message_of(partial(call, example))
        said[name] = [str(w.message) for w in caught if issubclass(w.category, PlanWarning)], message
    return said


def test_a_model_that_every_rank_runs_whole_is_told_of(ranks: Ranks) -> None:
    for outcome in ranks(launches_that_nothing_uses):
        assert not outcome.error, outcome.message
        said = outcome.value
        (warning,), error = said.pop("dense")
        assert error == ""
        assert warning.startswith("each of the 2 ranks runs all of MLP by itself: nothing of MLP is split")
        for name, what in (("dense, mesh", "MLP"), ("a function, mesh", "the function")):
            warned, error = said.pop(name)
            assert not warned
            assert error.startswith("MeshError: every rank: all 2 ranks of Mesh(unused=2) would do the same work")
            assert f"nothing of {what} is split" in error
        assert said == dict.fromkeys(said, ([], ""))


def blocks_compiled_one_by_one(rank: int) -> tuple[float, list[str]]:
    torch.compiler.reset()
    layers = nn.Sequential(*(models.MLP() for _ in range(3))).eval()
    torch.manual_seed(1)
    for parameter in layers.parameters():
        nn.init.normal_(parameter, std=0.1)
    x = torch.ones(2, 8, 32)
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        want = layers(x)
        for layer in layers:
            layer.compile(backend="torchtrt_md", options={"compute": "inductor", "report": False})
        found = error(layers(x), want)
    return found, [str(w.message) for w in caught if issubclass(w.category, PlanWarning)]


def test_dense_blocks_that_are_compiled_one_by_one_are_right(ranks: Ranks) -> None:
    for outcome in ranks(blocks_compiled_one_by_one):
        assert not outcome.error, outcome.message
        found, warned = outcome.value
        assert found < 1e-5
        assert warned


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
