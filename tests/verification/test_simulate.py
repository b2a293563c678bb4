"""The simulator: lockstep on any mesh, hangs found, precision widened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import graphs
import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from torchtrt_md.errors import MDError, RankMismatchError
from torchtrt_md.lowering import rank_input
from torchtrt_md.mesh import Mesh
from torchtrt_md.program import Value, Weights
from torchtrt_md.verification.simulate import Precision, simulate

md = torch.ops.torchtrt_md
CP = Mesh(cp=2)
SQUARE = Mesh(cp=2, tp=2)


def graphs_of(*functions: Callable[[Tensor], object], x: Tensor) -> list[GraphModule]:
    return [graphs.trace(f, x) for f in functions]


def run(mesh: Mesh, x: Tensor, *functions: Callable[[Tensor], object]) -> graphs.Results:
    """Each rank runs its own function."""
    return simulate(graphs.program(graphs_of(*functions, x=x), mesh, x), {})


def mismatch(mesh: Mesh, x: Tensor, *functions: Callable[[Tensor], object]) -> MDError:
    with pytest.raises(RankMismatchError) as raised:
        run(mesh, x, *functions)
    return raised.value


def gather(x: Tensor, dim: int = 0, axis: str = "cp") -> Tensor:
    gathered: Tensor = md.all_gather(x, dim, axis, 2)
    return gathered


def total(x: Tensor, op: str = "sum", axis: str = "cp") -> Tensor:
    reduced: Tensor = md.all_reduce(x, op, axis, 2)
    return reduced


def ring(x: Tensor, k: Tensor | None = None, is_causal: bool = False) -> Tensor:
    q, k = x[None, None], (x if k is None else k)[None, None]
    attended: Tensor = md.context_attention(q, k, k, is_causal, None, False, "ring", "cp", 2)
    return attended


X = torch.ones(2, 4)


def test_different_collectives() -> None:
    def forward(x: Tensor) -> Tensor:
        return gather(x * 2)

    error = mismatch(CP, X, lambda x: total(x), forward)
    assert "ranks 0 and 1 of axis 'cp' stand at different collectives" in error.problem
    assert (
        "rank 0: all_reduce = torchtrt_md.all_reduce.default(float32[2, 4], op=sum, axis=cp, size=2)" in error.problem
    )
    assert "rank 1: all_gather = torchtrt_md.all_gather.default(float32[2, 4], dim=0, axis=cp, size=2)" in error.problem
    assert f"at {__file__}:" in error.problem
    assert "in forward: return gather(x * 2)" in error.problem


@pytest.mark.parametrize(
    ("first", "second", "shown"),
    [
        (lambda x: gather(x), lambda x: gather(x[:1]), ["float32[2, 4]", "float32[1, 4]"]),
        (lambda x: gather(x), lambda x: gather(x.T), ["float32[2, 4]", "float32[4, 2]"]),
        (lambda x: gather(x), lambda x: gather(x.half()), ["float32[2, 4]", "float16[2, 4]"]),
        (lambda x: gather(x, 0), lambda x: gather(x, 1), ["dim=0", "dim=1"]),
        (lambda x: total(x, "sum"), lambda x: total(x, "max"), ["op=sum", "op=max"]),
        (lambda x: md.broadcast(x, 0, "cp", 2), lambda x: md.broadcast(x, 1, "cp", 2), ["src=0", "src=1"]),
        (lambda x: gather(total(x)), lambda x: total(gather(x)), ["all_reduce", "all_gather"]),
        (
            lambda x: md.permute_tensor(x, 1, "cp", 2),
            lambda x: md.permute_tensor(x, -1, "cp", 2),
            ["shift=1", "shift=-1"],
        ),
        (lambda x: ring(x), lambda x: ring(x, k=x[:1]), ["[1, 1, 2, 4]", "[1, 1, 1, 4]"]),
        (lambda x: ring(x), lambda x: ring(x, is_causal=True), ["is_causal=False", "is_causal=True"]),
        (lambda x: ring(x), lambda x: total(x), ["context_attention", "all_reduce"]),
    ],
)
def test_the_same_collective_on_other_terms(
    first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor], shown: list[str]
) -> None:
    error = mismatch(CP, X, first, second)
    assert "ranks 0 and 1 of axis 'cp'" in error.problem
    for rank, part in enumerate(shown):
        (line,) = (text for text in error.problem.splitlines() if text.strip().startswith(f"rank {rank}: "))
        assert part in line


def test_only_the_first_of_several_agrees() -> None:
    error = mismatch(CP, X, lambda x: total(total(x) + 1), lambda x: gather(total(x) + 1))
    assert "rank 0: all_reduce_1" in error.problem
    assert "rank 1: all_gather" in error.problem


@pytest.mark.parametrize("early", [0, 1])
def test_one_rank_finishes_early(early: int) -> None:
    functions = [lambda x: total(total(x)), lambda x: total(x)]
    error = mismatch(CP, X, *(functions if early else functions[::-1]))
    late = 1 - early
    assert "no group of ranks stands at one collective; on GPUs this would hang" in error.problem
    assert f"rank {late} waits in all_reduce_1 = torchtrt_md.all_reduce" in error.problem
    assert f"rank {early} has finished" in error.problem


def test_one_rank_never_communicates() -> None:
    error = mismatch(CP, X, lambda x: x * 2, lambda x: total(x))
    assert "rank 1 waits in all_reduce" in error.problem
    assert "rank 0 has finished" in error.problem


def test_each_axis_waits_for_the_other() -> None:
    """Rank 0 is first in its row, rank 1 in its column: nobody can start."""

    def rows_first(x: Tensor) -> Tensor:
        return total(total(x, axis="tp"), axis="cp")

    def columns_first(x: Tensor) -> Tensor:
        return total(total(x, axis="cp"), axis="tp")

    error = mismatch(SQUARE, X, rows_first, columns_first, columns_first, rows_first)
    for rank, axis in enumerate(["tp", "cp", "cp", "tp"]):
        assert f"rank {rank} waits in all_reduce = " in error.problem
        assert f"axis={axis}" in error.problem.splitlines()[1 + rank]


def test_a_group_may_be_ahead_of_another() -> None:
    """Rows differ in what they do among themselves; columns agree."""

    def busy(x: Tensor) -> Tensor:
        return total(total(total(x, axis="tp"), axis="tp"), axis="cp")

    def idle(x: Tensor) -> Tensor:
        return total(x, axis="cp")

    results = run(SQUARE, X, busy, busy, idle, idle)
    assert [r[0][0, 0].item() for r in results] == [5.0] * 4


def test_a_mismatch_in_the_second_group_names_its_ranks() -> None:
    error = mismatch(SQUARE, X, *[lambda x: total(x, axis="tp")] * 3, lambda x: gather(x, axis="tp"))
    assert "ranks 2 and 3 of axis 'tp'" in error.problem


@pytest.mark.parametrize("axes", [{"cp": 2, "tp": 3}, {"tp": 3, "cp": 2}, {"a": 2, "cp": 2, "tp": 3}])
def test_groups_of_a_mesh(axes: dict[str, int]) -> None:
    """A gather over one axis, then over the other, in the order of the coordinates."""
    mesh = Mesh(**axes)
    xs = [torch.tensor([[rank]]) for rank in range(mesh.size)]
    graph = graphs.trace(lambda x: md.all_gather(md.all_gather(x, 1, "tp", 3), 0, "cp", 2), xs[0])
    for rank, (result,) in enumerate(graphs.run_ranks(graph, mesh, xs)):
        rows = [mesh.ranks("tp", member) for member in mesh.ranks("cp", rank)]
        assert result.tolist() == [list(row) for row in rows]
    strides = {"cp": 3 if list(axes)[-1] == "tp" else 1, "tp": 1 if list(axes)[-1] == "tp" else 2}
    first = graphs.run_ranks(graph, mesh, xs)[0][0].tolist()
    assert first == [[c * strides["cp"] + t * strides["tp"] for t in range(3)] for c in range(2)]


@pytest.mark.parametrize("shift", [-1, 0, 1, 2, 3])
@pytest.mark.parametrize("axes", [{"cp": 3, "tp": 2}, {"tp": 2, "cp": 3}])
def test_a_rotation_of_a_group(axes: dict[str, int], shift: int) -> None:
    mesh = Mesh(**axes)
    xs = [torch.tensor([rank]) for rank in range(mesh.size)]
    graph = graphs.trace(lambda x: md.permute_tensor(x, shift, "cp", 3), xs[0])
    for rank, (result,) in enumerate(graphs.run_ranks(graph, mesh, xs)):
        assert result.item() == mesh.ranks("cp", rank)[(mesh.coordinate(rank, "cp") - shift) % 3]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("axes", [{"cp": 3, "tp": 2}, {"tp": 2, "cp": 3}])
def test_attention_that_an_engine_does_as_a_ring(axes: dict[str, int], is_causal: bool) -> None:
    """Of all ranks at once, in plain order."""
    mesh = Mesh(**axes)
    q, k, v = (graphs.per_rank(mesh, 2, heads, 3, 4, seed=seed) for seed, heads in enumerate((4, 2, 2)))
    graph = graphs.trace(lambda *x: md.context_attention(*x, is_causal, None, True, "ring", "cp", 3), q[0], k[0], v[0])
    expected = graphs.attended(mesh, "cp", q, k, v, is_causal)
    graphs.assert_same(graphs.run_ranks(graph, mesh, q, k, v), expected, exact=False)


def test_each_rank_gets_its_own_result() -> None:
    """No result is another's memory: what one rank writes, none sees."""
    graph = graphs.trace(lambda x: [total(x), gather(x)], X)
    first, second = graphs.run_ranks(graph, CP, [X, X])
    first[0].fill_(7)
    first[1].fill_(7)
    assert second[0].eq(2).all()
    assert second[1].eq(1).all()


WIDE = Precision(torch.float64)


def test_what_the_program_narrows_is_computed_wide() -> None:
    """Weights, constants, casts, promotions and collectives alike; integers stay, and what is made of them is wide."""
    constant = torch.tensor([1 / 3] * 4).bfloat16()

    def forward(x: Tensor, y: Tensor, n: Tensor) -> list[Tensor]:
        cast = y.to(torch.bfloat16) / 3
        made = torch.full((4,), 1 / 3, dtype=torch.bfloat16)
        joined = torch.cat([x, constant]) * 2
        promoted = (x * y) @ (x.float() / 3).unsqueeze(1)
        return [total(x / 3), cast, made, joined, total(constant), y / 3, n + 1, promoted, n / 3]

    x, y, n = torch.tensor([1.0, 2, 3, 4]).bfloat16(), torch.tensor([1.0, 2, 3, 4]), torch.arange(4)
    graph = graphs.trace(forward, x, y, n)
    narrow = graphs.run_ranks(graph, CP, x, y, n)
    assert [t.dtype for t in narrow[0]] == [*[torch.bfloat16] * 5, torch.float32, torch.int64, *[torch.float32] * 2]
    exact = x.double()
    for wide in graphs.run_ranks(graph, CP, x, y, n, precision=WIDE):
        expected = [
            exact / 3 * 2,
            exact / 3,
            torch.full((4,), 1 / 3).double(),
            torch.cat([exact, constant.double()]) * 2,
            constant.double() * 2,
            exact / 3,
            n + 1,
            (exact * exact) @ (exact / 3).unsqueeze(1),
            n.double() / 3,
        ]
        for number, (a, b) in enumerate(zip(wide, expected, strict=True)):
            torch.testing.assert_close(a, b, rtol=1e-7 if number in (2, 8) else 1e-15, atol=0)
    assert not narrow[0][0].double().equal(exact / 3 * 2)


def test_ranks_of_other_precision_still_agree() -> None:
    """A rank that communicates bfloat16 and one that communicates float64 differ, however wide it is computed."""
    functions = [lambda x: total(x), lambda x: total(x.double())]
    program = graphs.program(graphs_of(*functions, x=X.bfloat16()), CP, X.bfloat16())
    with pytest.raises(RankMismatchError, match=r"bfloat16\[2, 4\]"):
        simulate(program, {})


def test_inputs_weights_and_coordinates() -> None:
    """Inputs are the same on all ranks, and other weights may be taken than the program's own."""
    graph = graphs.trace(lambda w, x: [md.shard(x, 0, "cp", 2) + w], torch.ones(2), torch.ones(4))
    graphs.rewrite(rank_input.run, graph, CP)
    own = [torch.tensor([10.0, 20.0]), torch.tensor([30.0, 40.0])]
    program = graphs.program(graph, CP, own, torch.ones(4))
    weight, name, coordinate = program.sources
    sources = {**program.sources, name: Value("x", (4,), torch.float32)}
    program = replace(program, sources={key: sources[key] for key in (weight, name, coordinate)})
    x = {"x": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    assert [r[0].tolist() for r in simulate(program, x)] == [[11.0, 22.0], [33.0, 44.0]]
    other = Weights({weight: torch.zeros(4)})
    assert [r[0].tolist() for r in simulate(program, x, weights=other)] == [[1.0, 2.0], [3.0, 4.0]]
    assert program.weights.whole[weight].tolist() == [10.0, 20.0, 30.0, 40.0]


def test_a_value_that_is_used_late() -> None:
    """What is freed after its last use is not freed before."""

    def forward(x: Tensor, y: Tensor) -> list[Tensor]:
        first = x * 2
        second = total(first) + y
        third = gather(second, 0)
        return [third, first, x, y, third]

    xs, ys = graphs.per_rank(CP, 2), graphs.per_rank(CP, 2, seed=1)
    results = graphs.run_ranks(graphs.trace(forward, xs[0], ys[0]), CP, xs, ys)
    sums = sum(xs, torch.zeros(2)) * 2
    gathered = torch.cat([sums + y for y in ys])
    graphs.assert_same(results, [(gathered, x * 2, x, y, gathered) for x, y in zip(xs, ys, strict=True)], exact=False)


def test_a_program_that_is_not_lowered() -> None:
    program = replace(graphs.program(graphs.trace(lambda x: x + 1, X), CP, X), lowered=False)
    with pytest.raises(AssertionError, match="takes a lowered program"):
        simulate(program, {})
