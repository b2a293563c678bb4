"""The self-test of ring attention inside engines: one attention on the GPUs at hand, against gathered keys and values.

Where TensorRT has no kernels for attention over several ranks, it builds an engine all the same, which runs and
gives wrong values (measured on compute capability 9.0: relative errors of 0.93 on two ranks and 1.19 on four, as of
attention to one rank's keys alone).  No version number and no plan tells; so before an engine with ring attention
is run for the user, a small one is compared with what PyTorch computes.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from torchtrt_md.build.flavour import flavour, trt_dtype
from torchtrt_md.build.layers import add_attention, default_scale
from torchtrt_md.build.probes import builder_config, network_flags
from torchtrt_md.errors import BuildError, CommunicatorError, LaunchError, MDError
from torchtrt_md.launch import Launch, communicator
from torchtrt_md.verification.compare import relative_error

# norm(result - reference) / norm(reference), the reference in float32 from the same 16-bit inputs.  Right ones are a
# few roundings off (2 ** -9 in bfloat16, 2 ** -12 in float16); wrong ones were off by 0.9 and more.
BOUNDS = {torch.bfloat16: 2e-2, torch.float16: 5e-3}
_SEED = 20


def check_ring(
    axis: str,
    size: int,
    dtype: torch.dtype,
    head_dim: int,
    heads: int,
    kv_heads: int,
    tokens_per_rank: int,
    *,
    group: dist.ProcessGroup,
    launch: Launch,
    target: str = "current",
) -> float:
    """Compare one ring attention on these GPUs with attention over gathered keys and values.

    Collective: every rank of the launch calls it, after its communicators are connected.

    Args:
        axis: the mesh axis, of ``size`` ranks, whose sequence is split.
        dtype: float16 or bfloat16.
        head_dim, heads, kv_heads, tokens_per_rank: the sizes of one rank's q [1, heads, tokens, head_dim], and of k
            and v with ``kv_heads``.
        group: this rank's group along the axis.
        launch: whose watchdog ends the process where the engine hangs.
        target: what to build for.

    Returns:
        The relative error on this rank.

    Raises:
        MDError: on every rank, naming the ranks that failed: the engine does not build or load (BuildError,
            LaunchError), refuses its communicator (CommunicatorError) or is wrong (LaunchError).
    """
    about, agreement, device = f"the self-test of ring attention on axis {axis!r}", launch.agreement, launch.device
    shape, kv_shape = (1, heads, tokens_per_rank, head_dim), (1, kv_heads, tokens_per_rank, head_dim)
    plan = agreement.together(f"building {about}", lambda: ring_plan(shape, kv_shape, dtype, size, target))
    rank = dist.get_rank(group)
    q, k, v = (x.to(device) for x in ring_operands(shape, kv_shape, dtype, rank))
    with torch.cuda.device(device):
        context, keep = agreement.together(f"loading {about}", lambda: _context(plan, group, device, axis))
        with launch.watchdog.waiting(about):
            result = agreement.together(f"running {about}", functools.partial(_run, context, q, k, v))
            whole_k, whole_v = _gathered(k, size, group), _gathered(v, size, group)
            torch.cuda.synchronize(device)
        del context, keep  # in this order: a context must end before its engine
    reference = attended(q, whole_k, whole_v)
    agreement.vote(judge(result, reference, axis=axis, size=size), about)
    return relative_error(result, reference)


def ring_plan(
    shape: tuple[int, ...], kv_shape: tuple[int, ...], dtype: torch.dtype, size: int, target: str
) -> memoryview:
    """A serialized engine of one ring attention with inputs ``q``, ``k``, ``v`` and output ``out``.  Needs no GPU.

    Raises:
        TargetError: the target has no ring attention.
        BuildError: TensorRT cannot build it.
    """
    f = flavour()
    f.check_ring(target)
    builder = f.trt.Builder(f.trt.Logger(f.trt.Logger.WARNING))
    network, factor = ring_network(builder, shape, kv_shape, dtype, size)
    config = builder_config(f, builder)
    f.set_target(config, target)
    plan = builder.build_serialized_network(network, config)
    del factor  # TensorRT has read it
    if plan is None:
        raise BuildError(
            f"{f.name} {f.version} could not build ring attention of q {shape} and k {kv_shape} in {dtype} over"
            f" {size} ranks for target {target!r}",
            fix='its log above says why; use placement="split", where PyTorch does the ring',
        )
    return memoryview(plan)


def ring_network(
    builder: Any, shape: tuple[int, ...], kv_shape: tuple[int, ...], dtype: torch.dtype, size: int
) -> tuple[Any, Tensor]:
    """The network of :func:`ring_plan`, and its constant, which must live until it is built."""
    f = flavour()
    network = builder.create_network(network_flags(f))
    kind = getattr(f.trt.DataType, trt_dtype(dtype))
    q, k, v = (network.add_input(n, kind, s) for n, s in (("q", shape), ("k", kv_shape), ("v", kv_shape)))
    factor = torch.full((1, 1, 1, 1), default_scale(shape[-1]))
    scale = network.add_constant((1, 1, 1, 1), f.trt.Weights(f.trt.DataType.FLOAT, factor.data_ptr(), 1)).get_output(0)
    out = add_attention(f, network, q, k, v, None, False, scale, ranks=size)
    out.name = "out"
    network.mark_output(out)
    return network, factor


def ring_operands(
    shape: tuple[int, ...], kv_shape: tuple[int, ...], dtype: torch.dtype, rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of one rank of the group: normal, the same in every run, other ones on each rank."""
    generator = torch.Generator().manual_seed(_SEED + rank)
    # Wide enough that a softmax over some ranks' keys is not much like one over all, whatever its length.
    q, k, v = (torch.randn(s, generator=generator) for s in (shape, kv_shape, kv_shape))
    return (2 * q).to(dtype), (2 * k).to(dtype), v.to(dtype)


def attended(q: Tensor, whole_k: Tensor, whole_v: Tensor) -> Tensor:
    """The reference: attention in float32 of q to all ranks' keys and values."""
    return F.scaled_dot_product_attention(q.float(), whole_k.float(), whole_v.float(), enable_gqa=True)


def judge(result: Tensor, reference: Tensor, *, axis: str, size: int) -> MDError | None:
    """None where the result is right; else the error to raise.

    Args:
        result: what the engine gave, float16 or bfloat16.
        reference: what :func:`attended` gave.
    """
    error, bound = relative_error(result, reference), BOUNDS[result.dtype]
    if error <= bound:
        return None
    return LaunchError(
        f"ring attention inside an engine gives wrong values on these GPUs: over the {size} ranks of axis {axis!r} its"
        f" relative error is {error:.3g}, and at most {bound:g} is rounding",
        fix='use placement="split", where PyTorch does the ring, or another strategy',
    )


def _gathered(x: Tensor, size: int, group: dist.ProcessGroup) -> Tensor:
    """All ranks' parts of the sequence, dim 2, in order."""
    parts = [torch.empty_like(x) for _ in range(size)]
    dist.all_gather(parts, x, group=group)
    return torch.cat(parts, 2)


def _context(plan: memoryview, group: dist.ProcessGroup, device: torch.device, axis: str) -> tuple[Any, list[object]]:
    """An execution context with its communicator, and what it needs to live."""
    trt = flavour().trt
    logger = trt.Logger(trt.Logger.WARNING)
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan)
    context = None if engine is None else engine.create_execution_context()
    if context is None:
        raise LaunchError(
            "TensorRT does not load the engine of the self-test of ring attention",
            fix="see the lines that TensorRT logged above",
        )
    capsule = communicator.bind(context, group, device, engine="the self-test of ring attention", axis=axis)
    return context, [capsule, engine, runtime, logger]


def _run(context: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = torch.full_like(q, math.nan)  # a run that writes nothing must not pass
    for name, tensor in (("q", q), ("k", k), ("v", v), ("out", out)):
        context.set_tensor_address(name, tensor.data_ptr())
    stream: torch.cuda.Stream = torch.cuda.Stream(q.device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(q.device))
    if not context.execute_async_v3(stream.cuda_stream):
        raise CommunicatorError(
            "the self-test of ring attention could not be run",
            fix='see the lines that TensorRT logged above; placement="split" needs no ring in the engine',
        )
    stream.synchronize()
    return out
