"""What the arguments of the stages must be, checked before anything is done with them.

A wrong type would otherwise be an error from deep inside, or no error at all.  All raise OptionError, which names the
argument and says what to pass.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchtrt_md.errors import OptionError
from torchtrt_md.mesh import Mesh
from torchtrt_md.parallel import PARALLELS, Parallel

PLACEMENTS = ("auto", "engine", "split")
COMPUTES = ("tensorrt", "inductor")
TRANSPORTS = ("nccl", "store")
EXCHANGE_DTYPES = ("model", "float8")
FORMATS = ("bundle", "triton-python", "triton")  # what an export writes


def check_call(model: object, args: object, kwargs: object) -> None:
    """A model, and the arguments to call it with."""
    from torch import Tensor, nn

    if isinstance(model, type) and issubclass(model, nn.Module):
        raise refused("model", f"the class {model.__name__}", f"an instance of it: {model.__name__}(...)")
    check_type("model", model, nn.Module, "a torch.nn.Module")
    check_type(
        "args", args, (tuple, list), "args=(x,)" if isinstance(args, Tensor) else "a tuple of tensors and values"
    )
    if kwargs is not None:
        check_type("kwargs", kwargs, Mapping, "a dict: the name of an argument -> its value")
        assert isinstance(kwargs, Mapping)
        for name in kwargs:
            check_type("kwargs", name, str, "the names of arguments as its keys")


def check_mesh(mesh: object) -> None:
    """The mesh of a launch."""
    allowed = "a Mesh: Mesh(cp=4)"
    if isinstance(mesh, str):
        allowed = f"Mesh.parse({mesh!r})"
    elif hasattr(mesh, "mesh_dim_names"):
        allowed = "Mesh.from_device_mesh(...) of it"
    check_type("mesh", mesh, Mesh, allowed)


def as_parallels(parallel: object) -> tuple[Parallel, ...]:
    """What is parallel, given as one or as several."""
    several = tuple(parallel) if isinstance(parallel, (tuple, list)) else (parallel,)
    for one in several:
        check_type("parallel", one, PARALLELS, 'ContextParallel("cp"), TensorParallel("tp"), or a list of such')
    return several


def check_weights(weights: object) -> None:
    """Dense weights: a path, or tensors by name."""
    from torch import Tensor

    if weights is not None:
        check_type(
            "weights", weights, (Mapping, str, Path), "the folder of the dense model's checkpoint, or its state_dict()"
        )
    if isinstance(weights, Mapping):
        for value in weights.values():
            check_type("weights", value, Tensor, "tensors by name, as state_dict() of the dense model returns them")


def check_lower(program: object, placement: object, exchanges: object, dump: object) -> None:
    """The arguments of ``lower``."""
    from torchtrt_md.lowering.passes import Exchange

    check_program(program)
    check_choice("placement", placement, PLACEMENTS[1:])
    if exchanges is not None:
        check_type("exchanges", exchanges, Mapping, "a dict: attention_key -> Exchange")
        assert isinstance(exchanges, Mapping)
        for value in exchanges.values():
            check_type("exchanges", value, Exchange, "a lowering.passes.Exchange for each attention_key")
    if dump is not None:
        check_folder("dump", dump)
        check_place("dump", Path(dump), folder=True)  # type: ignore[arg-type]


def check_verify(program: object, model: object, args: object, kwargs: object) -> None:
    """The arguments of ``verify``."""
    check_program(program)
    check_call(model, args, kwargs)


def check_build(program: object, folder: object, target: object, ranks: object, progress: object) -> None:
    """The arguments of ``build``."""
    check_program(program)
    check_folder("folder", folder)
    check_type("target", target, str, '"portable", "current" or a GPU such as "sm89"')
    if ranks is not None:
        check_type("ranks", ranks, (list, tuple, set, frozenset, range), "a list of ranks")
        for rank in ranks:  # type: ignore[attr-defined]
            check_choice("ranks", rank, range(program.mesh.size))  # type: ignore[attr-defined]
    if not callable(progress):
        raise refused("progress", shown(progress), "a function that takes one line of text")


def check_export(
    *,
    model: object,
    args: object,
    kwargs: object,
    mesh: object,
    parallel: object,
    out: object,
    check: object,
    compute: object,
    transport: object,
    choices: object,
    dense: object,
    weights: object,
    coordinates_inside: object,
    format: object,
    weight_streaming: object,
    strip_weights: object,
    dump: object,
    progress: object,
) -> None:
    """The arguments of ``export``."""
    from torch import nn

    from torchtrt_md.choices import Choices

    check_call(model, args, kwargs)
    check_mesh(mesh)
    as_parallels(parallel)
    check_folder("out", out)
    check_choice("check", check, (True, False))
    check_choice("coordinates_inside", coordinates_inside, (True, False))
    check_choice("format", format, FORMATS)
    check_choice("compute", compute, COMPUTES)  # no "auto" as in Options, which are checked behind these
    check_choice("transport", transport, TRANSPORTS)
    if choices is not None:
        check_type("choices", choices, Choices, "the choices of a runner that md.compile made")
    if dense is not None:
        check_type("dense", dense, nn.Module, "the dense model, as it was before parallelize_module")
    check_weights(weights)
    check_choice("weight_streaming", weight_streaming, (True, False))
    check_choice("strip_weights", strip_weights, (True, False))
    if dump is not None:
        check_folder("dump", dump)
        check_place("dump", Path(dump), folder=True)  # type: ignore[arg-type]
    if not callable(progress):
        raise refused("progress", shown(progress), "a function that takes (stage, detail, seconds)")


def check_program(program: object) -> None:
    """A captured or lowered program."""
    from torchtrt_md.program import ShardedProgram

    check_type("program", program, ShardedProgram, "what torchtrt_md.capture or torchtrt_md.lower returned")


def check_folder(name: str, value: object) -> None:
    """A folder, as text or a path."""
    check_type(name, value, (str, Path), "a folder, as text or a pathlib.Path")


def check_place(name: str, path: Path, *, folder: bool) -> None:
    """A path at which a folder, or a file, is or can come into being, with the folders above it."""
    if path.exists() and path.is_dir() != folder:
        raise OptionError(
            f"{name!r} cannot be {path}, which is a {'file' if folder else 'folder'}",
            fix=f"give the name of a {'folder' if folder else 'file'}, which need not be there yet",
        )
    above = next(p for p in (path, *path.absolute().parents) if p.exists())
    if above != path and not above.is_dir():
        raise OptionError(f"{name!r} cannot be {path}: {above} is a file", fix="give a place in a folder")
    if not os.access(above, os.W_OK):
        raise OptionError(f"{name!r} cannot be {path}: {above} cannot be written to", fix="give another place")


def check_choice(name: str, value: object, choices: Any) -> None:
    """One of a few values."""
    # 1 == True, but is another choice.
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise refused(name, shown(value), " or ".join(map(repr, choices)))


def check_type(name: str, value: object, types: type | tuple[type, ...], allowed: str) -> None:
    """An instance of one of the types; ``allowed`` says in words what that is."""
    if not isinstance(value, types):
        raise refused(name, shown(value), allowed)


def refused(name: str, shown: str, allowed: str) -> OptionError:
    """The error for an argument that is something else than what it may be."""
    return OptionError(f"{name!r} cannot be {shown}", fix=f"pass {allowed}")


def shown(value: object) -> str:
    """A value as an error shows it."""
    return repr(value) if isinstance(value, (str, int, float, type(None))) else f"a {type(value).__name__}"
