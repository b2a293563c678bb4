"""md.split and md.gather in the model's own code: captured, dense, and as they are in a launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import torchtrt_md as md
from torchtrt_md.errors import CaptureError, MeshError, PlanError, PlanWarning

Split = md.ContextParallel("cp", plan={})
X = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(0))


class Marked(nn.Module):
    """Attention over a sequence that the model splits and gathers itself; with ``by_hand`` its keys, too."""

    def __init__(self, axis: str = "cp", by_hand: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.axis, self.by_hand, self.qkv = axis, by_hand, nn.Linear(32, 96)

    def forward(self, x: Tensor) -> Tensor:
        x = md.split(x, 1, self.axis)
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        if self.by_hand:
            k, v = md.gather(k, -2, self.axis), md.gather(v, -2, self.axis)
        return md.gather(F.scaled_dot_product_attention(q, k, v), 2, self.axis)


@pytest.mark.parametrize(
    ("strategy", "size", "by_hand"),
    [("ulysses", 4, False), ("allgather_kv", 2, False), ("ring", 4, False), ("ulysses", 4, True)],
)
def test_a_model_that_splits_itself_needs_no_plan(strategy: Any, size: int, by_hand: bool) -> None:
    model = Marked(by_hand=by_hand).eval()
    parallel = md.ContextParallel("cp", strategy, plan={})
    program = md.capture(model, (X,), mesh=md.Mesh(cp=size), parallel=parallel)
    lowered = md.lower(program, placement="split" if strategy == "ring" else "engine")
    assert md.verify(lowered, model, (X,)).error <= 1e-5


def test_on_one_rank_and_without_a_mesh_they_do_nothing() -> None:
    model = Marked().eval()
    q, k, v = model.qkv(X).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
    assert torch.equal(model(X), F.scaled_dot_product_attention(q, k, v))
    md.capture(model, (X,), mesh=md.Mesh(cp=1), parallel=Split)
    with pytest.raises(PlanError, match="no context-parallel plan of its own") as caught:
        md.capture(model, (X,), mesh=md.Mesh(cp=2), parallel=md.ContextParallel("cp"))
    assert "plan={}" in caught.value.fix


def test_an_axis_that_nothing_splits_a_sequence_over_is_warned_of() -> None:
    plan = {"": {"x": md.Split(1)}}
    with pytest.warns(PlanWarning, match="along axis 'sp', and that did nothing"):
        md.capture(Marked("sp"), (X,), mesh=md.Mesh(cp=2), parallel=md.ContextParallel("cp", plan=plan))
    with pytest.raises(PlanError, match="splits nothing of Marked"):
        md.capture(Marked("sp"), (X,), mesh=md.Mesh(cp=2), parallel=Split)


@pytest.mark.parametrize("function", [md.split, md.gather])
@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (([1], 0, "cp"), "was given a list"),
        ((X, 3, "cp"), "was given dim 3 of a tensor of 3 dims"),
        ((X, True, "cp"), "was given dim True"),
        ((X, 0, 0), "was given the axis 0"),
    ],
)
def test_wrong_arguments_are_refused(function: Callable[..., Tensor], args: Any, problem: str) -> None:
    with pytest.raises(PlanError, match=problem):
        function(*args)


def test_use_mesh_wants_a_device_mesh() -> None:
    with pytest.raises(MeshError, match="was given a Mesh"), md.use_mesh(md.Mesh(cp=2)):  # type: ignore[arg-type]
        pass


def in_a_launch(rank: int, x: Tensor) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("cp",))
    model, found = Marked(by_hand=True).eval(), dict[str, Any]()
    with torch.no_grad(), md.use_mesh(mesh):
        found["part"] = md.split(x, 1, "cp")
        found["whole"] = md.gather(found["part"], 1, "cp")
        found["model"] = model(x)
        found["compiled"] = torch.compile(model, backend="eager")(x)
        if rank == 0:  # one rank compares with the dense model, and no other waits for it
            program = md.capture(model, (x,), mesh=md.Mesh(cp=2), parallel=Split)
            found["error"] = md.verify(md.lower(program), model, (x,)).error
        for axis, value in (("cp", x[:, :5]), ("sp", x)):
            with pytest.raises(md.MDError) as caught:
                md.split(value, 1, axis)
            found[axis] = str(caught.value)
    found["after"] = md.split(x, 1, "cp")
    return found


def test_in_a_launch_they_act_on_the_mesh_in_use(ranks: Any) -> None:
    expected = Marked().eval()(X)
    for rank, outcome in enumerate(ranks(in_a_launch, X)):
        assert not outcome.error, outcome.message
        found = outcome.value
        assert torch.equal(found["part"], X.chunk(2, 1)[rank])
        assert torch.equal(found["whole"], X)
        assert torch.equal(found["after"], X)
        for name in ("model", "compiled"):
            torch.testing.assert_close(found[name], expected)
        assert rank or found["error"] <= 1e-5
        assert "5 entries of dim 1 over the 2 ranks of axis 'cp' leaves 1 over" in found["cp"]
        assert "has no axis 'sp'" in found["sp"]


def gathered(x: Tensor) -> Tensor:
    h = md.split(x, 1, "cp") * 2
    whole = md.gather(h, 1, "cp")
    h.add_(1)
    return whole


def base_of_a_split(x: Tensor) -> Tensor:
    y = x * 1.0
    part = md.split(y[:, :2], 1, "cp")
    y[:, :2] = 0
    return md.gather(part, 1, "cp")


def clamped(x: Tensor) -> Tensor:
    """As a guard against overflow, which the example is far from."""
    h = x * 1.0
    y = md.split(h, 1, "cp").clamp_(-6, 6) * 2
    return md.gather(y + md.split(h, 1, "cp"), 1, "cp")


def input_itself(x: Tensor) -> Tensor:
    h = md.split(x, 1, "cp")
    h += 1
    return md.gather(h, 1, "cp")


def both_of_a_list(x: Tensor) -> Tensor:
    h, other = x * 1.0, x * 2.0
    part = md.split(h, 1, "cp")
    torch._foreach_add_([other, part], 1.0)
    return md.gather(part + md.split(h, 1, "cp"), 1, "cp")


class Fn(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("function", [gathered, base_of_a_split, clamped, input_itself, both_of_a_list])
def test_a_write_to_one_side_of_a_mark_that_the_other_would_see(function: Callable[[Tensor], Tensor]) -> None:
    """On a rank the two sides are two tensors.  Drawn numbers need not show it."""
    with pytest.raises(CaptureError, match=r"writes in place .* to a value that the plan splits or gathers") as raised:
        md.capture(Fn(function).eval(), (torch.randn(1, 8, 4),), mesh=md.Mesh(cp=2), parallel=Split)
    assert "test_marks.py" in raised.value.at
    assert "clone()" in raised.value.fix


def test_a_write_that_nobody_else_sees_is_as_good_as_a_new_tensor() -> None:
    def function(x: Tensor) -> Tensor:
        h = x * 2
        h += 1  # in front of the mark
        h = md.split(h, 1, "cp")
        h *= 3
        whole = md.gather(h, 1, "cp")
        whole.add_(1)
        return whole

    model, x = Fn(function).eval(), torch.randn(1, 8, 4)
    program = md.capture(model, (x,), mesh=md.Mesh(cp=2), parallel=Split)
    assert md.verify(program, model, (x,)).error <= 1e-6


@pytest.mark.parametrize("sizes", [{"ring": 1, "ulysses": 2}, {"ring": 2, "ulysses": 1}, {"ring": 1, "ulysses": 1}])
@pytest.mark.parametrize("plan", [{"": {"x": md.Split(1)}}, {}])
def test_axes_of_one_rank_may_be_named_in_code(sizes: dict[str, int], plan: dict[str, Any]) -> None:
    """They are left out of the plan's axes, and the code goes on naming all."""
    axes = ("ring", "ulysses")

    def function(x: Tensor) -> Tensor:
        return md.gather((x if plan else md.split(x, 1, axes)) * 2, 1, axes)

    model, x = Fn(function).eval(), torch.randn(1, 8, 4)
    parallel = md.ContextParallel(axes, "ulysses", plan)
    program = md.lower(md.capture(model, (x,), mesh=md.Mesh(**sizes), parallel=parallel))
    assert program.outputs[0].sharding == ()
    assert md.verify(program, model, (x,)).error <= 1e-6
