"""What ranks hold behind the end of a sequence that they do not divide, and whose numbers a comparison sees.

Each model is run on inputs whose largest, or least, numbers are at each position in turn: where an example has them
decides whether a comparison of its results would notice anything.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchtrt_md as md
from torchtrt_md.lowering.ops import bound_args
from torchtrt_md.program import ShardedProgram
from torchtrt_md.verification.simulate import simulate

MASK = torch.tensor([[True, False, True], [True, True, False], [True, True, True]])
STRATEGIES = ("ulysses", "allgather_kv", "ring")


class Within(nn.Module):
    """A function between the modules at which a plan splits and gathers."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function, self.before, self.behind = function, nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Any:
        return self.behind(self.function(self.before(x)))


def lowered(model: nn.Module, x: Tensor, strategy: Any, mesh: md.Mesh, dim: int = 1) -> ShardedProgram:
    plan = {"before": {0: md.Split(dim, output=True)}, "behind": md.Gather(dim)}
    axes = mesh.names if len(mesh.names) > 1 else mesh.names[0]
    parallel = md.ContextParallel(axes, strategy, plan)
    program = md.capture(model, (x,), mesh=mesh, parallel=parallel)
    return md.lower(program, placement="split" if strategy == "ring" else "engine")


def check(function: Any, x: Tensor, strategy: Any = "ulysses", mesh: md.Mesh | None = None, dim: int = 1) -> None:
    """All ranks compute what the model does, wherever the largest numbers are."""
    model = Within(function)
    program = lowered(model, x, strategy, mesh or md.Mesh(cp=4), dim)
    generator = torch.Generator().manual_seed(0)
    for position in range(x.shape[dim]):
        for factor in (20, -20):
            example = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            example.select(dim, position).abs_().mul_(factor)
            drawn = (example * 10).to(x.dtype)
            for (result,) in simulate(program, {"x": drawn}):
                torch.testing.assert_close(result, model(drawn), rtol=1e-9, atol=1e-9)


def attend(x: Tensor, **how: Any) -> Tensor:
    q = x.unflatten(-1, (4, -1)).transpose(1, 2)  # type: ignore[no-untyped-call]
    attended: Tensor = F.scaled_dot_product_attention(q, q, q, **how)
    return attended.transpose(1, 2).flatten(2)


def pairs(x: Tensor) -> Tensor:
    """Two neighbors as one position.  Of the last of 6 on 4 ranks, one would be of two copies."""
    even, odd = x.unflatten(1, (-1, 2)).unbind(2)  # type: ignore[no-untyped-call]
    return even + odd  # type: ignore[no-any-return]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("largest", [lambda z: z.amax(), lambda z: z.amin(), lambda z: z.abs().max() + z.min()])
def test_positions_that_a_view_made_of_several(largest: Any, strategy: str) -> None:
    def scaled(x: Tensor) -> Any:
        z = pairs(x)
        return z / largest(z)

    check(scaled, torch.randn(1, 6, 8, dtype=torch.float64), strategy)


@pytest.mark.parametrize("length", [2, 3, 5])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_more_ranks_than_positions(strategy: str, length: int) -> None:
    """Those behind the last position have copies of it alone."""

    def scaled(x: Tensor) -> Tensor:
        y = x / x.amax() + attend(x) / x.abs().amax((0, 1))
        return y * (y.flatten(0, 1).amin(0) + attend(y, attn_mask=y.sum(-1) > y.sum(-1).amin()))

    check(scaled, torch.randn(1, length, 8, dtype=torch.float64), strategy, md.Mesh(cp=length + 3))


def test_over_some_dims_and_in_order() -> None:
    """The sequence merged with what is before and behind it, and one number for each channel."""

    def rows(x: Tensor) -> Tensor:
        z = pairs(x)
        return z + z.flatten(0, 1).amax(0) + z.transpose(1, 2).flatten(1).amin(-1, keepdim=True)[..., None]

    def columns(x: Tensor) -> Tensor:
        z = pairs(x)
        return z + z.flatten(1).amax(1)[:, None, None] * z.flatten(0, 1).t().amin(1)

    for function in (rows, columns):
        check(function, torch.randn(2, 6, 4, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32])
def test_numbers_of_other_dtypes(dtype: torch.dtype) -> None:
    check(lambda x: pairs(x) * pairs(x).amax() - pairs(x).amin(), torch.ones(2, 6, 4).to(dtype))


def test_truth_values() -> None:
    check(lambda x: (pairs(x) > 150).amax(1, True) & (pairs(x) > -150), torch.randn(1, 6, 1, dtype=torch.float64))
    check(lambda x: (pairs(x) > -150).amin(1, True) | (pairs(x) > 0), torch.randn(1, 6, 1, dtype=torch.float64))


def test_parts_that_were_concatenated() -> None:
    """Text and image, of which the ranks divide neither, and a text that is whole on every rank."""

    class Joined(Within):
        def __init__(self, function: Any) -> None:
            super().__init__(function)
            self.text = nn.Identity()

        def forward(self, x: Tensor) -> Any:
            text, whole, image = torch.split(x, [6, 2, 10], 1)
            parts = [pairs(self.text(text)), whole, self.before(image)]
            return self.behind(self.function(torch.cat(parts, 1))[:, 5:])

    def scaled(z: Tensor) -> Tensor:
        return z / z.amax() + z.amin((0, 1))

    x = torch.randn(1, 18, 4, dtype=torch.float64)
    model = Joined(scaled)
    split = {0: md.Split(1, output=True)}
    plan = {"before": split, "text": split, "behind": md.Gather(1)}
    program = md.lower(md.capture(model, (x,), mesh=md.Mesh(cp=4), parallel=md.ContextParallel("cp", plan=plan)))
    for position in range(18):
        example = torch.randn_like(x)
        example[:, position] *= 50
        for (result,) in simulate(program, {"x": example}):
            torch.testing.assert_close(result, model(example))


@pytest.mark.parametrize("length", [3, 13, 16])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_behind_causal_attention(strategy: str, length: int) -> None:
    """Queries behind the end see keys behind the end, so what they get is no copy, and could be the largest."""

    def scaled(x: Tensor) -> Tensor:
        y = attend(x, is_causal=True)
        return y / y.abs().amax() + (x * x).amax()

    check(scaled, torch.randn(1, length, 8, dtype=torch.float64), strategy)


@pytest.mark.parametrize("mesh", [md.Mesh(r=2), md.Mesh(r=2, u=2), md.Mesh(r=3, u=2)])
@pytest.mark.parametrize("length", [24, 23, 3])
def test_a_causal_ring_changes_the_order_of_the_sequence_alone(mesh: md.Mesh, length: int) -> None:
    """Not that of the largest numbers of all ranks, of which there is one for each."""

    def scaled(x: Tensor) -> Tensor:
        return attend(x, is_causal=True) * (x * x).amax() + x.amin((0, 1))

    check(scaled, torch.randn(1, length, 8, dtype=torch.float64), "ring", mesh)


@pytest.mark.parametrize("how", [{"is_causal": True}, {"attn_mask": MASK}, {}])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_no_number_behind_the_end(strategy: str, how: dict[str, Any]) -> None:
    """Copies differ by nothing, and 0 / 0 is hidden from no attention that takes it times zero."""

    def differences(x: Tensor) -> Tensor:
        even, odd = x.unflatten(1, (-1, 2)).unbind(2)  # type: ignore[no-untyped-call]
        d = even - odd
        return attend(d / d.norm(dim=-1, keepdim=True), **how)

    if strategy == "ring" and how.get("is_causal"):
        check(differences, torch.randn(1, 14, 8, dtype=torch.float64), strategy, md.Mesh(cp=2))
    else:
        check(differences, torch.randn(1, 6, 8, dtype=torch.float64), strategy)


def test_nothing_is_hidden_where_the_ranks_divide_the_sequence() -> None:
    def ops(length: int) -> int:
        model, x = Within(lambda x: x / x.amax()), torch.randn(1, length, 4)
        graph = lowered(model, x, "ulysses", md.Mesh(cp=4)).graphs[0].graph
        masked = graph.find_nodes(op="call_function", target=torch.ops.aten.masked_fill.Scalar)
        assert all(bound_args(node)["value"] == float("-inf") for node in masked)
        return len(masked)

    assert (ops(8), ops(7)) == (0, 1)


@pytest.mark.parametrize("example", ["largest first", "zeros"])
@pytest.mark.parametrize("forgets", [True, False])
def test_verify_does_not_depend_on_where_an_example_has_its_largest(forgets: bool, example: str) -> None:
    """Where that is at the beginning, or nowhere, nothing would be seen of what is wrong at the end."""
    model = Within(lambda x: pairs(x) / (pairs(x).abs().amax() + 0.1))
    x = torch.randn(1, 6, 16) * (example != "zeros")
    x[:, 0] *= 20
    program = lowered(model, x, "ulysses", md.Mesh(cp=4))
    md.verify(program, model, (x,))
    for graph, _ in program.distinct():
        for node in list(graph.graph.nodes):
            if forgets and node.target is torch.ops.torchtrt_md.all_gather.default and node.meta["val"].ndim == 1:
                (user,) = node.users
                with graph.graph.inserting_after(node):
                    first = graph.graph.call_function(torch.ops.aten.slice.Tensor, (node, 0, 0, 2))
                first.meta = dict(node.meta)
                user.replace_input_with(node, first)
            elif not forgets and node.target is torch.ops.aten.masked_fill.Scalar:
                node.replace_all_uses_with(node.args[0])
        graph.recompile()
    with pytest.raises(md.VerificationError, match="does not compute what Within computes"):
        md.verify(program, model, (x,))
