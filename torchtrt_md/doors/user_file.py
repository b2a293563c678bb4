"""Load a model file: a Python file with a function ``model`` that returns (model, args, kwargs).

A ``parallel`` beside it, a ``ContextParallel``, a ``TensorParallel`` or a list of such, serves models without a plan of
their own.
"""

from __future__ import annotations

import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchtrt_md.checks import as_parallels
from torchtrt_md.errors import CaptureError, OptionError, first_line
from torchtrt_md.graph.source import error_line
from torchtrt_md.parallel import Parallel

FUNCTION = "model"
_FORM = f"define `def {FUNCTION}():` that returns (model, args, kwargs): an nn.Module, a tuple and a dict"


@dataclass(frozen=True)
class UserFile:
    """What a model file gives.  ``parallel`` is its own list of that name, for a model without a plan, or None."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    parallel: list[Parallel] | None


def load_user_file(
    path: str | Path, seed: int = 0, device: str = "cpu"
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The (model, args, kwargs) of a model file; as :func:`read_user_file`."""
    file = read_user_file(path, seed, device)
    return file.model, file.args, file.kwargs


def read_user_file(path: str | Path, seed: int = 0, device: str = "cpu") -> UserFile:
    """Run the file and call its function, with PyTorch's seed set, so that every process gets the same.

    ``device`` is PyTorch's default device while the function runs; random weights differ between devices.

    Raises:
        CaptureError: no such file or function, or it returns something else.
        OptionError: a device that is not here, or a list ``parallel`` of other things.
    """
    path = Path(path)
    check_user_file(path, device)
    sys.path.insert(0, str(path.parent.resolve()))  # as python FILE does
    try:
        torch.manual_seed(seed)
        namespace = runpy.run_path(str(path))
        if not callable(namespace.get(FUNCTION)):
            raise CaptureError(f"{path} has no function {FUNCTION!r}", fix=_FORM)
        with torch.device(device):
            result = namespace[FUNCTION]()
    except CaptureError:
        raise
    except (Exception, SystemExit) as error:  # of the user's own code
        reason = next(iter(str(error).strip().splitlines()), "")
        raise CaptureError(
            f"{path} failed: {type(error).__name__}: {reason}",
            fix=f"make `python {path}` run, and its {FUNCTION}() return",
            at=error_line(error),
        ) from error
    finally:
        sys.path.pop(0)
    if (
        not isinstance(result, tuple)
        or len(result) != 3
        or not isinstance(result[0], nn.Module)
        or not isinstance(result[1], (tuple, list))
        or not isinstance(result[2], dict)
    ):
        raise CaptureError(f"{FUNCTION}() of {path} returned {type(result).__name__}, not a triple", fix=_FORM)
    return UserFile(result[0], tuple(result[1]), result[2], _parallel(path, namespace.get("parallel")))


def check_user_file(path: Path, device: str) -> None:
    """What can be known of the file before it is run.

    Raises:
        CaptureError: it is not there.
        OptionError: PyTorch has no such device here.
    """
    if not path.is_file():
        raise CaptureError(f"there is no model file {str(path)!r}", fix="give the path of a Python file")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter of a PyTorch that was built without it
        raise OptionError(
            f"no model can be made on the device {device!r}: {first_line(error)}",
            fix="give --model-device a device that PyTorch has here, such as cpu",
        ) from error


def _parallel(path: Path, own: object) -> list[Parallel] | None:
    """The file's own list, or the one thing that it has in its place."""
    if own is None:
        return None
    try:
        return list(as_parallels(own))
    except OptionError as error:
        raise OptionError(
            f"`parallel` of {path}: {error.problem}",
            fix='let it be md.ContextParallel("cp"), md.TensorParallel("tp"), md.DataParallel("dp"), or a list of such',
        ) from None
