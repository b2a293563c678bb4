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
from torchtrt_md.graph.quantized import QUANTIZED
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

    def rings(self, target: str) -> bool:
        """May attention go around a ring of ranks inside an engine for this target?"""
        return self.ring_refusal(target) is None

    def ring_refusal(self, target: str) -> str | None:
        """Why attention may not go around a ring inside an engine for this target; None where it may.

        TensorRT documents it for compute capability 10.0 and later.  Below that it builds, runs and gives wrong
        values (measured on 9.0), so what is not known to be later is refused.
        """
        if not hasattr(self.trt, "IAttention") or not hasattr(self.trt.IAttention, "num_ranks"):
            return f"{self.name} {self.version} has no attention over several ranks"
        capability = _capability(target)
        if capability is None:
            return f"target {target!r} does not say that the GPU has compute capability 10.0 or later"
        if capability < _RING_CAPABILITY:
            return (
                f"target {target!r} is compute capability {capability[0]}.{capability[1]}, and it takes 10.0 or later"
            )
        return None

    def check_ring(self, target: str) -> None:
        """Refuse to build ring attention for this target.

        Raises:
            TargetError: see :meth:`ring_refusal`.
        """
        refusal = self.ring_refusal(target)
        if refusal is not None:
            raise TargetError(
                f"ring attention inside an engine cannot be built: {refusal}",
                fix='use placement="split", where PyTorch does the ring, or another strategy',
            )


# The first that TensorRT documents attention over several ranks for.
_RING_CAPABILITY = (10, 0)


def _capability(target: str) -> tuple[int, int] | None:
    """The compute capability of a target, None where it is not one alone."""
    if target == CURRENT:
        return torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    digits = target.removeprefix("sm")
    return (int(digits[:-1]), int(digits[-1])) if digits != target and digits.isdigit() and len(digits) > 1 else None


# What TensorRT has at the boundary of an engine, and Torch-TensorRT passes as it is.
TRT_DTYPES = {
    torch.float32: "FLOAT",
    torch.float16: "HALF",
    torch.bfloat16: "BF16",
    torch.int64: "INT64",
    torch.int32: "INT32",
    torch.int8: "INT8",
    torch.uint8: "UINT8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "FP8",
}


def boundary_dtypes(f: Flavour) -> tuple[torch.dtype, ...]:
    """The dtypes of inputs and outputs of engines."""
    known = (dtype for dtype, theirs in TRT_DTYPES.items() if hasattr(f.trt.DataType, theirs))
    return tuple(dtype for dtype in known if dtype not in QUANTIZED)


def trt_dtype(dtype: torch.dtype) -> str:
    """The name of TensorRT's DataType for a dtype; the dtype's own where TensorRT has none."""
    return TRT_DTYPES.get(dtype, dtype_name(dtype).upper())


@functools.cache
def flavour() -> Flavour:
    """The installed TensorRT.

    Raises:
        BuildError: none is installed, or one that is does not load.
    """
    broken: dict[str, Exception] = {}
    for name, module in _MODULES.items():
        try:
            trt = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:  # something that it needs
                broken[name] = error
        except Exception as error:  # a library that is not found, or not for this machine
            broken[name] = error
        else:
            return Flavour(name, trt.__version__, trt)
    if broken:
        name, reason = next(iter(broken.items()))
        raise BuildError(
            f"{name} is installed and does not load: {type(reason).__name__}: {reason}",
            fix=f"install what it lacks, or {name} again; import {_MODULES[name]} in Python says more",
        ) from reason
    raise BuildError(
        "no TensorRT is installed",
        fix="pip install torchtrt_md[rtx] for TensorRT-RTX, or torchtrt_md[tensorrt] for TensorRT",
    )
