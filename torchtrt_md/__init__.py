"""torchtrt_md: an unmodified, sharded PyTorch model becomes TensorRT engines for each rank.

Importing this package loads no TensorRT and needs no GPU and no process group.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Functions that are named as their packages are bound here, before anything can bind the package instead.
from torchtrt_md.build import build
from torchtrt_md.capture import capture
from torchtrt_md.errors import (
    BuildError,
    BundleError,
    CaptureError,
    CollectiveError,
    CommunicatorError,
    ConversionError,
    InputError,
    LaunchError,
    MDError,
    MeshError,
    OptionError,
    PlanError,
    PlanWarning,
    RankMismatchError,
    ShardingError,
    TargetError,
    VerificationError,
    WeightsError,
)
from torchtrt_md.mesh import Mesh
from torchtrt_md.parallel import ContextParallel, DataParallel, Gather, Split, TensorParallel

if TYPE_CHECKING:
    from torchtrt_md.capture.marks import gather, split, use_mesh
    from torchtrt_md.doors.compile import compile
    from torchtrt_md.doors.export import export
    from torchtrt_md.doors.load import load
    from torchtrt_md.doors.triton import triton
    from torchtrt_md.lowering import lower
    from torchtrt_md.runtime.runner import Runner
    from torchtrt_md.verification import verify

__version__ = "0.1.0"

__all__ = [
    "BuildError",
    "BundleError",
    "CaptureError",
    "CollectiveError",
    "CommunicatorError",
    "ContextParallel",
    "ConversionError",
    "DataParallel",
    "Gather",
    "InputError",
    "LaunchError",
    "MDError",
    "Mesh",
    "MeshError",
    "OptionError",
    "PlanError",
    "PlanWarning",
    "RankMismatchError",
    "Runner",
    "ShardingError",
    "Split",
    "TargetError",
    "TensorParallel",
    "VerificationError",
    "WeightsError",
    "__version__",
    "build",
    "capture",
    "compile",
    "export",
    "gather",
    "load",
    "lower",
    "split",
    "triton",
    "use_mesh",
    "verify",
]

# These import DTensor or TensorRT, so they are imported when they are first used.
_HOMES = {
    **dict.fromkeys(("split", "gather", "use_mesh"), "capture.marks"),
    "compile": "doors.compile",
    "lower": "lowering",
    "verify": "verification",
    "export": "doors.export",
    "load": "doors.load",
    "triton": "doors.triton",
    "Runner": "runtime.runner",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
