"""Which TensorRT is installed: TensorRT-RTX or TensorRT.  Same Python API, other abilities."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from torchtrt_md.errors import BuildError, TargetError
from torchtrt_md.program import dtype_name

# Module of each flavour, in the order of preference of torch_tensorrt's own wheels.
_MODULES = {"TensorRT-RTX": "tensorrt_rtx", "TensorRT": "tensorrt"}
PORTABLE, CURRENT = "portable", "current"


@dataclass(frozen=True)
class Flavour:
    """An installed TensorRT: its name, exact version and module."""

    name: str
    version: str
    trt: ModuleType

    @property
    def targets(self) -> tuple[str, ...]:
        """The targets that engines can be built for, whatever GPU is in the machine."""
        if self.name != "TensorRT-RTX":
            return (PORTABLE, CURRENT)
        capabilities = (c.lower() for c in dir(self.trt.ComputeCapability) if c.startswith("SM"))
        return (*capabilities, PORTABLE, CURRENT)

    def set_target(self, config: Any, target: str) -> None:
        """Set the target of a builder config.

        Raises:
            TargetError: this flavour cannot build for it, or ``current`` is asked for where there is no GPU.
        """
        self.check_target(target)
        if self.name != "TensorRT-RTX":
            if target == PORTABLE:
                config.hardware_compatibility_level = self.trt.HardwareCompatibilityLevel.AMPERE_PLUS
        elif target != PORTABLE:
            config.num_compute_capabilities = 1  # the setter below needs its slot made first
            config.set_compute_capability(getattr(self.trt.ComputeCapability, target.upper()), 0)

    def check_target(self, target: str) -> None:
        """Raises TargetError as :meth:`set_target` does, before anything is built."""
        if target not in self.targets:
            raise TargetError(
                f"{self.name} {self.version} cannot build for target {target!r}",
                fix=f"use one of {', '.join(self.targets)}"
                + ("" if self.name == "TensorRT-RTX" else "; TensorRT builds on the kind of GPU that it will run on"),
            )
        if (target == CURRENT or self.name == "TensorRT") and not torch.cuda.is_available():
            raise TargetError(
                f"{self.name} with target {target!r} builds for the GPU in this machine, and there is none",
                fix=f"use one of {', '.join(t for t in self.targets if t != CURRENT)}"
                if self.name == "TensorRT-RTX"
                else "build on a machine with the GPU, or install TensorRT-RTX: pip install torchtrt_md[rtx]",
            )


# What TensorRT has at the boundary of an engine, and Torch-TensorRT passes as it is.
_DTYPES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int64": "INT64",
    "int32": "INT32",
    "int8": "INT8",
    "uint8": "UINT8",
    "bool": "BOOL",
    "float8_e4m3fn": "FP8",
}


def boundary_dtypes(f: Flavour) -> tuple[torch.dtype, ...]:
    """The dtypes of inputs and outputs of engines."""
    return tuple(getattr(torch, name) for name, theirs in _DTYPES.items() if hasattr(f.trt.DataType, theirs))


def trt_dtype(f: Flavour, dtype: torch.dtype) -> str:
    """The name of TensorRT's DataType for a dtype; the dtype's own where TensorRT has none."""
    name = dtype_name(dtype)
    return _DTYPES.get(name, name.upper())


@functools.cache
def flavour() -> Flavour:
    """The installed TensorRT.

    Raises:
        BuildError: none is installed.
    """
    for name, module in _MODULES.items():
        try:
            trt = importlib.import_module(module)
        except ImportError:
            continue
        return Flavour(name, trt.__version__, trt)
    raise BuildError(
        "no TensorRT is installed",
        fix="pip install torchtrt_md[rtx] for TensorRT-RTX, or torchtrt_md[tensorrt] for TensorRT",
    )
