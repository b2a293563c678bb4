"""The quantizers of NVIDIA's Model Optimizer, in a captured program and under tensor parallelism.

    y = quantizer(x)        y = fake_quantize(x, amax, 8, 4, False)         (TensorQuantizer, a module)

A quantizer rounds to few bits and keeps the dtype.  It is one op of the graph, so that a rule can say what becomes of
it on a shard, and an engine can have TensorRT's own layers for it.  Model Optimizer is not imported here: a model that
has its quantizers did so.

Where ``mtq.compress`` holds a weight in few bits, the weight is what it holds, and the quantizer has turned into what
makes it wide again, by the code of Model Optimizer's class for such weights.

Used of it are ``TensorQuantizer`` with its attributes, the op ``tensorrt::quantize_op``, ``_tensor_quant`` and the
``metadata`` of compressed weights.  Without ``_tensor_quant``, integers cannot be captured on a CPU, where it looks at
values; ``tests/capture/test_quantizers.py`` says so.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from torchtrt_md.errors import CaptureError, PlanError
from torchtrt_md.graph.source import running_line, source_line
from torchtrt_md.lowering import ops

if TYPE_CHECKING:
    from torchtrt_md.capture.tensor_parallel import Parts
    from torchtrt_md.capture.tensor_styles import Axis, Cut, Style

_ROOT = "modelopt.torch.quantization"
_UNSIGNED = "a quantizer of Model Optimizer is unsigned, and TensorRT has signed integers only"
_SIGNED = "quantize with unsigned=False"


@contextmanager
def whole() -> Iterator[None]:
    """While active, the function that Model Optimizer has for integers on a CPU is one op: it looks at values."""
    file: Any = sys.modules.get(f"{_ROOT}.tensor_quant")
    original = getattr(file, "_tensor_quant", None)
    if original is None:
        yield
        return
    file._tensor_quant = _integers
    try:
        yield
    finally:
        file._tensor_quant = original


def _integers(
    inputs: Tensor, amax: Tensor, num_bits: int = 8, unsigned: bool = False, narrow_range: bool = True
) -> Tensor:
    if unsigned:
        raise CaptureError(_UNSIGNED, fix=_SIGNED, at=running_line())
    rounded: Tensor = ops.fake_quantize(inputs, amax, num_bits, 0, narrow_range)
    return rounded


def as_one_op(graph: GraphModule) -> None:
    """tensorrt.quantize_op(x, amax, ...) -> fake_quantize(x, amax, ...), which needs no Model Optimizer to run.

    Raises:
        CaptureError: another op of that library, or arguments that no rule is known for.
    """
    for node in graph.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "tensorrt":
            continue
        if node.target._opname != "quantize_op":
            raise CaptureError(
                f"a quantizer of Model Optimizer was traced as {node.target}, as those are whose scales are of blocks"
                " and found in each call (NVFP4, MXFP8)",
                fix="quantize with scales of whole tensors or of rows: mtq.FP8_DEFAULT_CFG, mtq.INT8_DEFAULT_CFG",
                at=source_line(node),
            )
        x, amax, num_bits, exponent_bits, unsigned, narrow = ops.bound_args(node).values()
        if unsigned:
            raise CaptureError(_UNSIGNED, fix=_SIGNED, at=source_line(node))
        if amax is None or (exponent_bits and (num_bits, exponent_bits) != ops.FLOAT8):
            raise CaptureError(
                f"a quantizer of Model Optimizer has {num_bits} bits, {exponent_bits} of them of the exponent"
                + (", and no amax" if amax is None else ""),
                fix="use float8 e4m3, as of mtq.FP8_DEFAULT_CFG, or integers; with an amax",
                at=source_line(node),
            )
        node.target, node.kwargs = torch.ops.torchtrt_md.fake_quantize.default, {}
        node.args = (x, amax, num_bits, exponent_bits, narrow and not exponent_bits)


class Compressed(nn.Module):
    """In a shadow, in the place of the quantizer of a weight that is held in few bits: makes it wide again."""

    def __init__(self, quantizer: Any, metadata: Mapping[str, Any], held: tuple[int, ...]) -> None:
        super().__init__()
        self.kind, self.dtype, self.block_sizes = metadata["qtensor_class"], metadata["dtype"], quantizer.block_sizes
        self.shape = tuple(metadata["shape"])
        self.packs = held != self.shape
        for name in _SCALES.values():
            if quantizer._buffers.get(name) is not None:
                self.register_buffer(name, quantizer._buffers[name])

    def forward(self, held: Tensor) -> Tensor:
        """The weight, or a rank's part of it, in the dtype that it had."""
        shape = self.shape if self.packs else tuple(held.shape)
        scales = {name: self._buffers.get(buffer) for name, buffer in _SCALES.items()}
        wide: Tensor = self.kind(shape, self.dtype, held).dequantize(**scales, block_sizes=self.block_sizes)
        return wide


# The arguments of its classes -> the buffers of a quantizer.
_SCALES = {"scale": "_scale", "double_scale": "_double_scale", "scale_zeros": "_scale_zeros"}


def unwrap_compressed(shadow: nn.Module) -> None:
    """Let a shadow make its compressed weights wide from plain tensors, whose class says nothing.

    Of float8 weights on a GPU Model Optimizer has a product of its own, which is left out: what it computes with is the
    same, and it cannot be traced.

    Raises:
        CaptureError: a quantizer that compresses, without a weight that is compressed.
    """
    for path, module in shadow.named_modules():
        for name, quantizer in _of(module).items():
            if getattr(quantizer, "fake_quant", True):
                continue
            weight = module._parameters.get(name.removesuffix("_quantizer"))
            metadata = getattr(weight, "metadata", None)
            if not isinstance(metadata, dict):
                raise CaptureError(
                    f"the quantizer {f'{path}.{name}'!r} is to hold a weight in few bits, and holds none so",
                    fix="call mtq.compress(model) once its weights are loaded, or leave it out",
                )
            module._modules[name] = Compressed(quantizer, metadata, tuple(weight.shape))
            vars(module)["_parameters"] = dict(module._parameters)  # one of theirs, which compresses what it is given
            vars(module)["allow_real_quant_gemm"] = False


# --- tensor parallelism ---


def _kinds() -> tuple[type, ...]:
    """TensorQuantizer, and what holds several of them."""
    file = sys.modules.get(f"{_ROOT}.nn.modules.tensor_quantizer")
    return tuple(getattr(file, name) for name in ("TensorQuantizer", "SequentialQuantizer") if hasattr(file, name))


def _of(module: nn.Module) -> dict[str, Any]:
    """The quantizers that are the module's own and do something, by their names in it."""
    kinds = _kinds()
    return {n: q for n, q in module.named_children() if kinds and isinstance(q, kinds) and _acts(q)}


def _compressed(module: nn.Module) -> dict[str, Any]:
    """What makes its compressed weights wide."""
    return {name: child for name, child in module.named_children() if isinstance(child, Compressed)}


def _is_one(quantizer: object) -> bool:
    """Is it one quantizer, and not several in a row?"""
    return isinstance(quantizer, (*_kinds()[:1], Compressed))


def _acts(quantizer: Any) -> bool:
    return bool(
        not _is_one(quantizer)
        or quantizer.is_enabled
        or quantizer.pre_quant_scale is not None
        or quantizer.rotate_is_enabled
    )


def has_quantizers(model: nn.Module) -> bool:
    """Does any module of this one quantize what it is called with, or its weight, by Model Optimizer?"""
    return bool(_kinds()) and any(_of(module) for module in model.modules())


def forward_of(module: nn.Module) -> object:
    """The function that is the module's forward; of a layer that has quantizers, that which it had before."""
    if "forward" in vars(module):
        return None
    own = (c for c in type(module).__mro__ if "forward" in vars(c) and not c.__module__.startswith("modelopt."))
    return vars(next(own))["forward"]


def scales_argument(module: nn.Module) -> bool:
    """Does the layer scale its argument by the largest number that it finds there?"""
    quantizer = _of(module).get("input_quantizer")
    return quantizer is not None and _is_dynamic(quantizer)


def _is_dynamic(quantizer: Any) -> bool:
    return bool(
        _is_one(quantizer) and quantizer.is_enabled and quantizer.amax is None and not quantizer._use_constant_amax
    )


def check_rest(shadow: nn.Module, planned: set[str]) -> None:
    """Of the quantizers of layers that the plan does not name, refuse those that may read across what ranks have.

    Raises:
        PlanError: naming the quantizer.
    """
    for path, module in shadow.named_modules():
        for name, quantizer in _of(module).items() if path not in planned else ():
            where = f"{path}.{name}".lstrip(".")
            of_layer = isinstance(module, nn.Linear) and name in ("input_quantizer", "weight_quantizer")
            biased = getattr(quantizer, "bias_calibrator", None) is not None
            if not of_layer and (_is_dynamic(quantizer) or biased or not _is_one(quantizer)):
                raise _refused(where, "finds its scale in each call, maybe in a rank's part", "calibrate it")
            if name == "output_quantizer":
                raise _refused(where, "quantizes a result that may be a term of a sum over the ranks", "disable it")


def cut(module: nn.Module, path: str, style: Style, axis: Axis, parts: Parts) -> None:
    """Let the quantizers of a layer of which a rank has a part have their scales of that part.

    Raises:
        PlanError: one that would compute something else on the part.
    """
    from torchtrt_md.capture.tensor_styles import Colwise, Rowwise

    for name, q in {**_of(module), **_compressed(module)}.items():
        where = f"{path}.{name}"
        known = isinstance(module, nn.Linear) or (isinstance(module, nn.Embedding) and name == "weight_quantizer")
        if not known or not isinstance(style, (Colwise, Rowwise)):
            raise _refused(where, "is of a module that no style cuts with its scales", "leave the module out")
        _check_kind(where, q)
        shape = tuple(module._parameters["weight"].shape)  # type: ignore[union-attr]
        of_weight = style.cut(module, "weight", shape)
        assert of_weight is not None
        rowwise = isinstance(style, Rowwise)
        of_features = replace(of_weight, dim=0, zeros=False)  # of the result, or of the argument
        if isinstance(q, Compressed):
            _cut_buffer(q, where, "_scale", of_weight, shape, axis, parts)
        elif name == "weight_quantizer":
            if _is_dynamic(q):
                raise _refused(where, "finds the scale of the weight in each call, of a part of it", "calibrate it")
            _cut_buffer(q, where, "_amax", of_weight, shape, axis, parts)
        elif name == "input_quantizer":
            for buffer in ("_amax", "_pre_quant_scale") if rowwise else ():
                _cut_last(q, where, buffer, of_features, int(module.in_features), axis, parts)  # type: ignore[arg-type]
        elif name == "output_quantizer":
            if rowwise:
                raise _refused(where, "quantizes a term of the sum over the ranks, and not the sum", "disable it")
            if _is_dynamic(q):
                raise _refused(where, "finds its scale in each call, of a part of the result", "calibrate it")
            for buffer in ("_amax", "_pre_quant_scale"):
                _cut_last(q, where, buffer, of_features, int(module.out_features), axis, parts)  # type: ignore[arg-type]
        else:
            raise _refused(where, "is none of the input, the weight and the result", "disable it")


def _check_kind(where: str, q: Any) -> None:
    odd = {
        "is several in a row": not _is_one(q),
        "has scales of blocks": getattr(q, "block_sizes", None) is not None,
        "holds several numbers in a byte": getattr(q, "packs", False),
        "rotates what it quantizes": getattr(q, "rotate_is_enabled", False),
        "has a bias": getattr(q, "bias_calibrator", None) is not None,
        "has a backend of its own": getattr(q, "backend", None) is not None,
    }
    for why, there in odd.items():
        if there:
            raise _refused(where, why, "use mtq.FP8_DEFAULT_CFG or mtq.INT8_DEFAULT_CFG")


def _cut_last(q: Any, where: str, buffer: str, of_features: Cut, features: int, axis: Axis, parts: Parts) -> None:
    """Cut a scale that has an entry for each feature, which is the last dim of what is quantized."""
    scale = q._buffers.get(buffer)
    if scale is not None and scale.numel() > 1:
        shape = (*(1 for _ in scale.shape[:-1]), features)
        _cut_buffer(q, where, buffer, replace(of_features, dim=scale.dim() - 1), shape, axis, parts)


def _cut_buffer(q: Any, where: str, buffer: str, cut: Cut, shape: tuple[int, ...], axis: Axis, parts: Parts) -> None:
    """Cut a scale of what has this shape and is cut so, where it has an entry for each place of the dim."""
    scale = q._buffers.get(buffer)
    if scale is None or scale.numel() == 1:
        return
    fits = scale.dim() == len(shape) and all(n in (1, of) for n, of in zip(scale.shape, shape, strict=True))
    if not fits:
        raise _refused(f"{where}.{buffer}", f"has the shape {list(scale.shape)} for {list(shape)}", "calibrate by rows")
    if scale.shape[cut.dim] > 1:
        parts.cut_buffer(q, buffer, replace(cut, zeros=False), axis)


def _refused(where: str, why: str, fix: str) -> PlanError:
    return PlanError(
        f"the quantizer {where!r} {why}",
        fix=f"{fix}, or quantize the layers of this plan otherwise: mtq.disable_quantizer(model, {where!r})",
    )


def refuse_dtensor(module: nn.Module, path: str) -> None:
    """
    Raises:
        PlanError: a module with quantizers is to be cut by a style of PyTorch's own.
    """
    if has_quantizers(module):
        what = f"module {path!r}" if path else "the model"
        raise PlanError(
            f"{what} has quantizers of Model Optimizer, which PyTorch's own styles do not cut with it",
            fix="quantize the dense model, and give a plan with named styles: 'colwise', 'rowwise'",
        )
