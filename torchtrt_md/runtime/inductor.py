"""Parts that Inductor compiles."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule

from torchtrt_md.graph.functional import copied
from torchtrt_md.graph.uncollected import uncollected
from torchtrt_md.lowering.ops import bound_args
from torchtrt_md.runtime import private
from torchtrt_md.runtime.epilogue import fuse_gelu
from torchtrt_md.runtime.steps import to_device
from torchtrt_md.verification.compiled import Operands, check_compiled

log = logging.getLogger(__name__)
# Fusing after loops were reordered makes the kernels that torchtrt_md.verification.compiled tells of.
_OPTIONS = {"loop_ordering_after_fusion": False}


def prepare(device: torch.device) -> None:
    """Begin with what takes time before the first graph can be compiled, while earlier stages are under way."""
    if device.type == "cuda":  # for the CPU there are no Triton kernels
        private.start_compile_workers()


def compile_graph(
    name: str, graph: GraphModule, examples: Operands, device: torch.device, *, larger: Operands | None = None
) -> Callable[..., Sequence[Tensor]]:
    """The graph as a function of tensors like these, compiled now, and compared with what PyTorch's own ops compute.

    Inductor keeps what it compiled on disk, so equal graphs of later runs take seconds less.

    Args:
        name: of the part, for messages.
        graph: without collectives.
        examples: gives operands on the device, other ones for another number.
        larger: the same of larger numbers.

    Raises:
        VerificationError: what was compiled computes something else.
    """
    start = time.perf_counter()
    module = copied(graph)
    _sort_stably(module)
    to_device(module, device)
    own = copied(module)
    if device.type == "cuda":
        fuse_gelu(module)
    with torch.no_grad(), uncollected(), private.compiling(examples(0)) as like:
        compiled = private.by_inductor(module, like, _OPTIONS)

    def call(*tensors: Tensor) -> Sequence[Tensor]:
        results: Sequence[Tensor] = compiled(*tensors)
        return results

    between = time.perf_counter()
    check_compiled(name, own, call, examples, by="Inductor", larger=larger)
    end = time.perf_counter()
    log.info("%s: Inductor took %.2f s, the comparison %.2f s", name, between - start, end - between)
    return call


def _sort_stably(graph: GraphModule) -> None:
    """Say the order of equal elements, as of tokens of one expert: kernels leave them in different ones."""
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.sort.default):
        args = bound_args(node)
        node.target, node.args = torch.ops.aten.sort.stable, (args.pop("self"),)
        node.kwargs = {"stable": True, **args}
