"""Apply a tensor-parallel plan, or read one that the user applied.

The plan is applied to a shadow of the model whose parameters have shapes but no memory.  What it decides says which
part of each dense weight a rank holds.  Styles that are named are :mod:`torchtrt_md.capture.tensor_styles`; a
``ParallelStyle`` of PyTorch is applied by DTensor.
"""

from __future__ import annotations

import difflib
import fnmatch
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from torchtrt_md.capture import quantizers
from torchtrt_md.capture.tensor_styles import STYLES, Axis, Colwise, Cut, Dispatched, Rowwise, Style, style_of
from torchtrt_md.capture.transformers_private import Reading
from torchtrt_md.errors import MeshError, PlanError, PlanWarning
from torchtrt_md.mesh import Mesh, axis_names
from torchtrt_md.parallel import TensorParallel
from torchtrt_md.program import Sharding, UnevenSharding
from torchtrt_md.wrappers import held_by, is_wrapper

# The names whose meaning is one of PyTorch's own styles, of values that are DTensors in between.
_BY_DTENSOR: Mapping[str, Callable[[], ParallelStyle]] = {
    "sequence_parallel": lambda: SequenceParallel(use_local_output=True)
}
Shardings = tuple[Sharding | UnevenSharding, ...]


@dataclass
class Parts:
    """Which part of a weight a rank holds, of the parameters of a shadow that were cut."""

    _held: dict[int, tuple[Tensor, torch.Size, Shardings]] = field(default_factory=dict)
    _made: dict[tuple[int, Sharding | UnevenSharding], tuple[Tensor, nn.Parameter]] = field(default_factory=dict)

    def of(self, parameter: Tensor) -> tuple[torch.Size, Shardings]:
        """The whole shape, and the shardings."""
        _, whole, shardings = self._held.get(id(parameter), (parameter, parameter.shape, ()))
        return whole, shardings

    def cut(self, module: nn.Module, path: str, name: str, cut: Cut, axis: Axis) -> None:
        """Let the module's parameter be a rank's part; where it is another's too, that of equal cuts is one.

        Raises:
            PlanError: it is a wrapper, and what it holds cannot be cut with it.
        """
        parameter = module._parameters[name]
        assert parameter is not None
        key = id(parameter), cut.sharding(parameter.shape, axis)
        if key not in self._made:
            local = nn.Parameter(_local(path, parameter, cut, axis), requires_grad=False)
            self._made[key] = parameter, local  # both are kept, so that an id stays its own
            parts = held_by(path, local)
            for held, tensor in held_by(path, parameter).items():
                whole, before = self.of(tensor)
                self._held.setdefault(id(tensor), (tensor, whole, before))
                whole_here = is_wrapper(parameter) and tensor.shape == parts[held].shape  # a scale of all of it
                own = () if whole_here else (cut.sharding(tensor.shape, axis),)
                self._held[id(parts[held])] = parts[held], whole, (*before, *own)
        # Not register_parameter: it asks for the attribute, which a module may compute.
        module._parameters[name] = self._made[key][1]

    def cut_buffer(self, module: nn.Module, name: str, cut: Cut, axis: Axis) -> None:
        """Let the module's buffer be a rank's part."""
        whole = module._buffers[name]
        assert whole is not None
        local = torch.empty(cut.local(whole.shape, axis), dtype=whole.dtype, device=whole.device)
        extent, before = self.of(whole)
        self._held[id(local)] = local, extent, (*before, cut.sharding(whole.shape, axis))
        module._buffers[name] = local


def _local(path: str, parameter: Tensor, cut: Cut, axis: Axis) -> Tensor:
    """A rank's part of a parameter, of which the shape alone counts.

    A wrapper is cut by its own class, which knows what becomes of its scales: they are cut with the weight, or each is
    for all of it.  Scales of blocks must be cut where the weight is.

    Raises:
        PlanError: it is not so.
    """
    shape = cut.local(parameter.shape, axis)
    if not is_wrapper(parameter):
        return torch.empty(shape, dtype=parameter.dtype, device=parameter.device)
    dim, extents = cut.dim, cut.extents(parameter.shape, axis)
    problem = f"parameter {path!r}, a {type(parameter).__name__} of shape {list(parameter.shape)}, "
    fix = "leave the module out of the plan, or leave its weight as it was: quantize_(model, config, filter_fn)"
    try:
        local: Tensor = parameter.narrow(dim, 0, shape[dim])
    except Exception as error:  # of any library
        raise PlanError(f"{problem}cannot be cut on dim {dim}: {type(error).__name__}: {error}", fix=fix) from error
    parts = held_by(path, local)
    for name, tensor in held_by(path, parameter).items():
        of_part, sizes = list(parts[name].shape), list(tensor.shape)
        if of_part == sizes:
            continue
        along = len(sizes) == parameter.dim() and of_part == cut.local(sizes, axis)
        if not along or any(
            own * parameter.shape[dim] != extent * sizes[dim]
            for own, extent in zip(cut.extents(sizes, axis), extents, strict=True)
        ):
            raise PlanError(
                f"{problem}is cut on dim {dim} into parts of {shape[dim]}, and {name!r} of shape {sizes} is not to be"
                " cut at the same places",
                fix=f"quantize it with a scale for each row or for all of it; or {fix}",
            )
    return local


def needs_mesh(model: nn.Module, parallel: TensorParallel) -> bool:
    """Does the plan have a style that DTensor applies?"""
    return any(
        isinstance(e, ParallelStyle) or (isinstance(e, str) and e in _BY_DTENSOR)
        for e in _plan(model, parallel).values()
    )


def apply(
    shadow: nn.Module, parallel: TensorParallel, mesh: Mesh, device_mesh: DeviceMesh | None, parts: Parts
) -> None:
    """Parallelize the shadow in place; ``parts`` is told of each parameter that is cut.

    Raises:
        PlanError: there is no plan, it names nothing that is there or one thing twice, a style does not fit its module,
            or heads do not divide by the axis.

    Warns:
        PlanWarning: an entry of the user's plan names nothing that is there.  The model's own plan serves other
            configurations, too.
    """
    plan = _plan(shadow, parallel)
    axis = Axis(parallel.axis, mesh.axis_size(parallel.axis))
    modules = dict(shadow.named_modules(remove_duplicate=False))
    parameters = [name for name, _ in shadow.named_parameters(remove_duplicate=False)]
    taken: dict[str, str] = {}
    missing = []
    for pattern in plan:
        found = _named(pattern, [*modules, *parameters])
        if not found:
            missing.append(pattern)
        for path in found:
            if taken.setdefault(path, pattern) != pattern:
                raise PlanError(
                    f"the plan names module {path!r} twice: by {taken[path]!r} and by {pattern!r}",
                    fix="let one of the two names stand for it",
                )
    if parallel.plan is not None:
        _tell_missing(shadow, missing, len(missing) == len(plan))
    named = set(taken)
    taken = _each_once(taken, plan, modules)
    for path in taken:
        _refuse_sharded(path, modules)
    reading = Reading(shadow)
    alone = {_known_as(path, modules) for path in taken if path not in modules}
    quantizers.check_rest(shadow, named)
    # In the order of the model, as an outer module's hooks look at what is in it.
    for path, pattern in taken.items():
        style = _style(path, plan[pattern], modules.get(path))
        if isinstance(style, ParallelStyle):
            assert device_mesh is not None
            quantizers.refuse_dtensor(modules[path], path)
            _check_divides(modules[path], path, style, axis)
            _parallelize(modules[path], path, _along(device_mesh, axis.name), style)
        elif path in modules:
            _apply_to_module(modules, path, style, axis, parts, alone)
        else:
            owner, _, name = path.rpartition(".")
            quantizers.cut(modules[owner], owner, Style(), axis, parts)  # none of them is known to fit
            _cut(modules[owner], path, name, _as_read(style, modules[owner], path, reading), axis, parts)


def _each_once(taken: Mapping[str, str], plan: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """The first name of each thing that the plan names, for a module may have several; it is cut once.

    Raises:
        PlanError: one module, or parameter, has two styles by two of its names.
    """
    first: dict[tuple[int, str], str] = {}
    for path, pattern in taken.items():
        before = first.setdefault(_known_as(path, modules), path)
        if not _is_style(plan[taken[before]], plan[pattern]):
            raise PlanError(
                f"the plan has two styles for what is called {before!r} and {path!r}, and is one"
                f" {'module' if path in modules else 'parameter'}: by {taken[before]!r} and by {pattern!r}",
                fix="let one of the two names stand for it",
            )
    return {path: taken[path] for path in first.values()}


def _is_style(one: Any, other: Any) -> bool:
    """Is it one style?  PyTorch's compare as objects."""
    of_pytorch = isinstance(one, ParallelStyle) and type(one) is type(other)
    return one is other or bool(one == other) or (of_pytorch and vars(one) == vars(other))


def _known_as(path: str, modules: Mapping[str, nn.Module]) -> tuple[int, str]:
    """Equal for all names of a module, and for all of a module's parameter."""
    owner, _, name = path.rpartition(".")
    return (id(modules[path]), "") if path in modules else (id(modules[owner]), name)


def _along(device_mesh: DeviceMesh, axis: str) -> DeviceMesh:
    """The part of a mesh along one axis.

    Raises:
        MeshError: it is one dim of several, of which PyTorch takes parts by their names only, and these have none.
    """
    if device_mesh.ndim == 1:
        return device_mesh
    if device_mesh.mesh_dim_names is None:
        raise MeshError(
            f"the DeviceMesh that the model was sharded on has no names for its {device_mesh.ndim} dims",
            fix='make it with names: init_device_mesh("cuda", (2, 2), mesh_dim_names=("dp", "tp"))',
        )
    return device_mesh[device_mesh.mesh_dim_names[axis_names(device_mesh).index(axis)]]


def _refuse_sharded(path: str, modules: Mapping[str, nn.Module]) -> None:
    """
    Raises:
        PlanError: what the plan names, a module or a parameter, is in parts before the plan is applied.
    """
    owner, _, name = path.rpartition(".")
    held = dict(modules[path].named_parameters()) if path in modules else {name: modules[owner].get_parameter(name)}
    placed = next((name for name, parameter in held.items() if isinstance(parameter, DTensor)), None)
    if placed is not None:
        what = f"module {path!r}" if path else "the model"
        if path not in modules:
            what = f"parameter {path!r}"
        raise PlanError(
            f"the plan splits {what}, which is sharded already, as parallelize_module does it: "
            + (f"its {placed!r} is a DTensor" if path in modules else "it is a DTensor"),
            fix="leave out parallel: the model brings what is parallel itself; or pass the dense model",
        )


def _as_read(style: Style, module: nn.Module, path: str, reading: Reading) -> Style:
    """The style of a parameter by itself; where it is read from several tensors, a rank holds its part of each."""
    name = path.rpartition(".")[2]
    cut = style.cut(module, name, tuple(module.get_parameter(name).shape))
    if cut is None or not isinstance(style, (Colwise, Rowwise)) or len(style.blocks) > 1:
        return style
    return replace(style, blocks=(1,) * reading.parts(path, cut.dim))


def _plan(model: nn.Module, parallel: TensorParallel) -> Mapping[str, Any]:
    plan = parallel.plan
    if plan is None:
        plan = getattr(model, "tp_plan", None) or getattr(model, "_tp_plan", None)
    if not plan:
        raise PlanError(
            f"{type(model).__name__} has no tensor-parallel plan of its own (tp_plan or _tp_plan)",
            fix=_example(model, parallel.axis),
        )
    return plan


def _named(pattern: str, names: list[str]) -> list[str]:
    """The names that fit a pattern, part by part."""
    parts = pattern.split(".")
    return [
        name
        for name in dict.fromkeys(names)
        if bool(name) == bool(pattern)  # the model itself has no name, which * would fit
        and len(own := name.split(".")) == len(parts)
        and all(map(fnmatch.fnmatchcase, own, parts))
    ]


def _tell_missing(model: nn.Module, missing: list[str], all_of_them: bool) -> None:
    names = [name for name, _ in [*model.named_modules(), *model.named_parameters()] if name]
    for pattern in missing:
        problem = f"the plan names a module {pattern!r} that {type(model).__name__} does not have"
        close = difflib.get_close_matches(pattern, names, n=3) or names[:3]
        fix = "use a name from model.named_modules(), such as " + ", ".join(map(repr, close))
        if all_of_them:
            raise PlanError(problem, fix=fix)
        warnings.warn(f"{problem}; {fix}", PlanWarning, stacklevel=5)


def _apply_to_module(
    modules: Mapping[str, nn.Module],
    path: str,
    style: Style,
    axis: Axis,
    parts: Parts,
    alone: Collection[tuple[int, str]],
) -> None:
    """``alone`` are the parameters that the plan names by themselves."""
    module = modules[path]
    style = _by_heads(modules, path, style, axis)
    experts = getattr(module, "num_experts", None) if isinstance(style, Dispatched) else None  # of all ranks
    try:
        hooks = style.hooks(module, axis)
    except PlanError as error:
        problem = f"the style of module {path!r}, a {type(module).__name__}, does not fit: {error.problem}"
        raise PlanError(problem, fix=error.fix) from None
    quantizers.cut(module, path, style, axis, parts)  # before the weight, of whose whole shape they are
    for name, parameter in list(module.named_parameters(recurse=False)):
        if (id(module), name) not in alone:
            if experts is not None and parameter.shape[:1] == (experts,):
                raise PlanError(
                    f"a rank has some of the {experts} experts of module {path!r}, and all of their parameter"
                    f" {name!r}, {list(parameter.shape)}, which the plan does not name",
                    fix=f"name it, too: '{path}.{name}': 'grouped_gemm'",
                )
            _cut(module, f"{path}.{name}" if path else name, name, style, axis, parts, parameter)
    if hooks is not None:
        hooks.put_on(module)


def _cut(
    module: nn.Module,
    path: str,
    name: str,
    style: Style,
    axis: Axis,
    parts: Parts,
    parameter: Tensor | None = None,
) -> None:
    parameter = module._parameters[name] if parameter is None else parameter
    assert parameter is not None
    cut = style.cut(module, name, tuple(parameter.shape))
    if cut is None:
        return
    if cut.dim >= parameter.dim() or parameter.shape[cut.dim] % sum(cut.blocks):
        raise PlanError(
            f"parameter {path!r} of shape {list(parameter.shape)} is to be cut on dim {cut.dim}, in blocks of"
            f" {':'.join(map(str, cut.blocks))}",
            fix="leave it out of the plan",
        )
    parts.cut(module, path, name, cut, axis)


def _by_heads(modules: Mapping[str, nn.Module], path: str, style: Style, axis: Axis) -> Style:
    """The style of a projection to heads, of which a rank needs whole ones.

    Key/value heads fewer than the axis has ranks are held by several ranks each, those that have the queries to them.

    Raises:
        PlanError: heads do not divide by the axis.
    """
    if not isinstance(style, Colwise) or style.gather or len(style.blocks) > 1:
        return style
    module, owner = modules[path], modules[path.rpartition(".")[0]]
    width, head_dim = getattr(module, "out_features", None), getattr(owner, "head_dim", None)
    if not isinstance(width, int) or not isinstance(head_dim, int) or width % head_dim:
        return style
    heads = width // head_dim
    # As the model has it: it is changed below, with the first of keys and values.
    grouped = owner.__dict__.setdefault(_GROUPED, getattr(owner, "num_key_value_groups", 1))
    if heads % axis.size == 0:
        return style
    queries = heads * grouped
    is_kv = grouped > 1 and any(getattr(m, "in_features", 0) == queries * head_dim for m in owner.children())
    if is_kv and axis.size % heads == 0 and queries % axis.size == 0:
        owner.num_key_value_groups = queries // axis.size
        return replace(style, copies=axis.size // heads)
    what = "key/value heads" if is_kv else "heads"
    raise PlanError(
        f"module {path!r} has {heads} {what}, which do not divide by the {axis.size} ranks of axis {axis.name!r}:"
        f" {heads % axis.size} left over",
        fix=f"use an axis whose size divides {heads}, or give the module the style colwise_gather_output and what takes"
        " its result rowwise_split_input",
    )


# Among the attributes of a shadow's module: its num_key_value_groups before any key/value heads were copied.
_GROUPED = "_torchtrt_md_num_key_value_groups"


def _parallelize(module: nn.Module, path: str, mesh: DeviceMesh, style: ParallelStyle) -> None:
    try:
        parallelize_module(module, mesh, style, src_data_rank=None)
    except Exception as error:  # PyTorch has several for a style that does not fit
        reason = next(iter(str(error).strip().splitlines()), "")
        raise PlanError(
            f"the style {type(style).__name__} does not fit module {path!r}, a {type(module).__name__}:"
            f" {type(error).__name__}: {reason}",
            fix="ColwiseParallel and RowwiseParallel are for nn.Linear and nn.Embedding, SequenceParallel for norms;"
            " or leave the module out of the plan",
        ) from error


def _example(model: nn.Module, axis: str) -> str:
    """A plan in the model's own names where two layers are a pair beyond doubt, for a message."""
    for path, module in model.named_modules():
        widths: dict[tuple[int, int], list[str]] = {}
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                widths.setdefault((child.in_features, child.out_features), []).append(f"{path}.{name}".lstrip("."))
        for (inner, outer), ups in widths.items():
            downs = widths.get((outer, inner), [])
            if inner < outer and len(ups) == len(downs) == 1:
                plan = f'{{"{ups[0]}": "colwise", "{downs[0]}": "rowwise"}}'
                return f'pass one: TensorParallel("{axis}", plan={plan})'
    return (
        f'pass one: TensorParallel("{axis}", plan={{...}}), by the names of modules: "colwise" for a layer whose result'
        ' may be in parts, "rowwise" for the layer that takes it'
    )


def _style(name: str, entry: Any, module: nn.Module | None) -> ParallelStyle | Style:
    if isinstance(entry, ParallelStyle):
        return entry
    if isinstance(entry, str) and entry in _BY_DTENSOR:
        return _BY_DTENSOR[entry]()
    named = style_of(entry, module)
    if named is not None:
        return named
    if isinstance(entry, type) and issubclass(entry, ParallelStyle):
        raise PlanError(
            f"the plan gives module {name!r} the class {entry.__name__}, and not a style",
            fix=f"make one of it: {entry.__name__}()",
        )
    raise PlanError(
        f"the plan gives module {name!r} the style {_name_of(entry)!r}, which is not known",
        fix=f"use a ParallelStyle, or one of {', '.join((*STYLES, *_BY_DTENSOR))}; or leave the module out",
    )


def _name_of(entry: object) -> str:
    if isinstance(entry, str):
        return entry
    return entry.__name__ if isinstance(entry, type) else type(entry).__name__


def _check_divides(module: nn.Module, path: str, style: ParallelStyle, axis: Axis) -> None:
    """DTensor would give ranks parts of several sizes."""
    dim = {ColwiseParallel: 0, RowwiseParallel: 1}.get(type(style))
    if isinstance(module, nn.Embedding) and dim is not None:
        dim = 1 - dim
    weight = getattr(module, "weight", None)
    size = axis.size
    if dim is None or not isinstance(weight, nn.Parameter) or weight.dim() != 2 or weight.shape[dim] % size == 0:
        return
    raise PlanError(
        f"the weight of module {path!r} has {weight.shape[dim]} on dim {dim}, which does not divide by the {size}"
        f" ranks of axis {axis.name!r}: {weight.shape[dim] % size} left over",
        fix="name the style, as in transformers' plans: 'colwise', 'rowwise'; use an axis whose size divides it; or"
        " leave the module out of the plan",
    )


def shardings(name: str, parameter: DTensor, mesh: Mesh) -> tuple[Sharding, ...]:
    """Which part of a parameter a rank holds.

    Raises:
        PlanError: a placement other than replicated or evenly sharded.
    """
    found = []
    for axis, placement in zip(axis_names(parameter.device_mesh), parameter.placements, strict=True):
        if isinstance(placement, Replicate):
            continue
        # A subclass of Shard orders its parts otherwise than Sharding says.
        if type(placement) is not Shard or parameter.shape[placement.dim] % mesh.axis_size(axis):
            raise PlanError(
                f"parameter {name!r} of shape {list(parameter.shape)} is placed as {placement} on axis {axis!r}",
                fix="use Replicate() or Shard(dim) with a dim that divides by the axis",
            )
        found.append(Sharding(placement.dim, axis))
    return tuple(found)
