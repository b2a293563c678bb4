"""All that is used of Torch-TensorRT, and how it is loaded on a machine with no GPU.

``dynamo_tensorrt_converter``, ``get_decompositions``, ``post_lowering`` and ``CompilationSettings`` are its
documented ways to extend it.  The private ones are ``TRTInterpreter`` (its public callers deserialize the
engine that they built, for which there must be a GPU) and ``get_trt_tensor``;
``tests/build/test_torch_trt.py`` says what breaks without each.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch


@contextmanager
def without_gpu() -> Iterator[None]:
    """Answer the two questions that torch_tensorrt asks of a GPU it does not use, where there is none.

    It asks for the capability to rule out Tegra, and for the device number as a default argument.
    """
    if torch.cuda.is_available():
        yield
        return
    answers = {"get_device_capability": lambda device=None: (8, 0), "current_device": lambda: 0}
    asked = {name: getattr(torch.cuda, name) for name in answers}
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    try:
        yield
    finally:
        for name, function in asked.items():
            setattr(torch.cuda, name, function)


@functools.cache
def load() -> SimpleNamespace:
    """Torch-TensorRT's names, loaded when the first engine is built."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)  # about the absence of a GPU and of optional packages
    try:
        with without_gpu(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torch_tensorrt import Input
            from torch_tensorrt.dynamo._settings import CompilationSettings
            from torch_tensorrt.dynamo.conversion import (
                DYNAMO_CONVERTERS,
                ConverterPriority,
                dynamo_tensorrt_converter,
            )
            from torch_tensorrt.dynamo.conversion._TRTInterpreter import TRTInterpreter
            from torch_tensorrt.dynamo.conversion.converter_utils import get_trt_tensor
            from torch_tensorrt.dynamo.lowering import get_decompositions, post_lowering
    finally:
        logging.disable(previous)
    return SimpleNamespace(
        Input=Input,
        CompilationSettings=CompilationSettings,
        CONVERTERS=DYNAMO_CONVERTERS,
        ConverterPriority=ConverterPriority,
        converter=dynamo_tensorrt_converter,
        TRTInterpreter=TRTInterpreter,
        get_trt_tensor=get_trt_tensor,
        get_decompositions=get_decompositions,
        post_lowering=post_lowering,
    )
