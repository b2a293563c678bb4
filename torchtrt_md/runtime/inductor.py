"""Parts that Inductor compiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule

from torchtrt_md.graph.functional import copied
from torchtrt_md.runtime import private
from torchtrt_md.runtime.epilogue import fuse_gelu
from torchtrt_md.runtime.steps import to_device


def compile_graph(
    graph: GraphModule, examples: Sequence[Tensor], device: torch.device
) -> Callable[..., Sequence[Tensor]]:
    """The graph as a function of tensors like these, compiled now.

    Inductor keeps what it compiled on disk, so equal graphs of later runs take seconds less.
    """
    module = copied(graph)
    to_device(module, device)
    if device.type == "cuda":
        fuse_gelu(module)
    with private.outside_of_compilation(), torch.no_grad():
        compiled = torch._inductor.compile(module, list(examples))

    def call(*tensors: Tensor) -> Sequence[Tensor]:
        results: Sequence[Tensor] = compiled(*tensors)
        return results

    return call
