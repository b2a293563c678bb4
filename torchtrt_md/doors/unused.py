"""What ``torch.compile`` is told of a launch that nothing uses: every rank would do the same work."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakSet

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.fx import GraphModule

from torchtrt_md.capture.dynamo import GraphInput
from torchtrt_md.capture.dynamo_private import CallInProgress, graph_break
from torchtrt_md.capture.model import own_mesh
from torchtrt_md.errors import MeshError, PlanWarning
from torchtrt_md.lowering.ops import is_collective
from torchtrt_md.mesh import Mesh
from torchtrt_md.options import Options
from torchtrt_md.program import ShardedProgram, Weight

# What was compiled in several graphs, or used the launch: modules, and of functions the options.
_modules_in_parts: WeakSet[nn.Module] = WeakSet()
_functions_in_parts: list[Mapping[str, Any]] = []  # held, so that they stay the objects that they are
_used_meshes: set[Mesh] = set()  # a model may be compiled block by block, of which some are dense


def check_launch_used(
    gm: GraphModule,
    program: ShardedProgram,
    inputs: Sequence[GraphInput],
    options: Options,
    given: Mapping[str, Any] | None,
    call: CallInProgress | None,
) -> None:
    """Tell of a model that every rank would run whole: of one graph, since of several others may communicate.

    Raises, warns:
        as :func:`_tell_unused`.
    """
    if call is None and given is None:
        return
    if _uses_launch(program, inputs, call):
        _used_meshes.add(program.mesh)
    elif graph_break(gm) is None:
        parts = any(each is given for each in _functions_in_parts) if call is None else call.module in _modules_in_parts
        if not parts and (options.mesh is None or program.mesh not in _used_meshes):
            _tell_unused(program, options, call)
        return
    if call is not None:
        _modules_in_parts.add(call.module)
    elif given is not None and not any(each is given for each in _functions_in_parts):
        _functions_in_parts.append(given)


def _tell_unused(program: ShardedProgram, options: Options, call: CallInProgress | None) -> None:
    """
    Raises:
        MeshError: a mesh was given for it.

    Warns:
        PlanWarning: none was.
    """
    what = "the function" if call is None else type(call.module).__name__
    problem = f"nothing of {what} is split over ranks, and it does not communicate"
    fix = (
        "say what is parallel, as in options={'mesh': Mesh(cp=2), 'parallel': ContextParallel('cp')}, or shard the"
        " model with parallelize_module; where each rank has data of its own, options={'mesh': Mesh(dp=2), 'parallel':"
        " DataParallel('dp')}"
    )
    if options.mesh is not None:
        raise MeshError(
            f"all {program.mesh.size} ranks of {program.mesh} would do the same work: {problem}",
            fix=f"leave out the option 'mesh'; or {fix}",
        )
    warnings.warn(
        f"each of the {program.mesh.size} ranks runs all of {what} by itself: {problem}; {fix}",
        PlanWarning,
        stacklevel=2,
    )


def _uses_launch(program: ShardedProgram, inputs: Sequence[GraphInput], call: CallInProgress | None) -> bool:
    return (
        program.mesh.size == 1
        or bool(program.groups)
        or any(isinstance(source, Weight) and source.shardings for source in program.sources.values())
        or any(isinstance(i.example, (DTensor, DeviceMesh)) for i in inputs)
        or any(is_collective(node) for graph, _ in program.distinct() for node in graph.graph.nodes)
        or (call is not None and own_mesh(call.module) is not None)
    )
