"""Lowering in several ways: what the ways have in common is done once, and each is what it is by itself."""

from __future__ import annotations

import models
import pytest
import torch

import torchtrt_md as md
from torchtrt_md.lowering import PASSES, Lowering, lower, split_outputs
from torchtrt_md.lowering.passes import readable
from torchtrt_md.parallel import Placement
from torchtrt_md.program import ShardedProgram
from torchtrt_md.tune import candidates

PLAN = {"": {"x": md.Split(1)}, "out": md.Gather(1)}


@pytest.fixture(scope="module")
def flux() -> ShardedProgram:
    model, args, kwargs = models.flux()
    return md.capture(model, args, kwargs, mesh=md.Mesh(cp=2), parallel=md.ContextParallel("cp", "auto"))


def told(program: ShardedProgram) -> list[object]:
    """All that a lowered program is, but for its weights."""
    return [
        *(readable(graph) for graph in program.graphs),
        *([sorted(program.sources), program.outputs, program.counts]),
        program.lowered,
    ]


def test_each_way_is_what_it_is_by_itself(flux: ShardedProgram) -> None:
    before = readable(flux.graphs[0])
    shared = Lowering(flux)
    found = set()
    for _ in range(2):  # again, once all have made what they make of what they have in common
        for placement in ("split", "engine"):
            for exchange in candidates("auto").values():
                ways = dict.fromkeys(shared.attention_order(placement), exchange)
                together = told(shared.lower(placement=placement, exchanges=ways))
                assert together == told(lower(flux, placement=placement, exchanges=ways)), (placement, exchange)
                found.add(str(together[0]))
    assert len(found) > len(candidates("auto")), "the ways differ"
    assert readable(flux.graphs[0]) == before


@pytest.mark.parametrize("placements", [("split",), ("split", "engine")])
def test_the_passes_up_to_the_analysis_are_run_once_for_a_placement(
    placements: tuple[Placement, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = md.capture(
        models.Deep(2).eval(),
        (torch.randn(1, 8, 32),),
        mesh=md.Mesh(cp=2),
        parallel=md.ContextParallel("cp", "auto", PLAN),
    )
    counts = dict.fromkeys(PASSES, 0)

    def counted(name: str) -> None:
        run = PASSES[name]

        def count(graph: torch.fx.GraphModule, context: md.lowering.passes.PassContext) -> int:
            counts[name] += 1
            return run(graph, context)

        monkeypatch.setitem(PASSES, name, count)

    for name in list(PASSES):
        counted(name)
    shared = Lowering(program)
    for placement in placements:
        order = shared.attention_order(placement)
        for exchange in candidates("auto").values():
            shared.lower(placement=placement, exchanges=dict.fromkeys(order, exchange))
    names = list(PASSES)
    common, own = names[: names.index("choose_strategy")], names[names.index("choose_strategy") :]
    assert {counts[name] for name in common} == {len(placements)}
    assert {counts[name] for name in own} == {len(placements) * len(candidates("auto"))}


def test_errors_call_weights_and_inputs_as_the_model_does() -> None:
    """Also where the outputs alone are asked for, as torch.compile does before it lowers anything."""
    model, (x,), _ = models.attention()
    for plan, args, names in (
        ({"": {"x": md.Split(2)}, "out": md.Gather(1)}, (x,), ("q.bias [32], equal on all ranks",)),
        ({"": {"x": md.Split(0)}, "out": md.Gather(0)}, (x[:1],), ("x [1, 16, 32], equal on all ranks",)),
    ):
        program = md.capture(model, args, mesh=md.Mesh(cp=4), parallel=md.ContextParallel("cp", plan=plan))
        for step in (lower, split_outputs):
            with pytest.raises(md.ShardingError) as caught:
                step(program)
            assert all(name in caught.value.problem for name in names), caught.value.problem
            assert "arg" not in caught.value.problem.split(": ", 1)[1]
