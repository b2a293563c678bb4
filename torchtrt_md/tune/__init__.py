"""Choose by timing: how attentions exchange, and what each segment runs as, in bounded time.

    1. each way of exchange, for each different attention: one block around it, by each transport   -> the fastest
    2. a whole step compiled by Inductor, for which no engine has to be built
    3. the different compute segments alone, in TensorRT and compiled by Inductor                   -> the faster
    4. whole steps: what 1 and 3 chose, what is chosen without timing, and TensorRT alone           -> the fastest
    5. where 1 had no attention to time: a whole step by each other transport, in front of 3        -> the fastest

What an option says is not tried otherwise, and where nothing is left to choose, nothing is timed: one engine is what
``placement="engine"`` asks for.
Equal blocks are timed once, so that the time does not grow with a model's depth.  Every time is the largest of any
rank's median, so all ranks decide alike.  A candidate is begun where it is expected to end within the seconds that are
allowed: as those of its kind before did, and where engines are to be built, by their ops.  What there is no time for is
left out, and said.  Ways of exchange get half of the time where segments are to be timed, too.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

from torchtrt_md.errors import LaunchError
from torchtrt_md.tune import kept
from torchtrt_md.tune.clock import Clock, GpuClock
from torchtrt_md.tune.kept import keep
from torchtrt_md.tune.search import Search, candidates

if TYPE_CHECKING:
    from torchtrt_md.choices import Choices
    from torchtrt_md.session import Session


def tune(session: Session, default: Choices, clock: Clock | None = None) -> Choices:
    """The fastest choices that are found, or were found for this program on these GPUs before.  Collective.

    What it finds is kept by :func:`keep`, once it was built.

    Args:
        session: of the program.
        default: what is chosen without timing.
        clock: times candidates; by default the GPU's.

    Raises:
        LaunchError: there is no GPU to time on.
    """
    launch = session.launch
    if clock is None and launch.device.type != "cuda":
        raise LaunchError("tune=True times candidates on GPUs, and there is none", fix="leave out tune")
    if session.options.placement == "engine":
        return default
    clock = clock or GpuClock(session)
    start = clock.now()
    file = session.choices_file = session.road.cache.folder / "choices" / f"{kept.key(session, default)}.json"
    # What rank 0 has counts for all: they must not choose differently.
    held = launch.agreement.gather(kept.read(file), "choices made before")[0]
    if held is not None:
        return held
    gc.collect()
    gc.freeze()  # the next collections, of which there is one for each candidate, look at what was made since
    try:
        return Search(session, clock, start).choose(default)
    finally:
        gc.unfreeze()


__all__ = ["candidates", "keep", "tune"]
