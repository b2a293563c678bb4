"""The three rules of every op of the IR against each other: shapes, gloo processes, and the simulator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import graphs
import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from rank_processes import warm
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from torchtrt_md.capture.torch_private import FakeTensorMode
from torchtrt_md.errors import CollectiveError, MeshError
from torchtrt_md.lowering import PASSES, functional_collectives, ops
from torchtrt_md.lowering.passes import PassContext, run_passes
from torchtrt_md.mesh import Mesh

# torch 2.14 renamed what 2.11 has.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated. Please use.*single:FutureWarning")
md = torch.ops.torchtrt_md
wait = torch.ops._c10d_functional.wait_tensor
MESH = Mesh(cp=2, one=1)
DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool)


@dataclass(frozen=True)
class Case:
    """One call of an op, on operands of this shape; ``args`` are those between operand and axis."""

    op: str
    args: tuple[Any, ...]
    shape: tuple[int, ...] = (4, 2, 6)
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    wire: str = ""

    def __str__(self) -> str:
        arguments = ",".join(map(str, self.args))
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op}({arguments}) {dtype}{list(self.shape)} {self.layout} {self.wire}".rstrip()

    def operands(self) -> list[Tensor]:
        xs = graphs.per_rank(MESH, *self.shape, dtype=self.dtype, seed=len(self.args))
        if self.layout == "channels last":
            return [x.contiguous(memory_format=torch.channels_last) for x in xs]
        if self.layout == "permuted":
            return [x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim()))) for x in xs]
        return xs

    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor = getattr(md, self.op)(x, *self.args, "cp", 2, *([self.wire] if self.wire else []))
        return result


def _moves() -> Iterator[Case]:
    dims = (0, 1, 2, -1, -2, -3)
    for dim in dims:
        yield Case("all_gather", (dim,))
        yield Case("reduce_scatter", ("sum", dim))
        yield from (Case("all_to_all", (dim, concat)) for concat in (*range(3), dim, -1))
    yield from (Case("broadcast", (src,)) for src in (0, 1))
    yield from (Case("permute_tensor", (shift,)) for shift in (-1, 0, 1, 2, 3))


def _cases() -> list[Case]:
    cases = list(_moves())
    samples = [
        ("all_gather", (1,)),
        ("all_to_all", (2, 0)),
        ("all_to_all", (1, 1)),
        ("broadcast", (1,)),
        ("permute_tensor", (1,)),
        ("all_reduce", ("max",)),
        ("reduce_scatter", ("min", 2)),
    ]
    for op, args in samples:
        cases += [
            Case(op, args, dtype=dtype, layout=layout) for dtype in DTYPES for layout in ("contiguous", "permuted")
        ]
        cases += [Case(op, args, (1, 2, 2)), Case(op, args, (2, 2, 4, 3), layout="channels last")]
    for reduction in ops.REDUCE_OPS:
        for dtype in (torch.float32, torch.bfloat16, torch.int32):
            if reduction == "avg" and dtype is torch.int32:
                continue
            cases.append(Case("all_reduce", (reduction,), (5,), dtype))
            cases.append(Case("reduce_scatter", (reduction, 1), (3, 4), dtype, "permuted"))
    cases += [
        Case("all_gather", (dim,), shape) for shape in ((0, 3), (3, 0), (1,), (3, 1, 1)) for dim in range(len(shape))
    ]
    cases += [Case("all_to_all", (0, 1), (2, 0)), Case("all_reduce", ("sum",), (0,))]
    cases += [Case("permute_tensor", (1,), shape) for shape in ((0, 3), (1,), (5,))]
    packed = [("all_gather", (1,)), ("all_to_all", (1, 0)), ("all_to_all", (0, 0)), ("permute_tensor", (1,))]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        cases += [
            Case(op, args, dtype=dtype, layout=layout, wire="float8")
            for op, args in packed
            for layout in ("contiguous", "permuted")
        ]
    cases += [Case(op, args, (0, 2, 6), wire="float8") for op, args in packed]
    return list(dict.fromkeys(cases))


CASES = _cases()

# PyTorch's own collectives on x [4, 6], real, against what they are rewritten to.
FUNCTIONAL: dict[str, Callable[[Tensor, dist.ProcessGroup], Tensor]] = {
    "all_reduce": lambda x, g: funcol.all_reduce(x, "avg", g),
    "all_gather": lambda x, g: funcol.all_gather_tensor(x, 0, g),
    "all_gather on a dim": lambda x, g: funcol.all_gather_tensor(x, 1, g),
    "reduce_scatter": lambda x, g: funcol.reduce_scatter_tensor(x, "sum", 0, g),
    "reduce_scatter on a dim": lambda x, g: funcol.reduce_scatter_tensor(x, "max", -1, g),
    "all_to_all": lambda x, g: funcol.all_to_all_single(x, None, None, g),
    "all_to_all, sizes given": lambda x, g: funcol.all_to_all_single(x, [2, 2], [2, 2], g),
    "broadcast 0": lambda x, g: funcol.broadcast(x, 0, g),
    "broadcast 1": lambda x, g: funcol.broadcast(x, 1, g),
    "shard_dim_alltoall": lambda x, g: torch.ops._dtensor.shard_dim_alltoall(x, 0, 1, g.group_name),
    "shard_dim_alltoall back": lambda x, g: torch.ops._dtensor.shard_dim_alltoall(x, 1, 0, g.group_name),
}


@dataclass(frozen=True)
class Attention:
    """q [batch, heads, tokens, width] of each rank; k and v of ``kv_heads``, v of ``v_width``."""

    heads: int
    kv_heads: int
    is_causal: bool
    v_width: int = 4
    batch: int = 2
    tokens: int = 3

    def operands(self, mesh: Mesh) -> list[list[Tensor]]:
        shapes = [(self.heads, 4), (self.kv_heads, 4), (self.kv_heads, self.v_width)]
        return [
            graphs.per_rank(mesh, self.batch, heads, self.tokens, width, seed=seed)
            for seed, (heads, width) in enumerate(shapes)
        ]

    def call(self, q: Tensor, k: Tensor, v: Tensor, strategy: str, size: int) -> Tensor:
        result: Tensor = md.context_attention(
            q, k, v, self.is_causal, None, self.heads != self.kv_heads, strategy, "cp", size
        )
        return result


ATTENTIONS = [
    Attention(heads, kv_heads, is_causal, v_width)
    for heads, kv_heads in ((8, 8), (16, 8))
    for is_causal in (False, True)
    for v_width in (4, 6)
]


@dataclass(frozen=True)
class Ring:
    """One step of a ring of two, on q [2, 4, 6, 8], k [2, kv_heads, 6, 8] and v [2, kv_heads, 6, v_width]."""

    step: int
    is_causal: bool
    kv_heads: int = 2
    v_width: int = 8
    dtype: torch.dtype = torch.float32

    def operands(self) -> list[list[Tensor]]:
        shapes = [(4, 8), (self.kv_heads, 8), (self.kv_heads, self.v_width)]
        return [
            graphs.per_rank(MESH, 2, heads, 6, width, dtype=self.dtype, seed=seed)
            for seed, (heads, width) in enumerate(shapes)
        ]

    def call(self, q: Tensor, k: Tensor, v: Tensor, coordinate: Tensor) -> list[Tensor]:
        given = coordinate if self.is_causal else None
        return list(md.ring_attention(q, k, v, given, self.step, self.is_causal, 0.2, self.kv_heads != 4, 2))


RINGS = [
    Ring(step, is_causal, kv_heads, v_width, dtype)
    for step in (0, 1)
    for is_causal in (False, True)
    for kv_heads, v_width in ((4, 8), (2, 6))
    for dtype in (torch.float64, torch.float32, torch.bfloat16)
]


def rank_process(rank: int, folder: str) -> None:
    """Everything that is run on a real process group, into a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    device_mesh = MESH.to_device_mesh("cpu")
    results: dict[str, Any] = {}
    with ops.use_device_mesh(device_mesh):
        for case in CASES:
            results[str(case)] = case(case.operands()[rank])
        for attention in ATTENTIONS:
            q, k, v = (x[rank] for x in attention.operands(MESH))
            results[str(attention)] = attention.call(q, k, v, "ulysses", 2)
        coordinate = torch.tensor([rank], dtype=torch.int32)
        for ring in RINGS:
            q, k, v = (x[rank] for x in ring.operands())
            results[str(ring)] = ring.call(q, k, v, coordinate)
        x = torch.arange(24.0).view(4, 6) + 100 * rank
        for name, call in FUNCTIONAL.items():
            results[name] = wait(call(x, device_mesh.get_group("cp")))
        # The group of rank 1 is [1]: a source is a position in it, not a rank of the launch.
        results["alone"] = ops.broadcast(x, 0, "one", 1)
        results["alone, functional"] = wait(funcol.broadcast(x, 0, device_mesh.get_group("one")))
        results["shard"] = [ops.shard(x, dim, "cp", 2) for dim in (0, 1, -1)]
        try:
            ops.all_reduce(x, "sum", "cp", 4)
        except MeshError as error:
            results["other size"] = str(error)
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def eager(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("gloo")
    warm()
    start_processes(rank_process, (str(folder),), nprocs=2, start_method="forkserver")  # type: ignore[no-untyped-call]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def fake_result(case: Case) -> Tensor:
    with FakeTensorMode() as mode:
        return case(mode.from_tensor(case.operands()[0]))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_three_rules(case: Case, eager: list[dict[str, Any]]) -> None:
    xs = case.operands()
    claimed = fake_result(case)
    simulated = graphs.run_ranks(graphs.trace(case, xs[0]), MESH, xs)
    for rank in range(2):
        (result,) = simulated[rank]
        real = eager[rank][str(case)]
        for other in (claimed, real):
            assert (other.dtype, other.shape) == (result.dtype, result.shape)
        assert [t.is_contiguous() for t in (claimed, real, result)] == [True] * 3
        torch.testing.assert_close(result, real, rtol=0, atol=0)


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_pytorchs_own_collectives(name: str, eager: list[dict[str, Any]]) -> None:
    xs = [torch.arange(24.0).view(4, 6) + 100 * rank for rank in range(2)]
    with graphs.fake_launch(MESH) as launch:
        graph = graphs.trace(lambda x: FUNCTIONAL[name](x, launch.get_group("cp")), xs[0])
        graphs.rewrite(functional_collectives.run, graph, MESH, graphs.groups_of(launch))
    graphs.assert_same(graphs.run_ranks(graph, MESH, xs), [(eager[rank][name],) for rank in range(2)])


def test_a_source_is_a_position_in_the_group(eager: list[dict[str, Any]]) -> None:
    for rank in range(2):
        x = torch.arange(24.0).view(4, 6) + 100 * rank
        assert eager[rank]["alone"].equal(x)
        assert eager[rank]["alone, functional"].equal(x)


def test_shard(eager: list[dict[str, Any]]) -> None:
    for rank in range(2):
        x = torch.arange(24.0).view(4, 6) + 100 * rank
        for result, dim in zip(eager[rank]["shard"], (0, 1, -1), strict=True):
            assert result.equal(x.chunk(2, dim)[rank])


def test_a_graph_for_more_ranks_than_the_group_has(eager: list[dict[str, Any]]) -> None:
    assert "made for 4 ranks on axis 'cp', the mesh has 2" in eager[0]["other size"]


def test_without_a_mesh() -> None:
    with pytest.raises(MeshError, match="a collective on axis 'cp' was run with no mesh"):
        ops.all_reduce(torch.ones(2), "sum", "cp", 2)


@pytest.mark.parametrize("attention", ATTENTIONS, ids=str)
def test_context_attention_is_dense_attention(attention: Attention, eager: list[dict[str, Any]]) -> None:
    q, k, v = attention.operands(MESH)
    expected = graphs.attended(MESH, "cp", q, k, v, attention.is_causal)
    graphs.assert_same([(eager[rank][str(attention)],) for rank in range(2)], expected, exact=False)


@pytest.mark.parametrize("attention", ATTENTIONS, ids=str)
def test_context_attention_of_all_ranks_at_once(attention: Attention, eager: list[dict[str, Any]]) -> None:
    """As it stays for an engine that does the ring itself."""
    xs = attention.operands(MESH)
    graph = graphs.trace(lambda q, k, v: attention.call(q, k, v, "ring", 2), *(x[0] for x in xs))
    simulated = graphs.run_ranks(graph, MESH, *xs)
    graphs.assert_same(simulated, [(eager[rank][str(attention)],) for rank in range(2)], exact=False)


@pytest.mark.parametrize("case", RINGS, ids=str)
def test_three_rules_of_a_step_of_a_ring(case: Ring, eager: list[dict[str, Any]]) -> None:
    xs, coordinates = case.operands(), [torch.tensor([rank], dtype=torch.int32) for rank in range(2)]
    graph = graphs.trace(case.call, *(x[0] for x in xs), coordinates[0])
    (node,) = graph.graph.find_nodes(op="call_function", target=md.ring_attention.default)
    claimed = node.meta["val"]
    for rank, results in enumerate(graphs.run_ranks(graph, MESH, *xs, coordinates)):
        for claim, result, real in zip(claimed, results, eager[rank][str(case)], strict=True):
            assert (claim.dtype, claim.shape) == (result.dtype, result.shape)
            assert [t.is_contiguous() for t in (claim, real, result)] == [True] * 3
            torch.testing.assert_close(result, real, rtol=0, atol=0)


EXPANSION = ("ulysses", "allgather_kv", "merge_exchanged", "cancel_exchanged", "leading_dim", "rank_input", "validate")
MESHES = [Mesh(cp=2), Mesh(cp=4), Mesh(cp=8), Mesh(cp=2, tp=2), Mesh(tp=2, cp=2)]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("strategy", ["ulysses", "allgather_kv"])
@pytest.mark.parametrize("attention", ATTENTIONS, ids=str)
def test_lowered_context_attention_is_dense_attention(attention: Attention, strategy: str, mesh: Mesh) -> None:
    q, k, v = attention.operands(mesh)
    size = mesh.axis_size("cp")
    graph = graphs.trace(lambda q, k, v: attention.call(q, k, v, strategy, size), q[0], k[0], v[0])
    counts = run_passes({name: PASSES[name] for name in EXPANSION}, graph, PassContext(mesh, {}, {}))
    assert counts[strategy] == 1
    assert all(0 in c for c in graphs.collectives(graph)), "all on dim 0"
    expected = graphs.attended(mesh, "cp", q, k, v, attention.is_causal)
    graphs.assert_same(graphs.run_ranks(graph, mesh, q, k, v), expected, exact=False)


OPERANDS: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], bool]] = {
    "self": ((2, 4, 3, 8), (2, 4, 3, 8), (2, 4, 3, 8), False),
    "cross": ((2, 4, 3, 8), (2, 4, 5, 8), (2, 4, 5, 6), False),
    "grouped": ((1, 6, 3, 8), (1, 2, 5, 8), (1, 2, 5, 8), True),
    "keys for all batches": ((2, 4, 3, 8), (1, 4, 5, 8), (1, 4, 5, 8), False),
    "queries for all batches": ((1, 4, 3, 8), (2, 4, 5, 8), (2, 4, 5, 8), False),
    "one key head for all": ((2, 4, 3, 8), (2, 1, 5, 8), (2, 1, 5, 8), False),
    "grouped, queries for all batches": ((1, 4, 3, 8), (2, 2, 5, 8), (2, 2, 5, 8), True),
}


@pytest.mark.parametrize("case", OPERANDS)
@pytest.mark.parametrize(("masked", "is_causal"), [(False, False), (True, False), (False, True)])
def test_attention(case: str, masked: bool, is_causal: bool) -> None:
    """The shape rule and the eager rule against PyTorch's."""
    *shapes, grouped = OPERANDS[case]
    q, k, v = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    mask = torch.rand(q.shape[2], k.shape[2]) > 0.3 if masked else None
    if mask is not None:
        mask[:, 0] = True
    dense = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=0.2, enable_gqa=grouped)
    args = (mask, is_causal, 0.2, grouped)
    result = md.attention(q, k, v, *args)
    torch.testing.assert_close(result, dense, rtol=0, atol=0)
    assert result.is_contiguous()
    traced = graphs.trace(lambda q, k, v: md.attention(q, k, v, *args), q, k, v)
    (node,) = (n for n in traced.graph.nodes if n.op == "call_function")
    assert node.meta["val"].shape == dense.shape


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: md.reduce_scatter(x, "sum", 1, "cp", 4),
            "reduce_scatter on dim 1 of 6 does not divide by 4 ranks: 2 left",
        ),
        (lambda x: md.all_to_all(x, 1, 0, "cp", 4), "all_to_all on dim 1 of 6 does not divide by 4 ranks: 2 left"),
        (lambda x: md.shard(x, 1, "cp", 5), "shard on dim 1 of 6 does not divide by 5 ranks: 1 left over"),
        (lambda x: md.all_reduce(x, "band", "cp", 2), "reduces by 'band'"),
        (lambda x: md.all_reduce(x.int(), "avg", "cp", 2), "averages torch.int32 values"),
        (lambda x: md.all_reduce(x.bool(), "avg", "cp", 2), "averages torch.bool values"),
        (lambda x: md.reduce_scatter(x.long(), "avg", 0, "cp", 2), "averages torch.int64 values"),
    ],
)
def test_refused_when_traced(call: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(CollectiveError, match=message):
        graphs.trace(call, torch.ones(4, 6))


def test_what_would_divide_is_said() -> None:
    with pytest.raises(CollectiveError, match="use a multiple of 4: 4 or 8"):
        graphs.trace(lambda x: md.shard(x, 1, "cp", 4), torch.ones(4, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("ends", [[2, 2, 7], [0, 7, 7], [1, 2, 7]])
def test_grouped_mm(dtype: torch.dtype, ends: list[int]) -> None:
    """Each group of rows by its own matrix, of which some have none; the shape rule knows every dtype."""
    torch.manual_seed(0)
    x, weight = torch.randn(7, 4).to(dtype), torch.randn(3, 4, 5).to(dtype)
    found = ops.grouped_mm(x, weight, torch.tensor(ends, dtype=torch.int32))
    matrix_of_row = [sum(end <= row for end in ends) for row in range(7)]
    expected = torch.stack([row @ weight[which] for row, which in zip(x, matrix_of_row, strict=True)])
    torch.testing.assert_close(found, expected)
    with FakeTensorMode() as mode:
        fake = ops.grouped_mm(*(mode.from_tensor(t) for t in (x, weight, torch.tensor(ends))))
    assert (fake.shape, fake.dtype) == (found.shape, dtype)
