"""Queries, keys and values sent in float8, through the doors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
import torch
from rank_processes import Ranks
from torch import Tensor, nn

import torchtrt_md as md
from torchtrt_md.bundle import read_manifest
from torchtrt_md.choices import Choices
from torchtrt_md.doors.agreed import check_fit
from torchtrt_md.errors import OptionError, PlanError, ShardingError, VerificationError
from torchtrt_md.lowering import Lowering
from torchtrt_md.lowering.float8_rows import LARGEST_ERROR
from torchtrt_md.options import Options
from torchtrt_md.parallel import Strategy
from torchtrt_md.program import dtype_name
from torchtrt_md.verification import _changed
from torchtrt_md.verification.compare import relative_error
from torchtrt_md.verification.simulate import simulate

PLAN = {"": {"x": md.Split(1)}, "out": md.Gather(1)}
STRATEGIES: list[Strategy] = ["ulysses", "allgather_kv", "ring"]
FLOAT8: dict[str, Any] = {"exchange_dtype": "float8", "compute": "inductor"}


def parallel(strategy: Strategy = "ulysses") -> md.ContextParallel:
    return md.ContextParallel("cp", strategy, PLAN)


def simulated(strategy: Strategy) -> Tensor:
    """What the program computes, by the simulator."""
    model, args, _ = models.attention()
    program = md.capture(model, args, mesh=md.Mesh(cp=2), parallel=parallel(strategy))
    lowered = Lowering(program).lower(placement="split", exchange_dtype="float8")
    return simulate(lowered, {"x": args[0]})[0][0]


def differences(found: Tensor, model: nn.Module, args: tuple[Tensor], strategy: Strategy) -> tuple[float, float]:
    """From the simulator, where a number may fall on another step of float8, and from the dense model."""
    with torch.no_grad():
        dense = model(*args)
    return relative_error(found, simulated(strategy)), float((found - dense).norm() / dense.norm())


def compile_it(rank: int, strategy: Strategy, backend: bool) -> tuple[float, float]:
    model, args, _ = models.attention()
    how = {"mesh": md.Mesh(cp=2), "parallel": parallel(strategy), **FLOAT8, "report": False, "timeout": 120.0}
    with torch.no_grad():
        if backend:
            torch.compiler.reset()
            return differences(torch.compile(model, backend="torchtrt_md", options=how)(*args), model, args, strategy)
        with md.compile(model, args, **how) as runner:
            return differences(runner(*args), model, args, strategy)


@pytest.mark.parametrize(("strategy", "backend"), [*((s, False) for s in STRATEGIES), ("ulysses", True)])
def test_ranks_compute_what_was_proven(strategy: Strategy, backend: bool, ranks: Ranks) -> None:
    for outcome in ranks(compile_it, strategy, backend):
        assert not outcome.error, outcome.message
        from_simulated, from_dense = outcome.value
        assert from_simulated < 1e-3
        assert 2.0**-9 < from_dense < LARGEST_ERROR, "it is exchanged in float8, and in nothing coarser"


def load_it(rank: int, folder: str) -> tuple[float, float]:
    model, args, _ = models.attention()
    with md.load(folder, timeout=60.0, device=torch.device("cpu")) as runner:
        found = runner(*args)
    return differences(found, model, args, "ulysses")


def test_a_bundle_has_it(ranks: Ranks, tmp_path: Path) -> None:
    model, args, _ = models.attention()
    made = md.export(model, args, mesh=md.Mesh(cp=2), parallel=parallel(), out=tmp_path / "b", **FLOAT8)
    assert made.report is not None
    assert made.report.structure_error < 1e-8
    sent = [
        (dtype_name(c.dtype), c.bytes_sent / c.elements)
        for s in read_manifest(made.folder).ranks[0]
        for c in s.collectives
    ]
    assert sent == [("uint8", 0.5), ("float32", 2.0), ("float32", 4.0)], "there, back, and the gather of the result"
    for outcome in ranks(load_it, str(made.folder)):
        assert not outcome.error, outcome.message
        from_simulated, from_dense = outcome.value
        assert from_simulated < 1e-3
        assert 2.0**-9 < from_dense < LARGEST_ERROR


def test_it_is_between_engines_and_for_attention(tmp_path: Path) -> None:
    model, args, _ = models.attention()
    how: dict[str, Any] = {"mesh": md.Mesh(cp=2), "out": tmp_path / "b", "exchange_dtype": "float8"}
    with pytest.raises(PlanError, match="exchanges in float8 are between engines"):
        md.export(model, args, parallel=parallel(), placement="engine", **how)
    with pytest.raises(OptionError, match="exchange_dtype"):
        md.export(model, args, parallel=parallel(), **{**how, "exchange_dtype": "float16"})
    for target in ("sm75", "sm80", "sm86"):
        with pytest.raises(PlanError, match=f"needs compute capability 8.9 or later, and the target '{target}' has"):
            md.export(model, args, parallel=parallel(), target=target, **how)
    plan = {"": {"x": md.Split(1)}}
    with pytest.raises(ShardingError, match="no attention exchanges"):
        md.export(*models.mlp(), parallel=md.ContextParallel("cp", plan=plan), **how)


class Amplifies(nn.Module):
    """Attention over values that differ by a thousandth of what they have in common, which is taken off again."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        heads = x.view(*x.shape[:2], 4, 8).transpose(1, 2)
        attended = nn.functional.scaled_dot_product_attention(heads, heads, heads + 1000.0) - 1000.0
        result: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return result


def test_a_model_that_makes_much_of_the_rounding_is_refused() -> None:
    torch.manual_seed(0)
    model, x = Amplifies().eval(), torch.randn(1, 16, 32)
    program = md.capture(model, (x,), mesh=md.Mesh(cp=2), parallel=parallel())
    lowered = Lowering(program).lower(placement="split", exchange_dtype="float8")
    with pytest.raises(VerificationError, match="queries, keys and values in float8 changes"):
        md.verify(lowered, model, (x,))


class Filled(nn.Module):
    """What another model returns, some of it filled or made complex."""

    def __init__(self, inner: nn.Module, fill: float | None) -> None:
        super().__init__()
        self.inner, self.fill, self.out = inner, fill, nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        filled = y.masked_fill(torch.arange(32) < 4, self.fill) if self.fill else torch.complex(torch.zeros_like(y), y)
        result: Tensor = self.out(filled)
        return result


@pytest.mark.parametrize("fill", [torch.finfo(torch.float32).min, -1e30, float("-inf"), None])
def test_what_is_filled_in_neither_hides_nor_makes_an_error(fill: float | None) -> None:
    def verified(inner: nn.Module) -> tuple[str, ...]:
        torch.manual_seed(0)
        model, x = Filled(inner, fill).eval(), torch.randn(1, 16, 32)
        program = md.capture(model, (x,), mesh=md.Mesh(cp=2), parallel=parallel())
        return md.verify(Lowering(program).lower(placement="split", exchange_dtype="float8"), model, (x,)).notes

    with pytest.raises(VerificationError, match="queries, keys and values in float8 changes"):
        verified(Amplifies())
    (note,) = verified(models.attention()[0])
    assert note.startswith("sending queries, keys and values in float8 changes the outputs by 0.0")


def test_how_far_results_are_apart() -> None:
    plain = torch.ones(1000).masked_fill(torch.arange(1000) % 10 > 0, 0.0)
    flipped = plain.clone()
    flipped[0], flipped[1] = 0.0, 1.0
    assert _changed(flipped, plain) == pytest.approx(2**0.5 / 10)  # of a hundred ones
    for fill in (-1e4, torch.finfo(torch.float32).min, float("inf"), float("nan")):
        x = torch.cat([torch.ones(8), torch.full((8,), fill)])
        y = x.clone()
        y[0] += 0.5
        assert _changed(y, x) == pytest.approx(0.5 / 8**0.5)
        assert _changed(x, x) == 0.0
        y[8] = 0.0
        assert _changed(y, x) > 0.3, "it is no constant any more"
    z = torch.complex(torch.ones(4), torch.zeros(4)).conj()
    assert _changed(z * 1j, z) == pytest.approx(2**0.5)
    assert _changed(torch.ones(4), torch.zeros(4)) == float("inf")


def test_verify_reports_what_it_costs() -> None:
    model, args, _ = models.attention()
    program = md.capture(model, args, mesh=md.Mesh(cp=2), parallel=parallel())
    plain, sent = (
        md.verify(Lowering(program).lower(placement="split", exchange_dtype=dtype), model, args)
        for dtype in ("model", "float8")
    )
    assert sent.structure_error <= 1e-8
    assert plain.structure_error <= 1e-8
    assert sent.dense_error == plain.dense_error
    assert sent.error > 100 * plain.error  # of float32


@pytest.mark.parametrize("compute", ["tensorrt", "inductor"])
def test_a_target_counts_where_engines_are_built(compute: str) -> None:
    options = Options(mesh=md.Mesh(cp=2), parallel=parallel(), target="sm86", **{**FLOAT8, "compute": compute})
    if compute == "inductor":
        check_fit(options)
        return
    with pytest.raises(PlanError, match=r"the target 'sm86' has 8\.6"):
        check_fit(options)
    with pytest.raises(PlanError, match=r"the target 'sm86' has 8\.6"):
        check_fit(
            Options(mesh=md.Mesh(cp=2), parallel=parallel(), target="sm86"), Choices("split", exchange_dtype="float8")
        )


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), None])
def test_gpus_that_have_no_float8_are_refused_first(capability: tuple[int, int] | None) -> None:
    options = Options(mesh=md.Mesh(cp=2), parallel=parallel(), **FLOAT8)
    if capability is None or capability >= (8, 9):
        check_fit(options, capability=capability)
        return
    with pytest.raises(PlanError, match=r"needs compute capability 8\.9 or later, and this GPU has 8\."):
        check_fit(options, capability=capability)
