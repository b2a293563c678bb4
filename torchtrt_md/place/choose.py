"""Where attention runs, and as what all else, where nothing was said: by what hardware and flavour are good at."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

from torchtrt_md.errors import PlanError
from torchtrt_md.lowering.float8_rows import FLOAT8_CAPABILITY
from torchtrt_md.parallel import Placement
from torchtrt_md.segment import Runs


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
    float8: bool = False,
) -> Choice:
    """The placement that was asked for, or for ``auto`` the one that fits.

    Args:
        asked: ``engine``, ``split`` or ``auto``.
        strategies: of the program's context-parallel axes.
        compute: what runs all else; ``inductor``, or anything with engines.
        flavour: the installed TensorRT's name.
        capability: of the GPU that it will run on; None where that is not known, or is no GPU.
        rings: whether an engine for the target can have a ring inside.
        float8: whether queries, keys and values are to be sent in float8.

    Raises:
        PlanError: what was asked for does not go together.
    """
    if float8 and asked == "engine":
        raise PlanError(
            "exchanges in float8 are between engines; collectives inside one send what they are given",
            fix="use placement='split', or leave exchange_dtype out",
        )
    if compute == "inductor":
        if asked == "engine":
            raise PlanError(
                "placement='engine' with compute='inductor' leaves nothing for an engine to hold",
                fix="use placement='split', or compute='tensorrt'",
            )
        return Choice("split", "nothing runs in TensorRT")
    if asked in ("engine", "split"):
        return Choice("engine" if asked == "engine" else "split", "as asked for")
    if float8:
        return Choice("split", "collectives inside an engine send nothing in float8")
    if "ring" in strategies and not (rings and capability is not None and capability[0] >= 10):
        return Choice("split", "a ring inside an engine needs compute capability 10.0 or later, as GPU and as target")
    if _lacks_kernels(flavour, capability):
        return Choice("split", "TensorRT-RTX has no attention kernels for Hopper, and PyTorch has")
    return Choice("engine", "one engine is one launch, and can be run from C++")


def check_float8(capability: tuple[int, int] | None, target: str) -> None:
    """See that the GPU, and the one that is built for, can convert to float8.

    Args:
        capability: of the GPU that it will run on; None where that is not known, or is no GPU.
        target: as for :func:`torchtrt_md.build`.

    Raises:
        PlanError: one cannot.
    """
    known = re.fullmatch(r"sm(\d+)(\d)", target)
    for of, found in (("this GPU", capability), (f"the target {target!r}", known and tuple(map(int, known.groups())))):
        if found is not None and found < FLOAT8_CAPABILITY:
            raise PlanError(
                f"exchange_dtype='float8' needs compute capability 8.9 or later, and {of} has {found[0]}.{found[1]}",
                fix="leave exchange_dtype out",
            )


def choose_compute(asked: str, placement: str, *, flavour: str, capability: tuple[int, int] | None) -> tuple[Runs, str]:
    """What runs all that is not attention or a collective, and why, where that has to be said.

    Args:
        asked: ``tensorrt``, ``inductor`` or ``auto``.
        placement: that was asked for.
        flavour, capability: as for :func:`choose_placement`.
    """
    if asked == "auto" and placement != "engine" and _lacks_kernels(flavour, capability):
        return "inductor", "TensorRT-RTX has no kernels made for Hopper"
    return "inductor" if asked == "inductor" else "engine", ""


def _lacks_kernels(flavour: str, capability: tuple[int, int] | None) -> bool:
    """Has the flavour none made for this GPU?  On an H200 its products and attention are slower than PyTorch's."""
    return flavour == "TensorRT-RTX" and capability is not None and capability[0] == 9
