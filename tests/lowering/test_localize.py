"""From the whole to what a rank holds: the marks, the few arguments that change, and the net under the rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import split_functions as sf
import torch
import torch.nn.functional as F
from split_functions import gather, md, shard
from torch import Tensor, nn

import torchtrt_md
from torchtrt_md.errors import ShardingError
from torchtrt_md.lowering import localize, lower
from torchtrt_md.lowering.sharding import Sharded
from torchtrt_md.verification.simulate import simulate

aten = torch.ops.aten
torch.manual_seed(0)
X, ROW = torch.randn(2, 8, 6), torch.randn(6)
NOT_COMPUTED = "cannot be computed of what a rank holds"


def calls(graph: torch.fx.GraphModule) -> list[str]:
    return [str(n.target).split(".")[1] for n in graph.graph.nodes if n.op == "call_function"]


def test_marks_become_shard_and_gather() -> None:
    graph = sf.trace(lambda x: gather(shard(x, -2).view(2, 8, 2, 3)), X)
    (split,) = graph.graph.find_nodes(op="call_function", target=md.split_sequence.default)
    assert split.meta["val"].shape == (2, 8, 6), "a mark leaves the value whole"
    sf.analyze(graph)
    assert calls(graph) == ["shard", "view", "all_gather"]
    shapes = [list(n.meta["val"].shape) for n in graph.graph.nodes if n.op == "call_function"]
    assert shapes == [[2, 4, 6], [2, 4, 2, 3], [2, 8, 2, 3]]
    assert sf.returned(graph)[0].args[1:] == (1, "cp", 2)


def test_what_is_the_same_everywhere_is_cut_and_not_looked_up() -> None:
    def model(x: Tensor, row: Tensor) -> Tensor:
        return x * row.expand(x.shape) + torch.full(x.shape, 2.0) + row[None, None].expand(2, 8, 6)

    graph = sf.trace(lambda x, row: model(shard(x), row), X, ROW)
    sf.analyze(graph)
    assert calls(graph).count("shard") == 1, "that of x"
    sf.check_claims(graph, [X, ROW], [model(X, ROW)])


def test_an_example_that_happens_to_be_expanded_is_not_taken_to_be_the_same_everywhere() -> None:
    def forward(x: Tensor, y: Tensor) -> Tensor:
        return shard(x) + y[None]

    graph = sf.trace(forward, X, ROW.expand(8, 6))
    sf.analyze(graph)
    assert calls(graph).count("shard") == 2
    sf.check_claims(graph, [X, X[0]], [X + X[0]])


def test_one_part_of_a_table_for_all_its_uses() -> None:
    graph = sf.trace(lambda x, y: (shard(x) + y) * y.sin() + y, X, X[0])
    sf.analyze(graph)
    assert calls(graph).count("shard") == 3, "x, the table once for two uses, and its sine"


@pytest.mark.parametrize(
    ("model", "dim"),
    [
        (lambda x: x.view(4, 2, 4, 6).squeeze(1).squeeze().cumsum(2), 1),  # one row on each rank
        (lambda x: x.view(4, 2, 4, 6).flip(2) * torch.arange(2)[:, None, None], 1),
        (lambda x: F.group_norm(x, 4), 0),
        (lambda x: torch.cat([x, x], 1).split_with_sizes([8, 8], 1)[1], 1),
        (lambda x: aten.narrow_copy(torch.cat([x, x], 1), 1, 8, 8), 1),
    ],
)
def test_sizes_and_positions(model: Callable[[Tensor], Tensor], dim: int) -> None:
    x = X.repeat(2, 1, 1)
    graph = sf.trace(lambda x: model(shard(x, dim)), x)
    sf.analyze(graph)
    assert any(sf.check_claims(graph, [x], [model(x)]))


@pytest.mark.parametrize(
    ("op", "forward", "message"),
    [
        (aten.view, lambda x: shard(x).view(2, 8, 2, 3), NOT_COMPUTED),
        (aten.split_with_sizes, lambda x: shard(x).split_with_sizes([8], 1)[0], NOT_COMPUTED),
        (aten.expand, lambda x: shard(x).expand(3, 2, 8, 6), NOT_COMPUTED),
        (aten.slice, lambda x: torch.cat([shard(x), shard(x)], 1)[:, :8], "would be its part of the whole"),
    ],
)
def test_a_number_that_is_forgotten_is_found(
    op: Any, forward: Callable[[Tensor], Tensor], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(localize._ARGUMENTS, op)
    graph = sf.trace(forward, X)
    with pytest.raises(ShardingError, match=message):
        sf.analyze(graph)


class Lengths(nn.Module):
    """What a local length would make wrong, in one model: each term by another use of the length."""

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        positions = torch.arange(length, dtype=x.dtype)
        x = x / length + positions[:, None] + x.new_ones(x.shape).sum(1, keepdim=True) / x.numel()
        x = x + torch.linspace(0, 1, x.size(1))[None, :, None] * len(x[0])
        rows = x.view(batch, 2, -1, width)
        x = (rows * torch.zeros(length).add(1).cumsum(0).view(2, -1, 1)).cumsum(2).view(x.shape)
        return x[:, :length] + x[:, -length:] if length > 4 else x


@pytest.mark.parametrize("strategy", ["ulysses", "ring"])
def test_no_local_length_enters_as_a_number(strategy: Any) -> None:
    model, x = Lengths(), torch.randn(2, 8, 6, dtype=torch.float64)
    parallel = torchtrt_md.ContextParallel("cp", strategy, {"": {"x": torchtrt_md.Split(1)}})
    program = lower(torchtrt_md.capture(model, (x,), mesh=torchtrt_md.Mesh(cp=2), parallel=parallel))
    assert program.outputs[0].shape == (2, 8, 6)
    for rank, (out,) in enumerate(simulate(program, {"x": x})):
        torch.testing.assert_close(out, model(x).chunk(2, 1)[rank])


def test_a_causal_ring_gives_each_rank_the_positions_of_its_chunks() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            x = x * torch.arange(x.shape[1], dtype=x.dtype)[:, None].cos()
            q = x.view(*x.shape[:2], 2, -1).transpose(1, 2)
            x = F.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).flatten(2)
            out: Tensor = self.out(x)
            return out

    model, x = Model(), torch.randn(1, 16, 8, dtype=torch.float64)
    plan = {"": {"x": torchtrt_md.Split(1)}, "out": torchtrt_md.Gather(1)}
    parallel = torchtrt_md.ContextParallel("cp", "ring", plan)
    captured = torchtrt_md.capture(model, (x,), mesh=torchtrt_md.Mesh(cp=4), parallel=parallel)
    program = lower(captured, placement="split")
    assert program.counts["zigzag"] == 3, "x, the table of positions, and the way back"
    for (out,) in simulate(program, {"x": x}):
        torch.testing.assert_close(out, model(x))


def test_parts_of_a_table_for_concatenated_parts() -> None:
    def model(t: Tensor, x: Tensor, table: Tensor) -> Tensor:
        return torch.cat([t, x], 1) * table

    text, table = torch.randn(2, 4, 6), torch.randn(12, 1)
    graph = sf.trace(lambda t, x, table: model(shard(t), shard(x), table), text, X, table)
    with pytest.raises(ShardingError, match="2 concatenated parts"):
        sf.analyze(graph)

    def both(t: Tensor, x: Tensor, table: Tensor) -> list[Tensor]:
        return list(model(t, x, table).split_with_sizes([4, 8], 1))

    graph = sf.trace(lambda t, x, table: both(shard(t), shard(x), table), text, X, table)
    sf.analyze(graph)
    claims = sf.check_claims(graph, [text, X, table], both(text, X, table))
    assert claims == [Sharded(1, (2,)), Sharded(1, (4,))]


class LinearBehindAGather(nn.Module):
    """Of a batch, a linear layer views tokens and batch as one dim."""

    def __init__(self, uniform: bool) -> None:
        super().__init__()
        self.uniform, self.split, self.gather = uniform, nn.Identity(), nn.Identity()
        self.inner, self.linear = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        given = x.new_ones(x.shape) if self.uniform else x
        result: Tensor = self.linear(self.gather(torch.relu(self.inner(self.split(given)))))
        return result


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("placement", ["engine", "split"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_batch_of_sequences_that_the_ranks_do_not_divide(batch: int, placement: Any, uniform: bool) -> None:
    torch.manual_seed(0)
    model, x = LinearBehindAGather(uniform).eval(), torch.randn(batch, 11, 6)
    plan = {"split": {0: torchtrt_md.Split(1, output=True)}, "gather": torchtrt_md.Gather(1)}
    program = torchtrt_md.capture(
        model, (x,), mesh=torchtrt_md.Mesh(cp=3), parallel=torchtrt_md.ContextParallel("cp", "ulysses", plan)
    )
    assert torchtrt_md.verify(lower(program, placement=placement), model, (x,)).structure_error <= 1e-12
