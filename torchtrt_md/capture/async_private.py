"""What an eager functional collective returns: a tensor that may not be there yet.

``AsyncCollectiveTensor`` is a private name.  Without it, what an eager ``RowwiseParallel`` layer returns could not be
passed to a compiled one: ``tests/capture/test_dynamo_graphs.py``.
"""

from __future__ import annotations

from typing import Any

from torch.distributed._functional_collectives import AsyncCollectiveTensor


def arrived(tensor: Any) -> Any:
    """The tensor that an eager functional collective returned, once it is there; anything else as it is.

    Without it, what an eager ``RowwiseParallel`` layer returns could not be passed to a compiled one: it is a subclass
    of tensor that waits when it is first used.
    """
    if not isinstance(tensor, AsyncCollectiveTensor):
        return tensor
    tensor.wait()
    return tensor.elem
