"""Models that NVIDIA's Model Optimizer has quantized, for all tests."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Mapping
from typing import Any

import models
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of versions of transformers, and of a machine with no GPU
    import modelopt.torch.quantization as mtq

Call = tuple[Any, tuple[Any, ...], dict[str, Any]]  # as models.Call, of modules whose attributes are not known


def config(weight: Mapping[str, Any] | None = None, **quantizers: Mapping[str, Any]) -> dict[str, Any]:
    """A config of Model Optimizer's that quantizes these alone: ``input={"num_bits": 8, "axis": None}``."""
    named = {"weight": weight, **quantizers} if weight else quantizers
    rules = [{"quantizer_name": f"*{name}_quantizer", "cfg": dict(cfg)} for name, cfg in named.items() if cfg]
    return {"quant_cfg": [{"quantizer_name": "*", "enable": False}, *rules], "algorithm": "max"}


ROWS, WHOLE = {"num_bits": 8, "axis": 0}, {"num_bits": 8, "axis": None}
FLOAT8 = {"num_bits": (4, 3), "axis": None}
CONFIGS: Mapping[str, Any] = {
    "float8": mtq.FP8_DEFAULT_CFG,
    "int8": mtq.INT8_DEFAULT_CFG,
    "int8 weights": mtq.INT8_WEIGHT_ONLY_CFG,
    "smoothquant": mtq.INT8_SMOOTHQUANT_CFG,
    "by token": mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG,
    "of all tokens": config(ROWS, input={**WHOLE, "type": "dynamic"}),
}


def quantized(call: Call | models.Call, how: str | dict[str, Any]) -> Call:
    """The model with quantizers, calibrated by its own arguments."""
    model, args, kwargs = call
    chosen = copy.deepcopy(CONFIGS[how] if isinstance(how, str) else how)
    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = mtq.quantize(model, chosen, lambda m: m(*args, **kwargs))
    return model, args, kwargs


def compressed(call: Call | models.Call, how: str | dict[str, Any]) -> Call:
    """The quantized model with its weights held in 8 bits, or in fewer."""
    made = quantized(call, how)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mtq.compress(made[0])
    return made
