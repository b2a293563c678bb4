"""The collectives of the IR over ``torch.distributed``, into a tensor that is there already.

Operands and results are contiguous and act on dim 0; lowering has seen to the rest.  They run on the current stream.
What is sent in float8 is packed in front of the collective and unpacked behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx import Node

from torchtrt_md.lowering.ops import Packing, bound_args, packing_of
from torchtrt_md.runtime import rows

_REDUCTIONS = {
    "sum": dist.ReduceOp.SUM,
    "avg": dist.ReduceOp.AVG,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
    "product": dist.ReduceOp.PRODUCT,
}
Run = Callable[[Tensor, Tensor], None]


def runner_of(node: Node, groups: Mapping[str, dist.ProcessGroup]) -> Run:
    """What runs this collective: a function of (result, operand).

    Args:
        node: a collective of the IR on dim 0.
        groups: axis -> this rank's group along it.
    """
    args = bound_args(node)
    name = str(node.target).split(".")[1]
    dims = [args[key] for key in ("dim", "split_dim", "concat_dim") if key in args]
    assert not any(dims), f"{node.name} acts on dims {dims}; lowering moves collectives to dim 0"
    run, packing = _RUNS[name](args, groups[args["axis"]]), packing_of(node)
    return run if packing is None else _packed(run, packing)


def is_in_place(node: Node) -> bool:
    """Does the result of this collective fit where its operand is, so that no copy is needed?"""
    return str(node.target).split(".")[1] in ("all_reduce", "broadcast")


def _packed(run: Run, packing: Packing) -> Run:
    """The same of rows in float8."""

    def packed(out: Tensor, x: Tensor) -> None:
        sent = torch.empty(packing.parts, packing.bytes, dtype=torch.uint8, device=x.device)
        arrived = torch.empty(packing.arrive, packing.bytes, dtype=torch.uint8, device=x.device)
        rows.pack([*zip(sent.chunk(packing.parts), x.chunk(packing.parts), strict=True)])
        run(arrived, sent)
        rows.unpack(arrived, out)

    return packed


def _copied(out: Tensor, x: Tensor) -> None:
    if out.data_ptr() != x.data_ptr():
        out.copy_(x)


def _all_reduce(args: Mapping[str, Any], group: dist.ProcessGroup) -> Run:
    op = _REDUCTIONS[args["op"]]

    def run(out: Tensor, x: Tensor) -> None:
        _copied(out, x)
        dist.all_reduce(out, op=op, group=group)

    return run


# PyTorch 2.14 renamed two; both names mean one tensor in and one out.
_all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def _all_gather(args: Mapping[str, Any], group: dist.ProcessGroup) -> Run:
    def run(out: Tensor, x: Tensor) -> None:
        _all_gather_single(out, x, group=group)

    return run


def _reduce_scatter(args: Mapping[str, Any], group: dist.ProcessGroup) -> Run:
    op = _REDUCTIONS[args["op"]]

    def run(out: Tensor, x: Tensor) -> None:
        _reduce_scatter_single(out, x, op=op, group=group)

    return run


def _all_to_all(args: Mapping[str, Any], group: dist.ProcessGroup) -> Run:
    def run(out: Tensor, x: Tensor) -> None:
        dist.all_to_all_single(out, x, group=group)

    return run


def _permute_tensor(args: Mapping[str, Any], group: dist.ProcessGroup) -> Run:
    """A rotation: everything goes to one rank and comes from one."""
    size, shift, me = args["size"], args["shift"], dist.get_rank(group)
    to, source = (me + shift) % size, (me - shift) % size

    def run(out: Tensor, x: Tensor) -> None:
        flat, received = x.view(-1), out.view(-1)
        sends = [flat.numel() if rank == to else 0 for rank in range(size)]
        receives = [flat.numel() if rank == source else 0 for rank in range(size)]
        dist.all_to_all_single(received, flat, receives, sends, group=group)

    return run


def _broadcast(args: Mapping[str, Any], group: dist.ProcessGroup) -> Run:
    def run(out: Tensor, x: Tensor) -> None:
        _copied(out, x)
        dist.broadcast(out, group=group, group_src=args["src"])

    return run


_RUNS: dict[str, Callable[[Mapping[str, Any], dist.ProcessGroup], Run]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "permute_tensor": _permute_tensor,
    "broadcast": _broadcast,
}
