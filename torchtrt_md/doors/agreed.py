"""What a caller asks for, before any work: read by all ranks together, and refused where it does not go together."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist

from torchtrt_md.capture.axes import check_axes, with_one_name
from torchtrt_md.choices import Choices
from torchtrt_md.launch.agree import Agreement, Alone, Together, check_same
from torchtrt_md.mesh import Mesh, joined
from torchtrt_md.options import Options, seconds
from torchtrt_md.parallel import ContextParallel, Placement
from torchtrt_md.place.choose import check_float8
from torchtrt_md.road import by_default


def agreed_options(timeout: object, read: Callable[[], Options]) -> Options:
    """The options, once every rank has read its own and all have the same.  Collective, where there is a launch.

    Args:
        timeout: what was given as the option of that name; nothing of it is checked yet.
        read: reads the options, and whatever else may be wrong with the arguments of one rank.

    Raises:
        MDError: what ``read`` raised on some rank, on every rank.
        RankMismatchError: on every rank, with the options that differ.
    """
    launched = dist.is_available() and dist.is_initialized()
    # A wrong timeout is found by ``read``; the ranks wait for each other as long as they do by default.
    agreement: Together = Agreement(seconds(timeout)) if launched else Alone()
    options = agreement.together("reading the options", read)
    check_same(agreement, options.told(), "their options")
    return options


def check_fit(options: Options, choices: Choices | None = None, capability: tuple[int, int] | None = None) -> Placement:
    """Refuse a target that cannot be built for, and options that do not go together, before anything is captured.

    Args:
        options: as they were asked for.
        choices: that were made already, in place of what is asked for.
        capability: of the GPU that it will run on; None where that is not known, or is no GPU.

    Returns:
        Where attention will be, unless tuning finds otherwise.

    Raises:
        MeshError, PlanError: an axis that is not there, or is given twice; a placement that nothing could run in.
        TargetError: the installed TensorRT cannot build for the target, or no ring inside an engine for it.
    """
    mesh = options.mesh
    parallels = list(options.parallels)
    if isinstance(mesh, Mesh):  # else the model brings it, and capture asks these
        check_axes(parallels, mesh)
        parallels = [with_one_name(p, mesh) for p in parallels]
    sequences = [p for p in parallels if isinstance(p, ContextParallel)]
    if options.engines:
        from torchtrt_md.build.flavour import flavour

        flavour().check_target(options.target)
    if "float8" in (options.exchange_dtype, choices and choices.exchange_dtype):
        check_float8(capability, options.target if options.engines else "")
    if choices is not None:
        return choices.placement
    _, (placement, _) = by_default(options, {p.strategy for p in sequences}, capability)
    rung = [p.axis for p in sequences if p.strategy == "ring" and options.exchange is None]
    if placement == "engine" and isinstance(mesh, Mesh) and any(mesh.joined_size(joined(axis)) > 1 for axis in rung):
        flavour().check_ring(options.target)
    return placement
