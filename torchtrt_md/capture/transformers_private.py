"""How transformers reads a model's weights from a checkpoint, which is part of what its plans say.

It cuts the tensors of the checkpoint, and joins what was cut.  So a plan that names a weight ``colwise`` which is read
from several tensors, or from one whose rows alternate, gives a rank its part of each of them.  Without this such a
weight would be cut in one piece, and a rank would have gates without what they gate.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

# What the library does to tensors that it has cut, and how many parts are then one behind the other.
_JOINS: Mapping[str, Callable[[Any], int]] = {
    "Concatenate": lambda conversion: len(conversion.source_patterns),
    "Interleave": lambda conversion: 2,
}


class Reading:
    """What the library does to the tensors of a checkpoint of this model; nothing, for a model of another library."""

    def __init__(self, model: nn.Module) -> None:
        self._joins: list[tuple[Any, int, int]] = []  # of the names of weights, the dim, and how many parts
        loaded = sys.modules.get("transformers.modeling_utils")
        if loaded is None or not isinstance(model, loaded.PreTrainedModel):
            return
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
        except ImportError:  # before transformers 5, which joins nothing
            return
        for conversion in get_model_conversion_mapping(model):
            for operation in getattr(conversion, "operations", ()):
                if parts := _JOINS.get(type(operation).__name__):
                    self._joins.append((conversion.reverse_transform(), operation.dim, parts(conversion)))

    def parts(self, name: str, dim: int) -> int:
        """How many equal parts that are cut one by one a weight has on a dim, one behind the other."""
        return next(
            (parts for names, on, parts in self._joins if on == dim and names.rename_source_key(name)[1] is not None), 1
        )


def mark_expert_parallel(module: nn.Module) -> None:
    """Say that a module has some of the experts only: what is routed to others gives zeros.

    Without it the forward would index the weights of experts that are not there.
    """
    module._is_expert_parallel = True  # type: ignore[assignment]
