"""How large what a bundle describes may be: more than any program needs, and little enough to look at.

A reader that trusts a size allocates what the file says.  Without these, a few bytes of JSON would ask for terabytes.
"""

from __future__ import annotations

from collections.abc import Sequence

from torchtrt_md.errors import BundleError

MAX_MANIFEST_BYTES = 256 << 20  # 256 ranks with 1500 weights each take half of it
MAX_GRAPH_BYTES = 64 << 20  # 100,000 nodes
MAX_RANKS = 4096
MAX_AXES = 16
MAX_DIMS = 64  # what PyTorch's own kernels take
MAX_TENSOR_BYTES = 1 << 40
MAX_DEPTH = 64  # of what a model returns

_REBUILD = "export the bundle again; do not edit its files by hand"


def check_shape(shape: Sequence[int], itemsize: int, what: str, strides: Sequence[int] | None = None) -> None:
    """Refuse a tensor that cannot be, or that no machine holds.

    Args:
        shape: its extents.
        itemsize: bytes of an element.
        what: names the tensor in the message.
        strides: in elements; None for a contiguous tensor.

    Raises:
        BundleError: a negative extent or stride, too many dims, or too many bytes from its first element to its last.
    """
    strided = f" and strides {list(strides)[:MAX_DIMS]}" if strides is not None else ""
    described = f"{what} has shape {list(shape)[:MAX_DIMS]}{strided}"
    if len(shape) > MAX_DIMS:
        raise BundleError(f"{what} has {len(shape)} dims, and a tensor has at most {MAX_DIMS}", fix=_REBUILD)
    if min(shape, default=0) < 0 or (
        strides is not None and (len(strides) != len(shape) or min(strides, default=0) < 0)
    ):
        raise BundleError(described, fix=_REBUILD)
    # An extent of 0 hides no other: PyTorch multiplies them in 64 bits before it sees the 0.
    elements = held = 1
    for dim, extent in enumerate(shape):
        elements *= max(extent, 1)
        held += max(extent - 1, 0) * (strides[dim] if strides is not None else 0)
    # A dim of stride 0 takes no memory, but whoever makes the tensor contiguous pays for it.
    size = max(elements, held) * itemsize
    if size > MAX_TENSOR_BYTES:
        raise BundleError(
            f"{described}, which is {size} bytes, and a tensor of a bundle has at most {MAX_TENSOR_BYTES}", fix=_REBUILD
        )
