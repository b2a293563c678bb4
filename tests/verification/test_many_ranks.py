"""64 ranks along three axes cost one graph, and are compared with the dense model as two are."""

from __future__ import annotations

import models
import torch

import torchtrt_md as md
from torchtrt_md.lowering.schedule import schedule
from torchtrt_md.program import Coordinate


def test_two_by_four_by_eight() -> None:
    model, _, _ = models.attention(heads=8, kv_heads=8)
    x = torch.randn(2, 70, 32)  # 70 tokens on 32 ranks, the two samples on others
    plan = {"": {"x": md.Split(1)}, "out": md.Gather(1)}
    samples = {"": {"x": md.Split(0)}, "out": md.Gather(0)}
    parallel = [md.ContextParallel(("ring", "ulysses"), "ring", plan), md.ContextParallel("cfg", plan=samples)]
    program = md.capture(model, (x,), mesh=md.Mesh(cfg=2, ring=4, ulysses=8), parallel=parallel)
    lowered = md.lower(program, placement="split")
    assert len(lowered.distinct()) == 1
    assert {s.axis for s in lowered.sources.values() if isinstance(s, Coordinate)} == {"cfg", "ring", "ulysses"}
    sent = [(c.op, c.axis) for c in schedule(lowered.graphs[0])]
    assert sent.count(("permute_tensor", "ring")) == 3
    assert sent.count(("all_to_all", "ulysses")) == 2
    report = md.verify(lowered, model, (x,))
    assert len(report.per_rank) == 64
    assert report.structure_error <= 1e-8
