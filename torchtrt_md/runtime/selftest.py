"""Run self-tests on the GPUs at hand, and judge them: :mod:`torchtrt_md.selftest` says what they are.

Of ring attention: where TensorRT has no kernels for attention over several ranks, it builds an engine all the same,
which runs and gives wrong values (measured on compute capability 9.0: relative errors of 0.93 on two ranks and 1.19 on
four, as of attention to one rank's keys alone).  No version number and no engine file tells.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from torchtrt_md.errors import LaunchError, MDError
from torchtrt_md.launch import Launch
from torchtrt_md.runtime.engine import Engine
from torchtrt_md.segment import Segment
from torchtrt_md.selftest import RING, expected, operand
from torchtrt_md.verification.compare import relative_error

# norm(result - reference) / norm(reference), the reference in float32 from the same 16-bit inputs.  Right ones are a
# few roundings off (2 ** -9 in bfloat16, 2 ** -12 in float16); wrong ones were off by 0.9 and more.
BOUNDS = {torch.bfloat16: 2e-2, torch.float16: 5e-3}
_SEED = 20


def run_self_test(engine: Engine, group: dist.ProcessGroup, launch: Launch) -> Tensor:
    """Run one self-test and compare its result with what it must be.  Collective.

    Args:
        engine: of a self-test, bound to its communicator.
        group: this rank's group along its axis.
        launch: whose watchdog ends the process where the engine hangs.

    Returns:
        This rank's result.

    Raises:
        MDError: on every rank, naming the ranks that failed: LaunchError where the engine cannot be run, or is wrong.
    """
    test, rank = engine.segment, dist.get_rank(group)
    about, device = test.name, launch.device
    result = launch.meet(f"running {about}", lambda: _run(engine, rank, device))
    launch.agreement.vote(judge(test, result.cpu(), rank), about)
    return result


def _run(engine: Engine, rank: int, device: torch.device) -> Tensor:
    test = engine.segment
    held = dict(zip([b.source for b in test.inputs], operands(test, rank), strict=True))
    (output,) = test.outputs
    # a run that writes nothing must not pass
    held[output.source] = torch.full(output.shape, math.nan, dtype=output.dtype)
    held = {wire: tensor.to(device) for wire, tensor in held.items()}
    with torch.cuda.device(device):
        stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        engine.enqueue(held, stream.cuda_stream)
        stream.synchronize()
    return held[output.source]


def operands(test: Segment, rank: int) -> tuple[Tensor, ...]:
    """What a rank of the group puts in, on the CPU, in the order of the test's inputs."""
    (c,) = test.collectives
    if c.op == RING:
        q, k, _ = test.inputs
        return ring_operands(q.shape, k.shape, c.dtype, rank)
    return (operand(c.ranks, rank),)


def judge(test: Segment, result: Tensor, rank: int) -> MDError | None:
    """None where a rank's result is right; else the error to raise.

    Args:
        result: on the CPU.
        rank: in the group along the test's axis.
    """
    (c,) = test.collectives
    if c.op == RING:
        return _judge_ring(test, result, rank)
    right = expected(c.op, c.ranks, rank)
    if torch.equal(result, right):
        return None
    at = int((result != right).flatten().nonzero()[0])
    return LaunchError(
        f"TensorRT computes {c.op} wrong on these GPUs: over the {c.ranks} ranks of axis {c.axis!r}, element {at} on"
        f" the rank at {rank} is {result.flatten()[at].item():g} and must be {right.flatten()[at].item():g}; engines"
        " would communicate with other ranks than those of the axis, or with none",
        fix='use placement="split", where PyTorch communicates, or another version of TensorRT',
    )


def _judge_ring(test: Segment, result: Tensor, rank: int) -> MDError | None:
    (c,) = test.collectives
    parts = [operands(test, r) for r in range(c.ranks)]
    reference = attended(parts[rank][0], torch.cat([p[1] for p in parts], 2), torch.cat([p[2] for p in parts], 2))
    error, bound = relative_error(result, reference), BOUNDS[result.dtype]
    if error <= bound:
        return None
    return LaunchError(
        f"ring attention inside an engine gives wrong values on these GPUs: over the {c.ranks} ranks of axis {c.axis!r}"
        f" its relative error is {error:.3g}, and at most {bound:g} is rounding",
        fix='use placement="split", where PyTorch does the ring, or another strategy',
    )


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
