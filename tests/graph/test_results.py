"""What ops give of fake tensors: computed once for equal operands, and never for others."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import torchtrt_md as md
from torchtrt_md.graph.results import each_once, fake_result
from torchtrt_md.program import placeholders, value_of

MODE = FakeTensorMode()


def fake(*shape: int, dtype: torch.dtype = torch.float32, mode: FakeTensorMode = MODE) -> Tensor:
    with mode:
        return torch.empty(shape, dtype=dtype)


class Counted:
    """An op that counts how often it is computed."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor, *rest: Any, **named: Any) -> Tensor:
        self.calls += 1
        return x + 1


with MODE:
    X = torch.empty(4, 6)
    LIKE_X = {
        "other values": torch.empty(4, 6),
        "a view of all": torch.empty(24).view(4, 6),
    }
    UNLIKE_X = {
        "other dtype": torch.empty(4, 6, dtype=torch.bfloat16),
        "other shape": torch.empty(6, 4),
        "other strides": torch.empty(6, 4).t(),
        "other place in memory": torch.empty(5, 6)[1:],
        "more memory": torch.empty(5, 6)[:4],
        "other device": torch.empty(4, 6, device="meta"),
        "other mode": fake(4, 6, mode=FakeTensorMode()),
    }


@pytest.mark.parametrize("name", LIKE_X)
def test_equal_operands_are_asked_for_once(name: str) -> None:
    op = Counted()
    with each_once():
        first = fake_result(MODE, op, (X, [2, 3]), {"dim": 1})
        assert fake_result(MODE, op, (LIKE_X[name], [2, 3]), {"dim": 1}) is first
    assert op.calls == 1


@pytest.mark.parametrize("name", UNLIKE_X)
def test_other_operands_have_results_of_their_own(name: str) -> None:
    op, other = Counted(), UNLIKE_X[name]
    with each_once():
        fake_result(MODE, op, (X,))
        result = fake_result(other.fake_mode, op, (other,))  # type: ignore[attr-defined]
    assert op.calls == 2
    assert (result.dtype, result.shape, result.device) == (other.dtype, other.shape, other.device)


def test_numbers_that_are_equal_and_of_other_types_are_others() -> None:
    op = Counted()
    with each_once():
        for number in (1, 1.0, True, "1", None, [1], (1,)):
            fake_result(MODE, op, (X, number))
        assert op.calls == 6, "a list and a tuple of the same are the same to an op"
        fake_result(MODE, op, (X,), {"alpha": 1})
    assert op.calls == 7


def test_nothing_is_kept_behind_it() -> None:
    op = Counted()
    for _ in range(2):
        with each_once(), each_once():
            fake_result(MODE, op, (X,))
    assert op.calls == 2
    for _ in range(2):
        fake_result(MODE, op, (X,))
    assert op.calls == 4


def test_lowering_computes_the_shapes_of_equal_blocks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    computed, dispatch = 0, FakeTensorMode.dispatch

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal computed
        computed += 1
        return dispatch(*args, **kwargs)

    monkeypatch.setattr(FakeTensorMode, "dispatch", counted)
    found = []
    for depth in (3, 3, 9):  # what PyTorch itself asks itself the first time is not counted
        parallel = md.ContextParallel("cp", plan={"": {"x": md.Split(1)}, "out": md.Gather(1)})
        program = md.capture(models.Deep(depth), (torch.zeros(2, 16, 32),), mesh=md.Mesh(cp=2), parallel=parallel)
        computed = 0
        lowered = md.lower(program, placement="split")
        found.append(computed)
        read = [value_of(node) for node in placeholders(lowered.graphs[0])]
        assert len(set(map(id, read))) == len(read), "to a trace, one tensor is one operand"
    joined = 9 - 3  # queries, keys and values of a block have one weight, which is a placeholder
    assert 0 < found[2] <= found[1] + 2 * joined
