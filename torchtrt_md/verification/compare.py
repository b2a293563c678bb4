"""The dense model on one GPU as the reference for the engines' outputs, and how close they must come."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchtrt_md.errors import VerificationError

# Engines round in another order than the dense model, not more: half as much again is what that may cost.
ROUNDING_RATIO = 1.5
# TensorRT's fp32 kernels sum in other orders over long products; TF32, off in both, would show as 1e-3.
FP32_TOLERANCE = 1e-4


class Reference(NamedTuple):
    """What the dense model computes.

    Attributes:
        outputs: by name, computed in ``precision``; integer outputs are those of the model's own dtype.
        dense_errors: the error of the model in its own dtype, by output.
        precision: what the outputs were computed in.
    """

    outputs: dict[str, Tensor]
    dense_errors: dict[str, float]
    precision: torch.dtype


def dense_reference(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    flat: Callable[[Any], dict[str, Tensor]],
    device: torch.device,
) -> Reference:
    """Run the dense model in its own dtype, then in fp64, or in fp32 where fp64 does not fit or run.

    The model is moved to ``device`` and converted in place, so that it is there once; discard it afterwards.

    Args:
        flat: the output tensors, by name, of what the model returns.

    Raises:
        VerificationError: the model runs in neither, or its outputs are no use as a reference.
    """
    with torch.no_grad(), _no_tf32():
        model.to(device)
        own = flat(model(*_placed(args, device, None), **_placed(kwargs, device, None)))
        reasons = []
        for precision in (torch.float64, torch.float32):
            wide = _widened(model, args, kwargs, flat, device, precision)
            if isinstance(wide, str):
                reasons.append(wide)
                continue
            outputs = {name: wide[name] if value.is_floating_point() else value for name, value in own.items()}
            check_useful(outputs)
            return Reference(outputs, {n: relative_error(own[n], outputs[n]) for n in own}, precision)
    raise VerificationError(
        f"{type(model).__name__} gives no reference: {'; '.join(reasons)}",
        fix="verify with smaller inputs, or run without --verify",
    )


def relative_error(value: Tensor, reference: Tensor) -> float:
    """``norm(value - reference) / norm(reference)``; for integers and booleans the fraction that differs.

    Infinite where the shapes differ or anything is not finite: NaN must not pass for small.
    """
    if value.shape != reference.shape:
        return float("inf")
    if not reference.is_floating_point():
        return float((value != reference).double().mean()) if value.numel() else 0.0
    wide = reference.double()
    error = float((value.double() - wide).norm() / wide.norm())
    return float("inf") if math.isnan(error) else error


def limit(dtype: torch.dtype, dense_error: float) -> float:
    """The largest relative error that an engine's output of this dtype may have.

    An fp32 output of a model that computes in 16 bits is as coarse as the model, hence the larger of both.
    """
    if not dtype.is_floating_point:
        return 0.0
    return max(ROUNDING_RATIO * dense_error, FP32_TOLERANCE if dtype.itemsize >= 4 else 0.0)


def check_useful(outputs: Mapping[str, Tensor]) -> None:
    """Refuse a reference that would hide errors.

    Raises:
        VerificationError: naming the output.
    """
    for name, t in outputs.items():
        if not t.is_floating_point():
            continue
        if not bool(t.isfinite().all()):
            raise VerificationError(
                f"{name!r} of the dense model is not finite", fix="use arguments on which the model's result is finite"
            )
        if not bool(t.any()):
            raise VerificationError(
                f"{name!r} of the dense model is all zeros, which would hide any error",
                fix="use random arguments and weights",
            )


def _widened(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    flat: Callable[[Any], dict[str, Tensor]],
    device: torch.device,
    precision: torch.dtype,
) -> dict[str, Tensor] | str:
    """The model's outputs, computed in ``precision``, or why there are none."""
    try:
        model.to(precision)
        return flat(model(*_placed(args, device, precision), **_placed(kwargs, device, precision)))
    except RuntimeError as error:  # out of memory, or a cast to a fixed dtype inside the model
        reason = f"in {precision}: {str(error).splitlines()[0]}"
    if device.type == "cuda":
        torch.cuda.empty_cache()  # only now, when the error's frames have let go of their tensors
    return reason


def _placed(arguments: Any, device: torch.device, precision: torch.dtype | None) -> Any:
    """The arguments on the device, their floating tensors in ``precision`` unless it is None."""

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(device, precision if precision is not None and leaf.is_floating_point() else leaf.dtype)

    return pytree.tree_map(place, arguments)


@contextmanager
def _no_tf32() -> Iterator[None]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
