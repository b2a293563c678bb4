"""What a forward writes beside its results: refused where it can be seen, and never left behind by a comparison."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchtrt_md as md

PLAN = {"": {"x": md.Split(1)}, "out": md.Gather(1)}
HELD = torch.zeros(8)
X = torch.randn(1, 4, 8)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out, self.table = nn.Linear(8, 8), torch.zeros(8)
        self.prev: Tensor | None = None
        self.calls = 0


def model(forward: Callable[..., Tensor]) -> nn.Module:
    return type("Model", (Base,), {"forward": forward})().eval()  # type: ignore[no-any-return]


def captured(forward: Callable[..., Tensor], *args: Any) -> md.ShardedProgram:
    return md.capture(model(forward), args, mesh=md.Mesh(cp=2), parallel=md.ContextParallel("cp", plan=PLAN))


def adds(self: Any, x: Tensor) -> Tensor:
    self.table.add_(1)
    return self.out(x) + self.table  # type: ignore[no-any-return]


def writes_a_part(self: Any, x: Tensor) -> Tensor:
    self.table[2:4] = x.mean()
    return self.out(x)  # type: ignore[no-any-return]


def writes_to_a_file(self: Any, x: Tensor) -> Tensor:
    HELD.view(2, 4)[0].copy_(x[0, 0, :4])
    return self.out(x)  # type: ignore[no-any-return]


def writes_to_a_piece(self: Any, x: Tensor) -> Tensor:
    self.table.split(4)[1].copy_(x[0, 0, :4])
    return self.out(x) + self.table  # type: ignore[no-any-return]


@pytest.mark.parametrize("forward", [adds, writes_a_part, writes_to_a_file, writes_to_a_piece])
def test_a_write_to_a_tensor_that_the_code_holds(forward: Callable[..., Tensor]) -> None:
    with pytest.raises(md.CaptureError, match=r"the model writes to a tensor \[8\] that its code holds") as raised:
        captured(forward, X)
    assert "test_written_tensors.py" in raised.value.at
    assert not HELD.any()


def makes_its_own(self: Any, x: Tensor) -> Tensor:
    own = torch.zeros(8)
    own[2:4] = 1
    table = torch.tensor([1.0] * 8)
    table.mul_(2)
    copy = self.table.clone()
    copy += 1
    return self.out(x) + own + table + copy  # type: ignore[no-any-return]


def test_a_write_to_what_the_call_made() -> None:
    program = captured(makes_its_own, X)
    torch.manual_seed(0)
    assert md.verify(program, model(makes_its_own), (X,)).error >= 0


def appends(self: Any, x: Tensor, store: list[Tensor]) -> Tensor:
    y: Tensor = self.out(x)
    store.append(y)
    return y


def fills(self: Any, x: Tensor, store: dict[str, Any]) -> Tensor:
    y: Tensor = self.out(x)
    store["y"] = y
    return y


def takes_out(self: Any, x: Tensor, store: dict[str, Any]) -> Tensor:
    scale: float = store.pop("scale")
    y: Tensor = self.out(x)
    return y * scale


def test_a_tensor_put_into_an_argument() -> None:
    for forward, store in ((appends, []), (fills, {}), (fills, {"y": X})):
        with pytest.raises(md.CaptureError, match="puts a tensor into a list or dict that it is given"):
            captured(forward, X, store)
    captured(takes_out, X, {"scale": 2.0})


def keeps(self: Any, x: Tensor) -> Tensor:
    if self.prev is not None:
        x = x + self.prev
    self.prev = x * 0.5
    return self.out(x)  # type: ignore[no-any-return]


def counts(self: Any, x: Tensor) -> Tensor:
    self.calls += 1
    return self.out(x) * self.calls  # type: ignore[no-any-return]


def caches(self: Any, x: Tensor) -> Tensor:
    if self.prev is None:
        self.prev = torch.arange(8.0)
    self.calls += 1
    return self.out(x) * self.prev  # type: ignore[no-any-return]


@pytest.mark.parametrize("forward", [keeps, counts])
def test_what_depends_on_the_calls_before_is_refused(forward: Callable[..., Tensor]) -> None:
    own = model(forward)
    program = md.capture(own, (X,), mesh=md.Mesh(cp=2), parallel=md.ContextParallel("cp", plan=PLAN))
    with pytest.raises(md.VerificationError, match="keeps something from one call to the next"):
        md.verify(program, own, (X,))
    assert own.prev is None
    assert own.calls == 0


def test_a_comparison_leaves_the_model_as_it_was() -> None:
    own = model(caches)
    program = md.capture(own, (X,), mesh=md.Mesh(cp=2), parallel=md.ContextParallel("cp", plan=PLAN))
    md.verify(program, own, (X,))
    assert own.prev is None
    assert own.calls == 0
