"""Does what Inductor or TensorRT made of a graph compute what the graph says?

``verify`` compares graphs, and what is compiled of one may still be wrong.  Inductor of PyTorch 2.11 has made a kernel
of a norm and a rotary embedding whose threads read what others had not written yet: each call gave other bits, and
some tokens were off by a third (benchmarks/results/2026-11-22-inductor-race-h200.md).

So what was compiled is called some times on operands that are drawn, and each result is compared with that of the
graph's own ops; the same bits again are not compared again.  Between calls, memory of the results' sizes is filled with
NaN and let go of: what a kernel reads too early is then no right value of the call before.  Where the graph itself
makes NaN of what was drawn, nothing is asked.

Numbers may stay inside a bound, as the range of a quantizer.  So a graph that has one is called with larger numbers,
too.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.fx import GraphModule

from torchtrt_md.errors import VerificationError, first_line
from torchtrt_md.program import outputs_of
from torchtrt_md.verification.compare import FP32_TOLERANCE, coarsest, is_inexact, relative_error
from torchtrt_md.verification.dense import computed_in, widest
from torchtrt_md.verification.operands import has_bounds, unsaid
from torchtrt_md.verification.simulate import compute

log = logging.getLogger(__name__)
Function = Callable[..., Sequence[Tensor]]
Operands = Callable[[int], list[Tensor]]
Compiler = Literal["Inductor", "TensorRT"]
_OTHER = {"Inductor": "tensorrt", "TensorRT": "inductor"}
_CALLS = 3
# A router may send a token elsewhere when an intermediate result is rounded otherwise, but not in every draw.
_DRAWS = 8
_ROUNDINGS = 8.0  # of the coarsest dtype that is computed in: further than this, what rounding costs is measured
_COARSEST = torch.finfo(torch.bfloat16).eps  # eight roundings of float8 would be anything
_MANY = 64  # elements from which relative_error says how far off one of them is
_SMALL, _SMALL_PART = 2.0**-12, 16  # of a row in one scale, not more than one in 16 elements are as small as that
_OTHER_SCALE = 2.0**-24
_TIES = 1 / 16  # of the whole numbers of a result may differ by chance, at most
_RATIO = 4.0  # times the error of the graph's own ops; a part is small, and chance takes it further than a model


def check_compiled(
    name: str,
    graph: GraphModule,
    function: Function,
    operands: Operands,
    *,
    by: Compiler,
    larger: Operands | None = None,
) -> None:
    """Compare what was compiled of a graph with the graph, on this device.

    Args:
        name: of the part, for messages.
        graph: without collectives; placeholders are the operands.
        function: what was compiled of it.
        operands: gives them, other ones for another number.
        by: what compiled it.
        larger: the same of larger numbers.

    Raises:
        VerificationError: it computes something else, with each of some draws of operands, or in some of the calls
            with one.
    """
    found, reason = _wrong_in_draws(name, graph, function, operands)
    if reason:
        log.warning("%s was not compared with its graph: %s", name, reason)
    elif not found and larger is not None and has_bounds(graph) and not _attends(graph):
        found, reason = _wrong_in_draws(name, graph, function, larger)
        if reason:
            log.warning("%s was not compared with its graph beyond its bounds: %s", name, reason)
    if found:
        raise VerificationError(
            f"{name}, as {by} compiled it, computes something else than its graph: {found}",
            fix=f"this is a fault of {by}: use another version of it, or compute={_OTHER[by]!r}",
        )


def _attends(graph: GraphModule) -> bool:
    """Is attention computed?  Of larger numbers its scores say nothing in 16 bits, whoever computes it."""
    return bool(graph.graph.find_nodes(op="call_function", target=torch.ops.torchtrt_md.attention.default))


def _wrong_in_draws(name: str, graph: GraphModule, function: Function, operands: Operands) -> tuple[str, str]:
    """What is wrong with the results in each of some draws, or in some of the calls with one, "" where nothing is; and
    why that could not be found, "" where it could.
    """
    found, reason = "", unsaid(graph)
    try:
        for number in range(_DRAWS if not reason else 0):
            found, differs = _wrong(graph, function, operands(number))
            if not found:
                break
            log.info("%s: draw %d: %s", name, number, found)
            if differs:
                break
    # An op that runs compiled only, one without a kernel for a dtype, or what is too large.
    except (torch.OutOfMemoryError, VerificationError, NotImplementedError) as error:
        found, reason = "", first_line(error)
    finally:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()  # NCCL and TensorRT have memory of their own
    return found, reason


def _wrong(graph: GraphModule, function: Function, operands: list[Tensor]) -> tuple[str, bool]:
    """What is wrong with the results for these operands, "" where they are right; and if they are in some calls."""
    own = [_readable(result) for result in compute(graph, operands)]
    exact: tuple[Tensor, ...] = ()
    wide: torch.dtype | None = None

    def check(index: int, result: Tensor) -> str:
        nonlocal exact, wide
        plain, near = own[index], nears[index]
        if _is_near(result, plain, near):
            return ""
        if result.shape == plain.shape and bool(plain.isnan().any()):
            result = torch.where(plain.isnan(), plain, result)
        if is_inexact(plain) and plain.numel() >= _MANY and relative_error(result, plain) <= near:
            return ""
        if not exact:
            exact, wide, _ = widest(lambda precision: compute(graph, operands, precision))
        reference = _readable(exact[index])
        error, dense = relative_error(result, reference), relative_error(plain, reference)
        most = max(_RATIO * (dense if wide else near if is_inexact(plain) else 0.0), FP32_TOLERANCE)
        if not is_inexact(plain) and near > FP32_TOLERANCE:  # near ties of 16-bit numbers fall either way
            most += min(4 * math.sqrt(dense * plain.numel() + 1) / max(plain.numel(), 1), _TIES)
        if error <= most:
            return ""
        return f"result {index} is {error:.3g} off, and that of PyTorch's own ops {dense:.3g}"

    nears = [_ROUNDINGS * min(torch.finfo(coarsest(computed_in(node))).eps, _COARSEST) for node in outputs_of(graph)]
    wrong = []
    first: list[Tensor] = []
    said = ""  # of the first call, and so of those that give the same bits, as most do
    for call in range(_CALLS):
        results = [_readable(result.clone()) for result in function(*operands)]
        assert len(results) == len(own)
        found = said
        if not first or not all(map(torch.equal, results, first)):
            found = next(filter(None, (check(index, result) for index, result in enumerate(results))), "")
        if not call:
            first, said = results, found
        if found:
            wrong.append(f"in call {call} {found}")
        _spoil(results)
    return wrong[0] if wrong else "", 0 < len(wrong) < _CALLS


def _readable(tensor: Tensor) -> Tensor:
    """Of a dtype that has arithmetic, which float8 has not."""
    return tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize == 1 else tensor


def _is_near(result: Tensor, plain: Tensor, near: float) -> bool:
    """Whether each row, and each element in the units of its row, is as near as that: cheap, and true of most.

    Not where some of a row are of another scale, which could all be wrong.
    """
    if result.dtype != plain.dtype or result.shape != plain.shape:
        return False
    if not plain.is_floating_point() or not plain.numel():
        return torch.equal(result, plain)
    wide = torch.promote_types(plain.dtype, torch.float32)
    columns = plain.shape[-1] if plain.ndim else 1
    plain, result = (t.to(wide).reshape(-1, columns) for t in (plain, result))
    difference, size = (result - plain).abs_(), plain.abs()
    largest = size.amax(-1, keepdim=True).clamp_(min=torch.finfo(wide).tiny)
    unit = (size / largest).square_().mean(-1, keepdim=True).sqrt_().mul_(largest)  # squares alone may overflow
    off = (difference / largest).square_().mean(-1, keepdim=True).sqrt_().mul_(largest)
    small = ((size < unit * _SMALL) & (size > 0)).sum(-1, keepdim=True)
    elements = difference <= 4 * near * torch.where(size < unit * _OTHER_SCALE, size, unit)
    return bool(((off <= near * unit) & (_SMALL_PART * small <= columns) & elements.all(-1, keepdim=True)).all())


def _spoil(results: Sequence[Tensor]) -> None:
    """Leave NaN in the memory that is given out next for tensors of these sizes."""
    held = [torch.full_like(r, float("nan")) for r in results if r.is_floating_point() for _ in range(2)]
    del held
