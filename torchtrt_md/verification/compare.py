"""Compare a tensor with its reference so that no part of it can hide an error.

One norm over a whole tensor is decided by its largest elements: logits at -1e9 hide that all others are wrong.  Here
each element is measured in its own unit, what rounding may leave there, and every part is judged by itself.

**The unit.**  Rounding errors are relative to the terms of a sum, not to its result: an element that is small because
terms cancelled has the error of its neighbours.  So the unit of an element is the root mean square, over its *peers*,
of a sample of rounding: how far the dense model in its own dtype is from the dense model in fp64.  Peers share a slice
(an index of one dim or of two: a token, a head, a channel) and have about the element's magnitude, in buckets of four
binades; where fewer than half of a slice's nonzero elements are as small, the next larger buckets join, as they must
after cancellation, but none that is 2**24 and more above: those are another scale (a mask), whose rounding says
nothing here.  An element belongs to several slices and takes the largest of their units, since channels or tokens of
a larger scale round more.  A multiple of its own magnitude comes on top.

The largest is too much for a token whose scale is far below that of the others: in each channel its peers are others'
elements that cancelled.  So ``rounding`` also asks what the element's own place is worth (``_Places``): the noise of
its row times that of its column, over that of all, where the tensor's dims are cut in two.  Its unit is no larger than
five times that, or than what the least of its slices says, whichever is more.  This noise is of several draws of
rounding, one of which moves the weights and inputs: where terms cancel inside a product, the dense model rounds their
sum once, and a program that has parts of it on several ranks rounds each.

**The parts.**  Each element, each slice, each slice by magnitude, and the whole by magnitude.  A part's
error is the root mean square of its elements' errors in their units, over a slack for chance: ``Slack``.

**The questions.**  ``structure``: both in fp64, where a right program leaves 1e-12 or so and a wrong one 1e-6 or more,
so every element alone must be right.  ``rounding``: both in the model's own dtype, where an element alone says little
and the parts are compared with the dense model's own.  ``relative_error``: no sample of rounding is at hand; the unit
is the magnitude of the peers, which is too much for a token that is far smaller than the others.  Integers and booleans
have no rounding: they are equal, or as many differ as of the dense model's own.

Tensors are read in blocks, so that comparing needs little memory beside them.  They may be on a CPU or a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

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

_BLOCK = 1 << 22
_COLUMNS = 256
_BUCKETS = 512  # of fp64's 2 ** 11 binades, 2 ** 2 each
_BINADES_SHIFT = 2
_REACH = 6  # buckets above its own from which an element's unit may come
_FEW = 8
_NOISE_FACTOR = 64.0  # structure: how much the sample of rounding, scaled to fp64, may be too small by
_HUGE = 1e150  # squares must stay finite
_PLACE_FACTOR = 5.0  # how far the noise of a place may be beyond the product of its row's and its column's
_LOG_BIAS = 1.0  # by how much the mean of the logarithms of a few draws' squares is below that of many


class Slack(NamedTuple):
    """How far chance alone may take a part beyond its unit, as a factor of the root mean square.

    The largest of 1e8 normal errors is 6 units; the errors in a slice have one cause in common and may be far fewer
    than its elements; small parts scatter.
    """

    element: float
    part: float
    whole: float

    def of_part(self, count: Tensor) -> Tensor:
        return self.part + (self.element - self.part) / count.clamp(min=1).sqrt()

    def of_whole(self, count: Tensor) -> Tensor:
        return self.whole + (self.element - self.whole) / count.clamp(min=1).sqrt()


_EACH = Slack(1.0, math.inf, math.inf)
_CHANCE = Slack(8.0, 4.0, 1.0)
_WITHOUT_SAMPLE = Slack(8.0, 2.0, 1.0)


@dataclass(frozen=True)
class Difference:
    """How far a tensor is from its reference, in the worst of its parts.

    Attributes:
        error: of the worst part, in units; infinite where shapes differ or one is finite and the other is not.
        part: which part that is, in words.
        index: the worst element; None where there is none.
        value: what it is.
        expected: what it should be.
    """

    error: float
    part: str = ""
    index: tuple[int, ...] | None = None
    value: float | complex = 0.0
    expected: float | complex = 0.0

    @property
    def place(self) -> str:
        """The part, the worst element and both values."""
        if self.index is None:
            return self.part
        element = f"at {list(self.index)} it is {self.value:.9g} and should be {self.expected:.9g}"
        return f"{self.part}: {element}" if self.part else element


SAME = Difference(0.0)


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
    """The root mean square of each element's error over draws of rounding: in float32, or as pairs of it (complex)."""
    if reference.is_complex():
        draws, reference = [_pairs(draw) for draw in draws], _pairs(reference)
    total = torch.zeros(reference.shape, dtype=torch.float64, device=reference.device)
    for draw in draws:
        total += (draw.double() - reference.double()).nan_to_num_(0.0, _HUGE, -_HUGE).clamp_(-_HUGE, _HUGE).square_()
    return (total / len(draws)).sqrt_().clamp_(max=torch.finfo(torch.float32).max).float()


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
    cells = _Cells(reference)
    infinite = _first_not_finite(cells, value, sample)
    if infinite is not None:
        return _element(math.inf, infinite, value, reference)
    places = None if noise is None else _Places(noise, reference, relative)
    return _Judge(cells, value, sample, relative, factor, slack, least, places).worst()


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
    return _element(math.inf, int(wrong.reshape(-1).int().argmax()), value, reference)


class _Cells:
    """The elements of a tensor by slice and by magnitude, block by block.

    The tensor is read as a matrix whose rows are indices of the leading dims and whose columns are those of the
    trailing ones.  What is summed over rows and over columns, by magnitude, gives the sums over the slices of every
    dim, at the cost of two.
    """

    def __init__(self, reference: Tensor) -> None:
        self.reference, self.shape, self.device = reference, tuple(reference.shape), reference.device
        split = len(self.shape) - 1
        while split > 0 and math.prod(self.shape[split:]) < _COLUMNS:
            split -= 1
        self.split = max(split, 0)
        self.sides = (self.shape[: self.split], self.shape[self.split :])
        self.matrix = reference.reshape(math.prod(self.sides[0]), math.prod(self.sides[1]))
        self.buckets = self._present()
        self.position = torch.zeros(_BUCKETS, dtype=torch.int32, device=self.device)
        self.position[self.buckets] = torch.arange(len(self.buckets), dtype=torch.int32, device=self.device)
        rows, columns = self.matrix.shape
        self.rows = torch.arange(rows, dtype=torch.int32, device=self.device).unsqueeze(1) * len(self.buckets)
        self.columns = torch.arange(columns, dtype=torch.int32, device=self.device) * len(self.buckets)
        # A slice of few elements says little, and one that is everything says it twice.
        elements = reference.numel()
        of_side = [range(self.split), range(self.split, len(self.shape))]
        slices = [s for side in of_side for n in (1, 2) for s in combinations(side, n)]
        self.dims: list[tuple[int, ...]] = [
            s for s in slices if all(self.shape[d] > 1 for d in s) and elements >= _FEW * self.slices(s)
        ]

    def slices(self, dims: tuple[int, ...]) -> int:
        """How many slices there are along these dims together."""
        return math.prod(self.shape[d] for d in dims)

    def blocks(self) -> Iterator[slice]:
        step = max(1, _BLOCK // self.matrix.shape[1])
        for start in range(0, self.matrix.shape[0], step):
            yield slice(start, start + step)

    def of(self, block: slice) -> tuple[Tensor, Tensor]:
        """The cells of the block's elements in the sums over rows and over columns: slice, then bucket."""
        position = self.position[_bucket(self.matrix[block])]
        return position + self.rows[block], position + self.columns

    def sums(self) -> tuple[Tensor, Tensor]:
        """Zeros, [rows x buckets] and [columns x buckets]."""
        width = len(self.buckets)
        rows, columns = (torch.zeros(n * width, dtype=torch.float64, device=self.device) for n in self.matrix.shape)
        return rows, columns

    def by_slice(self, sums: tuple[Tensor, Tensor]) -> dict[tuple[int, ...], Tensor]:
        """Dims -> sums [slices, buckets]; no dims is the whole."""
        width = len(self.buckets)
        whole = sums[0].reshape(-1, width).sum(0, keepdim=True)
        found: dict[tuple[int, ...], Tensor] = {(): whole}
        for dims in self.dims:
            side, own = self._of_side(dims)
            table = sums[side].reshape(*self.sides[side], width)
            others = [d for d in range(len(self.sides[side])) if d not in own]
            found[dims] = (table.sum(others) if others else table).reshape(-1, width)
        return found

    def most(self, tables: Mapping[tuple[int, ...], Tensor], sign: int = 1) -> tuple[Tensor, Tensor]:
        """What an element finds in the tables of its leading and of its trailing dims: the largest.

        With ``sign`` -1, the smallest; a side without tables has 0, or infinity.
        """
        width, start = len(self.buckets), 0.0 if sign > 0 else math.inf
        found = [torch.full((*sizes, width), start, dtype=torch.float64, device=self.device) for sizes in self.sides]
        for dims in self.dims or [()]:
            side, own = self._of_side(dims)
            view = [size if d in own else 1 for d, size in enumerate(self.sides[side])]
            pick = torch.maximum if sign > 0 else torch.minimum
            found[side] = pick(found[side], tables[dims].reshape(*view, width))
        return found[0].reshape(-1), found[1].reshape(-1)

    def _of_side(self, dims: tuple[int, ...]) -> tuple[int, list[int]]:
        side = int(bool(dims) and dims[0] >= self.split)
        return side, [d - self.split * side for d in dims]

    def _present(self) -> Tensor:
        counts = torch.zeros(_BUCKETS, dtype=torch.long, device=self.device)
        for block in self.blocks():
            counts += torch.bincount(_bucket(self.matrix[block]).reshape(-1), minlength=_BUCKETS)
        return counts.nonzero().reshape(-1)


class _Places:
    """What rounding does at each place of a tensor: the noise of its row times that of its column, over that of all.

    That is so for every way to cut the dims in two, of which the least counts.  Rows and columns are averaged in two
    ways, of which the larger counts: by squares; and by logarithms, of which a few places that are much noisier than
    their row and their column say take nothing from the others.  Elements that should be zero, as many are behind a
    ReLU, say nothing of others; a row or column of which few are left has at least the noise of all.

    Args:
        noise: of each element.
        reference: what it should be.
        relative: an element's noise is not far below this part of it, though it may be rounded well by chance.
    """

    def __init__(self, noise: Tensor, reference: Tensor, relative: float) -> None:
        self.noise = noise.reshape(-1)
        counts = ((reference != 0) & reference.isfinite()).reshape(-1).double()
        least = reference.reshape(-1).double().abs().nan_to_num_(0.0, 0.0).clamp_(1 / _HUGE, _HUGE).mul_(relative / 8)
        squares = torch.maximum(self.noise.double(), least).square_()
        logs = squares.log().mul_(counts)
        squares.mul_(counts)
        shape = tuple(reference.shape)
        # Columns; and of each row and each column the logarithm of its squared noise, the latter over that of all.
        self.cuts: list[tuple[int, list[tuple[Tensor, Tensor]]]] = []
        for columns in [math.prod(shape[at:]) for at in range(1, len(shape))] or [len(squares)]:
            row, column, whole = (t.log() for t in self._means(squares, counts, columns))
            by_squares = row, column - whole
            row, column, whole = self._means(logs, counts, columns)
            self.cuts.append((columns, [by_squares, (row + _LOG_BIAS, column - whole)]))

    @staticmethod
    def _means(values: Tensor, counts: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of rows, of columns, and of all."""
        whole = values.sum() / counts.sum().clamp(min=1)
        found = []
        for dim in (1, 0):
            n, s = (t.reshape(-1, columns).sum(dim) for t in (counts, values))
            mean = s / n.clamp(min=1)
            found.append(torch.where(n < _FEW, mean.where(n > 0, whole).clamp(min=whole), mean))
        return found[0], found[1], whole

    def units(self, first: int, shape: torch.Size) -> Tensor:
        """Of the elements from the ``first`` on, as many as a block of this shape has."""
        at = torch.arange(first, first + shape.numel(), device=self.noise.device)
        found: Tensor | None = None
        for columns, ways in self.cuts:
            row, column = at // columns, at % columns
            squared = torch.stack([of_row[row] + of_column[column] for of_row, of_column in ways]).amax(0)
            found = squared if found is None else torch.minimum(found, squared)
        assert found is not None
        return found.div_(2).exp_().mul_(_PLACE_FACTOR).reshape(shape)

    def own(self, first: int, shape: torch.Size) -> Tensor:
        """The noise of these elements alone."""
        return self.noise[first : first + shape.numel()].double().reshape(shape)


class _Judge:
    """The errors of all parts, in their elements' units."""

    def __init__(
        self,
        cells: _Cells,
        value: Tensor,
        sample: Tensor | None,
        relative: float,
        factor: float,
        slack: Slack,
        least: float,
        places: _Places | None,
    ) -> None:
        self.cells, self.slack, self.least, self.places = cells, slack, least, places
        self.original = value
        self.value = value.reshape(cells.matrix.shape)
        self.sample = None if sample is None else sample.reshape(cells.matrix.shape)
        self.relative, self.factor = relative, factor
        self.counts, self.squares = cells.sums(), cells.sums()
        self.largest, self.largest_at = -1.0, 0

    def worst(self) -> Difference:
        for block in self.cells.blocks():
            for count, cells in zip(self.counts, self.cells.of(block), strict=True):
                count += torch.bincount(cells.reshape(-1), minlength=len(count))
        # Of each cell, among its row's slices and among its column's.
        most = self.cells.most({dims: unit for dims, (unit, _) in self._peers(self._sampled).items()})
        least = None
        if self.places is not None:  # of slices in which an element has more than a few peers
            peers = {dims: unit.masked_fill(few, math.inf) for dims, (unit, few) in self._peers(self._own).items()}
            least = self.cells.most(peers, -1)
        for block in self.cells.blocks():
            self._add(block, most, least)
        error, part = self.largest / self.slack.element, ""
        counts, squares = self.cells.by_slice(self.counts), self.cells.by_slice(self.squares)
        for dims in self.cells.dims:
            found, name = self._worst_part(dims, counts[dims], squares[dims])
            if found > error:
                error, part = found, name
        whole, name = self._worst_part((), counts[()], squares[()])
        if whole > self.slack.part * error:  # else a slice says better where it is
            part = name
        return _element(max(error, whole), self.largest_at, self.original, self.cells.reference, part)

    def _peers(self, size: Callable[[slice, Tensor], Tensor]) -> dict[tuple[int, ...], tuple[Tensor, Tensor]]:
        """The unit of each cell of each slice, of errors of this size, and whether its peers are few."""
        squares = self.cells.sums()
        for block in self.cells.blocks():
            weight = size(block, self.cells.matrix[block].double())
            weight = weight.nan_to_num(0.0, _HUGE, -_HUGE).clamp_(-_HUGE, _HUGE).square_().reshape(-1)
            for square, cells in zip(squares, self.cells.of(block), strict=True):
                square += torch.bincount(cells.reshape(-1), weight, minlength=len(square))
        n, s = self.cells.by_slice(self.counts), self.cells.by_slice(squares)
        return {dims: _peers(n[dims], s[dims], self.cells.buckets) for dims in n}

    def _sampled(self, block: slice, reference: Tensor) -> Tensor:
        return reference if self.sample is None else self.sample[block].double() - reference

    def _own(self, block: slice, reference: Tensor) -> Tensor:
        assert self.places is not None
        return self.places.own(block.start * reference.shape[1], reference.shape)

    def _add(self, block: slice, most: tuple[Tensor, Tensor], least: tuple[Tensor, Tensor] | None) -> None:
        reference = self.cells.matrix[block].double()
        error = (self.value[block].double() - reference).abs_()
        error.nan_to_num_(0.0, 0.0)  # both are infinite: they have been seen to be equal
        cells = self.cells.of(block)
        unit = torch.maximum(most[0][cells[0]], most[1][cells[1]])
        if self.places is not None and least is not None:
            local = torch.minimum(least[0][cells[0]], least[1][cells[1]])
            local = torch.maximum(local, self.places.units(block.start * error.shape[1], error.shape))
            # What is left of terms that cancelled to zero, or were cut off there, may be of any scale.
            unit = torch.where(reference == 0, unit, torch.minimum(unit, local))
            unit = torch.maximum(unit, self._own(block, reference))
        unit = unit.mul_(self.factor).add_(reference.abs(), alpha=self.relative)
        unit += self.least * (reference != 0)
        error = error.div_(unit).nan_to_num_(0.0, math.inf)  # 0 / 0 is right where nothing may be left
        largest, at = error.reshape(-1).max(0)
        if float(largest) > self.largest:
            self.largest, self.largest_at = float(largest), block.start * error.shape[1] + int(at)
        if self.slack.part == math.inf:
            return
        weight = error.clamp_(max=_HUGE).square_().reshape(-1)
        for square, c in zip(self.squares, cells, strict=True):
            square += torch.bincount(c.reshape(-1), weight, minlength=len(square))

    def _worst_part(self, dims: tuple[int, ...], counts: Tensor, squares: Tensor) -> tuple[float, str]:
        """The worst slice along some dims, whole or of one magnitude."""
        slack = self.slack.of_part if dims else self.slack.of_whole
        errors = []
        for n, s in ((counts, squares), (counts.sum(1, keepdim=True), squares.sum(1, keepdim=True))):
            errors.append((s / n.clamp(min=1)).sqrt() / slack(n))
        table = torch.cat(errors, 1)
        error, at = table.reshape(-1).max(0)
        index, bucket = divmod(int(at), table.shape[1])
        name = "all of it"
        for dim in reversed(dims):
            index, at_dim = divmod(index, self.cells.shape[dim])
            name = f"index {at_dim} of dim {dim}" + (f", {name}" if name != "all of it" else "")
        if bucket < len(self.cells.buckets):
            name += _magnitude(int(self.cells.buckets[bucket]))
        return float(error), name


def _peers(counts: Tensor, squares: Tensor, buckets: Tensor) -> tuple[Tensor, Tensor]:
    """The unit of each cell: the larger of its own elements' and its peers' root mean square; and if these are few."""
    numbers = buckets.tolist()
    own = torch.where(counts >= _FEW, squares / counts.clamp(min=1), 0.0)
    nonzero = [i for i, number in enumerate(numbers) if number]
    half = counts[:, nonzero].sum(1) / 2
    units, few = torch.zeros_like(squares), torch.zeros_like(squares, dtype=torch.bool)
    for i, number in enumerate(numbers):
        # Zeros may be what is left of terms that cancelled: their peers are the smallest elements that there are.
        at = number or (numbers[nonzero[0]] if nonzero else 0)
        near = [j for j in nonzero if abs(numbers[j] - at) <= 1]
        n, s = counts[:, near].sum(1), squares[:, near].sum(1)
        below = counts[:, [j for j in nonzero if numbers[j] <= at + 1]].sum(1)
        for j in (j for j in nonzero if at + 1 < numbers[j] <= at + _REACH):
            joins = (below < half) | (n < _FEW)
            n, s = n + joins * counts[:, j], s + joins * squares[:, j]
            below = below + counts[:, j]
        # Few of them may all be rounded well by chance.
        units[:, i] = torch.maximum(own[:, i], s / n.clamp(min=1) * (1 + 4 / n.clamp(min=1)).square())
        few[:, i] = n < _FEW
    return units.sqrt_(), few


def _bucket(values: Tensor) -> Tensor:
    """The binades of fp64 numbers, by fours; 0 is zero."""
    bits = values.to(torch.float64, memory_format=torch.contiguous_format).view(torch.int64)
    return (bits >> (52 + _BINADES_SHIFT)) & (_BUCKETS - 1)


def _magnitude(bucket: int) -> str:
    if not bucket:
        return ", where it should be zero"
    low = (bucket << _BINADES_SHIFT) - 1023
    return f", of magnitude {2.0**low:.2g} to {2.0 ** min(low + (1 << _BINADES_SHIFT), 1023):.2g}"


def _first_not_finite(cells: _Cells, value: Tensor, sample: Tensor | None) -> int | None:
    """An element that is not finite as its reference is not, unless the sample's is not finite either: it overflows."""
    shape = cells.matrix.shape
    for block in cells.blocks():
        v, r = value.reshape(shape)[block], cells.matrix[block]
        if bool(v.isfinite().all()) and bool(r.isfinite().all()):
            continue
        same = (v.isfinite() & r.isfinite()) | (v.double() == r.double()) | (v.isnan() & r.isnan())
        if sample is not None:
            same |= ~sample.reshape(shape)[block].isfinite() & r.isfinite()
        if not bool(same.all()):
            first: int = block.start * shape[1]
            return first + int((~same).reshape(-1).int().argmax())
    return None


def _element(error: float, at: int, value: Tensor, reference: Tensor, part: str = "") -> Difference:
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), reference.shape))
    got, expected = (t.reshape(-1)[at].item() for t in (value, reference))
    return Difference(error, part, index, got, expected)


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
