"""Large sums over ranks are done in two halves of the tokens, and the model computes the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_processes import Ranks
from torch import Tensor, nn

import torchtrt_md as md
from torchtrt_md.lowering import halve_sums
from torchtrt_md.place import place
from torchtrt_md.place.partition import base_of
from torchtrt_md.program import ShardedProgram, outputs_of
from torchtrt_md.segment import Part
from torchtrt_md.verification.compare import relative_error

WIDTH, TOKENS = 16, 12
STYLES = {"up": "colwise", "down": "rowwise", "more": "colwise", "less": "rowwise"}
Body = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def small_sums_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halve_sums, "_LEAST", 1)


class Layers(nn.Module):
    """A sum over ranks, something, and another sum."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH, bias=False)
        self.more, self.less = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
        self.norm, self.body = nn.LayerNorm(WIDTH), body

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(self.up(x).relu())
        y: Tensor = x + self.less(self.more(self.norm(self.body(x))).relu())
        return y


def lowered(call: models.Call, mesh: md.Mesh, parallel: Any, **options: Any) -> ShardedProgram:
    program = md.lower(
        md.capture(*call, mesh=mesh, parallel=parallel), placement="split", **{"overlap": True, **options}
    )
    assert md.verify(program, *call).structure_error < 1e-11
    return program


def of_layers(body: Body = lambda x: x, shape: tuple[int, ...] = (TOKENS, WIDTH), **options: Any) -> ShardedProgram:
    call: models.Call = Layers(body).eval(), (torch.randn(shape),), {}
    return lowered(call, md.Mesh(tp=2), md.TensorParallel("tp", STYLES), **options)


def sums(program: ShardedProgram) -> list[tuple[int, ...]]:
    nodes = program.graphs[0].graph.find_nodes(op="call_function", target=torch.ops.torchtrt_md.all_reduce.default)
    return [tuple(node.meta["val"].shape) for node in nodes]


def products(part: Part) -> int:
    assert part.graph is not None
    targets = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return sum(len(part.graph.graph.find_nodes(op="call_function", target=target)) for target in targets)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_llama_has_a_product_beside_each_sum(ranks: int) -> None:
    program = lowered(models.llama(torch.float32), md.Mesh(tp=ranks), md.TensorParallel("tp"))
    count = program.counts["halve_sums"]
    assert count > 2
    parts = place(program, "split", compute="inductor").parts[0]
    summing = [i for i, part in enumerate(parts) if any(c.op == "all_reduce" for c in part.segment.collectives)][1:]
    assert len(summing) == 2 * count  # behind the first, of the embedding
    bare = 0
    for index in summing:
        (made,) = (b.source for b in parts[index].segment.outputs)
        beside = next(part for part in parts[index + 1 :] if part.runs == "inductor")
        bare += products(beside) == 0 or made in [b.source for b in beside.segment.inputs]
    assert bare == 1, "only the last has nothing left to run beside it"


def test_layers_are_compiled_as_often_as_one() -> None:
    model = md.lower(
        md.capture(*models.llama(torch.float32), mesh=md.Mesh(tp=2), parallel=md.TensorParallel("tp")),
        placement="split",
        overlap=True,
    )
    digests = [part.digest for part in place(model, "split", compute="inductor").parts[0] if part.runs == "inductor"]
    assert len(set(digests)) < len(digests)


@pytest.mark.parametrize(
    ("shape", "halves"),
    [
        ((TOKENS, WIDTH), [(6, WIDTH)] * 4),
        ((1, TOKENS, WIDTH), [(1, 6, WIDTH)] * 4),
        ((4, 3, WIDTH), [(2, 3, WIDTH)] * 4),
        ((1, 2, 3, WIDTH), [(1, 1, 3, WIDTH)] * 4),
    ],
)
def test_tokens_or_samples_are_halved(shape: tuple[int, ...], halves: list[tuple[int, ...]]) -> None:
    assert sums(of_layers(shape=shape)) == halves


@pytest.mark.parametrize("shape", [(11, WIDTH), (3, 4, WIDTH), (1, 1, WIDTH)])
def test_what_has_no_halves_stays_whole(shape: tuple[int, ...]) -> None:
    assert sums(of_layers(shape=shape)) == [shape] * 2


def test_small_sums_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halve_sums, "_LEAST", TOKENS * WIDTH * 4 + 1)
    assert sums(of_layers()) == [(TOKENS, WIDTH)] * 2


def test_only_what_can_overlap_is_halved() -> None:
    assert sums(of_layers(overlap=False)) == [(TOKENS, WIDTH)] * 2
    call: models.Call = Layers(lambda x: x).eval(), (torch.randn(TOKENS, WIDTH),), {}
    captured = md.capture(*call, mesh=md.Mesh(tp=2), parallel=md.TensorParallel("tp", STYLES))
    assert sums(md.lower(captured, overlap=True)) == [(TOKENS, WIDTH)] * 2  # in an engine


BODIES: dict[str, Body] = {
    "gelu": nn.functional.gelu,
    "heads": lambda x: x.view(x.shape[0], 4, 4).transpose(0, 1).softmax(-1).transpose(0, 1).reshape(x.shape),
    "chunks": lambda x: torch.cat([part * 2 for part in torch.split(x, [3, 6, 7], -1)], -1),
    "one of two": lambda x: x.chunk(2, -1)[1].repeat(1, 2),
    "norms": lambda x: nn.functional.layer_norm(x, (WIDTH,)),
    "table": lambda x: x * torch.arange(x.shape[0], dtype=x.dtype)[:, None],
    "by the length": lambda x: x / x.shape[0],
    "cumsum": lambda x: x.cumsum(0),
    "mean": lambda x: x - x.mean(0),
    "largest": lambda x: x / x.abs().amax(),
    "flip": lambda x: x.flip(0),
    "shift": lambda x: torch.cat([x[1:], x[:1]]),
    "neighbors": lambda x: x.view(-1, 3, WIDTH).sum(1, keepdim=True).expand(-1, 3, -1).reshape(x.shape),
    "pairs": lambda x: x.view(-1, 2, WIDTH).flip(1).reshape(x.shape),
    "attention": lambda x: nn.functional.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None])[
        0, 0
    ],
    "sort": lambda x: x.sort(-1).values,
    "sorted tokens": lambda x: x[x[:, 0].argsort(stable=True)],
    "product": lambda x: x @ (x.T @ x) / 100,
    "last": lambda x: x + x[-1],
    "where": lambda x: torch.where(x > x.median(0).values, x, 0.0),
}


@pytest.mark.parametrize("name", BODIES)
def test_what_mixes_tokens_gets_the_whole(name: str) -> None:
    assert of_layers(BODIES[name]).counts["halve_sums"] == 2


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(sorted(BODIES)), min_size=2, max_size=5))
def test_any_of_these_in_any_order(names: list[str]) -> None:
    def body(x: Tensor) -> Tensor:
        for name in names:
            x = BODIES[name](x) + x
        return x

    of_layers(body)


def test_a_result_that_a_sum_and_the_user_read() -> None:
    class Two(Layers):
        def forward(self, x: Tensor) -> Any:
            y = x + self.down(self.up(x).relu())
            first, second = torch.split(y, WIDTH // 2, -1)
            return y + self.less(self.more(torch.cat([second, second], -1))), first, y

    call: models.Call = Two(lambda x: x).eval(), (torch.randn(TOKENS, WIDTH),), {}
    program = lowered(call, md.Mesh(tp=2), md.TensorParallel("tp", STYLES))
    assert program.counts["halve_sums"] == 2
    assert [tuple(node.meta["val"].shape) for node in outputs_of(program.graphs[0])] == [
        (TOKENS, WIDTH),
        (TOKENS, WIDTH // 2),
        (TOKENS, WIDTH),
    ]


@pytest.mark.parametrize("strategy", ["ulysses", "allgather_kv", "ring"])
def test_beside_a_split_sequence(strategy: Any) -> None:
    call = models.flux(torch.float32)
    plan = {"transformer_blocks.*.ff.net.0.proj": "colwise", "transformer_blocks.*.ff.net.2": "rowwise"}
    parallel = [md.ContextParallel("cp", strategy), md.TensorParallel("tp", plan)]
    assert lowered(call, md.Mesh(cp=2, tp=2), parallel).counts["halve_sums"] > 0


def run_halves(rank: int, overlap: bool) -> tuple[Tensor, Tensor, int]:
    halve_sums._LEAST = 1
    model, args, kwargs = models.llama()
    with torch.no_grad():
        dense = model(*args, **kwargs).logits
        options: dict[str, Any] = {"compute": "inductor", "placement": "split", "overlap": overlap, "report": False}
        with md.compile(model, args, kwargs, mesh=md.Mesh(tp=2), parallel=md.TensorParallel("tp"), **options) as runner:
            found = [runner(*args, **kwargs).logits.clone() for _ in range(2)]
            sums = sum(c.op == "all_reduce" for s in runner.manifest.ranks[rank] for c in s.collectives)
    assert torch.equal(*found)
    return found[0], dense, sums


def test_two_ranks_compute_the_same_in_halves(ranks: Ranks) -> None:
    whole = ranks(run_halves, False)
    halves = ranks(run_halves, True)
    for one, other in zip(whole, halves, strict=True):
        assert not one.error, one.message
        assert not other.error, other.message
        (_, _, count), (found, dense, more) = one.value, other.value
        assert more > count
        assert relative_error(found, dense) < 1e-5


def test_a_view_that_passes_between_parts_is_found() -> None:
    """Queries are passed as attention reads them, so that its result need not be copied."""
    program = lowered(models.llama(torch.float32), md.Mesh(tp=2), md.TensorParallel("tp"))
    seen = 0
    for part in place(program, "split", compute="inductor").parts[0]:
        assert part.graph is not None
        for node in part.graph.graph.find_nodes(op="call_function", target=torch.ops.torchtrt_md.attention.default):
            batch, heads, tokens, width = node.args[0].meta["val"].shape
            assert tuple(base_of(node.args[0]).meta["val"].shape) == (batch, tokens, heads, width)
            seen += 1
    assert seen
