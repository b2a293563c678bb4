"""The comparer: no part of a tensor hides an error, and rounding is not taken for one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from torchtrt_md.verification import cells, judge
from torchtrt_md.verification.compare import (
    FP32_TOLERANCE,
    engine_ratio,
    limit,
    noise_of,
    ratio,
    relative_error,
    rounding,
    structure,
    structure_tolerance,
)

EXACT = structure_tolerance(torch.float64)
FP64 = torch.finfo(torch.float64).eps
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BATCH, TOKENS, HEADS, WIDTH = 2, 24, 4, 16


class Outputs:
    """Products of random operands: the reference, the dense model's own, and a program's, whose sums are halved."""

    def __init__(self, dtype: torch.dtype, seed: int = 0, *, masked: bool = False, tokens: int = TOKENS) -> None:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(BATCH, tokens, 256, generator=generator)
        w = torch.randn(HEADS * WIDTH, 256, generator=generator) / 16
        x[:, tokens // 2] *= 1e-3  # a token and a channel of another scale
        w[3] *= 1e3
        x, w = x.to(dtype), w.to(dtype)
        self.dtype, self.finer = dtype, FP64 / torch.finfo(dtype).eps
        self.reference, self.dense = (self._product(x.to(d), w.to(d)) for d in (torch.float64, dtype))
        self.exact, self.program = (self._halves(x.to(d), w.to(d)) for d in (torch.float64, dtype))
        moved = (t * (1 + torch.finfo(dtype).eps * self._signs(t, generator)) for t in (x, w))
        self.draw = self._product(*(t.to(dtype) for t in moved))
        if masked:
            for t in (self.reference, self.dense, self.exact, self.program, self.draw):
                t[..., -3:] = torch.finfo(dtype).min
                t[0, 1, 0, :2] = -torch.inf

    @staticmethod
    def _signs(t: Tensor, generator: torch.Generator) -> Tensor:
        drawn = torch.randint(0, 8, t.shape, generator=generator)
        return (drawn == 0).double() - (drawn == 1).double()

    @staticmethod
    def _product(x: Tensor, w: Tensor) -> Tensor:
        return (x @ w.t()).reshape(*x.shape[:-1], HEADS, WIDTH)

    def _halves(self, x: Tensor, w: Tensor) -> Tensor:
        (a, b), (c, d) = x.chunk(2, -1), w.chunk(2, -1)
        return self._product(a.contiguous(), c.contiguous()) + self._product(b.contiguous(), d.contiguous())

    def structure(self, value: Tensor) -> float:
        return structure(value, self.reference, self.dense, self.finer).error

    def rounding(self, value: Tensor) -> float:
        noise = noise_of([self.dense, self.draw], self.reference)
        return rounding(value.to(self.dtype), self.reference, self.dense, self.dtype, noise).error


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_right_program_is_refused(dtype: torch.dtype, seed: int, masked: bool) -> None:
    for tokens in (2, TOKENS):
        made = Outputs(dtype, seed, masked=masked, tokens=tokens)
        assert made.structure(made.exact) < EXACT / 10
        assert made.rounding(made.program) <= ratio(dtype)
        assert made.rounding(made.dense) <= ratio(dtype)
        assert relative_error(made.exact, made.reference) < 1e-13
        assert relative_error(made.program, made.dense) < 8 * torch.finfo(dtype).eps


def _scaled(where: Callable[[Tensor], Tensor]) -> Callable[[Tensor, float], Tensor]:
    return lambda t, size: torch.where(where(t), t * (1 + size), t)


def _at(*index: int | slice) -> Callable[[Tensor], Tensor]:
    def where(t: Tensor) -> Tensor:
        mask = torch.zeros_like(t, dtype=torch.bool)
        mask[index] = True
        return mask & t.isfinite()

    return where


def _flipped(t: Tensor, _: float) -> Tensor:
    return torch.where(_at(0, 5, 2, 7)(t), -t, t)


def _swapped(t: Tensor, _: float) -> Tensor:
    """Two tokens of about the same norm."""
    order = list(range(t.shape[1]))
    order[4], order[6] = 6, 4
    return t[:, order]


def _small(t: Tensor) -> Tensor:
    return (t.abs() < t.abs().median()) & t.isfinite()


FAULTS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "an element": _scaled(_at(1, 3, 2, 9)),
    "a row": _scaled(_at(0, 7, 1)),
    "a token": _scaled(_at(slice(None), 9)),
    "a small token": _scaled(_at(slice(None), TOKENS // 2)),
    "a head": _scaled(_at(slice(None), slice(None), 2)),
    "a channel": _scaled(_at(slice(None), slice(None), 1, 5)),
    "a rank's part": _scaled(_at(slice(None), slice(TOKENS // 2, None))),
    "the small half": _scaled(_small),
    "beside the masked": _scaled(lambda t: (t > -1e4) & (torch.arange(WIDTH) > WIDTH - 6)),
}


@pytest.mark.parametrize("size", [1.0, 1e-6])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_structure_finds_an_error_in_any_part(dtype: torch.dtype, fault: str, size: float) -> None:
    for masked in (False, True):
        made = Outputs(dtype, masked=masked)
        assert made.structure(FAULTS[fault](made.exact, size)) > EXACT


# An element alone may be off by some roundings; a part of many elements less so.
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_finds_what_is_larger_than_rounding(dtype: torch.dtype, fault: str) -> None:
    for masked in (False, True):
        made = Outputs(dtype, masked=masked)
        size = {torch.bfloat16: 0.25, torch.float16: 0.03, torch.float32: 1e-2}[dtype]
        assert made.rounding(FAULTS[fault](made.program.double(), size)) > ratio(dtype)
        if fault != "a small token":  # of which only draws of rounding can tell that it is none that cancelled
            assert relative_error(FAULTS[fault](made.exact, 0.5), made.reference) > 1e-2


@pytest.mark.parametrize("change", [_flipped, _swapped])
@pytest.mark.parametrize("dtype", DTYPES)
def test_signs_and_order_are_seen(dtype: torch.dtype, change: Callable[[Tensor, float], Tensor]) -> None:
    for masked in (False, True):
        made = Outputs(dtype, masked=masked)
        assert made.structure(change(made.exact, 0)) > EXACT
        assert made.rounding(change(made.program, 0)) > ratio(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_elements_set_to_zero_are_seen(dtype: torch.dtype) -> None:
    made = Outputs(dtype)
    small = made.reference.abs() < made.reference.abs().quantile(0.05)
    assert made.structure(made.exact.masked_fill(small, 0)) > EXACT
    assert made.structure(made.exact.masked_fill(made.reference.abs() == made.reference.abs().min(), 0)) > EXACT


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_cancels_has_the_error_of_its_terms(dtype: torch.dtype) -> None:
    """Rows that are almost zero after a subtraction: their errors are those of what was subtracted."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 256, generator=generator).to(dtype)

    def centred(x: Tensor, order: Tensor) -> Tensor:
        x = torch.cat([x[:32], torch.ones_like(x[32:]) / 3])
        return x - x[:, order].sum(-1, keepdim=True) / 256

    plain, shuffled = torch.arange(256), torch.randperm(256, generator=generator)
    reference, dense = centred(x.double(), plain), centred(x, plain)
    finer = FP64 / torch.finfo(dtype).eps
    assert structure(centred(x.double(), shuffled), reference, dense, finer).error < EXACT
    assert rounding(centred(x, shuffled), reference, dense, dtype).error <= ratio(dtype)


def test_zeros_and_nothing() -> None:
    x = torch.zeros(4, 8, dtype=torch.float64)
    assert relative_error(x, x) == structure(x, x, x.float(), 1e-9).error == 0.0
    assert rounding(x.float(), x, x.float(), torch.float32).error == 0.0
    wrong = x.clone()
    wrong[2, 3] = 1e-6
    assert relative_error(wrong, x) == structure(wrong, x, x.float(), 1e-9).error == float("inf")
    assert rounding(wrong.float(), x, x.float(), torch.float32).error == float("inf")
    half = torch.randn(4, 8, dtype=torch.float64)
    half[2:] = 0
    wrong = half.clone()
    wrong[3, 1] = 1e-6
    assert structure(half, half, half.float(), 1e-9).error == 0.0
    found = structure(wrong, half, half.float(), 1e-9)
    assert found.error > EXACT
    assert found.place == "at [3, 1] it is 1e-06 and should be 0"
    assert relative_error(x[:0], x[:0]) == 0.0
    assert relative_error(x[0, 0], x[0, 0]) == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_underflows_is_no_error(dtype: torch.dtype) -> None:
    """As most of a softmax over large numbers does; beside it all is as it was."""
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reference = (1e3 * x).softmax(-1)
    dense = reference.to(dtype)
    noise = noise_of([dense, dense], reference)
    flushed = dense.masked_fill(dense.abs() < torch.finfo(dtype).tiny, 0)
    for program in (dense, flushed) if dtype != torch.float16 else (dense,):
        assert rounding(program, reference, dense, dtype, noise).error <= ratio(dtype)
        assert relative_error(program, reference) < 4 * torch.finfo(dtype).eps
    wrong = torch.where(dense == dense.amax(-1, keepdim=True), 0.5, dense.double()).to(dtype)
    assert rounding(wrong, reference, dense, dtype, noise).error > ratio(dtype)


def test_what_is_not_finite() -> None:
    x = torch.randn(4, 8, dtype=torch.float64)
    x[0, 0], x[1, 1] = torch.inf, torch.nan
    assert relative_error(x, x) == 0.0
    for index, value in (((0, 0), -torch.inf), ((0, 0), 1.0), ((1, 1), 1.0), ((2, 2), torch.nan), ((3, 3), torch.inf)):
        wrong = x.clone()
        wrong[index] = value
        assert relative_error(wrong, x) == float("inf")
    overflown = torch.full((4,), 1e5, dtype=torch.float64)
    for program in (torch.full((4,), torch.inf).half(), torch.full((4,), 65504.0).half()):
        assert rounding(program, overflown, overflown.half(), torch.float16).error == pytest.approx(0, abs=100)


def test_the_place_is_named() -> None:
    made = Outputs(torch.bfloat16)
    wrong = FAULTS["a head"](made.program.double(), 1.0)
    found = rounding(wrong.bfloat16(), made.reference, made.dense, torch.bfloat16)
    assert "index 2 of dim 2" in found.place
    assert f"and should be {found.expected:.9g}" in found.place
    assert found.index is not None
    assert found.index[2] == 2
    assert "of shape [2] and" not in judge.SAME.place


def test_integers() -> None:
    x = torch.arange(100)
    assert relative_error(x, x) == 0.0
    wrong = x.clone()
    wrong[7] = 0
    assert relative_error(wrong, x) == 0.01
    assert structure(wrong, x, x, 1.0).error == float("inf"), "in fp64 there is no near tie to excuse it"
    assert structure(wrong, x, x, 1.0).index == (7,)
    assert rounding(wrong, x, x, torch.bfloat16).error == 0.0, "a near tie"
    assert rounding(wrong[:8], x[:8], x[:8], torch.bfloat16).place == ""
    assert rounding(wrong[:3] + 1, x[:3], x[:3], torch.bfloat16).error == float("inf")
    assert structure(x + 1, x, x, 1.0).error == float("inf")
    assert structure(x[:1] + 1, x[:1], x[:1], 1.0).error == float("inf")


def test_complex_numbers() -> None:
    x = torch.randn(16, 16, dtype=torch.complex128)
    assert structure(x + 1e-17, x, x.to(torch.complex64), 1e-9).error < EXACT
    for wrong in (x.conj(), x * 1j, x * (1 + 1e-6)):
        assert structure(wrong, x, x.to(torch.complex64), 1e-9).error > EXACT


def test_errors_are_relative() -> None:
    x = torch.randn(64, 64, dtype=torch.float64)
    assert relative_error(x.float(), x) < 1e-7
    assert relative_error(x * 1.01, x) == pytest.approx(0.01, rel=0.5)
    assert relative_error(x[:3], x) == float("inf")
    assert relative_error(torch.full_like(x, float("nan")), x) == float("inf")


def test_blocks_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Outputs(torch.bfloat16)
    whole = made.rounding(made.program), made.structure(FAULTS["a row"](made.exact, 1.0))
    monkeypatch.setattr(cells, "_BLOCK", 300)
    assert (made.rounding(made.program), made.structure(FAULTS["a row"](made.exact, 1.0))) == pytest.approx(whole)


def test_limits() -> None:
    assert limit(torch.bfloat16, 4e-3) == pytest.approx(6e-3)
    assert limit(torch.float32, 1e-7) == FP32_TOLERANCE
    assert limit(torch.float32, 4e-3) == pytest.approx(6e-3), "computed in 16 bits and returned in 32"
    assert limit(torch.int64, 0.0) == 0.0
    assert ratio(torch.bfloat16) == engine_ratio(torch.bfloat16, 1 << 20) < ratio(torch.float32)
    assert ratio(torch.float32) == engine_ratio(torch.float32, 256) < engine_ratio(torch.float32, 1 << 14)


def _tf32(t: Tensor) -> Tensor:
    """Ten bits of the mantissa."""
    return (t.view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("terms", [512, 16384])
def test_an_engine_may_sum_in_any_order_in_fp32_and_not_in_tf32(terms: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, terms, generator=generator) for n in (24, 32))
    moved = (t * (1 + torch.finfo(t.dtype).eps * Outputs._signs(t, generator)) for t in (x, w))
    moved_x, moved_w = (t.float() for t in moved)
    reference, dense, draw = x.double() @ w.double().t(), x @ w.t(), moved_x @ moved_w.t()
    one_by_one = torch.zeros(24, 32)
    for k in range(terms):
        one_by_one += x[:, k, None] * w[:, k]
    noise = noise_of([dense, draw], reference)
    in_order, in_tf32 = (
        rounding(value, reference, dense, torch.float32, noise).error for value in (one_by_one, _tf32(x) @ _tf32(w).t())
    )
    assert in_order <= engine_ratio(torch.float32, terms) < in_tf32
