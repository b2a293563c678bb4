"""The parts that a tensor is judged by: its slices, and in each of them the elements of about one magnitude."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import combinations

import torch
from torch import Tensor

FEW = 8  # elements, which say little of what rounding leaves
_BLOCK = 1 << 22
_COLUMNS = 256
_BUCKETS = 512  # of fp64's 2 ** 11 binades, 2 ** 2 each
_BINADES_SHIFT = 2


class Cells:
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
            s for s in slices if all(self.shape[d] > 1 for d in s) and elements >= FEW * self.slices(s)
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
        position = self.position[bucket(self.matrix[block])]
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
            counts += torch.bincount(bucket(self.matrix[block]).reshape(-1), minlength=_BUCKETS)
        return counts.nonzero().reshape(-1)


def bucket(values: Tensor) -> Tensor:
    """The binades of fp64 numbers, by fours; 0 is zero."""
    bits = values.to(torch.float64, memory_format=torch.contiguous_format).view(torch.int64)
    return (bits >> (52 + _BINADES_SHIFT)) & (_BUCKETS - 1)


def magnitude(bucket: int) -> str:
    if not bucket:
        return ", where it should be zero"
    low = (bucket << _BINADES_SHIFT) - 1023
    return f", of magnitude {2.0**low:.2g} to {2.0 ** min(low + (1 << _BINADES_SHIFT), 1023):.2g}"
