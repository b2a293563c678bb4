"""Axes along which nothing would be parallel are refused, unless that is said."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor, nn

import torchtrt_md as md
from torchtrt_md.capture.torch_private import fake_ranks
from torchtrt_md.errors import CollectiveError, MeshError

TP = md.TensorParallel("tp", plan={"up": "colwise", "down": "rowwise"})
CP = md.ContextParallel("cp", plan={"": {"x": md.Split(1)}, "down": md.Gather(1)})


@pytest.mark.parametrize(
    ("mesh", "parallel", "axis", "why"),
    [
        (md.Mesh(cp=4), (), "cp", "nothing is parallel along it"),
        (md.Mesh(cp=4, tp=2), CP, "tp", "nothing is parallel along it"),
        (md.Mesh(dp=2, tp=2), TP, "dp", "nothing is parallel along it"),
        (
            md.Mesh(tp=2),
            md.TensorParallel("tp", plan={"up": "replicate"}),
            "tp",
            r"TensorParallel\('tp'\) splits nothing",
        ),
    ],
)
def test_an_idle_axis_is_refused(mesh: md.Mesh, parallel: Any, axis: str, why: str) -> None:
    model, args, _ = models.mlp()
    size = mesh.axis_size(axis)
    with pytest.raises(MeshError, match=f"all {size} ranks along axis '{axis}' of .* the same work: {why}") as caught:
        md.capture(model, args, mesh=mesh, parallel=parallel)
    assert f'DataParallel("{axis}")' in caught.value.fix


@pytest.mark.parametrize(
    ("mesh", "parallel"),
    [
        (md.Mesh(cp=1), ()),
        (md.Mesh(cp=2, tp=1), CP),
        (md.Mesh(cp=2, tp=2), [CP, TP]),
        (md.Mesh(cp=2, tp=2), [TP, CP]),
        (md.Mesh(dp=2, tp=2), [TP, md.DataParallel("dp")]),
        (md.Mesh(dp=2), md.DataParallel("dp")),
    ],
)
def test_axes_that_are_used_or_said_to_be_idle(mesh: md.Mesh, parallel: Any) -> None:
    model, args, _ = models.mlp()
    program = md.lower(md.capture(model, args, mesh=mesh, parallel=parallel))
    assert md.verify(program, model, args).error <= 1e-5


class Calls(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = getattr(self, self.what)(x * 2)
        return result

    def functional(self, x: Tensor) -> Tensor:
        result: Tensor = functional.all_reduce(x, "sum", dist.group.WORLD)  # type: ignore[arg-type]
        return result

    def in_place(self, x: Tensor) -> Tensor:
        dist.all_reduce(x)
        return x

    def beside(self, x: Tensor) -> Tensor:
        """What is sent is not what is returned."""
        sent = x.clone()
        dist.all_reduce(sent)
        return x

    def into(self, x: Tensor) -> Tensor:
        out = [torch.empty_like(x), torch.empty_like(x)]
        dist.all_gather(out, x)
        return torch.cat(out)

    def form_in_place(self, x: Tensor) -> Tensor:
        group = dist.group.WORLD.group_name  # type: ignore[union-attr]
        result: Tensor = torch.ops._c10d_functional.all_reduce_(x, "sum", group)
        return result

    def form_out(self, x: Tensor) -> Tensor:
        out = torch.empty(2 * x.shape[0], *x.shape[1:])
        group = dist.group.WORLD.group_name  # type: ignore[union-attr]
        torch.ops._c10d_functional.all_gather_into_tensor_out(x, 2, group, out=out)
        return out

    def barrier(self, x: Tensor) -> Tensor:
        dist.barrier()
        return x


def test_a_model_that_communicates_by_itself_is_not_idle() -> None:
    with fake_ranks(2):
        program = md.capture(Calls("functional"), (torch.randn(2, 4),), mesh=md.Mesh(tp=2))
    assert any("all_reduce" in str(node.target) for node in program.graphs[0].graph.nodes)


@pytest.mark.parametrize("what", ["in_place", "beside", "into", "form_in_place", "form_out", "barrier"])
def test_collectives_that_write_into_a_tensor_are_refused_with_their_line(what: str) -> None:
    with fake_ranks(2), pytest.raises(CollectiveError, match=r"the model calls .*c10d") as caught:
        md.capture(Calls(what), (torch.randn(2, 4),), mesh=md.Mesh(tp=2))
    assert f"in {what}: " in caught.value.at
    assert "in forward)" in caught.value.at
    assert "all_reduce" in caught.value.fix


def test_a_module_may_hold_a_process_group() -> None:
    class Holds(Calls):
        def __init__(self) -> None:
            super().__init__("of_group")
            self.group = dist.group.WORLD

        def of_group(self, x: Tensor) -> Tensor:
            assert self.group is dist.group.WORLD
            result: Tensor = functional.all_reduce(x, "sum", self.group)  # type: ignore[arg-type]
            return result

    with fake_ranks(2):
        assert md.capture(Holds(), (torch.randn(2, 4),), mesh=md.Mesh(tp=2)).groups == {}
