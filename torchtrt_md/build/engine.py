"""``Engine``: an engine file and what it is for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from torchtrt_md.lowering.schedule import ScheduledCollective


@dataclass(frozen=True)
class Binding:
    """An input or output of an engine: its name there, its local shape and dtype, and what it is.

    ``source`` is as in the manifest: ``input:NAME``, ``coordinate:AXIS``, ``output:NAME``, ``value:NAME`` between two
    parts, or ``weight:NAME``, which the engine takes ``transposed`` where that is set.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: str
    transposed: bool = False


@dataclass(frozen=True)
class Engine:
    """One engine file, for all the ranks whose graph and weights are equal.

    ``axis`` is the mesh axis of its communicator, None where it has no collectives.
    """

    ranks: tuple[int, ...]
    file: Path
    axis: str | None
    inputs: tuple[Binding, ...]
    outputs: tuple[Binding, ...]
    collectives: tuple[ScheduledCollective, ...]
    target: str
    layers: int
    seconds: float
