"""The last look refuses what the build stage would have to guess at."""

from __future__ import annotations

from collections.abc import Callable

import graphs
import pytest
import torch
from torch import Tensor

from torchtrt_md.errors import CollectiveError
from torchtrt_md.lowering import validate
from torchtrt_md.lowering.passes import PassContext
from torchtrt_md.mesh import Mesh

MESH = Mesh(cp=2, tp=2)
md = torch.ops.torchtrt_md


def test_a_lowered_graph_passes_as_it_is() -> None:
    def forward(x: Tensor) -> list[Tensor]:
        return [
            md.all_reduce(md.all_gather(x, 0, "tp", 2), "sum", "cp", 2),
            md.attention(x, x, x, None, True, None, False),
        ]

    graph = graphs.trace(forward, torch.randn(1, 2, 3, 4))
    before = graphs.ops(graph)
    assert graphs.rewrite(validate.run, graph, MESH) == 0
    assert graphs.ops(graph) == before


def over_another_size(x: Tensor) -> Tensor:
    gathered: Tensor = md.all_gather(x, 0, "cp", 4)
    return gathered


def over_no_axis(x: Tensor) -> Tensor:
    gathered: Tensor = md.all_gather(x, 0, "ep", 2)
    return gathered


def shard(x: Tensor) -> Tensor:
    mine: Tensor = md.shard(x, 0, "cp", 2)
    return mine


def context_attention(x: Tensor, strategy: str = "ulysses", size: int = 2) -> Tensor:
    q = x.view(1, 2, 2, 4)
    attended: Tensor = md.context_attention(q, q, q, False, None, False, strategy, "cp", size)
    return attended


def ring_over_another_size(x: Tensor) -> Tensor:
    return context_attention(x, "ring", 4)


def functional(x: Tensor) -> Tensor:
    reduced: Tensor = torch.ops._c10d_functional.all_reduce(x, "sum", "0")
    return reduced


@pytest.mark.parametrize(
    ("call", "part"),
    [
        (over_another_size, "over 4 ranks of axis 'cp', which has 2 in Mesh(cp=2, tp=2)"),
        (over_no_axis, "over 2 ranks of axis 'ep', which has none in Mesh(cp=2, tp=2)"),
        (shard, "is still torchtrt_md.shard"),
        (ring_over_another_size, "over 4 ranks of axis 'cp', which has 2 in Mesh(cp=2, tp=2)"),
        (context_attention, "is still torchtrt_md.context_attention"),
        (functional, "is still _c10d_functional."),
    ],
)
def test_refused(call: Callable[[Tensor], Tensor], part: str) -> None:
    def forward(x: Tensor) -> Tensor:
        return call(x * 2)

    with graphs.fake_launch(MESH):
        graph = graphs.trace(forward, torch.randn(4, 4))
    with pytest.raises(CollectiveError) as raised:
        graphs.rewrite(validate.run, graph, MESH)
    assert part in raised.value.problem
    assert raised.value.at.startswith(f"{__file__}:")
    assert raised.value.at.endswith(" in forward: return call(x * 2)")


def test_a_ring_may_stay_in_the_engine_only() -> None:
    graph = graphs.trace(lambda x: context_attention(x, "ring"), torch.randn(4, 4))
    assert validate.run(graph, PassContext(MESH, {}, {}, "engine")) == 0
    with pytest.raises(CollectiveError, match=r"is still torchtrt_md\.context_attention"):
        validate.run(graph, PassContext(MESH, {}, {}, "split"))
