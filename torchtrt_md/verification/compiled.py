"""Does what Inductor or TensorRT made of a graph compute what the graph says?

``verify`` compares graphs, and what is compiled of one may still be wrong.  Inductor of PyTorch 2.11 has made a kernel
of a norm and a rotary embedding whose threads read what others had not written yet: each call gave other bits, and
some tokens were off by a third (benchmarks/results/2026-11-22-inductor-race-h200.md).

So what was compiled is called some times on operands that are drawn, and each result is compared with that of the
graph's own ops.  Between calls, memory of the results' sizes is filled with NaN and let go of: what a kernel reads too
early is then no right value of the call before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.fx import GraphModule

from torchtrt_md.errors import VerificationError, first_line
from torchtrt_md.program import outputs_of
from torchtrt_md.verification.compare import FP32_TOLERANCE, coarsest, relative_error
from torchtrt_md.verification.dense import computed_in, widest
from torchtrt_md.verification.simulate import compute

log = logging.getLogger(__name__)
Function = Callable[..., Sequence[Tensor]]
Compiler = Literal["Inductor", "TensorRT"]
_OTHER = {"Inductor": "tensorrt", "TensorRT": "inductor"}
_CALLS = 3
# A router may send a token elsewhere when an intermediate result is rounded otherwise, but not in every draw.
_DRAWS = 3
_ROUNDINGS = 8.0  # of the coarsest dtype that is computed in: further than this, what rounding costs is measured
_RATIO = 4.0  # times the error of the graph's own ops; a part is small, and chance takes it further than a model


def draw(shape: Sequence[int], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """An operand: normal where it is floating, zeros where it is integer, which any table can be asked for."""
    generator = torch.Generator(device).manual_seed(seed)
    if dtype.is_floating_point or dtype.is_complex:
        drawn = torch.randn(shape, generator=generator, device=device, dtype=dtype if dtype.is_complex else None)
        return drawn.to(dtype)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator, device=device) < 0.5
    return torch.zeros(shape, dtype=dtype, device=device)


def check_compiled(
    name: str, graph: GraphModule, function: Function, operands: Callable[[int], list[Tensor]], *, by: Compiler
) -> None:
    """Compare what was compiled of a graph with the graph, on this device.

    Args:
        name: of the part, for messages.
        graph: without collectives; placeholders are the operands.
        function: what was compiled of it.
        operands: gives them, other ones for another number.
        by: what compiled it.

    Raises:
        VerificationError: it computes something else, with each of some draws of operands.
    """
    try:
        for number in range(_DRAWS):
            found = _wrong(graph, function, operands(number))
            if not found:
                return
            log.info("%s: draw %d: %s", name, number, found)
    except (torch.OutOfMemoryError, VerificationError) as error:  # an op that runs compiled only, or is too large
        log.warning("%s was not compared with its graph: %s", name, first_line(error))
        return
    raise VerificationError(
        f"{name}, as {by} compiled it, computes something else than its graph: {found}",
        fix=f"this is a fault of {by}: use another version of it, or compute={_OTHER[by]!r}",
    )


def _wrong(graph: GraphModule, function: Function, operands: list[Tensor]) -> str:
    """What is wrong with the results for these operands; "" where they are right."""
    own = compute(graph, operands)
    exact: tuple[Tensor, ...] = ()
    wide: torch.dtype | None = None
    dtypes = [coarsest(computed_in(node)) for node in outputs_of(graph)]
    for call in range(_CALLS):
        results = [result.clone() for result in function(*operands)]
        for index, (result, plain, dtype) in enumerate(zip(results, own, dtypes, strict=True)):
            near = _ROUNDINGS * torch.finfo(dtype).eps
            if _is_near(result, plain, near) or relative_error(result, plain) <= near:
                continue
            if not exact:
                exact, wide, _ = widest(lambda precision: compute(graph, operands, precision))
            error, dense = relative_error(result, exact[index]), relative_error(plain, exact[index])
            if not error <= max(_RATIO * (dense if wide else near), FP32_TOLERANCE):
                return f"result {index} of call {call} is {error:.3g} off, and that of PyTorch's own ops {dense:.3g}"
        _spoil(results)
    return ""


def _is_near(result: Tensor, plain: Tensor, near: float) -> bool:
    """Whether each row, and each element in the units of its row, is as near as that: cheap, and true of most."""
    if not plain.is_floating_point() or plain.ndim == 0 or plain.dtype.itemsize == 1:
        return torch.equal(result, plain)
    unit = plain.float().square().mean(-1, keepdim=True).sqrt_()
    difference = (result.float() - plain.float()).abs_()
    rows = difference.square().mean(-1, keepdim=True).sqrt_() <= near * unit
    return bool((rows & (difference <= 4 * near * unit).all(-1, keepdim=True)).all())


def _spoil(results: Sequence[Tensor]) -> None:
    """Leave NaN in the memory that is given out next for tensors of these sizes."""
    held = [torch.full_like(r, float("nan")) for r in results if r.is_floating_point() for _ in range(2)]
    del held
