"""Dynamo's graphs as programs of a rank, in two real ranks; and the private names of Dynamo."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from rank_processes import Ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.fx import GraphModule

from torchtrt_md.capture import dynamo_private, torch_private
from torchtrt_md.capture.dynamo import capture_graph, graph_inputs, groups_mesh
from torchtrt_md.doors.compared import run_rank
from torchtrt_md.lowering import lower
from torchtrt_md.lowering.ops import COLLECTIVES
from torchtrt_md.mesh import Mesh
from torchtrt_md.program import ShardedProgram, Weight

Programs = list[ShardedProgram]


def lowered_backend(programs: Programs, mesh: Mesh | DeviceMesh | None = None) -> Callable[..., Any]:
    """Captures, lowers, and runs what came of it in PyTorch over the ranks."""

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., list[Any]]:
        with dynamo_private.outside_dynamo():
            program = capture_graph(gm, example_inputs, mesh=mesh)
            lowered = lower(program)
        programs.append(program)
        values = [(i, each.name) for i, each in enumerate(graph_inputs(gm, example_inputs)) if each.kind == "value"]
        device_mesh = mesh if isinstance(mesh, DeviceMesh) else None

        def run(*flat: Any) -> list[Any]:
            return run_rank(lowered, {name: flat[i] for i, name in values}, device_mesh)

        return run

    return backend


def parallelized(model: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
    styles: Mapping[str, Callable[[], Any]] = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
    plan = getattr(model, "tp_plan", None) or {"up": "colwise", "down": "rowwise"}
    return parallelize_module(model, device_mesh, {k: styles[v]() for k, v in plan.items() if v in styles})


def error(ours: Tensor, dense: Tensor) -> float:
    return float((ours - dense).norm() / dense.norm())


def tensor_parallel(rank: int, name: str) -> tuple[float, list[str], list[str], dict[str, list[str]], str]:
    torch.compiler.reset()
    with torch.no_grad():
        model, args, kwargs = getattr(models, name)()
        dense = model(*args, **kwargs)
        device_mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        programs: Programs = []
        compiled = torch.compile(parallelized(model, device_mesh), backend=lowered_backend(programs), fullgraph=True)
        result = compiled(*args, **kwargs)
    (program,) = programs
    split = {
        source.name: [f"{s.dim}{s.axis}" for s in source.shardings]
        for source in program.sources.values()
        if isinstance(source, Weight) and source.shardings
    }
    collectives = [str(n.target) for n in lower(program).graphs[0].graph.nodes if n.target in COLLECTIVES]
    ours, theirs = (r if isinstance(r, Tensor) else r.logits for r in (result, dense))
    return error(ours, theirs), [v.name for v in program.inputs], collectives, split, str(program.mesh)


@pytest.mark.parametrize(
    ("name", "inputs", "reduces", "weight"),
    [("mlp", ["x"], 1, "up.weight"), ("llama", ["args.0"], 4, "model.layers.0.self_attn.q_proj.weight")],
)
def test_a_parallelized_model(own_ranks: Ranks, name: str, inputs: list[str], reduces: int, weight: str) -> None:
    for outcome in own_ranks(tensor_parallel, name):
        assert not outcome.error, outcome.message
        relative, names, collectives, split, mesh = outcome.value
        assert relative < 1e-5
        assert names == inputs
        assert collectives == ["torchtrt_md.all_reduce.default"] * reduces
        assert split[weight] == ["0tp"]
        assert mesh == "Mesh(tp=2)"


class Reduced(nn.Module):
    """A product over a split inner dim, each rank having its part of it, with a rotation of what it has."""

    def __init__(self, rank: int, group: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        whole = torch.randn(8, 6)
        self.weight = nn.Parameter(whole[:, rank * 3 : rank * 3 + 3].clone())
        self.register_buffer("scale", torch.full((1, 8), 2.0))
        self.group = group

    def forward(self, x: Tensor, unused: Tensor, mask: dict[str, Tensor]) -> tuple[Tensor, int, Tensor]:
        partial = torch.nn.functional.linear(x, self.weight)
        whole = funcol.all_reduce(partial, "sum", self.group)
        gathered = funcol.all_gather_tensor(
            x.t().contiguous(), 0, self.group
        )  # on dim 1 it breaks the graph in torch 2.11
        return whole * self.scale + mask["bias"], x.shape[0], gathered


def explicit(rank: int, where: str) -> tuple[list[float], list[str], str, int]:
    torch.compiler.reset()
    device_mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)) if where == "mesh" else None
    group = dist.group.WORLD if device_mesh is None else device_mesh.get_group("tp")
    whole = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    bias = torch.ones(4, 8)
    programs: Programs = []
    with torch.no_grad():
        model = Reduced(rank, group)
        compiled = torch.compile(model, backend=lowered_backend(programs, device_mesh), fullgraph=True)
        x = whole[:, rank * 3 : rank * 3 + 3].clone()
        result, rows, gathered = compiled(x, torch.ones(2, 2), {"bias": bias})
    torch.manual_seed(0)
    dense = torch.nn.functional.linear(whole, torch.randn(8, 6)) * 2 + bias
    (program,) = programs
    return (
        [error(result, dense), error(gathered.t(), whole)],
        [v.name for v in program.inputs],
        str(program.mesh),
        rows,
    )


@pytest.mark.parametrize(("where", "mesh"), [("mesh", "Mesh(tp=2)"), ("world", "Mesh(world=2)")])
def test_explicit_collectives(own_ranks: Ranks, where: str, mesh: str) -> None:
    for outcome in own_ranks(explicit, where):
        assert not outcome.error, outcome.message
        errors, names, found, rows = outcome.value
        assert max(errors) < 1e-5
        assert (names, found, rows) == (["x", "mask.bias"], mesh, 4)


def message_of(call: Callable[[], Any]) -> str:
    """Of the error of this package that Dynamo wraps."""
    try:
        call()
    except Exception as raised:
        inner = getattr(raised, "inner_exception", raised)
        return f"{type(inner).__name__}: {inner}"
    return ""


def refused(rank: int, case: str) -> str:
    torch.compiler.reset()
    device_mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("tp", "cp"))
    x = torch.ones(4, 4)
    shape: dict[str, Any] = {"shape": torch.Size([7, 4]), "stride": (4, 1), "run_check": False}
    uneven = DTensor.from_local(x[rank:], device_mesh["tp"], [Shard(0)], **shape)
    whole: Any = nn.Module()
    whole.register_buffer("state", torch.ones(4, 4))
    alone: Any = [dist.new_group([r]) for r in range(2)][rank]
    calls: dict[str, Callable[[Tensor], Any]] = {
        "input": lambda t: t + 1,
        "output": lambda t: DTensor.from_local(t[rank:] * 2, device_mesh["tp"], [Shard(0)], **shape),
        "group": lambda t: funcol.all_reduce(t, "sum", alone),
        "write": lambda t: whole.state.add_(t),
        "value": lambda t: t * t.sum().item(),
    }
    compiled = torch.compile(calls[case], backend=lowered_backend([], Mesh(world=2) if case == "group" else None))
    with torch.no_grad(), torch._dynamo.config.patch(capture_scalar_outputs=True):
        return message_of(lambda: compiled(uneven if case == "input" else x))


@pytest.mark.parametrize(
    ("case", "problem"),
    [
        ("input", "CaptureError: the input 't' is a DTensor of [7, 4], placed as (Shard(dim=0),)"),
        ("output", "CaptureError: output 0 of the graph is a DTensor of [7, 4], placed as (Shard(dim=0),)"),
        (
            "group",
            "CollectiveError: _c10d_functional.all_reduce.default in node 'all_reduce' is over the ranks [{rank}]",
        ),
        ("write", "CaptureError: the model writes to an input or a buffer"),
        ("value", "CaptureError: node 'item' is a number that depends on the values of tensors"),
    ],
)
def test_what_is_refused(own_ranks: Ranks, case: str, problem: str) -> None:
    for rank, outcome in enumerate(own_ranks(refused, case)):
        assert problem.format(rank=rank) in outcome.value
        assert "Instead: " in outcome.value
        if case in ("group", "write", "value"):
            assert "test_dynamo_graphs.py" in outcome.value, "the user's own line"


def shapes(rank: int, dynamic: bool | None) -> tuple[list[float], list[list[list[int]]]]:
    torch.compiler.reset()
    programs: Programs = []
    errors = []
    with torch.no_grad():
        model, _, _ = models.mlp()
        dense, _, _ = models.mlp()
        device_mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        compiled = torch.compile(parallelized(model, device_mesh), backend=lowered_backend(programs), dynamic=dynamic)
        for tokens in (8, 6, 4, 6, 8):
            x = torch.randn(2, tokens, 32)
            errors.append(error(compiled(x), dense(x)))
    return errors, [[list(v.shape) for v in program.inputs] for program in programs]


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_each_shape_is_a_program_of_its_own(own_ranks: Ranks, dynamic: bool | None) -> None:
    for outcome in own_ranks(shapes, dynamic):
        assert not outcome.error, outcome.message
        errors, inputs = outcome.value
        assert max(errors) < 1e-5
        assert inputs == [[[2, 8, 32]], [[2, 6, 32]], [[2, 4, 32]]]


# --- one process ---


@pytest.mark.parametrize(
    ("size", "rank", "groups", "mesh"),
    [
        (4, 2, [(2, 3)], "Mesh(dim0=2, dim1=2)"),
        (4, 2, [(0, 2)], "Mesh(dim0=2, dim1=2)"),
        (4, 3, [(2, 3), (1, 3)], "Mesh(dim0=2, dim1=2)"),
        (8, 5, [(4, 5), (1, 3, 5, 7)], "Mesh(dim0=4, dim1=2)"),
        (8, 5, [(5, 7)], "Mesh(dim0=2, dim1=2, dim2=2)"),
        (4, 2, [(0, 1, 2, 3)], "None"),
        (4, 2, [], "None"),
        (4, 2, [(2,)], "None"),
        (4, 2, [(3, 2)], "None"),
        (4, 2, [(1, 2)], "None"),
        (4, 2, [(0, 1, 2)], "None"),
        (8, 5, [(4, 5), (3, 4, 5)], "None"),
        (6, 2, [(0, 1, 2), (2, 3)], "None"),
    ],
)
def test_the_mesh_that_groups_make(size: int, rank: int, groups: list[tuple[int, ...]], mesh: str) -> None:
    assert str(groups_mesh(groups, size, rank)) == mesh


def recorded(function: Callable[..., Any], *calls: Sequence[Any]) -> list[tuple[ShardedProgram, Any]]:
    """The program of each compilation, and what the graph of it returned to the user."""
    torch.compiler.reset()
    programs: Programs = []
    compiled = torch.compile(function, backend=lowered_backend(programs))
    with torch.no_grad():
        return [(programs[-1], result) for result in [compiled(*args) for args in calls]]


def test_symbolic_numbers_are_guarded_at_their_value() -> None:
    def scaled(x: Tensor, factor: float, shift: int) -> Tensor:
        return x * factor + shift

    torch.compiler.reset()
    programs: Programs = []
    compiled = torch.compile(scaled, backend=lowered_backend(programs))
    x = torch.ones(2, 2)
    with torch.no_grad():
        for factor, shift in ((0.5, 1), (0.25, 1), (0.125, 1), (0.25, 1), (0.25, 3), (0.25, 4)):
            assert torch.equal(compiled(x, factor, shift), x * factor + shift)
    assert len(programs) == 5


def test_user_lines_are_kept() -> None:
    ((program, _),) = recorded(lambda x: x.exp() + 1, (torch.ones(2, 2),))
    (node,) = program.graphs[0].graph.find_nodes(op="call_function", target=torch.ops.aten.exp.default)
    assert "test_dynamo_graphs.py" in node.stack_trace
    assert "x.exp() + 1" in node.stack_trace


def test_autocast_around_the_call_is_in_the_graph() -> None:
    model, (x,), _ = models.mlp()
    programs: Programs = []
    torch.compiler.reset()
    compiled = torch.compile(model, backend=lowered_backend(programs))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        result, dense = compiled(x), model(x)
    assert result.dtype == dense.dtype == torch.bfloat16
    assert error(result.float(), dense.float()) < 2e-2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_attention_stays_whole(mode: Callable[[], Any]) -> None:
    model, (x,), _ = models.attention()
    programs: Programs = []
    torch.compiler.reset()
    with mode():
        assert error(torch.compile(model, backend=lowered_backend(programs))(x), model(x)) < 1e-5
    targets = [str(n.target) for n in programs[0].graphs[0].graph.nodes]
    assert targets.count("torchtrt_md.attention.default") == 1


# --- private names ---


def seen_in_backend(look: Callable[[GraphModule], Any], function: Callable[..., Any], *args: Any) -> Any:
    """What ``look`` finds in the first graph of a function."""
    found = []

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        found.append(look(gm))
        return gm.forward

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend)(*args)
    return found[0]


def test_sources_without_which_weights_are_taken_for_inputs() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)
            self.register_buffer("table", torch.ones(2))
            self.plain = torch.ones(2)

        def forward(self, x: Tensor, **more: Tensor) -> Tensor:
            result: Tensor = self.inner(x) + self.table + self.plain + more["y"]
            return result

    def look(gm: GraphModule) -> dict[str, bool]:
        nodes = gm.graph.find_nodes(op="placeholder")
        return {".".join(dynamo_private.source_path(node)): dynamo_private.is_weight(node) for node in nodes}

    assert seen_in_backend(look, lambda model, x: model(x, y=x * 2), Model(), torch.ones(2, 2)) == {
        "model._modules.inner._parameters.weight": True,
        "model._modules.inner._parameters.bias": True,
        "model._buffers.table": True,
        "model.plain": False,
        "x": False,
    }


def test_the_reason_of_a_graphs_end_without_which_a_part_is_taken_for_the_whole() -> None:
    def broken(x: Tensor) -> Tensor:
        y = x + 1
        torch._dynamo.graph_break()
        return y * 2

    assert seen_in_backend(dynamo_private.graph_break, broken, torch.ones(2))
    assert seen_in_backend(dynamo_private.graph_break, lambda x: x * 2, torch.ones(2)) is None


def test_the_call_in_progress_without_which_no_plan_fits_a_dense_model() -> None:
    seen: list[dynamo_private.CallInProgress | None] = []

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        seen.append(dynamo_private.call_in_progress())
        return gm.forward

    model, (x,), _ = models.mlp()
    in_place, _, _ = models.mlp()
    in_place.compile(backend=backend)
    sequence = nn.Sequential(nn.Linear(32, 2))  # PyTorch's own, whose call Dynamo wraps otherwise

    def function(x: Tensor) -> Any:
        return model(x)

    with torch.no_grad():
        for call in (torch.compile(model, backend=backend), in_place, torch.compile(sequence, backend=backend)):
            torch.compiler.reset()
            call(x)
        torch.compiler.reset()
        torch.compile(model.forward, backend=backend)(x=x)
        torch.compiler.reset()
        torch.compile(function, backend=backend)(x)
    assert [s and (s.module, s.args, s.kwargs) for s in seen] == [
        (model, (x,), {}),
        (in_place, (x,), {}),
        (sequence, (x,), {}),
        (model, (), {"x": x}),
        None,
    ]
    assert dynamo_private.call_in_progress() is None


def test_leaving_dynamo_without_which_nothing_can_be_compiled_in_a_backend() -> None:
    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        with dynamo_private.outside_dynamo():
            inner = torch.compile(lambda x: (x.sin() + 1,), backend="aot_eager")
            inner(torch.ones(3))
        return inner

    torch.compiler.reset()
    with torch.no_grad():
        result = torch.compile(lambda x: x.sin() + 1, backend=backend)(torch.ones(2))
    assert torch.equal(result, torch.ones(2).sin() + 1)


def resolve(rank: int) -> tuple[list[int], bool]:
    device_mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("cp", "tp"))
    group = device_mesh.get_group("tp")
    root = torch_private.root_mesh(device_mesh["tp"])
    return list(dynamo_private.group_ranks(group.group_name)), root is device_mesh


def test_group_names_and_root_meshes_without_which_axes_are_not_found(own_ranks: Ranks) -> None:
    assert [outcome.value for outcome in own_ranks(resolve)] == [([0, 1], True)] * 2
