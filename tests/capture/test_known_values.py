"""Values that depend on shapes alone answer what depends on values; those of inputs and weights do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

import torchtrt_md as md
from torchtrt_md.capture.torch_private import fake_ranks
from torchtrt_md.errors import CaptureError


class Calls(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.table = function, torch.arange(12).remainder(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def compared(function: Callable[[Tensor], Tensor]) -> None:
    """What is captured computes what the function does, for another input, too."""
    model, x = Calls(function).eval(), torch.randn(6, 6)
    program = md.capture(model, (x,), mesh=md.Mesh(dp=2), parallel=md.DataParallel("dp"))
    assert md.verify(program, model, (x,)).error <= 1e-6
    other = torch.randn(6, 6)
    assert torch.equal(program.graphs[0](other)[0], function(other))


def by_rows_of_a_mask(x: Tensor) -> Tensor:
    causal = torch.ones(6, 6).tril().bool()
    return torch.stack([x[row].index_select(0, causal[row].nonzero().flatten()).sum() for row in range(6)])


def by_a_written_mask(x: Tensor) -> Tensor:
    mask = torch.zeros(6, dtype=torch.bool)
    mask[1:3], mask.view(2, 3)[1, 2] = True, True
    return x[mask.nonzero()[:, 0]]


def by_a_mask(x: Tensor) -> Tensor:
    y = x[torch.arange(6) % 2 == 0] * 2
    return y[:, torch.ones(6, dtype=torch.bool)] + x[torch.eye(6).bool()].sum()


def by_positions_that_are_written(x: Tensor) -> Tensor:
    at = (torch.arange(6) % 2 == 0).nonzero()[:, 0]
    at += 1
    at[0] = 0
    return x[at] * int(at.max())


def by_a_number(x: Tensor) -> Tensor:
    lengths = torch.tensor([2, 3, 1])
    parts = torch.split(x, lengths.tolist())
    return torch.cat([part.mean(0, keepdim=True) for part in parts if part.shape[0] > int(lengths.min())])


def by_repeats(x: Tensor) -> Tensor:
    return x.repeat_interleave(torch.arange(6), 0)


def by_a_branch(x: Tensor) -> Tensor:
    return x * 2 if (torch.arange(6) > 4).any() else x


@pytest.mark.parametrize(
    "function",
    [
        by_rows_of_a_mask,
        by_a_written_mask,
        by_a_mask,
        by_positions_that_are_written,
        by_a_number,
        by_repeats,
        by_a_branch,
    ],
    ids=lambda f: f.__name__,
)
def test_what_depends_on_shapes_alone_is_known(function: Callable[[Tensor], Tensor]) -> None:
    compared(function)


def test_a_table_of_the_model_is_known_and_stays_as_it_is() -> None:
    class Table(Calls):
        def forward(self, x: Tensor) -> Tensor:
            at = torch.unique(self.table)
            self.table.clone().add_(1)
            return x[at]

    model, x = Table(torch.relu).eval(), torch.randn(6, 6)
    program = md.capture(model, (x,), mesh=md.Mesh(dp=2), parallel=md.DataParallel("dp"))
    assert torch.equal(program.graphs[0](x)[0], x[:5])
    assert torch.equal(model.table, torch.arange(12).remainder(5))


def written_by_an_input(x: Tensor) -> Tensor:
    mask = torch.zeros(6, dtype=torch.bool)
    mask.view(2, 3)[:, 0].copy_(x[0, :2] > 0)
    return x[: int(mask.sum())]


def random(x: Tensor) -> Tensor:
    return x[: int(torch.randint(3, ()))]


def uninitialized(x: Tensor) -> Tensor:
    return x[: int(torch.empty(1, dtype=torch.long))]


@pytest.mark.parametrize("function", [written_by_an_input, random, uninitialized], ids=lambda f: f.__name__)
def test_what_does_not_is_not(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(CaptureError, match="depends on the values of tensors"):
        compared(function)


def test_what_is_written_through_a_dtensor_is_not_known() -> None:
    with fake_ranks(2):
        mesh = init_device_mesh("cpu", (2,))

        def forward(x: Tensor) -> Tensor:
            mask = torch.zeros(6, dtype=torch.int64)
            DTensor.from_local(mask, mesh, [Replicate()], run_check=False).add_(1)
            return x[: int(mask.sum())]

        model, x = Calls(forward).eval(), torch.randn(6, 6)
        with pytest.raises(CaptureError, match="depends on the values of tensors"):
            md.capture(model, (x,), mesh=md.Mesh(dp=2), parallel=md.DataParallel("dp"))
