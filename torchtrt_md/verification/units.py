"""The unit of an element's error: what rounding leaves in its peers, and at its own place."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchtrt_md.verification.cells import FEW

HUGE = 1e150  # squares must stay finite
_REACH = 6  # buckets above its own from which an element's unit may come
_PLACE_FACTOR = 5.0  # how far the noise of a place may be beyond the product of its row's and its column's
_LOG_BIAS = 1.0  # by how much the mean of the logarithms of a few draws' squares is below that of many


class Places:
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
        known = self.noise.isfinite()  # and not of what overflows
        counts = ((reference != 0) & reference.isfinite()).reshape(-1).logical_and_(known).double()
        least = reference.reshape(-1).double().abs().nan_to_num_(0.0, 0.0).clamp_(1 / HUGE, HUGE).mul_(relative / 8)
        squares = torch.maximum(self.noise.double().masked_fill_(~known, 0.0), least).square_()
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
            found.append(torch.where(n < FEW, mean.where(n > 0, whole).clamp(min=whole), mean))
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


def peers(counts: Tensor, squares: Tensor, buckets: Tensor) -> tuple[Tensor, Tensor]:
    """The unit of each cell: the larger of its own elements' and its peers' root mean square; and if these are few."""
    numbers = buckets.tolist()
    own = torch.where(counts >= FEW, squares / counts.clamp(min=1), 0.0)
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
            joins = (below < half) | (n < FEW)
            n, s = n + joins * counts[:, j], s + joins * squares[:, j]
            below = below + counts[:, j]
        # Few of them may all be rounded well by chance.
        units[:, i] = torch.maximum(own[:, i], s / n.clamp(min=1) * (1 + 4 / n.clamp(min=1)).square())
        few[:, i] = n < FEW
    return units.sqrt_(), few
