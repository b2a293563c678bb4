"""The seconds that a search may take: what candidates took, and whether the next would end too late."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torchtrt_md.launch.agree import Agreement
from torchtrt_md.tune.clock import Clock

T = TypeVar("T")
_SECONDS_PER_OP = 0.05  # of an engine; taken for the first, after which it is measured


class Allowance:
    """Counts from ``start``, by the clock.

    Attributes:
        until: when the seconds are over.
        half: when half of them are.
        once: seconds of the present candidate that later ones of its kind will not take.
    """

    def __init__(self, clock: Clock, agreement: Agreement, start: float, seconds: float) -> None:
        self._clock, self._agreement = clock, agreement
        self.until, self.half = start + seconds, start + seconds / 2
        self.once = 0.0
        self._built = (0.0, 0)  # seconds that building took, and the ops of the largest shares
        self._shortest: dict[str, float] = {}  # kind of candidate -> seconds that one took, what is done once aside

    def is_over(self, seconds: float, until: float | None = None) -> bool:
        """Would something that takes these seconds end when they are over, or behind ``until``?  Collective.

        By rank 0's clock, so that all ranks stop at the same candidate.
        """
        end = self.until if until is None else until
        return self._agreement.gather(self._clock.now() + seconds > end, "the time that is left")[0]

    def begun(self) -> float:
        """When the next candidate is begun."""
        self.once = 0.0
        return self._clock.now()

    def ended(self, kind: str, start: float) -> None:
        """A candidate of a kind was begun then, and has ended."""
        seconds = max(self._clock.now() - start - self.once, 0.0)
        self._shortest[kind] = min(seconds, self._shortest.get(kind, seconds))

    def expected(self, kind: str) -> float:
        """The seconds that the next of a kind will take: those of the shortest before."""
        return self._shortest.get(kind, 0.0)

    def to_build(self, ops: int) -> float:
        """The seconds that engines are expected to take, of which one rank builds so many ops."""
        seconds, before = self._built
        return ops * (seconds / before if before else _SECONDS_PER_OP)

    def building(self, ops: int, build: Callable[[], T]) -> T:
        """Build engines of so many ops, and learn from the time that it takes."""
        start = self._clock.now()
        built = build()
        if ops:
            seconds = self._clock.now() - start
            self.once += seconds
            self._built = (self._built[0] + seconds, self._built[1] + ops)
        return built
