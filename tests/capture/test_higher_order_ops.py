"""Ops that take ops: int8 products are understood, others are refused by name, with the user's line."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.out_dtype import out_dtype

import torchtrt_md as md
from torchtrt_md.errors import CaptureError


class IntegerProduct(nn.Module):
    """As torchao multiplies int8 where tensors are on a GPU."""

    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-9, 9, (32, 32), dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        rounded = (x * 10).to(torch.int8)
        y: Tensor = out_dtype(torch.ops.aten.mm.default, torch.int32, rounded, self.weight)
        return y.float()


class Conditional(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,))  # type: ignore[no-any-return]


class WiderProduct(IntegerProduct):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = out_dtype(torch.ops.aten.mm.default, torch.int64, x.to(torch.int32), self.weight.int())
        return y.float()


def captured(model: nn.Module, x: Tensor) -> md.ShardedProgram:
    return md.capture(model.eval(), (x,), mesh=md.Mesh(dp=2), parallel=md.DataParallel("dp"))


def test_products_of_int8() -> None:
    model, x = IntegerProduct(), torch.randn(32, 32)
    program = captured(model, x)
    (found,) = program.graphs[0].graph.find_nodes(op="call_function", target=torch.ops.aten._int_mm.default)
    assert found.meta["val"].dtype == torch.int32
    assert md.verify(md.lower(program), model, (x,)).error == 0


@pytest.mark.parametrize(("model", "op"), [(Conditional(), "cond"), (WiderProduct(), "out_dtype")])
def test_others_are_refused_by_name(model: nn.Module, op: str) -> None:
    with pytest.raises(CaptureError) as raised:
        captured(model, torch.randn(32, 32))
    assert f"the model calls {op}, an op that takes functions" in str(raised.value)
    assert "test_higher_order_ops.py" in str(raised.value)
