"""What is asked of tensors in several places of the runtime."""

from __future__ import annotations

import torch

from torchtrt_md.errors import BundleError

# TensorRT reads its bindings with vector loads; PyTorch allocates at multiples of this, views may start anywhere.
ALIGNMENT = 256


def dtype_of(name: str) -> torch.dtype:
    """PyTorch's dtype of that name, as the manifest writes it: ``"bfloat16"``.

    Raises:
        BundleError: this PyTorch has no such dtype.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise BundleError(
            f"the bundle has tensors of dtype {name!r}, which PyTorch {torch.__version__} lacks",
            fix="install the PyTorch that built it (versions.torch in its manifest.json)",
        )
    return dtype
