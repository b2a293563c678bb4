"""torchtrt_md: an unmodified, sharded PyTorch model becomes one TensorRT engine per rank.

Importing this package loads no TensorRT and needs no GPU and no process group.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Functions that are named as their packages are bound here, before anything can bind the package instead.
from torchtrt_md.build import build as build
from torchtrt_md.capture import capture as capture
from torchtrt_md.errors import MDError as MDError
from torchtrt_md.errors import VerificationError as VerificationError
from torchtrt_md.mesh import Mesh as Mesh
from torchtrt_md.parallel import ContextParallel as ContextParallel
from torchtrt_md.parallel import DataParallel as DataParallel
from torchtrt_md.parallel import Gather as Gather
from torchtrt_md.parallel import Split as Split
from torchtrt_md.parallel import TensorParallel as TensorParallel

if TYPE_CHECKING:
    from torchtrt_md.doors.compile import compile as compile
    from torchtrt_md.doors.export import export as export
    from torchtrt_md.lowering import lower as lower
    from torchtrt_md.runtime import load as load
    from torchtrt_md.verification import verify as verify

__version__ = "0.1.0"

# These stages import DTensor or TensorRT, so they are imported when they are first used.
_HOMES = {
    "compile": "doors.compile",
    "lower": "lowering",
    "verify": "verification",
    "export": "doors.export",
    "load": "runtime",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
