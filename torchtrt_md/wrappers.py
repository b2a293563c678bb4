"""Weights that are wrappers: tensor subclasses that hold plain tensors, as the quantized ones of torchao do.

    weight          Float8Tensor [N, K], which says that it is bfloat16
    weight.qdata    float8_e4m3fn [N, K]
    weight.scale    float32 [N, 1]

A program has a weight for each plain tensor, named after the parameter and the attribute that holds it.  While a model
is traced they are wrapped again: the subclass's own code says what is computed of them, and the graph has plain tensors
alone.  A DTensor is such a subclass too, and is not taken apart: its placements say what a rank holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchtrt_md.errors import CaptureError


def is_wrapper(tensor: Tensor) -> bool:
    """Does it hold plain tensors, of which PyTorch's protocol for subclasses can make it again?

    What an eager functional collective returns does too, but is a plain tensor as soon as it is used.
    """
    kind = type(tensor)
    return hasattr(kind, "__tensor_flatten__") and not issubclass(kind, DTensor) and not hasattr(kind, "trigger_wait")


def held_by(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The plain tensors of a wrapper by name, by reference; of any other tensor itself.

    Raises:
        CaptureError: a DTensor whose part on this rank is a wrapper.
    """
    if not is_wrapper(tensor):
        if isinstance(tensor, DTensor) and is_wrapper(tensor.to_local()):
            raise CaptureError(
                f"the weight {name!r} is a DTensor of {type(tensor.to_local()).__name__}",
                fix="quantize the dense model, and let a plan with named styles cut it: 'colwise', 'rowwise'",
            )
        return {name: tensor}
    return {inner: getattr(holder, attribute) for inner, (holder, attribute) in _places(name, tensor).items()}


def _places(name: str, wrapper: Tensor) -> dict[str, tuple[Tensor, str]]:
    """The names of the plain tensors of a wrapper -> what holds each, and as which attribute."""
    found: dict[str, tuple[Tensor, str]] = {}
    for attribute in wrapper.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
        inner, path = getattr(wrapper, attribute), f"{name}.{attribute}"
        found |= _places(path, inner) if is_wrapper(inner) else {path: (wrapper, attribute)}
    return found


def plain(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors by name, those that wrappers hold in place of the wrappers."""
    return {inner: t for name, tensor in tensors for inner, t in held_by(name, tensor).items()}


def holders(model: nn.Module) -> dict[str, tuple[Tensor, str]]:
    """The names of :func:`named_weights` that wrappers hold -> the wrapper, and the attribute."""
    return {inner: at for name, t in _named(model) if is_wrapper(t) for inner, at in _places(name, t).items()}


def outer(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers that are wrappers or DTensors: what is written goes through these."""
    return {name: t for name, t in _named(model) if is_wrapper(t) or isinstance(t, DTensor)}


def wrapped(name: str, like: Tensor, held: Mapping[str, Tensor]) -> Tensor:
    """The reverse of :func:`held_by`: a wrapper as ``like`` of other plain tensors, or the one that has the name."""
    if not is_wrapper(like):
        return held[name]
    attributes, context = like.__tensor_flatten__()  # type: ignore[attr-defined]
    inner = {a: wrapped(f"{name}.{a}", getattr(like, a), held) for a in attributes}
    made: Tensor = type(like).__tensor_unflatten__(inner, context, like.shape, like.stride())  # type: ignore[attr-defined]
    return made


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """The plain tensors of a model's parameters and buffers, each under all of its names."""
    return plain(_named(model))


def _named(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
