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
from torchtrt_md.runtime.inductor import compile_graph
from torchtrt_md.verification.compiled import check_compiled, draw

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

    with pytest.raises(VerificationError, match="of call 2"):
        check(late)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.bool, torch.int64])
def test_operands_that_are_drawn(dtype: torch.dtype) -> None:
    drawn, other = draw((5, 7), dtype, CPU, 1), draw((5, 7), dtype, CPU, 2)
    assert drawn.dtype == dtype
    assert drawn.shape == (5, 7)
    assert torch.equal(drawn, other) == (dtype == torch.int64)
    assert torch.equal(drawn, draw((5, 7), dtype, CPU, 1))
