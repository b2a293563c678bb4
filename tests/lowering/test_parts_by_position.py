"""Parts of a sequence that are computed on apart and joined again may end anywhere in a rank's part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchtrt_md as md
from torchtrt_md.errors import ShardingError

TOKENS, WIDTH = 12, 8
Body = Callable[[Tensor, Tensor], Tensor]


class Model(nn.Module):
    def __init__(self, body: Body) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.out = body, nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.randn(WIDTH), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.view(*y.shape[:2], 4, 2).transpose(1, 2) for y in (x, self.body(x, self.scale), x))
        y: Tensor = self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y


def lowered(body: Body, ranks: int = 2, strategy: Any = "ulysses", tokens: int = TOKENS) -> md.ShardedProgram:
    model, x = Model(body).eval(), torch.randn(2, tokens, WIDTH)
    plan = {"": {"x": md.Split(1)}, "out": md.Gather(1)}
    captured = md.capture(model, (x,), {}, mesh=md.Mesh(cp=ranks), parallel=md.ContextParallel("cp", strategy, plan))
    program = md.lower(captured, placement="split")
    assert md.verify(program, model, (x,), {}).structure_error < 1e-11
    return program


@pytest.mark.parametrize("strategy", ["ulysses", "allgather_kv", "ring"])
@pytest.mark.parametrize("end", [1, 6, 7])
@pytest.mark.parametrize(("ranks", "tokens"), [(2, 12), (2, 13), (4, 14)])
def test_a_border_anywhere(strategy: str, end: int, ranks: int, tokens: int) -> None:
    program = lowered(lambda x, s: torch.cat([x[:, :end] * s, x[:, end:]], 1), ranks, strategy, tokens)
    assert program.counts["parts_by_position"] == 1


BODIES: dict[str, Body] = {
    "several ops": lambda x, s: torch.cat([(x[:, :5] * s + 1).sigmoid(), x[:, 5:] / 2], 1),
    "three parts": lambda x, s: torch.cat([x[:, :3] * s, x[:, 3:7], -x[:, 7:]], 1),
    "one twice": lambda x, s: torch.cat([x[:, :5] * x[:, :5], x[:, 5:]], 1),
    "a division": lambda x, s: torch.cat([x[:, :5], x[:, 5:] / x[:, 5:].abs()], 1),
    "a scale of a sample": lambda x, s: torch.cat([x[:, :5] * s.view(2, 1, 4).repeat(1, 1, 2), x[:, 5:]], 1),
    "with where": lambda x, s: torch.cat([torch.where(x[:, :5] > 0, s, 0.0), x[:, 5:]], 1),
    "twice": lambda x, s: (lambda y: torch.cat([y[:, :2], y[:, 2:] + 1], 1))(torch.cat([x[:, :5] * s, x[:, 5:]], 1)),
}


@pytest.mark.parametrize("name", BODIES)
def test_what_is_done_to_parts(name: str) -> None:
    assert lowered(BODIES[name]).counts["parts_by_position"] == (2 if name == "twice" else 1)


def squared(x: Tensor, times: int) -> Tensor:
    for _ in range(times):
        x = x * x.sigmoid()
    return x


def test_a_table_of_fewer_dims_is_no_part() -> None:
    def body(x: Tensor, scale: Tensor) -> Tensor:
        y = x.unsqueeze(2) * torch.arange(3)[:, None].sin()
        return torch.cat([y, y + torch.arange(3.0)[:, None].cos()], 2).sum(2)

    assert lowered(body).counts["parts_by_position"] == 0


@pytest.mark.parametrize("end", [1, 5])
def test_what_many_ops_read_is_done_once(end: int) -> None:
    program = lowered(lambda x, s: torch.cat([squared(x[:, :end], 40), x[:, end:]], 1))
    assert program.counts["parts_by_position"] == 1
    (graph, _), *_ = program.distinct()
    assert len(graph.graph.find_nodes(op="call_function", target=torch.ops.aten.sigmoid.default)) == 40


def test_blocks_share_which_positions_are_in_front() -> None:
    program = lowered(BODIES["twice"])
    (graph, _), *_ = program.distinct()
    ranges = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.arange.default)
    again = lowered(lambda x, s: torch.cat([(y := BODIES["several ops"](x, s))[:, :5] * s, y[:, 5:]], 1))
    (other, _), *_ = again.distinct()
    assert len(ranges) == 2
    assert len(other.graph.find_nodes(op="call_function", target=torch.ops.aten.arange.default)) == 1


@pytest.mark.parametrize(
    "body",
    [
        lambda x, s: torch.cat([x[:, :5].cumsum(1), x[:, 5:]], 1),
        lambda x, s: torch.cat([x[:, 5:] * s, x[:, :5]], 1),
        lambda x, s: torch.cat([x[:, :5] * s, x[:, 6:], x[:, :1]], 1),
        lambda x, s: torch.cat([x[:, :5] * x[:, 5:10], x[:, 5:]], 1),
        lambda x, s: torch.cat([x[:, :5] * torch.arange(5)[:, None], x[:, 5:]], 1),
        lambda x, s: torch.cat([x[:, ::2] * s, x[:, 1::2]], 1),
    ],
)
def test_what_mixes_positions_is_refused_as_before(body: Body) -> None:
    with pytest.raises(ShardingError, match="shard"):
        lowered(body)


def test_a_width_in_parts_stays_as_it_is() -> None:
    program = lowered(lambda x, s: torch.cat([x[..., :3] * 2, x[..., 3:]], -1))
    assert program.counts["parts_by_position"] == 0


def test_a_program_that_splits_no_sequence_stays_as_it_is() -> None:
    model = Model(BODIES["several ops"]).eval()
    captured = md.capture(
        model,
        (torch.randn(2, TOKENS, WIDTH),),
        {},
        mesh=md.Mesh(tp=2),
        parallel=md.TensorParallel("tp", {"out": "colwise_rep"}),
    )
    assert md.lower(captured).counts["parts_by_position"] == 0
