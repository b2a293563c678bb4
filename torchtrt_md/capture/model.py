"""How a model is captured: one process traces the graphs of all ranks of any mesh.

    shadow      a copy of the module structure that shares the parameters  (this file)
    apply       hooks for context parallelism, DTensor for tensor parallelism
    trace       make_fx on fake tensors, once for each rank whose graph may differ

The user's model is left as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from torchtrt_md.capture import context_parallel, quantizers, tensor_parallel
from torchtrt_md.capture.arguments import Arguments
from torchtrt_md.capture.axes import check_axes, check_axes_used, with_one_name
from torchtrt_md.capture.beside_dtensor import beside_dtensor
from torchtrt_md.capture.held_tensors import Slots, constants, originals
from torchtrt_md.capture.kept_state import KeptState
from torchtrt_md.capture.marks import Marking, marking
from torchtrt_md.capture.repeated import RepeatedBlocks, UnrepeatedError
from torchtrt_md.capture.torch_private import DEPENDS_ON_VALUES, as_written, coordinates, fake_mesh
from torchtrt_md.capture.trace import LocalWeight, Trace, same_graph, trace
from torchtrt_md.checkpoint import Checkpoint, Given, listed
from torchtrt_md.errors import CaptureError, MDError, MeshError, PlanError, WeightsError
from torchtrt_md.mesh import Mesh, axis_names, joined
from torchtrt_md.parallel import ContextParallel, DataParallel, Parallel, TensorParallel
from torchtrt_md.program import ShardedProgram, Value, Weight, Weights, part
from torchtrt_md.wrappers import holders, named_weights, outer, plain


def capture_model(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    mesh: Mesh,
    parallels: Sequence[Parallel],
    weights: Given,
) -> ShardedProgram:
    """See :func:`torchtrt_md.capture`."""
    with as_written(model):
        try:
            return _captured(model, args, kwargs, mesh, parallels, weights, once=True)
        except UnrepeatedError:
            return _captured(model, args, kwargs, mesh, parallels, weights, once=False)


def _captured(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    mesh: Mesh,
    parallels: Sequence[Parallel],
    weights: Given,
    *,
    once: bool,
) -> ShardedProgram:
    """
    Args:
        once: may equal blocks be traced once?

    Raises:
        UnrepeatedError: they may not.
    """
    check_axes(parallels, mesh)
    named = [joined(p.axis) for p in parallels]
    parallels = [with_one_name(p, mesh) for p in parallels]
    called = dict(zip(named, (joined(p.axis) for p in parallels), strict=True))
    arguments = Arguments.of(model, args, kwargs)
    held = _weights(model, weights, parallels, mesh)  # before the tracing, which may take minutes
    own = own_mesh(model)
    if own is not None:
        quantizers.refuse_dtensor(model, "")
    by_dtensor = any(isinstance(p, TensorParallel) and tensor_parallel.needs_mesh(model, p) for p in parallels)
    with _device_mesh(mesh, by_dtensor, own, arguments.device.type) as device_mesh:
        shadow, copied = _shadow(model, without_memory=any(isinstance(p, TensorParallel) for p in parallels))
        plans: list[context_parallel.AppliedPlan] = []
        parts = tensor_parallel.Parts()
        # Tensor parallelism first: the other's hooks go around DTensor's.
        for p in sorted(parallels, key=lambda p: not isinstance(p, TensorParallel)):
            if isinstance(p, TensorParallel):
                tensor_parallel.apply(shadow, p, mesh, device_mesh, parts)
            elif isinstance(p, ContextParallel):
                plans.append(context_parallel.apply(shadow, p, mesh.joined_size(joined(p.axis))))
        local = _local_weights(shadow, mesh, arguments.device, parts)
        kept = KeptState(shadow)
        split_over = [joined(p.axis) for p in parallels if isinstance(p, ContextParallel)]
        marks = Marking({axis: mesh.joined_size(axis) for axis in split_over}, called)
        traces = []
        beside = beside_dtensor if by_dtensor else nullcontext
        for rank in range(mesh.size if device_mesh is not None else 1):
            here = {axis: mesh.coordinate(rank, axis) for axis in mesh.names}
            repeated = RepeatedBlocks(shadow, kept) if once else None
            try:
                with coordinates(here), kept, marking(marks), beside():
                    traces.append(trace(shadow, arguments, local, repeated))
            except MDError as error:
                if repeated is not None and repeated.has_some:
                    raise UnrepeatedError from error  # a whole trace says whose it is
                if not isinstance(error, CaptureError):
                    raise
                raise _without_a_plan(model, arguments, error) or error from error.__cause__
        groups = _groups(device_mesh)
    for plan in plans:
        plan.check_used(marks.split)
    marks.check_used()
    check_axes_used(mesh, parallels, own, traces[0], groups)
    held.replaced = Slots(model).replaced
    held.constants = constants(model, [t for trace in traces for t in trace.met], copied)
    traces = traces if device_mesh is not None else traces * mesh.size
    return _program(traces, mesh, parallels, groups, held, arguments)


def _without_a_plan(model: nn.Module, arguments: Arguments, error: CaptureError) -> CaptureError | None:
    """What to say where the model's own code raised something that it raises without any plan, too; else None."""
    raised = error.__cause__
    if raised is None or isinstance(raised, (MDError, *DEPENDS_ON_VALUES)) or own_mesh(model) is not None:
        return None
    shadow, _ = _shadow(model, without_memory=False)
    local = _local_weights(shadow, Mesh(alone=1), arguments.device, tensor_parallel.Parts())
    try:
        with KeptState(shadow), marking(Marking({})):
            trace(shadow, arguments, local)
    except CaptureError as alone:
        return CaptureError(
            alone.problem,
            fix="make the model run by itself with the example arguments: it fails without a plan, too; it is run on"
            " tensors without values, so what it does may depend on their shapes only",
            at=alone.at,
        )
    return None


def own_mesh(model: nn.Module) -> DeviceMesh | None:
    """The mesh that ``parallelize_module`` was given; None of a dense model."""
    return next((p.device_mesh for p in model.parameters() if isinstance(p, DTensor)), None)


@contextmanager
def _device_mesh(mesh: Mesh, by_dtensor: bool, own: DeviceMesh | None, device_type: str) -> Iterator[DeviceMesh | None]:
    """The mesh that DTensor traces on: the user's own, or a fake one; None where none is needed."""
    if own is not None:
        for axis, size in zip(axis_names(own), own.mesh.shape, strict=True):
            if mesh.axis_size(axis) != size:
                raise MeshError(
                    f"the model was parallelized over {size} ranks on axis {axis!r}, and {mesh} has"
                    f" {mesh.axis_size(axis)}",
                    fix="pass the mesh that parallelize_module was given",
                )
        yield own
    elif not by_dtensor:
        yield None
    else:
        with fake_mesh(mesh, device_type) as made:
            yield made


def _groups(device_mesh: DeviceMesh | None) -> dict[str, str]:
    if device_mesh is None:
        return {}
    return {device_mesh.get_group(dim).group_name: name for dim, name in enumerate(axis_names(device_mesh))}


def _shadow(model: nn.Module, without_memory: bool) -> tuple[nn.Module, dict[int, Tensor]]:
    """A copy of the modules that shares all parameters and buffers, or holds their shapes only.

    And of what else they hold, by the ids of the copies, the originals.

    Raises:
        CaptureError: a module holds what cannot be copied.
    """
    shared = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    # Process groups and meshes are not to be copied: they are how the ranks know each other.
    links = {
        id(v): v for m in model.modules() for v in vars(m).values() if isinstance(v, (dist.ProcessGroup, DeviceMesh))
    }
    memo: dict[int, Any] = {**shared, **links}
    try:
        shadow = copy.deepcopy(model, memo)
    except Exception as error:  # any class may refuse to be copied, in its own way
        raise _uncopied(model, {**shared, **links}, error) from error
    quantizers.unwrap_compressed(shadow)
    if without_memory:
        empty: dict[int, nn.Parameter] = {}
        for module in shadow.modules():
            if isinstance(module, torch.jit.ScriptModule) and any(True for _ in module.parameters(recurse=False)):
                raise CaptureError(
                    f"{type(model).__name__} holds a module that TorchScript compiled, whose parameters cannot be cut",
                    fix="use the module that was scripted or traced in its place",
                )
            for name, parameter in module._parameters.items():
                if parameter is not None and not isinstance(parameter, DTensor):
                    if id(parameter) not in empty:  # one that is tied stays so
                        empty[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
                    module._parameters[name] = empty[id(parameter)]  # registering asks for what a module may compute
    return shadow, originals(memo)


def _uncopied(model: nn.Module, shared: Mapping[int, object], error: Exception) -> CaptureError:
    """The error that names the attribute which cannot be copied."""
    own = frozenset(vars(nn.Module()))
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in own:
                try:
                    copy.deepcopy(value, dict(shared))
                except Exception:  # this is the one
                    where = f"{path}.{name}".lstrip(".")
                    return CaptureError(
                        f"{type(model).__name__} holds a {type(value).__name__} in {where!r}, which cannot be copied:"
                        f" {error}",
                        fix="capture traces a copy of the modules, so that yours stay as they are: keep this outside"
                        " of the module, or give its class a __deepcopy__",
                    )
    return CaptureError(
        f"{type(model).__name__} cannot be copied: {error}",
        fix="capture traces a copy of the modules: make copy.deepcopy(model) work",
    )


def _local_weights(
    shadow: nn.Module, mesh: Mesh, device: torch.device, parts: tensor_parallel.Parts
) -> list[LocalWeight]:
    """What each rank holds of every parameter and buffer."""
    found = []
    for name, t in plain([*shadow.named_parameters(), *shadow.named_buffers()]).items():
        whole, shardings = parts.of(t)
        if isinstance(t, DTensor):
            shardings = tensor_parallel.shardings(name, t, mesh)
        found.append(LocalWeight(Weight(name, tuple(whole), t.dtype, shardings), t, device))
    return found


def _weights(model: nn.Module, given: Given, parallels: Sequence[Parallel], mesh: Mesh) -> Weights:
    tensors = named_weights(model)
    held = holders(model)
    through = outer(model)
    shards = {name: t.to_local().detach() for name, t in tensors.items() if isinstance(t, DTensor)}
    whole = {name: t for name, t in tensors.items() if name not in shards}
    rank = dist.get_rank() if shards else 0
    unrelated = frozenset() if parallels else frozenset(whole)
    of_shards = isinstance(given, Mapping) and bool(shards) and not any(t.is_meta for t in tensors.values())
    if given is not None and not of_shards:
        checkpoint = Checkpoint(given)
        read = _read(model, tensors, checkpoint)
        shards, whole = ({name: t for name, t in of.items() if name not in read} for of in (shards, whole))
        return Weights(whole, shards, rank, unrelated, read, checkpoint, held, through)
    if given is not None:
        assert isinstance(given, Mapping)
        _check_dense(tensors, given, mesh, rank)
        whole |= {name: given[name].detach() for name in shards}
    return Weights(whole, shards, rank, unrelated, holders=held, outer=through)


def _check_dense(tensors: Mapping[str, Tensor], dense: Mapping[str, Tensor], mesh: Mesh, rank: int) -> None:
    """See that a sharded model has its parts of these weights, and no others.

    Raises:
        PlanError: naming a weight that is another, unknown or missing.
    """
    fix = "pass the state_dict of the dense model that was parallelized"
    lacking = [name for name, t in tensors.items() if isinstance(t, DTensor) and name not in dense]
    if lacking or dense.keys() - tensors.keys():
        odd = [*lacking, *sorted(dense.keys() - tensors.keys())][0]
        what = "is not among the dense weights" if lacking else "is no weight of the sharded model"
        raise PlanError(f"{odd!r} {what}", fix=fix)
    for name, given in dense.items():
        own = tensors[name]
        if (given.shape, given.dtype) != (own.shape, own.dtype):
            raise PlanError(
                f"the dense weight {name!r} is {given.dtype} {list(given.shape)} and the model's is {own.dtype}"
                f" {list(own.shape)}",
                fix=fix,
            )
        if given.is_meta:
            continue
        local, mine = own, given
        if isinstance(own, DTensor):
            local, mine = own.to_local(), part(given, tensor_parallel.shardings(name, own, mesh), mesh, rank)
        if local.shape == mine.shape and not _same_bits(local.detach(), mine.detach()):
            raise PlanError(f"the dense weight {name!r} has other values than the sharded model's", fix=fix)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    ours, theirs = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b.to(a.device)))
    return torch.equal(ours, theirs)


def _read(model: nn.Module, tensors: Mapping[str, Tensor], checkpoint: Checkpoint) -> dict[str, str]:
    """The names of what is read from a checkpoint, each with its name there: one of those of tied weights.

    A parameter has one source: the checkpoint, or the model where it is not on meta.  A buffer, such as a running mean,
    is that of the checkpoint where it is there, else the model's own.

    Raises:
        WeightsError: a parameter that has none or two, a name that the model lacks, another dtype or shape.
    """
    parameters = plain(model.named_parameters(remove_duplicate=False))
    if unexpected := sorted(checkpoint.forms.keys() - tensors.keys()):
        raise WeightsError(
            f"{checkpoint.where} has {listed(unexpected)}, and {type(model).__name__} has no weight of that name",
            fix="give the checkpoint of this very class of model, and of no other",
        )
    tied: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        tied.setdefault(id(tensor), []).append(name)
    read: dict[str, str] = {}
    missing: list[str] = []
    for names in tied.values():
        there = [name for name in names if name in checkpoint.forms]
        tensor = tensors[names[0]]
        if not there:
            missing += names[:1] if names[0] in parameters and tensor.is_meta else []
            continue
        if names[0] in parameters and not tensor.is_meta:
            raise WeightsError(
                f"the weight {names[0]!r} of {type(model).__name__} has a value, and {checkpoint.where} has one too",
                fix="make the model on meta, with torch.device('meta'): ..., or load the checkpoint and leave weights"
                " out",
            )
        for name in there:
            checkpoint.check(name, tensor.dtype, tensor.shape)
        checkpoint.check_equal(there)
        read |= dict.fromkeys(names, there[0])
    if missing:
        raise checkpoint.missing(missing)
    return read


def _output_name(index: int, arguments: Arguments) -> str:
    """``output0`` and so on; an engine cannot give an input and an output one name."""
    name = f"output{index}"
    while name in arguments.tensors:
        name = f"{name}_"
    return name


def _program(
    traces: Sequence[Trace],
    mesh: Mesh,
    parallels: Sequence[Parallel],
    groups: Mapping[str, str],
    weights: Weights,
    arguments: Arguments,
) -> ShardedProgram:
    distinct: list[Trace] = []
    graphs = []
    for t in traces:
        twin = next((d for d in distinct if d is t or same_graph(d.graph, t.graph)), None)
        if twin is None:
            distinct.append(t)
        graphs.append((twin or t).graph)
    first = traces[0]
    own = {p.axis for p in parallels if isinstance(p, DataParallel)}  # along which ranks are given data of their own
    of_all = parallels and len(distinct) == 1 and not (weights.shards or weights.unrelated)
    return ShardedProgram(
        mesh=mesh,
        graphs=tuple(graphs),
        sources=first.sources,
        outputs=tuple(Value(_output_name(i, arguments), tuple(v.shape), v.dtype) for i, v in enumerate(first.outputs)),
        weights=weights,
        constants=arguments.constants,
        positional=arguments.positional,
        opaque=arguments.opaque,
        strategies={joined(p.axis): p.strategy for p in parallels if isinstance(p, ContextParallel)},
        groups=groups,
        out_spec=first.out_spec,
        out_leaves=first.out_leaves,
        alike=frozenset(mesh.names) - own if of_all else frozenset(),
    )
