"""What a compiler makes of a graph is compared with the graph."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from torchtrt_md.errors import VerificationError
from torchtrt_md.lowering.ops import attention
from torchtrt_md.program import placeholders
from torchtrt_md.runtime.inductor import compile_graph
from torchtrt_md.verification import compiled
from torchtrt_md.verification.compiled import check_compiled
from torchtrt_md.verification.operands import draw, has_bounds, limit

CPU = torch.device("cpu")
WIDTH = 64


def norm_and_product(x: Tensor, weight: Tensor) -> tuple[Tensor]:
    return ((nn.functional.rms_norm(x.float(), (WIDTH,)).to(x.dtype) @ weight).sigmoid(),)


def routed(x: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    chosen = (x.float() @ experts[0].float()).argmax(-1)
    return torch.gather(x @ experts[0], 1, chosen[:, None]), chosen


def graph_of(function: Callable[..., object], operands: Sequence[Tensor]) -> GraphModule:
    return make_fx(function)(*operands)


def examples(dtype: torch.dtype, *shapes: tuple[int, ...]) -> Callable[[int], list[Tensor]]:
    return lambda number: [draw(shape, dtype, CPU, 10 * number + i) for i, shape in enumerate(shapes)]


def check(function: Callable[..., Sequence[Tensor]], dtype: torch.dtype = torch.bfloat16) -> None:
    operands = examples(dtype, (32, WIDTH), (WIDTH, WIDTH))
    check_compiled("part 3", graph_of(norm_and_product, operands(0)), function, operands, by="Inductor")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_what_rounds_otherwise_is_right(dtype: torch.dtype) -> None:
    def fused(x: Tensor, weight: Tensor) -> list[Tensor]:  # as Inductor does: nothing in between is rounded
        wide = nn.functional.rms_norm(x.double(), (WIDTH,), eps=torch.finfo(torch.float32).eps)
        return [(wide @ weight.double()).sigmoid().to(x.dtype)]

    check(fused, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_wrong_token_is_found(dtype: torch.dtype) -> None:
    def one_token(x: Tensor, weight: Tensor) -> list[Tensor]:
        (result,) = norm_and_product(x, weight)
        result[7] = result[8]
        return [result]

    with pytest.raises(VerificationError, match=r"part 3, as Inductor compiled it, computes something else.*result 0"):
        check(one_token, dtype)


def test_what_is_wrong_in_a_later_call_only_is_found() -> None:
    calls = 0

    def late(x: Tensor, weight: Tensor) -> list[Tensor]:
        nonlocal calls
        calls += 1
        (result,) = norm_and_product(x, weight)
        return [result if calls % 3 else result.flip(0)]

    with pytest.raises(VerificationError, match="in call 2"):
        check(late)


def test_equal_bits_are_judged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[Tensor] = []

    def near(result: Tensor, plain: Tensor, near: float) -> bool:
        judged.append(result)
        return True

    monkeypatch.setattr(compiled, "_is_near", near)
    check(lambda *operands: list(norm_and_product(*operands)))
    assert len(judged) == 1
    calls: list[int] = []

    def other_bits(x: Tensor, weight: Tensor) -> list[Tensor]:
        calls.append(0)
        return [norm_and_product(x, weight)[0] + (len(calls) == 2) * 2.0**-6]

    check(other_bits)
    assert (len(calls), len(judged)) == (3, 3), "the first, the second, and not the third, which is as the first"


def test_memory_that_is_read_too_early_holds_no_right_values() -> None:
    """A kernel that reads its result before it is written sees what the call before left there."""
    kept: list[Tensor] = []

    def early(x: Tensor, weight: Tensor) -> list[Tensor]:
        (result,) = norm_and_product(x, weight)
        memory = torch.empty_like(result)
        seen = memory.clone()
        memory.copy_(result)
        kept.append(seen)
        return [torch.where(torch.arange(32)[:, None] == 5, seen, memory)]

    with pytest.raises(VerificationError):
        check(early)


def test_a_router_may_choose_otherwise_in_one_draw() -> None:
    """A token between two experts goes to the one or to the other by rounding; that is no fault of the compiler."""
    operands = examples(torch.bfloat16, (32, WIDTH), (1, WIDTH, 4))
    seen: list[int] = []

    def other_in_the_first_draw(x: Tensor, experts: Tensor) -> list[Tensor]:
        result, chosen = routed(x, experts)
        if torch.equal(x, operands(0)[0]):
            seen.append(1)
            chosen = (chosen + 1) % 4
            result = torch.gather(x @ experts[0], 1, chosen[:, None])
        return [result, chosen]

    check_compiled("part 0", graph_of(routed, operands(0)), other_in_the_first_draw, operands, by="Inductor")
    assert seen


def test_what_cannot_be_run_op_by_op_is_said(caplog: pytest.LogCaptureFixture) -> None:
    operands = examples(torch.bfloat16, (32, WIDTH), (WIDTH, WIDTH))
    graph = graph_of(norm_and_product, operands(0))
    (product,) = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
    product.args = (product.args[0], product.args[0])  # shapes that do not fit
    with caplog.at_level(logging.WARNING, logger="torchtrt_md"):
        check_compiled("part 3", graph, norm_and_product, operands, by="TensorRT")
    assert "part 3 was not compared with its graph" in caplog.text


def test_what_inductor_compiles_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    operands = examples(torch.bfloat16, (32, WIDTH), (WIDTH, WIDTH))
    graph = graph_of(norm_and_product, operands(0))
    right = compile_graph("part 3", graph, operands, CPU)
    real = torch._inductor.compile

    def wrong(module: GraphModule, given: list[Any], **options: Any) -> Callable[..., Sequence[Tensor]]:
        compiled = real(module, given, **options)
        return lambda *tensors: [result.roll(1, 0) for result in compiled(*tensors)]

    torch.testing.assert_close(right(*operands(1))[0], norm_and_product(*operands(1))[0])
    monkeypatch.setattr(torch._inductor, "compile", wrong)
    with pytest.raises(VerificationError, match="part 3"):
        compile_graph("part 3", graph, operands, CPU)


def scattered(x: Tensor, at: Tensor, y: Tensor, rows: Tensor) -> tuple[Tensor]:
    """As tokens of several kinds are put to their places in one sequence."""
    return (torch.index_copy(torch.index_copy(x.new_zeros(1, 40, WIDTH), 1, at, x * 2), 1, rows, y + 1),)


def drawn_for(graph: GraphModule) -> Callable[[int], list[Tensor]]:
    nodes = placeholders(graph)
    of = [(node.meta["val"], limit(node)) for node in nodes]
    return lambda number: [draw(v.shape, v.dtype, CPU, 10 * number + i, below) for i, (v, below) in enumerate(of)]


def test_what_is_written_by_index_is_written_once() -> None:
    """Two values for one place: either may stay, so that a right kernel would be refused."""
    made = (torch.ones(1, 7, WIDTH), torch.zeros(7).long(), torch.ones(1, 30, WIDTH), torch.zeros(30).long())
    graph = make_fx(scattered, tracing_mode="fake")(*made)
    operands = drawn_for(graph)
    assert [len(set(operands(0)[place].tolist())) for place in (1, 3)] == [7, 30]
    compile_graph("part 4", graph, operands, CPU)


def put(x: Tensor, at: Tensor) -> tuple[Tensor]:
    return (torch.index_put(x, [at // 2], x * 2),)


def sampled(x: Tensor) -> tuple[Tensor]:
    return (x + torch.randn_like(x),)


def looked_up(x: Tensor, table: Tensor) -> tuple[Tensor]:
    return (table[(x * 10).long()],)


@pytest.mark.parametrize(
    ("function", "made", "reason"),
    [
        (put, (torch.ones(8), torch.arange(8)), "may write to a place twice"),
        (sampled, (torch.ones(8),), "draws at random"),
        (looked_up, (torch.ones(8), torch.ones(32)), "places that follow from floating numbers"),
    ],
)
def test_a_graph_that_does_not_say_what_comes_of_drawn_operands_is_not_compared(
    function: Callable[..., object], made: tuple[Tensor, ...], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    graph = make_fx(function, tracing_mode="fake")(*made)

    def never(*operands: Tensor) -> list[Tensor]:
        raise AssertionError

    with caplog.at_level(logging.WARNING, logger="torchtrt_md"):
        check_compiled("part 3", graph, never, drawn_for(graph), by="Inductor")
    assert reason in caplog.text


def test_what_indices_are_drawn_below() -> None:
    def use(ids: Tensor, table: Tensor, at: Tensor, mask: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        rows = nn.functional.embedding(ids, table)
        return rows, rows[0].index_select(0, at), (1 - mask.float()) * -1e4, table[other + 1]

    made = (
        torch.zeros(2, 9).long(),
        torch.ones(50, 4),
        torch.zeros(3).long(),
        torch.ones(5).long(),
        torch.ones(2).long(),
    )
    graph = make_fx(use, tracing_mode="fake")(*made)
    assert [limit(node) for node in placeholders(graph)] == [50, 2, 9, 2, 1]
    ids, _, at, mask, other = drawn_for(graph)(0)
    assert len(set(ids.flatten().tolist())) == 18
    assert len(set(at.tolist())) == 3
    assert set(mask.tolist()) <= {0, 1}
    assert other.tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.int64, torch.float64])
def test_results_of_any_dtype(dtype: torch.dtype) -> None:
    """Among them those that are NaN, overflow or are single numbers."""

    def several(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        y = x @ weight
        return (y * 4).to(dtype), y.sum(), (x - 2).log(), y * 1e37 * 1e37, y[:0], y > 0

    def other(x: Tensor, weight: Tensor) -> list[Tensor]:
        y = (x.double() @ weight.double()).float()
        return [(y * 4).to(dtype), y.sum(), (x.double() - 2).log().float(), y * 1e37 * 1e37, y[:0], y > 0]

    operands = examples(torch.float32, (32, WIDTH), (WIDTH, WIDTH))
    graph = graph_of(several, operands(0))
    check_compiled("part 3", graph, other, operands, by="Inductor")
    for index in (0, 1, 5):

        def wrong(x: Tensor, weight: Tensor, index: int = index) -> list[Tensor]:
            results = other(x, weight)
            results[index] = (
                results[index] * 1.1 if index == 1 else results[index].float().roll(1, 0).to(results[index].dtype)
            )
            return results

        with pytest.raises(VerificationError, match=f"result {index}"):
            check_compiled("part 3", graph, wrong, operands, by="Inductor")


def chosen(x: Tensor, weight: Tensor) -> tuple[Tensor]:
    return ((x @ weight).topk(4).indices,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("others", "right"), [(2, True), (64, False)])
def test_a_few_near_ties_fall_either_way(dtype: torch.dtype, others: int, right: bool) -> None:
    """In every draw some: in float32 there are none."""

    def choose(x: Tensor, weight: Tensor) -> list[Tensor]:
        (ids,) = chosen(x, weight)
        ids.view(-1)[:others] += 1
        return [ids]

    operands = examples(dtype, (32, WIDTH), (WIDTH, WIDTH))
    graph = graph_of(chosen, operands(0))
    if right and dtype == torch.bfloat16:
        check_compiled("part 3", graph, choose, operands, by="Inductor")
        return
    with pytest.raises(VerificationError, match="result 0"):
        check_compiled("part 3", graph, choose, operands, by="Inductor")


@pytest.mark.parametrize("large", [1e9, 3e38])
def test_elements_of_another_scale_hide_nothing(large: float) -> None:
    """As a row of a mask: all that is not hidden is wrong."""

    def masked(x: Tensor, weight: Tensor) -> tuple[Tensor]:
        return ((x @ weight).masked_fill(torch.arange(WIDTH) > 30, -large),)

    def wrong(x: Tensor, weight: Tensor) -> list[Tensor]:
        return [masked(x.flip(0), weight)[0]]

    operands = examples(torch.float32, (32, WIDTH), (WIDTH, WIDTH))
    graph = graph_of(masked, operands(0))
    check_compiled("part 3", graph, masked, operands, by="Inductor")
    with pytest.raises(VerificationError):
        check_compiled("part 3", graph, wrong, operands, by="Inductor")


def test_what_is_wrong_in_some_calls_is_no_chance_of_rounding() -> None:
    """Of a race that shows in every other call, some draw of operands would see nothing."""
    calls = 0

    def sometimes(x: Tensor, weight: Tensor) -> list[Tensor]:
        nonlocal calls
        calls += 1
        (result,) = norm_and_product(x, weight)
        return [result if calls > 2 else result.flip(0)]

    with pytest.raises(VerificationError):
        check(sometimes)
    assert calls == 3


def test_the_order_of_equal_elements_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel of Inductor's own sorts equal elements into another order than PyTorch's."""
    seen: list[GraphModule] = []

    def given(module: GraphModule, *rest: Any, **options: Any) -> Callable[..., Sequence[Tensor]]:
        seen.append(module)
        return lambda *tensors: list(module(*tensors))

    def ordered(x: Tensor) -> tuple[Tensor, ...]:
        return torch.sort((x > 0).long(), -1, True)[1], torch.sort(x)[0]

    monkeypatch.setattr(torch._inductor, "compile", given)
    operands = examples(torch.float32, (4, WIDTH))
    graph = graph_of(ordered, operands(0))
    compile_graph("part 3", graph, operands, CPU)
    assert not seen[0].graph.find_nodes(op="call_function", target=torch.ops.aten.sort.default)
    assert len(seen[0].graph.find_nodes(op="call_function", target=torch.ops.aten.sort.stable)) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.bool, torch.int64])
def test_operands_that_are_drawn(dtype: torch.dtype) -> None:
    drawn, other = draw((5, 7), dtype, CPU, 1), draw((5, 7), dtype, CPU, 2)
    assert drawn.dtype == dtype
    assert drawn.shape == (5, 7)
    assert torch.equal(drawn, other) == (dtype == torch.int64)
    assert torch.equal(drawn, draw((5, 7), dtype, CPU, 1))


def clipped(x: Tensor, weight: Tensor) -> list[Tensor]:
    return [(x @ weight).clamp(-100.0, 100.0), x.exp()]


def unclipped(x: Tensor, weight: Tensor) -> list[Tensor]:
    y = x @ weight
    return [torch.where(y.abs() <= 100.0, y, torch.nan), x.exp()]


def without_bounds(x: Tensor, weight: Tensor) -> list[Tensor]:
    return [x @ weight, x.exp()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_beyond_a_bound_is_compared_too(dtype: torch.dtype) -> None:
    """Where numbers overflow in the graph they may in what is compiled of it."""
    operands = examples(dtype, (32, WIDTH), (WIDTH, WIDTH))

    def larger(number: int) -> list[Tensor]:
        x, weight = operands(number)
        return [x * 64, weight]

    graph = graph_of(clipped, operands(0))
    assert float(clipped(*operands(0))[0].abs().max()) < 100.0, "what is drawn stays inside"
    assert not bool(clipped(*larger(0))[1].isfinite().all())
    check_compiled("part 3", graph, unclipped, operands, by="TensorRT")
    check_compiled("part 3", graph, clipped, operands, by="TensorRT", larger=larger)
    with pytest.raises(VerificationError, match="part 3, as TensorRT compiled it, computes something else"):
        check_compiled("part 3", graph, unclipped, operands, by="TensorRT", larger=larger)


def attended(x: Tensor) -> list[Tensor]:
    return [attention(x, x, x, None, False, None, False).clamp(-100.0, 100.0)]


@pytest.mark.parametrize(
    ("function", "shapes"), [(without_bounds, [(32, WIDTH), (WIDTH, WIDTH)]), (attended, [(1, 2, 32, WIDTH)])]
)
def test_larger_numbers_are_asked_for_only_where_there_is_a_bound_and_no_attention(
    function: Callable[..., list[Tensor]], shapes: list[tuple[int, ...]]
) -> None:
    def never(number: int) -> list[Tensor]:
        raise AssertionError("larger numbers would say nothing")

    operands = examples(torch.float32, *shapes)
    graph = graph_of(function, operands(0))
    assert has_bounds(graph) == (function is attended)
    check_compiled("part 3", graph, function, operands, by="Inductor", larger=never)
