"""A program over several axes is cut into the fewest engines of one axis each, and computes what it did."""

from __future__ import annotations

import itertools
from random import Random
from typing import Any

import models
import pytest
import torch
from joined import joined
from torch.fx import Graph, Node

import torchtrt_md as md
from torchtrt_md.lowering.schedule import schedule
from torchtrt_md.place import PlacedProgram, place
from torchtrt_md.place.fewest import fewest_engines
from torchtrt_md.place.partition import axis_of
from torchtrt_md.program import ShardedProgram
from torchtrt_md.verification.simulate import Precision, simulate


def of(axes: str, needs: list[set[int]]) -> tuple[list[tuple[Node, str]], dict[Node, list[Node]]]:
    """Collectives with an axis each, and what each of them needs of those before it."""
    graph = Graph()
    nodes = [graph.placeholder(f"n{i}") for i in range(len(axes))]
    return list(zip(nodes, axes, strict=True)), {n: [nodes[i] for i in of] for n, of in zip(nodes, needs, strict=True)}


def cut(axes: str, needs: list[set[int]]) -> list[list[int]]:
    collectives, operands = of(axes, needs)
    nodes = [node for node, _ in collectives]
    return [[nodes.index(n) for n in engine] for engine in fewest_engines(collectives, nodes, operands.__getitem__)]


def test_the_examples_of_the_module() -> None:
    assert cut("tct", [set(), set(), set()]) == [[0, 2], [1]]
    assert cut("tct", [set(), set(), {1}]) in ([[0], [1], [2]], [[1], [0, 2]])
    assert cut("tct", [set(), {0}, {1}]) == [[0], [1], [2]]


def test_no_order_has_fewer() -> None:
    """Against all orders that the operands allow."""
    random = Random(0)
    for _ in range(150):
        count = random.randint(2, 6)
        axes = "".join(random.choice("abc"[: random.choice([2, 3])]) for _ in range(count))
        needs = [{j for j in range(i) if random.random() < 0.4} for i in range(count)]
        fewest = min(
            1 + sum(axes[a] != axes[b] for a, b in itertools.pairwise(order))
            for order in itertools.permutations(range(count))
            if all(order.index(j) < order.index(i) for i in range(count) for j in needs[i])
        )
        engines = cut(axes, needs)
        assert len(engines) == fewest, (axes, needs, engines)
        assert sorted(i for engine in engines for i in engine) == list(range(count))
        done: set[int] = set()
        for engine in engines:
            assert len({axes[i] for i in engine}) == 1
            for i in engine:
                assert needs[i] <= done | set(engine)
            done |= set(engine)


def tp_and_cp(**more: int) -> ShardedProgram:
    """FLUX with the sequence split, and the weights of its feed forwards."""
    model, args, kwargs = models.flux()
    plan = {"transformer_blocks.*.ff.net.0.proj": "colwise", "transformer_blocks.*.ff.net.2": "rowwise"}
    plan |= {name.replace("ff.", "ff_context."): style for name, style in plan.items()}
    parallel: list[Any] = [md.ContextParallel("cp"), md.TensorParallel("tp", plan), *map(md.DataParallel, more)]
    mesh = md.Mesh({**more, "tp": 2, "cp": 2})
    return md.lower(md.capture(model, args, kwargs, mesh=mesh, parallel=parallel))


def guided() -> ShardedProgram:
    """Wan with the two samples of its guidance on different ranks."""
    model, _, kwargs = models.wan()
    both = {name: torch.cat([x, x + 1]) for name, x in kwargs.items() if isinstance(x, torch.Tensor)}
    samples = {"": dict.fromkeys(both, md.Split(0)), "proj_out": md.Gather(0)}
    parallel = [md.ContextParallel("cp"), md.ContextParallel("cfg", plan=samples)]
    return md.lower(md.capture(model, (), {**kwargs, **both}, mesh=md.Mesh(cfg=2, cp=2), parallel=parallel))


def usp() -> ShardedProgram:
    model, args, kwargs = models.flux()
    parallel = md.ContextParallel(("ring", "ulysses"), "allgather_kv")
    return md.lower(md.capture(model, args, kwargs, mesh=md.Mesh(ring=2, ulysses=2), parallel=parallel))


def longest_chain(program: ShardedProgram) -> int:
    """Of the chains of collectives that need each other, the most changes of axis: no cut has fewer engines."""
    most: dict[Node, dict[str | None, int]] = {}
    for node in program.graphs[0].graph.nodes:
        found: dict[str | None, int] = {}
        for operand in node.all_input_nodes:
            for axis, count in most[operand].items():
                found[axis] = max(found.get(axis, 0), count)
        mine = axis_of(node)
        if mine is not None:
            found = {mine: max([count + (axis != mine) for axis, count in found.items()], default=1)}
        most[node] = found
    return max(count for found in most.values() for count in found.values())


def assert_computes_the_same(placed: PlacedProgram) -> None:
    generator, wide = torch.Generator().manual_seed(3), Precision(torch.float64)
    inputs = {v.name: torch.rand(v.shape, generator=generator).to(v.dtype) for v in placed.program.inputs}
    expected = simulate(placed.program, inputs, precision=wide)
    found = simulate(joined(placed), inputs, precision=wide)
    for want, have in zip(expected, found, strict=True):
        for a, b in zip(want, have, strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("made", "axes"),
    [
        (tp_and_cp, {"tp", "cp"}),
        (lambda: tp_and_cp(dp=2), {"tp", "cp"}),
        (guided, {"cfg", "cp"}),
        (usp, {"ring", "ulysses"}),
    ],
)
def test_a_program_over_several_axes_is_engines_of_one_axis_each(made: Any, axes: set[str]) -> None:
    program = made()
    placed = place(program, "engine")
    segments = [part.segment for part in placed.parts[0]]
    assert [s.runs for s in segments] == ["engine"] * len(segments)
    assert not placed.kept
    for segment in segments:
        assert {c.axis for c in segment.collectives} == {segment.axis}
    assert {s.axis for s in segments} == axes
    assert len(segments) == longest_chain(program)
    done = [c for s in segments for c in s.collectives]
    assert sorted(map(str, done)) == sorted(map(str, schedule(program.graphs[0])))
    assert_computes_the_same(placed)


def test_no_axis_is_no_cut() -> None:
    model, args, kwargs = models.mlp()
    program = md.lower(md.capture(model, args, kwargs, mesh=md.Mesh(cp=1)))
    assert place(program, "engine").is_one_engine
