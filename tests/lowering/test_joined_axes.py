"""One sequence over several axes: heads are exchanged along all but the first (USP), and the first has the strategy."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchtrt_md as md
from torchtrt_md.errors import MeshError, PlanError, ShardingError
from torchtrt_md.lowering import attention_keys
from torchtrt_md.lowering.passes import Exchange
from torchtrt_md.lowering.schedule import schedule
from torchtrt_md.program import ShardedProgram, Sharding

PLAN = {"": {"x": md.Split(1)}, "out": md.Gather(1)}
MESH = md.Mesh(ring=2, ulysses=2)
USP = ("ring", "ulysses")


def lowered(
    call: models.Call,
    strategy: Any,
    mesh: md.Mesh = MESH,
    axis: Any = USP,
    plan: Any = PLAN,
    placement: Any = None,
    **how: Any,
) -> ShardedProgram:
    model, args, kwargs = call
    program = md.capture(model, args, kwargs, mesh=mesh, parallel=md.ContextParallel(axis, strategy, plan))
    return md.lower(program, placement=placement or ("split" if strategy == "ring" else "engine"), **how)


def verified(call: models.Call, strategy: Any, *args: Any, **kwargs: Any) -> ShardedProgram:
    program = lowered(call, strategy, *args, **kwargs)
    report = md.verify(program, *call)
    assert report.error <= 1e-5
    assert report.structure_error <= 1e-8
    return program


def sent(program: ShardedProgram) -> list[tuple[str, str]]:
    return [(c.op, c.axis) for c in schedule(program.graphs[0])]


@pytest.mark.parametrize("strategy", ["ring", "allgather_kv", "ulysses"])
def test_flux_computes_what_the_dense_model_does(strategy: str) -> None:
    program = verified(models.flux(), strategy, plan=None)
    along = {axis: {op for op, at in sent(program) if at == axis} for axis in USP}
    assert along["ulysses"] == {"all_to_all", "all_gather"}  # the gather is that of the result
    inside = {"ring": "permute_tensor", "allgather_kv": "all_gather", "ulysses": "all_to_all"}[strategy]
    assert along["ring"] == {inside, "all_gather"}


@pytest.mark.parametrize("strategy", ["ring", "allgather_kv", "ulysses"])
def test_flux_of_lengths_and_heads_that_do_not_divide(strategy: str) -> None:
    """Text and image are two parts, each with positions behind its end; 3 heads on 2 ranks."""
    verified(models.flux(heads=3, image=30, text=37), strategy, plan=None)


@pytest.mark.parametrize(
    ("strategy", "mesh", "axes", "call"),
    [
        ("allgather_kv", md.Mesh(a=3, b=2), ("a", "b"), {"kv_heads": 1, "tokens": 24}),
        ("ring", md.Mesh(b=2, a=3), ("a", "b"), {"kv_heads": 2, "tokens": 19}),  # the first is not the mesh's first
        ("ring", md.Mesh(a=2, b=2, c=2), ("a", "b", "c"), {"kv_heads": 2, "tokens": 19}),
        ("ulysses", md.Mesh(a=2, b=2, c=2), ("a", "b", "c"), {"kv_heads": 2, "tokens": 19}),
        # A causal ring has an order of its own.
        ("ring", md.Mesh(a=3, b=2), ("a", "b"), {"kv_heads": 1, "tokens": 24, "causal": True}),
        *[
            (s, MESH, USP, {"tokens": tokens, "causal": causal})
            for s in ("ring", "allgather_kv", "ulysses")
            for tokens, causal in ((19, True), (3, True), (3, False))  # 3 are fewer than ranks
        ],
    ],
)
def test_meshes_and_attentions(strategy: str, mesh: md.Mesh, axes: tuple[str, ...], call: Any) -> None:
    verified(models.attention(**call), strategy, mesh, axes)


@pytest.mark.parametrize(("strategy", "groups", "values_first"), [("ring", 2, True), ("ulysses", 2, False)])
def test_the_ways_of_exchange_along_the_last_axis(strategy: str, groups: int, values_first: bool) -> None:
    call = models.attention()
    captured = md.capture(*call, mesh=MESH, parallel=md.ContextParallel(USP, strategy, PLAN))  # type: ignore[arg-type]
    (key,) = attention_keys(captured)
    assert key.endswith("ring+ulysses=4")
    how = Exchange(strategy, groups, values_first)
    program = verified(call, strategy, placement="split", exchanges={key: how})
    assert sent(program).count(("all_to_all", "ulysses")) == 2 * groups + values_first * groups // 2
    assert sent(program) != sent(lowered(call, strategy, placement="split"))


class Masked(nn.Module):
    """A whole mask, with a value for each query and key of each head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, bias)
        result: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return result


@pytest.mark.parametrize("strategy", ["ring", "allgather_kv", "ulysses"])
def test_a_mask_of_all_heads_queries_and_keys(strategy: str) -> None:
    call: models.Call = (Masked().eval(), (torch.randn(2, 19, 32), torch.randn(2, 4, 19, 19)), {})
    verified(call, strategy)


@pytest.mark.parametrize("strategy", ["ring", "allgather_kv"])
def test_auto_sends_the_least_along_the_first_axis(strategy: str) -> None:
    """Of 8 heads over 8 an exchange along the first axis sends no more than keys and values; over 2 it does."""
    many, few = models.attention(heads=8, kv_heads=8), models.attention(heads=8, kv_heads=2)
    assert sent(lowered(many, "auto")) == sent(lowered(many, "ulysses"))
    assert sent(lowered(few, "auto")) == sent(lowered(few, "allgather_kv"))
    placement = "split" if strategy == "ring" else "engine"

    def along_the_first(call: models.Call, how: str) -> int:
        program = lowered(call, how, placement=placement)
        return sum(c.bytes_sent for c in schedule(program.graphs[0]) if c.axis == "ring")

    assert along_the_first(few, strategy) < along_the_first(few, "ulysses")
    assert along_the_first(few, "auto") == min(along_the_first(few, s) for s in ("ulysses", strategy))


def test_axes_of_one_rank_are_left_out() -> None:
    inner = verified(models.attention(), "ring", md.Mesh(ring=1, ulysses=2))
    assert {axis for _, axis in sent(inner)} == {"ulysses"}
    assert ("permute_tensor", "ulysses") not in sent(inner)  # heads are exchanged there, as on more ranks
    outer = verified(models.attention(), "ring", md.Mesh(ring=2, ulysses=1))
    assert {axis for _, axis in sent(outer)} == {"ring"}
    verified(models.attention(), "ring", md.Mesh(ring=1, ulysses=1))


def test_beside_tensor_parallel_weights() -> None:
    model, args, kwargs = models.flux()
    plan = {"transformer_blocks.*.ff.net.0.proj": "colwise", "transformer_blocks.*.ff.net.2": "rowwise"}
    parallel: list[Any] = [md.ContextParallel(USP, "ring"), md.TensorParallel("tp", plan)]
    program = md.capture(model, args, kwargs, mesh=md.Mesh(ring=2, ulysses=2, tp=2), parallel=parallel)
    assert md.verify(md.lower(program, placement="split"), model, args, kwargs).error <= 1e-5


def test_an_output_that_stays_split_is_split_over_one_axis_after_the_other() -> None:
    call = models.attention()
    program = verified(call, "ulysses", plan={"": {"x": md.Split(1)}})
    (output,) = program.outputs
    assert output.shape == (2, 16, 32)
    assert output.sharding == (Sharding(1, "ring"), Sharding(1, "ulysses"))


class Marked(nn.Module):
    """Split and gathered by its own code."""

    def __init__(self) -> None:
        super().__init__()
        self.block = models.SelfAttention()

    def forward(self, x: Tensor) -> Tensor:
        return md.gather(self.block(md.split(x, 1, USP)), 1, USP)


def test_the_models_own_code_names_the_axes() -> None:
    verified((Marked().eval(), (torch.randn(1, 18, 32),), {}), "ring", plan={})


@pytest.mark.parametrize(
    ("axis", "message"), [(("ring",), "are \\('ring',\\)"), (("ring", 3), "'ring', 3"), ((), "are \\(\\)")]
)
def test_what_are_no_axes(axis: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        md.ContextParallel(axis)


def test_axes_that_are_given_twice_or_are_not_there() -> None:
    call = models.attention()
    with pytest.raises(PlanError, match="axis 'ring' is given twice"):
        lowered(call, "ring", axis=("ring", "ring"))
    with pytest.raises(MeshError, match="no axis 'cp'"):
        lowered(call, "ring", axis=("ring", "cp"))
    with pytest.raises(MeshError, match=r"no axis 'ring\+ulysses'"):
        lowered(call, "ring", axis="ring+ulysses")
    with pytest.raises(PlanError, match=r'ContextParallel\(\("ring", "ulysses"\), plan='):
        lowered(call, "ring", plan=None)


@pytest.mark.parametrize("tokens", [3, 4])
def test_what_is_gathered_of_one_position_on_each_rank_is_in_one_piece(tokens: int) -> None:
    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.out(x.sin())
            return y.view(-1, 32) + 1

    call: models.Call = (Viewed(), (torch.randn(2, tokens, 32),), {})
    verified(call, "ulysses", md.Mesh(cp=4), "cp")


def test_what_a_sequence_is_too_short_for() -> None:
    with pytest.raises(ShardingError, match=r"over axis 'ring\+ulysses' of 4 ranks"):
        lowered(models.attention(tokens=1), "ring")
    with pytest.raises(
        ShardingError, match="of which each of 4 ranks would get 2"
    ):  # of one chunk of a ring's two each
        lowered(models.attention(tokens=2, causal=True), "ring")
    with pytest.raises(ShardingError, match="a ring in the engine takes none"):
        lowered(models.attention(tokens=19), "ring", placement="engine")


class TwoSequences(nn.Module):
    """Two sequences that never meet, the first with causal attention."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Identity(), nn.Identity()

    def forward(self, x: torch.Tensor, w: torch.Tensor) -> Any:
        causal = F.scaled_dot_product_attention(x, x, x, is_causal=True)
        return self.first(causal), self.second(F.scaled_dot_product_attention(w, w, w))


def test_a_ring_is_not_causal_for_what_another_axis_has_lowered() -> None:
    """A causal ring has two chunks of each rank, which would fill 6 tokens on 2 ranks up to 8."""
    model, args = TwoSequences().eval(), (torch.randn(1, 4, 8, 8), torch.randn(1, 4, 6, 8))
    parallel = [
        md.ContextParallel("a", "ulysses", {"": {"x": md.Split(2)}, "first": md.Gather(2)}),
        md.ContextParallel("b", "ring", {"": {"w": md.Split(2)}, "second": md.Gather(2)}),
    ]
    program = md.lower(md.capture(model, args, mesh=md.Mesh(a=2, b=2), parallel=parallel), placement="split")
    parts = {n.meta["val"][0].shape[2] for n in program.graphs[0].graph.nodes if "ring_attention" in n.name}
    assert parts == {3}
    assert md.verify(program, model, args).error <= 1e-5
