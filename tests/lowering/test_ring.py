"""Ring attention: the blocks, what is emitted in which order, and the result on all ranks."""

from __future__ import annotations

import math
import operator

import graphs
import models
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

import torchtrt_md
from torchtrt_md.errors import ShardingError
from torchtrt_md.lowering import lower, ring
from torchtrt_md.lowering.attention_math import attention_with_lse, block_of, ring_attention_block
from torchtrt_md.lowering.ops import bound_args
from torchtrt_md.lowering.passes import PassContext, run_passes
from torchtrt_md.mesh import Mesh
from torchtrt_md.program import value_of
from torchtrt_md.verification import verify
from torchtrt_md.verification.simulate import simulate

md = torch.ops.torchtrt_md
PLAN = {"": {"x": torchtrt_md.Split(1)}, "out": torchtrt_md.Gather(1)}


def zigzag(x: Tensor, size: int, dim: int = 2) -> list[Tensor]:
    """What each rank has of the whole in the order of a causal ring."""
    chunks = x.chunk(2 * size, dim)
    return [torch.cat([chunks[rank], chunks[2 * size - 1 - rank]], dim) for rank in range(size)]


def firsts(parts: list[list[Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of rank 0."""
    q, k, v = (x[0] for x in parts)
    return q, k, v


def expand(graph: GraphModule, mesh: Mesh, placement: str = "split") -> int:
    return run_passes({"ring": ring.run}, graph, PassContext(mesh, {}, {}, placement))["ring"]


def ring_graph(q: Tensor, k: Tensor, v: Tensor, size: int, is_causal: bool = False) -> GraphModule:
    grouped = q.shape[1] != k.shape[1] and k.shape[1] != 1

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attended: Tensor = md.context_attention(q, k, v, is_causal, None, grouped, "ring", "cp", size)
        return attended

    return graphs.trace(forward, q, k, v)


# The whole road.


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_a_model_in_fp32(size: int, causal: bool, kv_heads: int) -> None:
    model, args, kwargs = models.attention(causal=causal, kv_heads=kv_heads, tokens=48)
    parallel = [torchtrt_md.ContextParallel("cp", "ring", PLAN)]
    program = torchtrt_md.capture(model, args, kwargs, mesh=Mesh(cp=size), parallel=parallel)
    lowered = lower(program, placement="split")
    assert (lowered.counts["ring"], lowered.counts["zigzag"]) == (1, 2 if causal else 0)
    report = verify(lowered, model, args, kwargs)
    assert report.error <= 1e-5
    assert report.structure_error <= 1e-11, "in fp64 nothing is narrower"


@pytest.mark.parametrize("causal", [False, True])
def test_a_model_in_bf16(causal: bool) -> None:
    model, args, kwargs = models.attention(torch.bfloat16, causal=causal, kv_heads=2, tokens=256)
    parallel = [torchtrt_md.ContextParallel("cp", "ring", PLAN)]
    program = torchtrt_md.capture(model, args, kwargs, mesh=Mesh(cp=4), parallel=parallel)
    report = verify(lower(program, placement="split"), model, args, kwargs)
    assert report.error <= 1.5 * report.dense_error
    assert report.structure_error <= 1e-11


def test_text_and_image_tokens() -> None:
    model, args, kwargs = models.flux(torch.bfloat16)
    program = torchtrt_md.capture(
        model, args, kwargs, mesh=Mesh(cp=4), parallel=[torchtrt_md.ContextParallel("cp", "ring")]
    )
    lowered = lower(program, placement="split")
    assert lowered.counts["ring"] == 3
    verify(lowered, model, args, kwargs)


# The graph.


def calls(graph: GraphModule) -> list[Node]:
    return [n for n in graph.graph.nodes if n.target in (md.permute_tensor.default, md.ring_attention.default)]


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_each_block_is_sent_on_before_it_is_attended_to(size: int) -> None:
    q = torch.randn(1, 4, 6, 8)
    graph = ring_graph(q, q[:, :2], q[:, :2], size)
    assert expand(graph, Mesh(cp=size)) == 1
    found = calls(graph)
    names = [str(n.target).split(".")[1] for n in found]
    assert names == ["permute_tensor", "ring_attention"] * (size - 1) + ["ring_attention"]
    sent, attended = found[0:-1:2], [*found[1:-1:2], found[-1]]
    assert [bound_args(n)["step"] for n in attended] == list(range(size))
    assert [bound_args(n)["shift"] for n in sent] == [1] * (size - 1)
    blocks: list[Node] = [bound_args(sent[0])["x"], *sent]
    for step, block in enumerate(blocks):
        assert list(value_of(block).shape) == [2, 2, 6, 8], "keys and values in one"
        keys, values = (bound_args(attended[step])[name] for name in ("k", "v"))
        assert (keys.args[0], values.args[0]) == (block, block)
        if step < size - 1:
            assert sent[step].args[0] is block
    first = list(graph.graph.nodes).index(attended[-1])
    between = {n.target for n in list(graph.graph.nodes)[list(graph.graph.nodes).index(sent[0]) : first]}
    assert between == {*(n.target for n in found), operator.getitem, torch.ops.aten.slice.Tensor}, "no merge between"


@pytest.mark.parametrize(
    ("heads", "kv_heads", "batch", "key_batch", "tokens", "key_tokens", "width"),
    [
        (4, 4, 2, 2, 3, 3, 4),
        (4, 2, 2, 2, 3, 3, 4),
        (6, 2, 1, 1, 2, 5, 6),
        (4, 1, 2, 2, 5, 3, 4),
        (2, 2, 2, 1, 3, 3, 4),
        (2, 2, 1, 2, 3, 3, 4),
    ],
)
@pytest.mark.parametrize("mesh", [Mesh(cp=3), Mesh(cp=2, tp=2), Mesh(tp=2, cp=2)], ids=str)
def test_it_is_dense_attention(
    mesh: Mesh, heads: int, kv_heads: int, batch: int, key_batch: int, tokens: int, key_tokens: int, width: int
) -> None:
    q = graphs.per_rank(mesh, batch, heads, tokens, 4)
    k = graphs.per_rank(mesh, key_batch, kv_heads, key_tokens, 4, seed=1)
    v = graphs.per_rank(mesh, key_batch, kv_heads, key_tokens, width, seed=2)
    size = mesh.axis_size("cp")
    graph = ring_graph(q[0], k[0], v[0], size)
    expand(graph, mesh)
    moved = [c[0] for c in graphs.collectives(graph)]
    assert moved == ["permute_tensor"] * (size - 1) * (1 if width == 4 else 2), "packed where one tensor holds both"
    assert value_of(next(iter(graph.graph.find_nodes(op="output"))).args[0][0]).shape[-1] == width
    expected = graphs.attended(mesh, "cp", q, k, v, is_causal=False)
    graphs.assert_same(graphs.run_ranks(graph, mesh, q, k, v), expected, exact=False)


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_causal_in_zigzag_order(size: int, kv_heads: int) -> None:
    mesh = Mesh(cp=size)
    q = torch.randn(2, 4, 4 * size, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, kv_heads, 4 * size, 8, dtype=torch.float64)
    parts = [zigzag(x, size) for x in (q, k, v)]
    graph = ring_graph(*firsts(parts), size, is_causal=True)
    assert expand(graph, mesh) == 1
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    graphs.assert_same(graphs.run_ranks(graph, mesh, *parts), [(x,) for x in zigzag(dense, size)], exact=False)


def test_causal_reads_the_coordinate_and_other_attention_does_not() -> None:
    q = torch.randn(1, 2, 4, 8)
    for is_causal in (False, True):
        graph = ring_graph(q, q, q, 2, is_causal)
        expand(graph, Mesh(cp=2))
        inputs = [n.target for n in graph.graph.find_nodes(op="placeholder")]
        assert inputs[3:] == (["coordinate_cp"] if is_causal else [])
        read = {str(bound_args(n)["coordinate"]) for n in calls(graph) if n.target is md.ring_attention.default}
        assert read == {"coordinate_cp" if is_causal else "None"}


def test_blocks_without_keys_are_finite_and_have_no_weight() -> None:
    """Rank 0 of a causal ring attends to nothing in half of its rows; and exponentials of the scores overflow."""
    size, scale = 4, 1e3
    mesh = Mesh(cp=size)
    q, k, v = torch.randn(3, 1, 2, 16, 8) * torch.tensor([scale, 1, 1]).view(3, 1, 1, 1, 1)
    parts = [zigzag(x, size) for x in (q, k, v)]
    _, lse = ring_attention_block(*firsts(parts), 0, 1, True, None, False, size)
    assert lse[:, :, :2].eq(-math.inf).all()
    assert lse[:, :, 2:].abs().max() > 100
    graph = ring_graph(*firsts(parts), size, is_causal=True)
    expand(graph, mesh)
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    for (result,), expected in zip(graphs.run_ranks(graph, mesh, *parts), zigzag(dense, size), strict=True):
        assert result.isfinite().all()
        torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)


def test_16_bit_parts_are_merged_in_float32() -> None:
    q = torch.randn(1, 2, 4, 8, dtype=torch.bfloat16)
    graph = ring_graph(q, q, q, 4)
    expand(graph, Mesh(cp=4))
    aten = torch.ops.aten
    for target, count in ((aten._softmax.default, 1), (aten.mul.Tensor, 4), (aten.add.Tensor, 3)):
        found = graph.graph.find_nodes(op="call_function", target=target)
        assert [value_of(n).dtype for n in found] == [torch.float32] * count
    (output,) = graph.graph.find_nodes(op="output")
    assert value_of(output.args[0][0]).dtype is torch.bfloat16


def test_scale_is_kept() -> None:
    mesh = Mesh(cp=2)
    q = graphs.per_rank(mesh, 1, 2, 3, 4)
    graph = graphs.trace(lambda q: md.context_attention(q, q, q, False, 0.25, False, "ring", "cp", 2), q[0])
    expand(graph, mesh)
    halves = [x * 0.5 for x in q]  # 1/sqrt(4) is 0.5: half of it by half the queries
    expected = graphs.attended(mesh, "cp", halves, q, q, is_causal=False)
    graphs.assert_same(graphs.run_ranks(graph, mesh, q), expected, exact=False)


def test_another_strategy_is_left() -> None:
    q = torch.randn(1, 2, 2, 4)
    graph = graphs.trace(lambda q: md.context_attention(q, q, q, True, None, False, "ulysses", "cp", 2), q)
    assert expand(graph, Mesh(cp=2)) == 0
    assert graphs.ops(graph) == ["torchtrt_md.context_attention"]


# In the engine.


def test_in_the_engine_it_stays_one_op() -> None:
    model, args, kwargs = models.attention()
    parallel = [torchtrt_md.ContextParallel("cp", "ring", PLAN)]
    program = torchtrt_md.capture(model, args, kwargs, mesh=Mesh(cp=4), parallel=parallel)
    lowered = lower(program)
    assert lowered.counts["ring"] == 0
    (node,) = lowered.graphs[0].graph.find_nodes(op="call_function", target=md.context_attention.default)
    assert bound_args(node)["strategy"] == "ring"
    verify(lowered, model, args, kwargs)


def test_causal_in_the_engine_is_refused() -> None:
    model, args, kwargs = models.attention(causal=True)
    parallel = [torchtrt_md.ContextParallel("cp", "ring", PLAN)]
    program = torchtrt_md.capture(model, args, kwargs, mesh=Mesh(cp=4), parallel=parallel)
    with pytest.raises(ShardingError, match="is causal, and what a causal ring in the engine attends to") as raised:
        lower(program)
    assert 'placement="split"' in raised.value.fix
    assert raised.value.at.startswith(f"{models.__file__}:")
    assert "scaled_dot_product_attention" in raised.value.at


@pytest.mark.parametrize("low", [-1e4, -1e9, torch.finfo(torch.float32).min, -math.inf])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [8, 7])
def test_queries_that_see_nothing_by_a_finite_mask(low: float, causal: bool, tokens: int) -> None:
    """They attend to all keys alike, as in PyTorch, whatever the example masked; by -inf to none."""

    class Masked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = torch.nn.Linear(16, 48), torch.nn.Linear(16, 16)

        def forward(self, x: Tensor, bias: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
            y: Tensor = self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))
            return y

    def bias(padding: slice) -> Tensor:
        hidden = torch.zeros(2, 1, tokens, tokens)
        hidden[1, :, :, padding] = low
        return torch.minimum(hidden, torch.full((tokens, tokens), low).triu(1)) if causal else hidden

    model, x = Masked().eval(), torch.randn(2, tokens, 16)
    parallel = torchtrt_md.ContextParallel(
        "cp", "ring", {"": {"x": torchtrt_md.Split(1)}, "out": torchtrt_md.Gather(1)}
    )
    none, left, whole = (bias(hidden) for hidden in (slice(0, 0), slice(0, 3), slice(None)))
    program = torchtrt_md.capture(model, (x, none), mesh=Mesh(cp=2), parallel=parallel)
    lowered = lower(program, placement="split")
    verify(lowered, model, (x, none))
    for hidden in (none, left, whole) if low > -math.inf else (none,):
        with torch.no_grad():
            for outputs in simulate(lowered, {"x": x, "bias": hidden}):
                torch.testing.assert_close(outputs[0], model(x, hidden), rtol=1e-5, atol=1e-5)


# One block.


@pytest.mark.parametrize("size", [1.0, 30.0, 1e3, 1e5])
def test_large_scores(size: float) -> None:
    """Equal ones, of which the dense model's softmax makes equal weights, however large they are."""
    q, v = torch.full((1, 1, 1, 16), size), torch.randn(1, 1, 64, 16)
    k = torch.full((1, 1, 64, 16), size)
    out, _ = attention_with_lse(q, k, v, False, None, False)
    torch.testing.assert_close(out[0, 0, 0], v.mean(2)[0, 0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_with_its_log_sum_exp(dtype: torch.dtype, is_causal: bool, scale: float | None) -> None:
    q, k, v = (torch.randn(2, h, 5, d, dtype=torch.float64).to(dtype) for h, d in ((4, 8), (2, 8), (2, 6)))
    out, lse = attention_with_lse(q, k, v, is_causal, scale, True)
    assert (out.dtype, lse.dtype) == (dtype, torch.promote_types(dtype, torch.float32))
    wide_q, wide_k, wide_v = q.double(), k.double().repeat_interleave(2, 1), v.double().repeat_interleave(2, 1)
    dense = F.scaled_dot_product_attention(wide_q, wide_k, wide_v, is_causal=is_causal, scale=scale)
    scores = wide_q @ wide_k.mT * (scale or 8**-0.5)
    if is_causal:
        scores = scores.masked_fill(torch.ones(5, 5).triu(1) > 0, -math.inf)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), dense, rtol=2 * rounding, atol=2 * rounding)
    rounding = torch.finfo(lse.dtype).eps
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=9 * rounding, atol=9 * rounding)


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_every_block_of_a_causal_ring(size: int) -> None:
    """Against all scores of the block, masked by the positions in the whole sequence."""
    q, k, v = torch.randn(3, 1, 2, 4 * size, 8, dtype=torch.float64)
    parts = [zigzag(x, size) for x in (q, k, v)]
    positions = zigzag(torch.arange(4 * size), size, 0)
    for rank in range(size):
        for step in range(size):
            source = (rank - step) % size
            mine, keys, values = parts[0][rank], parts[1][source], parts[2][source]
            out, lse = ring_attention_block(mine, keys, values, rank, step, True, None, False, size)
            attended = positions[rank][:, None] >= positions[source]
            scores = (mine @ keys.mT / math.sqrt(8)).masked_fill(~attended, -math.inf)
            torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(out, scores.softmax(-1).nan_to_num() @ values, rtol=1e-12, atol=1e-12)
            assert out.is_contiguous()
            assert lse.is_contiguous()
            if step:
                rows, columns, _ = block_of(mine, keys, values, rank, step, size)
                assert rows.shape[2] * columns.shape[2] == 4 * 2, "half of the block, on every rank"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize(("rank", "step", "is_causal"), [(0, 0, False), (0, 0, True), (1, 1, True), (0, 1, True)])
def test_on_a_gpu_as_in_math(dtype: torch.dtype, kv_heads: int, rank: int, step: int, is_causal: bool) -> None:
    q, k, v = (torch.randn(2, heads, 256, 64).to(dtype) for heads in (8, kv_heads, kv_heads))
    rest = (rank, step, is_causal, None, kv_heads != 8, 2)
    out, lse = ring_attention_block(q.cuda(), k.cuda(), v.cuda(), *rest)
    expected, expected_lse = ring_attention_block(q, k, v, *rest)
    assert (out.dtype, lse.dtype, out.is_contiguous(), lse.is_contiguous()) == (dtype, torch.float32, True, True)
    rounding = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.cpu(), expected, rtol=rounding, atol=rounding)
    torch.testing.assert_close(lse.cpu(), expected_lse, rtol=1e-3, atol=1e-3)
