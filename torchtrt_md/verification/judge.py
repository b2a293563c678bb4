"""The worst part of a tensor, each measured in the units of its elements."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from torchtrt_md.verification.cells import Cells, magnitude
from torchtrt_md.verification.units import HUGE, Places, peers


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


class Judge:
    """The errors of all parts, in their elements' units."""

    def __init__(
        self,
        cells: Cells,
        value: Tensor,
        sample: Tensor | None,
        relative: float,
        factor: float,
        slack: Slack,
        least: float,
        places: Places | None,
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
        return element(max(error, whole), self.largest_at, self.original, self.cells.reference, part)

    def _peers(self, size: Callable[[slice, Tensor], Tensor]) -> dict[tuple[int, ...], tuple[Tensor, Tensor]]:
        """The unit of each cell of each slice, of errors of this size, and whether its peers are few.

        What overflows where it is rounded says nothing of its peers.
        """
        squares, counts = self.cells.sums(), (self.counts[0].clone(), self.counts[1].clone())
        for block in self.cells.blocks():
            weight = size(block, self.cells.matrix[block].double()).reshape(-1)
            beyond = ~weight.isfinite()
            some = bool(beyond.any())
            weight = weight.masked_fill(beyond, 0.0).clamp_(-HUGE, HUGE).square_()
            for square, count, cells in zip(squares, counts, self.cells.of(block), strict=True):
                square += torch.bincount(cells.reshape(-1), weight, minlength=len(square))
                if some:
                    count -= torch.bincount(cells.reshape(-1)[beyond], minlength=len(count))
        n, s = self.cells.by_slice(counts), self.cells.by_slice(squares)
        return {dims: peers(n[dims], s[dims], self.cells.buckets) for dims in n}

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
        weight = error.clamp_(max=HUGE).square_().reshape(-1)
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
            name += magnitude(int(self.cells.buckets[bucket]))
        return float(error), name


def first_not_finite(cells: Cells, value: Tensor, sample: Tensor | None) -> int | None:
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


def element(error: float, at: int, value: Tensor, reference: Tensor, part: str = "") -> Difference:
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), reference.shape))
    got, expected = (t.reshape(-1)[at].item() for t in (value, reference))
    return Difference(error, part, index, got, expected)
