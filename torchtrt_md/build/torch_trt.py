"""All that is used of Torch-TensorRT, and how it is loaded on a machine with no GPU.

``dynamo_tensorrt_converter``, ``get_decompositions``, ``post_lowering`` and ``CompilationSettings`` are its
documented ways to extend it.  The private ones are ``TRTInterpreter`` (its public callers deserialize the
engine that they built, for which there must be a GPU) with its ``_construct_trt_network_def`` and ``_cur_node``,
``get_trt_tensor`` and ``_TorchTensorRTConstantFolder``; ``tests/build/test_torch_trt.py`` says what breaks without
each.
"""

from __future__ import annotations

import functools
import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import Any

import torch
from torch.fx import Node

from torchtrt_md.lowering.ops import is_collective


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
            from torch_tensorrt.dynamo.lowering.passes import constant_folding
            from torch_tensorrt.logging import TRT_LOGGER
    finally:
        logging.disable(previous)
    constant_folding._TorchTensorRTConstantFolder = _without_collectives(constant_folding._TorchTensorRTConstantFolder)
    return SimpleNamespace(
        Input=Input,
        CompilationSettings=CompilationSettings,
        CONVERTERS=DYNAMO_CONVERTERS,
        ConverterPriority=ConverterPriority,
        converter=dynamo_tensorrt_converter,
        TRTInterpreter=_with_own_outputs(TRTInterpreter, get_trt_tensor),
        get_trt_tensor=get_trt_tensor,
        get_decompositions=get_decompositions,
        post_lowering=post_lowering,
        logger=TRT_LOGGER,  # TensorRT takes one in a process, and complains of others
    )


def torch_tensorrt_version() -> str:
    """The installed Torch-TensorRT's, whose lowering and converters decide what an engine is."""
    for name in ("torch_tensorrt_rtx", "torch_tensorrt"):
        with suppress(PackageNotFoundError):
            return version(name)
    return ""


def user_converters() -> set[str]:
    """The ops of all converters that neither Torch-TensorRT nor this package registered."""
    found = set()
    for registry in load().CONVERTERS.registries:
        for target, converters in registry.items():
            for converter in converters if isinstance(converters, (list, tuple)) else (converters,):
                if not _is_known(getattr(converter, "converter_implementation", converter)):
                    found.add(str(target))
    return found


def user_decompositions() -> set[str]:
    """The same of decompositions."""
    return {str(op) for op, rule in load().get_decompositions().items() if not _is_known(rule)}


def _is_known(function: Any) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    module = getattr(inspect.unwrap(function), "__module__", None) or ""
    return module.partition(".")[0] in ("torch", "torch_tensorrt", "torchtrt_md")


_QUANTIZERS = tuple(f"torchtrt_md.{op}.default" for op in ("fake_quantize", "eight_bits", "held_numbers"))


def _without_collectives(folder: Any) -> Any:
    """A constant folder that leaves collectives alone: what other ranks send is no constant, whatever the operand.

    And quantizers: TensorRT has to see that a weight is of 8 bits.

    Torch-TensorRT's exclusion rules do not help: they are asked after the op was run, and a collective cannot run here.
    """

    class Folder(folder):  # type: ignore[misc]
        def run_node(self, node: Node) -> Any:
            kept = is_collective(node) or str(node.target) in _QUANTIZERS
            return self.unknown_value if kept else super().run_node(node)

    return Folder


def _with_own_outputs(interpreter: Any, get_trt_tensor: Any) -> Any:
    """A TRTInterpreter that gives each output a tensor of its own.

    A tensor cannot be an input and an output of an engine, nor two outputs; and nodes say little about which tensors
    are the same, for many converters (of clone, of casts to the same dtype) return their operand.
    """

    class Interpreter(interpreter):  # type: ignore[misc]
        def convert(self) -> None:
            """Make the network, without building an engine of it."""
            self._construct_trt_network_def()

        @property
        def converting(self) -> Node | None:
            """The node that was being converted when that failed."""
            return getattr(self, "_cur_node", None)

        def output(self, target: Any, args: Any, kwargs: Any) -> Any:
            net = self.ctx.net
            taken = {net.get_input(i).name for i in range(net.num_inputs)}
            returned = []
            for index, value in enumerate(args[0]):
                tensor = get_trt_tensor(self.ctx, value, f"returned{index}")
                if tensor.name in taken:
                    tensor = net.add_identity(tensor).get_output(0)
                taken.add(tensor.name)
                returned.append(tensor)
            return super().output(target, (tuple(returned),), kwargs)

    return Interpreter
