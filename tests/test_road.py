"""The road: of equal parts one is looked at, and ranks share what there is to build."""

from __future__ import annotations

import unittest.mock
from pathlib import Path

import models
import pytest
import torch
from torch import Tensor, nn

import torchtrt_md as md
from torchtrt_md.build import part as parts_of
from torchtrt_md.build.part import build_part, unconvertible
from torchtrt_md.choices import Choices
from torchtrt_md.options import Options
from torchtrt_md.place import place
from torchtrt_md.program import ShardedProgram
from torchtrt_md.road import Road

CHOICES = Choices("split", "engine")


class Blocks(nn.Module):
    """Equal blocks of attention, with an op between them that TensorRT has no layer for."""

    def __init__(self, unusual: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.unusual = models.Deep(2), models.Deep(2), unusual

    def forward(self, x: Tensor) -> Tensor:
        for deep in (self.first, self.second):
            x = deep(x)
            x = x + torch.lgamma(x.abs() + 1) if self.unusual else x
        return x


def captured(unusual: bool) -> ShardedProgram:
    plan = {"": {"x": md.Split(1)}, "second.out": md.Gather(1)}
    x = torch.randn(1, 8, 32).half()
    model = Blocks(unusual).half().eval()
    return md.capture(model, (x,), mesh=md.Mesh(cp=2), parallel=md.ContextParallel("cp", "ulysses", plan))


def road(program: ShardedProgram, cache: Path, rank: int = 0, share: tuple[int, int] = (0, 1)) -> Road:
    options = Options(mesh=md.Mesh(cp=2), target="sm80", cache=str(cache), report=False)
    return Road(program, options, ranks=[rank], share=share)


def test_what_no_engine_can_hold_is_found_in_one_of_equal_parts(tmp_path: Path) -> None:
    way = road(captured(True), tmp_path)
    lowered = way.lower(CHOICES)
    with unittest.mock.patch.object(parts_of, "unconvertible", wraps=unconvertible) as asked:
        placed = way.place(lowered, CHOICES).placed
        looked = asked.call_count
        assert way.place(lowered, CHOICES).placed.kept == placed.kept
        assert asked.call_count == looked, "once for each different part"
    wanted = place(lowered, "split", keep=unconvertible(lowered.graphs[0]), ranks=[0])
    assert placed.kept == wanted.kept
    assert [(part.runs, part.digest) for part in placed.parts[0]] == [(p.runs, p.digest) for p in wanted.parts[0]]
    assert sum(kept.count for kept in placed.kept if "lgamma" in kept.op) == 2


@pytest.fixture(scope="module")
def plain() -> ShardedProgram:
    return captured(False)


def test_equal_parts_get_the_engine_of_one(plain: ShardedProgram, tmp_path: Path) -> None:
    way = road(plain, tmp_path)
    lowered = way.lower(CHOICES)
    with unittest.mock.patch.object(parts_of, "build_part", wraps=build_part) as asked:
        built = way.build(lowered, CHOICES)
    engines = [part for part in built.parts[0] if part.runs == "engine"]
    different = {part.engine for part in engines}
    assert asked.call_count == len(different) < len(engines)
    assert (built.hits, built.misses) == (0, len(different))
    for part, cut in zip(built.parts[0], place(lowered, "split", ranks=[0]).parts[0], strict=True):
        alone = build_part(cut, "sm80", way.cache)
        assert (part.segment, part.engine, part.digest) == (alone.segment, alone.engine, alone.digest)


def test_ranks_share_what_there_is_to_build(plain: ShardedProgram, tmp_path: Path) -> None:
    ways = [road(plain, tmp_path, rank, (rank, 2)) for rank in (0, 1)]
    cuts = [way.place(way.lower(CHOICES), CHOICES).parts[rank] for rank, way in enumerate(ways)]
    ops = ways[0].ops_to_build(cuts[0])
    assert ops == ways[1].ops_to_build(cuts[1]) > 0
    for way, cut in zip(ways, cuts, strict=True):  # at once, in a launch
        way._build_share(cut)
    assert ways[0].ops_to_build(cuts[0]) == 0
    assert all(way.cache.misses for way in ways)
    found = [way.engines(cut) for way, cut in zip(ways, cuts, strict=True)]
    assert [part.engine for part in found[0]] == [part.engine for part in found[1]]
    assert sum(way.cache.misses for way in ways) == len({p.engine for p in found[0] if p.runs == "engine"})
