"""Cutting a program changes its order, not what it computes."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from joined import joined
from torch import nn

import torchtrt_md as md
from torchtrt_md.errors import BuildError
from torchtrt_md.lowering.ops import COLLECTIVES, is_collective
from torchtrt_md.lowering.passes import Exchange
from torchtrt_md.lowering.schedule import schedule
from torchtrt_md.place import PlacedProgram, place
from torchtrt_md.place.partition import ATTENTION, base_of
from torchtrt_md.program import ShardedProgram, Weight, placeholders, value_of
from torchtrt_md.segment import Part, Wire
from torchtrt_md.verification.simulate import Precision, simulate

PLAN = {"": {"x": md.Split(1)}, "out": md.Gather(1)}


def flux(strategy: str, **options: Any) -> ShardedProgram:
    model, args, kwargs = models.flux(torch.float32)
    program = md.capture(model, args, kwargs, mesh=md.Mesh(cp=2), parallel=md.ContextParallel("cp", strategy))  # type: ignore[arg-type]
    return md.lower(program, placement="split", **options)


def random_inputs(program: ShardedProgram) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        v.name: torch.randn(v.shape, generator=generator).to(v.dtype)
        if v.dtype.is_floating_point
        else torch.randint(0, 7, v.shape, generator=generator).to(v.dtype)
        for v in program.inputs
    }


def graph_of(part: Part) -> torch.fx.GraphModule:
    assert part.graph is not None
    return part.graph


def assert_computes_the_same(placed: PlacedProgram) -> None:
    program, inputs = placed.program, random_inputs(placed.program)
    wide = Precision(torch.float64)
    expected, found = simulate(program, inputs, precision=wide), simulate(joined(placed), inputs, precision=wide)
    for rank, (want, have) in enumerate(zip(expected, found, strict=True)):
        for a, b in zip(want, have, strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=1e-12, msg=f"rank {rank}")


@pytest.mark.parametrize("strategy", ["ulysses", "allgather_kv", "ring"])
def test_flux_in_parts_computes_the_same(strategy: str) -> None:
    placed = place(flux(strategy), "split")
    assert_computes_the_same(placed)
    for part in placed.parts[0]:
        special = [n for n in graph_of(part).graph.nodes if n.target in ATTENTION or is_collective(n)]
        own_rows = [n for n in graph_of(part).graph.nodes if n.target is torch.ops.aten.index_select.default]
        assert (part.runs == "eager") == bool(special or (own_rows and part.runs == "eager")), part.segment.name


def test_llama_in_parts_computes_the_same() -> None:
    model, args, kwargs = models.llama(torch.float32)
    program = md.capture(model, args, kwargs, mesh=md.Mesh(tp=2), parallel=md.TensorParallel("tp"))
    assert_computes_the_same(place(md.lower(program, placement="split"), "split"))


@pytest.mark.parametrize(("groups", "values_first"), [(2, False), (1, True), (2, True)])
def test_the_ways_of_exchange(groups: int, values_first: bool) -> None:
    model, args, kwargs = models.attention(torch.float32, kv_heads=4)
    parallel = md.ContextParallel("cp", "ulysses", PLAN)
    captured = md.capture(model, args, kwargs, mesh=md.Mesh(cp=2), parallel=parallel)
    (key,) = md_keys(captured)
    program = md.lower(captured, placement="split", exchanges={key: Exchange("ulysses", groups, values_first)})
    assert_computes_the_same(place(program, "split"))


def md_keys(program: ShardedProgram) -> tuple[str, ...]:
    from torchtrt_md.lowering import attention_keys

    return attention_keys(program)


def test_the_order_of_collectives_stays() -> None:
    placed = place(flux("ulysses"), "split")
    in_parts = [c for part in placed.parts[0] for c in schedule(graph_of(part))]
    assert in_parts == schedule(placed.program.graphs[0])


def test_what_passes_between_parts_is_contiguous_and_one_tensor() -> None:
    for part in place(flux("ulysses"), "split").parts[0]:
        (output,) = graph_of(part).graph.find_nodes(op="output")
        values = [*placeholders(graph_of(part)), *(output.args[0] if part.runs != "eager" else ())]
        assert all(value_of(node).is_contiguous() for node in values)


def test_no_view_is_passed_and_attention_is_passed_as_it_is_written() -> None:
    placed = place(flux("allgather_kv"), "split")
    returned = [
        node
        for part in placed.parts[0][1:]  # the first has this rank's parts of the inputs
        if part.runs == "eager"
        for node in graph_of(part).graph.find_nodes(op="output")[0].args[0]
    ]
    no_copy = torch.ops.aten.contiguous.default  # where it lies as it is passed
    assert {node.target for node in returned[:-1]} <= {no_copy, *COLLECTIVES}  # the last is the model's own result
    shapes = [list(value_of(node).shape) for node in returned if node.target is no_copy][:3]
    assert shapes == [[1, 24, 4, 16]] * 3  # [B, S, H, D]


def test_queries_are_passed_as_attention_is_to_write() -> None:
    """It lays out its result like them, and as [B, S, H, D] nobody has to copy that."""
    model, args, kwargs = models.llama(torch.float32)
    program = md.capture(model, args, kwargs, mesh=md.Mesh(tp=2), parallel=md.TensorParallel("tp"))
    placed = place(md.lower(program, placement="split"), "split")
    assert_computes_the_same(placed)
    found = 0
    for part in placed.parts[0]:
        for node in graph_of(part).graph.find_nodes(op="call_function", target=torch.ops.torchtrt_md.attention.default):
            batch, heads, tokens, width = value_of(node.args[0]).shape
            assert value_of(base_of(node.args[0])).shape == (batch, tokens, heads, width)
            found += 1
    assert found > 1


class Joint(nn.Module):
    """Queries of two kinds of tokens, joined."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.image = nn.Linear(16, 48), nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        both = [
            linear(z).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4) for linear, z in ((self.text, x), (self.image, y))
        ]
        q, k, v = (torch.cat([text, image], 2) for text, image in zip(*both, strict=True))
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        result: torch.Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return result


def test_joined_queries_are_joined_as_they_are_passed() -> None:
    call: models.Call = Joint().eval(), (torch.randn(1, 8, 16), torch.randn(1, 4, 16)), {}
    plan = {"text": "colwise", "image": "colwise"}
    program = md.capture(*call, mesh=md.Mesh(tp=1), parallel=md.TensorParallel("tp", plan))
    placed = place(md.lower(program, placement="split"), "split")
    assert_computes_the_same(placed)
    (*_, queries) = placed.parts[0][0].segment.outputs
    assert queries.shape == (1, 12, 4, 4)
    (*_, made) = graph_of(placed.parts[0][0]).graph.find_nodes(op="output")[0].args[0]
    assert made.target is torch.ops.aten.cat.default, "no copy of what is joined"


class TwoBranches(nn.Module):
    """A product that needs attention's result and one that does not, as in FLUX's single blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.up, self.out = nn.Linear(16, 48), nn.Linear(16, 64), nn.Linear(80, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        result: torch.Tensor = self.out(torch.cat([y, torch.nn.functional.gelu(self.up(x))], -1))
        return result


def test_what_does_not_need_an_exchange_runs_beside_it() -> None:
    parallel = md.ContextParallel("cp", "ulysses", PLAN)
    program = md.capture(TwoBranches().eval(), (torch.randn(1, 8, 16),), mesh=md.Mesh(cp=2), parallel=parallel)
    placed = place(md.lower(program, placement="split"), "split")
    assert_computes_the_same(placed)
    kinds = [part.runs for part in placed.parts[0]]
    assert kinds == ["eager", "engine", "eager", "engine", "engine", "eager"]
    beside = placed.parts[0][3]
    assert any(name.startswith("up.") for name in beside.segment.weights)
    written = {b.source for b in placed.parts[0][2].segment.outputs}
    assert not any(b.source in written for b in beside.segment.inputs)


class Modulated(nn.Module):
    """Two blocks, of which the second has a scale that it makes of the time alone."""

    def __init__(self) -> None:
        super().__init__()
        self.once, self.again, self.scale = TwoBranches(), TwoBranches(), nn.Linear(4, 16)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.again(self.once(x) * self.scale(torch.nn.functional.silu(t)))
        return result


def test_what_needs_neither_an_exchange_nor_each_other_can_run_beside_two() -> None:
    plan = {"": {"x": md.Split(1)}, "again.out": md.Gather(1)}
    call: models.Call = Modulated().eval(), (torch.randn(1, 8, 16), torch.randn(1, 4)), {}
    program = md.capture(*call, mesh=md.Mesh(cp=2), parallel=md.ContextParallel("cp", "ulysses", plan))
    placed = place(md.lower(program, placement="split"), "split")
    assert_computes_the_same(placed)
    kinds = [part.runs for part in placed.parts[0]]
    assert kinds == ["eager", "engine", "eager", "engine", "engine", "engine", "eager", "engine", "engine", "eager"]
    branch, scale = placed.parts[0][3:5]
    assert [name.split(".")[1] for name in branch.segment.weights] == ["up", "up"]
    assert [name.split(".")[0] for name in scale.segment.weights] == ["scale", "scale"]


def test_values_are_exchanged_before_queries_and_keys_are_made() -> None:
    parallel = md.ContextParallel("cp", "ulysses", PLAN)
    model = models.attention(torch.float32, kv_heads=4)
    captured = md.capture(model[0], model[1], model[2], mesh=md.Mesh(cp=2), parallel=parallel)
    (key,) = md_keys(captured)
    program = md.lower(captured, placement="split", exchanges={key: Exchange("ulysses", values_first=True)})
    kinds = [part.runs for part in place(program, "split").parts[0]]
    assert kinds[:5] == ["eager", "engine", "eager", "engine", "eager"]


def test_engine_placement_is_one_engine() -> None:
    model, args, kwargs = models.flux(torch.float32)
    program = md.capture(model, args, kwargs, mesh=md.Mesh(cp=2), parallel=md.ContextParallel("cp", "ulysses"))
    placed = place(md.lower(program), "engine")
    assert placed.is_one_engine
    assert_computes_the_same(placed)


def test_what_cannot_be_converted_stays_in_pytorch_and_is_told() -> None:
    program = flux("ulysses")
    node = next(n for n in program.graphs[0].graph.nodes if n.target is torch.ops.aten.silu.default)
    placed = place(program, "split", keep={node.name: "for a test"})
    assert [(k.op, k.reason, k.count) for k in placed.kept] == [("aten.silu.default", "for a test", 1)]
    assert placed.kept[0].at
    assert_computes_the_same(placed)
    with pytest.raises(BuildError, match=r"silu.*for a test"):
        place(program, "split", keep={node.name: "for a test"}, fullgraph=True)


class Doubles(nn.Module):
    """A double that lives on both sides of an attention."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.double().cumsum(-1)
        y = nn.functional.scaled_dot_product_attention(wide.float(), x, x)
        return (y.double() * wide).float()


def test_a_dtype_that_engines_cannot_pass_stays_in_pytorch() -> None:
    program = md.lower(
        md.capture(Doubles(), (torch.randn(1, 2, 8, 4),), mesh=md.Mesh(cp=1), parallel=()), placement="split"
    )
    placed = place(program, "split", boundary=(torch.float32,))
    for part in placed.parts[0]:
        if part.runs == "engine":
            assert all(value_of(n).dtype == torch.float32 for n in placeholders(graph_of(part)))
    assert any("float64" in k.reason for k in placed.kept)
    assert_computes_the_same(placed)


class Returns(nn.Module):
    """An input, a weight, one value twice and a view of another."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x * 2
        z = y.flatten()
        return x, self.w, y, y, z


def test_what_is_returned_as_it_came_or_twice() -> None:
    program = md.lower(md.capture(Returns().eval(), (torch.randn(2, 3),), mesh=md.Mesh(cp=1)), placement="split")
    placed = place(program, "split")
    assert any(b.source.kind == "output" for part in placed.parts[0] for b in part.segment.outputs)
    assert_computes_the_same(placed)


class KeptBehindAttention(nn.Module):
    """An op that keeps the layout of what it reads, behind attention and behind a transposed value."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(x).unflatten(-1, (4, 4)).transpose(1, 2)
        o = torch.sinh(nn.functional.scaled_dot_product_attention(q, q, q))
        y = torch.sinh((self.q(x).transpose(1, 2) * 2).transpose(1, 2))
        whole: torch.Tensor = self.out(o.transpose(1, 2).flatten(2) + y) + torch.sinh(o).flatten(1).sum()
        return whole


def test_what_eager_parts_pass_is_contiguous_whatever_their_ops_keep() -> None:
    call = (KeptBehindAttention().eval(), (torch.randn(2, 8, 16),))
    program = md.lower(md.capture(*call, mesh=md.Mesh(cp=1)), placement="split")
    keep = {n.name: "for a test" for n in program.graphs[0].graph.nodes if n.target is torch.ops.aten.sinh.default}
    placed = place(program, "split", keep=keep)
    values: dict[Wire, torch.Tensor] = {Wire("input", program.inputs[0].name): call[1][0]}
    weights = {Wire("weight", s.name): s for s in program.sources.values() if isinstance(s, Weight)}
    for part in placed.parts[0]:
        operands = [
            program.weights.local(weights[b.source], program.mesh, 0) if b.source in weights else values[b.source]
            for b in part.segment.inputs
        ]
        with torch.no_grad():
            made = _run_as_attention_writes(graph_of(part), operands)
        assert all(t.is_contiguous() for t in made), part.segment.name
        values.update(zip((b.source for b in part.segment.outputs), made, strict=True))
    expected = call[0](*call[1])
    torch.testing.assert_close(values[Wire("output", program.outputs[0].name)], expected)


def _run_as_attention_writes(graph: torch.fx.GraphModule, operands: list[torch.Tensor]) -> list[torch.Tensor]:
    """Run a part with PyTorch's attention, whose result lies as [B, S, H, D]."""

    class Runner(torch.fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            result = super().call_function(target, args, kwargs)
            if target is torch.ops.torchtrt_md.attention.default:
                return result.transpose(1, 2).contiguous().transpose(1, 2)
            return result

    return list(Runner(graph).run(*operands))


class Shifted(nn.Module):
    """A block whose shifts and scales are pieces of one product, read before and behind its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation, self.qkv, self.out = nn.Linear(8, 48), nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        shift, scale, gate = self.modulation(time).chunk(3, -1)
        q, k, v = (
            y.unflatten(-1, (2, 8)).transpose(1, 2)
            for y in self.qkv(x * (1 + scale[:, None]) + shift[:, None]).split([16, 16, 16], -1)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        result: torch.Tensor = x + gate[:, None] * self.out(y)
        return result


@pytest.mark.parametrize("batch", [1, 2])
def test_parts_pass_on_what_was_split_and_not_its_pieces(batch: int) -> None:
    """Each piece would be a copy, and is a view where what is split has one row."""
    call = Shifted().eval(), (torch.randn(batch, 8, 16), torch.randn(batch, 8))
    parallel = md.ContextParallel("cp", "ulysses", {"": {"x": md.Split(1)}, "out": md.Gather(1)})
    program = md.lower(md.capture(*call, mesh=md.Mesh(cp=2), parallel=parallel), placement="split")
    placed = place(program, "split")
    assert_computes_the_same(placed)
    passed = {
        (b.source.name, b.shape) for part in placed.parts[0] for b in part.segment.outputs if b.source.kind == "value"
    }
    assert any(shape == (batch, 48) for _, shape in passed) == (batch == 1)
    assert any(shape == (batch, 16) for _, shape in passed) == (batch == 2)


class Returning(nn.Module):
    """Pieces and views of an input that are returned as they are."""

    def __init__(self, look: Any) -> None:
        super().__init__()
        self.look = look

    def forward(self, x: torch.Tensor, wide: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x * 2, *self.look(wide)


@pytest.mark.parametrize("placement", ["split", "engine"])
@pytest.mark.parametrize(
    "look",
    [
        lambda d: d.split([2, 2], 0),
        lambda d: d.split([2, 2], 0)[1:],
        lambda d: [d.transpose(0, 1)],
        lambda d: [d.reshape(-1)],
        lambda d: [d[1:3, :2]],
    ],
)
def test_what_is_returned_as_it_came_is_no_engines_where_none_can_pass_it(look: Any, placement: Any) -> None:
    call = Returning(look).eval(), (torch.randn(2, 4), torch.randn(4, 3, dtype=torch.float64))
    program = md.lower(md.capture(*call, mesh=md.Mesh(cp=1), parallel=()), placement=placement)
    placed = place(program, placement, boundary=(torch.float32,))
    assert_computes_the_same(placed)
    for part in placed.parts[0]:
        bindings = (*part.segment.inputs, *part.segment.outputs)
        assert part.runs == "eager" or {b.dtype for b in bindings} == {torch.float32}


class Embedded(nn.Module):
    """Equal blocks behind a layer that embeds their input."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(16, 32)
        self.blocks = nn.ModuleList([models.SelfAttention() for _ in range(4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.parametrize("compute", ["engine", "inductor"])
def test_the_first_of_equal_blocks_is_built_with_the_others(compute: Any) -> None:
    call: models.Call = Embedded().eval(), (torch.randn(1, 8, 16),), {}
    parallel = md.ContextParallel("cp", "ulysses", {"": {"x": md.Split(1)}})
    program = md.lower(md.capture(*call, mesh=md.Mesh(cp=2), parallel=parallel), placement="split")
    placed = place(program, "split", compute=compute)
    assert_computes_the_same(placed)
    middle = [part.digest for part in placed.parts[0] if part.runs == compute][1:-1]
    assert len(middle) == 3
    assert len(set(middle)) == 1
