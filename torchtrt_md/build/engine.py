"""``BuiltEngine``: an engine with its weights inside, for the ranks that are equal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torchtrt_md.segment import Segment


@dataclass(frozen=True)
class BuiltEngine:
    """One engine file, for all the ranks whose graph and weights are equal.

    Attributes:
        ranks: who runs it.
        file: the engine.
        segment: its bindings, named as the program's inputs and outputs are where it is the whole program, the axis of
            its communicator, and its collectives in order.
        target: what it was built for.
        seconds: that building it took; next to none where it was in the cache.
    """

    ranks: tuple[int, ...]
    file: Path
    segment: Segment
    target: str
    seconds: float
