"""In-place ops: gone, and what is computed stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import torchtrt_md as md
from torchtrt_md.graph import functional as module
from torchtrt_md.graph.functional import mutates
from torchtrt_md.verification.simulate import interpret

HELD = torch.arange(16).view(4, 4) % 3 == 0


class Model(nn.Module):
    def __init__(self, body: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def _used_twice(x: Tensor) -> Tensor:
    y = x * 2
    z = y.add_(1)
    return y * z


def _seen_by_a_view(x: Tensor) -> Tensor:
    y = x * 2
    row = y[0]
    y.mul_(3)
    return row + y


def _of_constants(x: Tensor) -> Tensor:
    hidden = HELD & HELD.T
    hidden[:, 0] = True
    return x.masked_fill(hidden, 0)


def _through_a_view(x: Tensor) -> Tensor:
    y = x * 2
    y[:, 1].add_(5)
    return y


def _chain(x: Tensor) -> Tensor:
    return (x * 2).add_(1).mul_(x).clamp_(min=0.0)


def _dtype_kept(x: Tensor) -> Tensor:
    return (x > 0).long().mul_(x.long()).add_(1) + x.bfloat16().mul_(x).float()


def _promoted(x: Tensor) -> Tensor:
    return x.bfloat16().mul(2).add_(x)  # in place it stays bfloat16, out of place it would not


def _transposed(x: Tensor) -> Tensor:
    return (x.t() * 2).add_(x.t().contiguous()).view(-1, 1) if x.shape == (1, 1) else (x.t() * 2).add_(x.t()).t()


def _copied(x: Tensor) -> Tensor:
    return torch.empty_like(x).copy_(x * 2)


BODIES = [
    _used_twice,
    _seen_by_a_view,
    _of_constants,
    _through_a_view,
    _chain,
    _dtype_kept,
    _promoted,
    _transposed,
    _copied,
]


@pytest.mark.parametrize("body", BODIES)
def test_what_is_computed_stays(body: Callable[[Tensor], Tensor]) -> None:
    model, x = Model(body), torch.randn(4, 4)
    program = md.capture(model, (x,), mesh=md.Mesh(d=1))
    assert not any(mutates(node) for node in program.graphs[0].graph.nodes)
    expected = model(x.clone())
    (found,) = interpret(program, {"x": x}, weights=program.weights)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("body", [_chain, nn.RMSNorm(4), lambda x: nn.functional.silu(x * 2, inplace=True)])
def test_a_value_of_no_other_use_needs_no_second_trace(
    body: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def traced_again(*args: object, **kwargs: object) -> None:
        raise AssertionError("traced again")

    monkeypatch.setattr(module, "make_fx", traced_again)
    md.capture(Model(body), (torch.randn(4, 4),), mesh=md.Mesh(d=1))


def test_a_view_of_the_dtype_that_it_has_is_no_op() -> None:
    """Model Optimizer looks at int8 as int8.  Another dtype is another tensor."""

    def body(x: Tensor) -> Tensor:
        return x.view(torch.float32).view(torch.int32).view(torch.int32).float()

    graph = md.capture(Model(body), (torch.ones(4),), mesh=md.Mesh(tp=1)).graphs[0]
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert targets == [torch.ops.aten.view.dtype, torch.ops.aten._to_copy.default]
