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
from torchtrt_md.verification.compiled import check_compiled

# Fusing after loops were reordered makes the kernels that torchtrt_md.verification.compiled tells of.
_OPTIONS = {"loop_ordering_after_fusion": False}


def compile_graph(
    name: str, graph: GraphModule, examples: Callable[[int], list[Tensor]], device: torch.device
) -> Callable[..., Sequence[Tensor]]:
    """The graph as a function of tensors like these, compiled now, and compared with what PyTorch's own ops compute.

    Inductor keeps what it compiled on disk, so equal graphs of later runs take seconds less.

    Args:
        name: of the part, for messages.
        graph: without collectives.
        examples: gives operands on the device, other ones for another number.

    Raises:
        VerificationError: what was compiled computes something else.
    """
    module = copied(graph)
    to_device(module, device)
    own = copied(module)
    if device.type == "cuda":
        fuse_gelu(module)
    with private.outside_of_compilation(), torch.no_grad():
        compiled = torch._inductor.compile(module, [*examples(0)], options=_OPTIONS)

    def call(*tensors: Tensor) -> Sequence[Tensor]:
        results: Sequence[Tensor] = compiled(*tensors)
        return results

    check_compiled(name, own, call, examples, by="Inductor")
    return call
