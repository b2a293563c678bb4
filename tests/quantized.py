"""Models that torchao has quantized, for all tests."""

from __future__ import annotations

import unittest.mock
from collections.abc import Callable, Mapping
from typing import Any

import models
import torch
from torch import nn
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    PerRow,
    PerTensor,
    quantize_,
)

Call = tuple[Any, tuple[Any, ...], dict[str, Any]]  # as models.Call, of modules whose attributes are not known
_QUIET = {"set_inductor_config": False}  # which would be that of all tests
CONFIGS: Mapping[str, Callable[[], Any]] = {
    "float8 by row": lambda: Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), **_QUIET),
    "float8 by tensor": lambda: Float8DynamicActivationFloat8WeightConfig(granularity=PerTensor(), **_QUIET),
    "float8 weights": lambda: Float8WeightOnlyConfig(**_QUIET),
    "int8 by row": lambda: Int8DynamicActivationInt8WeightConfig(**_QUIET),
    "int8 weights": lambda: Int8WeightOnlyConfig(**_QUIET),
}
DYNAMIC = [name for name in CONFIGS if "by" in name]  # which quantize what they are called with, too


def quantized(call: Call, config: str, within: str = "") -> Call:
    """The model with all linear layers quantized whose names have ``within`` in them.

    torchao makes float8 layers only where there is a GPU that has them; what they compute has kernels for CPUs too.
    """
    model = call[0]
    with unittest.mock.patch("torchao.quantization.quant_api._check_hardware_support"):
        quantize_(model, CONFIGS[config](), lambda m, name: isinstance(m, nn.Linear) and within in name)
    return call


def attention(config: str, dtype: torch.dtype = torch.bfloat16) -> Call:
    return quantized(models.attention(dtype), config)


def mlp(config: str, dtype: torch.dtype = torch.bfloat16) -> Call:
    return quantized(models.mlp(dtype), config)


def flux(config: str) -> Call:
    """With quantized blocks, as it is used."""
    return quantized(models.flux(torch.bfloat16), config, within="transformer_blocks")
