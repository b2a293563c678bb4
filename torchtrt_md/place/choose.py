"""Where attention runs, where nothing else was said: by what the hardware and the TensorRT flavour are good at."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from torchtrt_md.errors import PlanError
from torchtrt_md.parallel import Placement


class Choice(NamedTuple):
    """What was chosen, and why."""

    placement: Placement
    why: str


def choose_placement(
    asked: str,
    *,
    strategies: Collection[str],
    compute: str,
    flavour: str,
    capability: tuple[int, int] | None,
    rings: bool,
) -> Choice:
    """The placement that was asked for, or for ``auto`` the one that fits.

    Args:
        asked: ``engine``, ``split`` or ``auto``.
        strategies: of the program's context-parallel axes.
        compute: what runs all else, ``tensorrt`` or ``inductor``.
        flavour: the installed TensorRT's name.
        capability: of the GPU that it will run on; None where that is not known, or is no GPU.
        rings: whether an engine for the target can have a ring inside.

    Raises:
        PlanError: what was asked for does not go together.
    """
    if compute == "inductor":
        if asked == "engine":
            raise PlanError(
                "placement='engine' with compute='inductor' leaves nothing for an engine to hold",
                fix="use placement='split', or compute='tensorrt'",
            )
        return Choice("split", "nothing runs in TensorRT")
    if asked in ("engine", "split"):
        return Choice("engine" if asked == "engine" else "split", "as asked for")
    if "ring" in strategies and not (rings and capability is not None and capability[0] >= 10):
        return Choice("split", "a ring inside an engine needs compute capability 10.0 or later, as GPU and as target")
    if flavour == "TensorRT-RTX" and capability is not None and capability[0] == 9:
        return Choice("split", "TensorRT-RTX has no attention kernels for Hopper, and PyTorch has")
    return Choice("engine", "one engine is one launch, and can be run from C++")
