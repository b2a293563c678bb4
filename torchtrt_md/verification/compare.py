"""Compare a tensor with its reference so that no part of it can hide an error.

One norm over a whole tensor is decided by its largest elements: logits at -1e9 hide that all others are wrong.  Here
each element is measured in its own unit, what rounding may leave there, and every part is judged by itself.

**The unit** (``units``).  Rounding errors are relative to the terms of a sum, not to its result: an element that is
small because terms cancelled has the error of its neighbours.  So the unit of an element is the root mean square, over
its *peers*, of a sample of rounding: how far the dense model in its own dtype is from the dense model in fp64.  Peers
share a slice (an index of one dim or of two: a token, a head, a channel) and have about the element's magnitude, in
buckets of four binades; where fewer than half of a slice's nonzero elements are as small, the next larger buckets join,
as they must after cancellation, but none that is 2**24 and more above: those are another scale (a mask), whose rounding
says nothing here.  An element belongs to several slices and takes the largest of their units, since channels or tokens
of a larger scale round more.  A multiple of its own magnitude comes on top.

The largest is too much for a token whose scale is far below that of the others: in each channel its peers are others'
elements that cancelled.  So ``rounding`` also asks what the element's own place is worth (``Places``): the noise of
its row times that of its column, over that of all, where the tensor's dims are cut in two.  Its unit is no larger than
five times that, or than what the least of its slices says, whichever is more.  This noise is of several draws of
rounding, one of which moves the weights and inputs: where terms cancel inside a product, the dense model rounds their
sum once, and a program that has parts of it on several ranks rounds each.

**The parts** (``cells``, ``judge``).  Each element, each slice, each slice by magnitude, and the whole by magnitude.  A
part's error is the root mean square of its elements' errors in their units, over a slack for chance: ``Slack``.

**The questions.**  ``structure``: both in fp64, where a right program leaves 1e-12 or so and a wrong one 1e-6 or more,
so every element alone must be right.  ``rounding``: both in the model's own dtype, where an element alone says little
and the parts are compared with the dense model's own.  ``relative_error``: no sample of rounding is at hand; the unit
is the magnitude of the peers, which is too much for a token that is far smaller than the others.  Integers and booleans
have no rounding: they are equal, or as many differ as of the dense model's own.

Tensors are read in blocks, so that comparing needs little memory beside them.  They may be on a CPU or a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torchtrt_md.verification.cells import Cells
from torchtrt_md.verification.judge import SAME, Difference, Judge, Slack, element, first_not_finite
from torchtrt_md.verification.units import HUGE, Places

# Of the elements of one part, relative, in fp64.  Kernels sum in other orders, which leaves 1e-12 in deep models.
STRUCTURE_TOLERANCE = 1e-8
# The same where the ops have no fp64 kernels.
STRUCTURE_TOLERANCE_FP32 = 1e-4
# A 16-bit model rounds what it stores, and so does the program; half as much again is what another order may cost.
ROUNDING_RATIO = 1.5
# An fp32 model's error is of the order of its sums alone, which differs by kernel and by how many ranks share a sum.
# One op in TF32 or a 16-bit dtype is thousands of times worse.
FP32_RATIO = 32.0
FP32_TOLERANCE = 1e-4

_NOISE_FACTOR = 64.0  # structure: how much the sample of rounding, scaled to fp64, may be too small by
_EACH = Slack(1.0, math.inf, math.inf)
_CHANCE = Slack(8.0, 4.0, 1.0)
_WITHOUT_SAMPLE = Slack(8.0, 2.0, 1.0)


def structure(value: Tensor, reference: Tensor, sample: Tensor, finer: float) -> Difference:
    """Is it the same function?  Every element by itself, relative to its magnitude and to what cancelled there.

    Args:
        value, reference: computed in fp64 (or the widest dtype that there is).
        sample: the reference with rounding of the dense model's own dtype.
        finer: epsilon of the dtype of ``value`` over that of the sample.
    """
    tolerance = structure_tolerance(value.dtype)
    if value.shape == reference.shape and not is_inexact(reference):
        return _counted(value, reference, None)  # computed in fp64, there is no near tie to excuse
    return _compared(value, reference, sample, relative=1.0, factor=_NOISE_FACTOR * finer / tolerance, slack=_EACH)


def structure_tolerance(dtype: torch.dtype) -> float:
    """The largest error that :func:`structure` may find, computed in this dtype."""
    return STRUCTURE_TOLERANCE if dtype in (torch.float64, torch.complex128) else STRUCTURE_TOLERANCE_FP32


def rounding(
    value: Tensor, reference: Tensor, sample: Tensor, coarse: torch.dtype, noise: Tensor | None = None
) -> Difference:
    """Is it as accurate as the dense model?  The unit is the dense model's own error.

    Args:
        value: in the model's own dtype.
        reference: in fp64 (or the widest dtype that there is).
        sample: what the dense model gives in its own dtype.
        coarse: the coarsest floating dtype that the output is computed in.
        noise: the root mean square of each element's error over several draws of rounding (:func:`noise_of`); by
            default nothing is asked of an element's own place.
    """
    return _compared(
        value, reference, sample, relative=_eps(coarse), factor=1.0, slack=_CHANCE, noise=noise, least=_least(coarse)
    )


def noise_of(draws: Sequence[Tensor], reference: Tensor) -> Tensor:
    """The root mean square of each element's error over draws of rounding: in float32, or as pairs of it (complex).

    Infinite where some draw is and the reference is not: it overflows there.
    """
    if reference.is_complex():
        draws, reference = [_pairs(draw) for draw in draws], _pairs(reference)
    total = torch.zeros(reference.shape, dtype=torch.float64, device=reference.device)
    beyond = torch.zeros_like(total, dtype=torch.bool)
    for draw in draws:
        beyond |= ~draw.isfinite() & reference.isfinite()
        total += (draw.double() - reference.double()).nan_to_num_(0.0, HUGE, -HUGE).clamp_(-HUGE, HUGE).square_()
    found = (total / len(draws)).sqrt_().clamp_(max=torch.finfo(torch.float32).max).float()
    return found.masked_fill_(beyond, math.inf)


def relative_error(value: Tensor, reference: Tensor) -> float:
    """The error of the worst part, relative to the magnitude of its peers; of integers, the fraction that differs.

    One slice counts for half, and one element for an eighth, as that is how far chance takes them.  Infinite where
    the shapes differ, or where one is finite and the other is not.
    """
    if value.shape == reference.shape and not is_inexact(reference):
        return float((value != reference).double().mean()) if value.numel() else 0.0
    least = _least(coarsest([value.dtype, reference.dtype]))
    return _compared(value, reference, None, relative=0.0, factor=1.0, slack=_WITHOUT_SAMPLE, least=least).error


def ratio(coarse: torch.dtype) -> float:
    """How many units :func:`rounding` may find in what is computed in this dtype."""
    return ROUNDING_RATIO if _eps(coarse) > torch.finfo(torch.float32).eps else FP32_RATIO


def engine_ratio(coarse: torch.dtype, terms: int) -> float:
    """The same of an engine whose longest sum has so many terms.

    fp32 sums of N terms, one after the other, which is the worst order that a kernel may take, are off by sqrt(N / 2)
    roundings of the result, where the dense model's may be off by one.  In 16 bits all is summed in fp32, whose order
    nobody sees.  Engines compute fp32 in fp32: TF32 is off when they are built, and would be found.
    """
    return ratio(coarse) if ratio(coarse) == ROUNDING_RATIO else max(FP32_RATIO, math.sqrt(terms / 2))


def limit(dtype: torch.dtype, dense_error: float) -> float:
    """The largest :func:`relative_error` of an output of this dtype, where the dense model's own is ``dense_error``.

    An fp32 output of a model that computes in 16 bits is as coarse as the model, hence the larger of both.
    """
    if not dtype.is_floating_point:
        return 0.0
    return max(ROUNDING_RATIO * dense_error, FP32_TOLERANCE if dtype.itemsize >= 4 else 0.0)


def _compared(
    value: Tensor,
    reference: Tensor,
    sample: Tensor | None,
    *,
    relative: float,
    factor: float,
    slack: Slack,
    noise: Tensor | None = None,
    least: float = 0.0,
) -> Difference:
    """The worst part; an element's unit is ``relative`` of its magnitude plus ``factor`` of its peers' rounding.

    With ``noise``, that is no more than the rounding of its own place.  What should not be zero may be off by
    ``least``, in which it underflows.
    """
    if value.shape != reference.shape:
        return Difference(math.inf, f"of shape {list(value.shape)}, and should be of {list(reference.shape)}")
    if not value.numel():
        return SAME
    if not is_inexact(reference):
        return _counted(value, reference, sample)
    if reference.is_complex():
        value, reference = _pairs(value), _pairs(reference)
        sample = None if sample is None else _pairs(sample)
    cells = Cells(reference)
    infinite = first_not_finite(cells, value, sample)
    if infinite is not None:
        return element(math.inf, infinite, value, reference)
    places = None if noise is None else Places(noise, reference, relative)
    return Judge(cells, value, sample, relative, factor, slack, least, places).worst()


def _counted(value: Tensor, reference: Tensor, sample: Tensor | None) -> Difference:
    """Integers: none may differ where the dense model's own do not; argmax and its kin may flip as often as its own."""
    wrong = value != reference
    found = int(wrong.sum())
    if not found:
        return SAME
    if sample is not None:
        own = int((sample != reference).sum())
        # Near ties are rare, and whether a sample has any is chance.
        chance = min(4 * math.sqrt(own + 1), value.numel() // 4)
        if found <= ROUNDING_RATIO * own + chance:
            return SAME
    return element(math.inf, int(wrong.reshape(-1).int().argmax()), value, reference)


def _pairs(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs of fp64 numbers."""
    return torch.view_as_real(tensor.to(torch.complex128).resolve_conj())


def is_inexact(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _eps(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).eps)


def _least(dtype: torch.dtype) -> float:
    """The smallest number that this dtype has, or that GPUs have in it: some take for zero what is below normal."""
    numbers = torch.finfo(dtype)
    return numbers.tiny if numbers.tiny < 1e-30 else numbers.tiny * numbers.eps


def coarsest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The floating or complex dtype with the largest epsilon; float64 where there is none."""
    inexact = [d for d in dtypes if d.is_floating_point or d.is_complex]
    return max(inexact, key=_eps, default=torch.float64)
