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
    attributes, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return plain((f"{name}.{attribute}", getattr(tensor, attribute)) for attribute in attributes)


def plain(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors by name, those that wrappers hold in place of the wrappers."""
    return {inner: t for name, tensor in tensors for inner, t in held_by(name, tensor).items()}


def holders(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, tuple[Tensor, str]]:
    """The names of :func:`plain` -> the wrapper that holds the tensor, and the attribute; none of other tensors."""
    found: dict[str, tuple[Tensor, str]] = {}
    for name, tensor in tensors:
        if is_wrapper(tensor):
            for attribute in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
                inner = getattr(tensor, attribute)
                more = holders([(f"{name}.{attribute}", inner)])
                found |= more or {f"{name}.{attribute}": (tensor, attribute)}
    return found


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
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return plain(named)
