"""Each rule against the op itself: what the ranks compute of their parts is what the rule says of the whole."""

import math
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import split_functions as sf
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from torchtrt_md.errors import ShardingError
from torchtrt_md.lowering import sequence
from torchtrt_md.lowering.sharding import Part, Sharded, carried_by_view, cut, local_shape
from torchtrt_md.lowering.sharding_rules import RULES

aten = torch.ops.aten
Case = tuple[Callable[..., Any], list[tuple[Tensor, int | None]]]

torch.manual_seed(0)
X = (torch.randn(2, 8, 6), 1)
Y = (torch.randn(2, 8, 6), 1)
WIDE = (torch.randn(2, 8, 16), 1)
TEXT = (torch.randn(2, 4, 6), 1)
TOKENS = (torch.randint(6, (2, 8)), 1)
BATCH = (torch.randn(4, 6, 5), 0)
FLAGS = (torch.randn(2, 8, 6) > 0, 1)
W = (torch.randn(6, 6), None)
ROW = (torch.randn(6), None)
KEEP = (torch.randn(2, 6), None)
CHANNELS = (torch.randn(6, 6, 3), None)
INDEX = (torch.tensor([1, 0, 3]), None)
TABLE = (torch.randn(12, 6), None)

ACCEPTED: dict[str, Case] = {
    "cat with whole": (lambda x: torch.cat([x.new_ones(2, 3, 6), x, x.new_ones(2, 1, 6)], 1).tanh()[:, 3:-1], [X]),
    "cut of what is whole": (lambda x: torch.cat([x.new_ones(2, 3, 6).cumsum(1), x], 1)[:, 2:][:, 1:], [X]),
    "select of what is whole": (lambda x: (x, torch.cat([x, x.new_ones(2, 3, 6).cumsum(1)], 1)[:, -2]), [X]),
    "split of what is whole": (
        lambda x: torch.split(torch.cat([x.new_ones(2, 3, 6).cumsum(1), x], 1), [2, 1, 8], 1),
        [X],
    ),
    "broadcast": (lambda x, y, row: torch.where(x > 0, x * y + row, 0.5), [X, Y, ROW]),
    "expanded operand": (lambda x, t: x + t[:, None].expand(-1, x.shape[1], -1), [X, KEEP]),
    "more dims": (lambda x, w: x[:, :, None] * w, [X, W]),
    "casts": (lambda x: (x.double().clone().contiguous().detach().to(torch.float32), x.to(torch.bfloat16)), [X]),
    "like": (lambda x: (torch.zeros_like(x) + x, torch.full_like(x, 2.0), x.new_ones(3)), [X]),
    "untagged": (lambda x, m: (F.hardswish(x), x // 2, 1 - x, x.masked_fill(m, x.new_zeros(())), m & m), [X, FLAGS]),
    "logsigmoid": (lambda x: F.logsigmoid(x.clamp(min=0.0)), [X]),
    "copies": (lambda x, y: (aten.copy(x, y), aten.fill(x, 2), aten._reshape_copy(x, [-1, 6])), [X, Y]),
    "constants": (lambda x: (torch.ones_like(x) * x.new_full((6,), 2.0), aten.native_dropout(x, 0.5, False)[0]), [X]),
    "assertion": (lambda x: (aten._assert_tensor_metadata(x, None, None, x.dtype), x)[1], [X]),
    "unsafe splits": (
        lambda x: (x.unsafe_chunk(2, -1), x.unsafe_split(4, 2), x.unsafe_split_with_sizes([2, 4], 2)),
        [X],
    ),
    "more sums": (lambda x: (x.nansum(-1), x.amin(0), *x.mode(2), *x.kthvalue(2, -1), aten.norm(x, 2, [2])), [X]),
    "running": (lambda x: (x.cumprod(-1), x.cummin(0), x.logcumsumexp(2)), [X]),
    "unsafe index": (lambda x, i: aten._unsafe_index(x, [None, None, i]), [X, INDEX]),
    "dropout": (lambda x: F.dropout(x, 0.5, training=False), [X]),
    "in place": (lambda x: x.clone().mul_(2).clamp_min_(0.1), [X]),
    "complex": (lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (3, 2))) * 1j).flatten(-2), [X]),
    "polar": (lambda x, y: torch.polar(x.abs(), y).real + torch.complex(x, y).conj().imag, [X, Y]),
    "views": (lambda x: (x.flatten(0, 1), x.flatten(), x.reshape(-1, 6).view(x.shape), x.flatten(1)), [X]),
    "heads": (lambda x: x.view(*x.shape[:2], 3, -1).transpose(1, 2), [X]),
    "split view": (lambda x: (x.view(2, -1, 2, 6), x.unflatten(1, (-1, 2)), x.view(2, -1, 12)), [X]),
    "dtype view": (lambda x: (x.view(torch.int32), x.view(torch.int16)), [X]),
    "size one": (lambda x: x[:, None, :, None].squeeze(1).squeeze().unsqueeze(-1).squeeze((0, 3)), [X]),
    "permute": (lambda x: (x.permute(2, -2, 0), x.movedim(1, 0), x.mT, x[0].t()), [X]),
    "expand": (lambda x: (x.expand(3, -1, -1, -1), x.repeat(2, 3, 1, 2), x.repeat_interleave(2, 1)), [X]),
    "slices": (lambda x: (x[:, :, 1:5:2], x[1], x[..., -1], x[:, : x.shape[1]], x.narrow(2, 1, 2)), [X]),
    "splits": (lambda x: (*x.chunk(2, -1), *x.split([1, 5], 2), *x.split(4, 2), *x.unbind(-1), *x.unbind(0)), [X]),
    "cat": (lambda x, y: (torch.cat([x, y], -1), torch.cat([x, x, y]), torch.cat([x], 1)), [X, Y]),
    "cat expanded": (lambda x, t: torch.cat([x, t[:, None].expand(-1, x.shape[1], -1)], -1), [X, KEEP]),
    "joint": (lambda t, x: torch.cat([t, x], 1) * 2, [TEXT, X]),
    "joint heads": (lambda t, x: torch.cat([t, x], 1).view(2, -1, 3, 2).transpose(1, 2), [TEXT, X]),
    "joint flat": (lambda t, x: torch.cat([t, x], 1).flatten(0, 1), [TEXT, X]),
    "joint split": (lambda t, x: torch.cat([t, x], 1).split_with_sizes([t.shape[1], x.shape[1]], 1), [TEXT, X]),
    "joint slices": (
        lambda t, x: (
            (j := torch.cat([t, x, t], 1))[:, : t.shape[1]],
            j[:, t.shape[1] : -t.shape[1]],
            j[:, t.shape[1] :],
        ),
        [TEXT, X],
    ),
    "joint narrow": (lambda t, x: torch.cat([t, x], 1).narrow(1, t.shape[1], x.shape[1]), [TEXT, X]),
    "stack": (lambda x, y: (torch.stack([x, y]), torch.stack([x, y], -1), torch.stack([x, y], 1)), [X, Y]),
    "index": (lambda x, i: (x[:, :, i], x[i % 2], x[i % 2, :, i]), [X, INDEX]),
    "table": (lambda n, w: (w[n], w[:, n], F.embedding(n, w), w[n, n]), [TOKENS, W]),
    "index rows": (lambda n, w: (w.index_select(0, n[0]), w.index_select(1, n[1])), [TOKENS, W]),
    "index select": (lambda x, i: x.index_select(-1, i), [X, INDEX]),
    "gather": (lambda x: (x.gather(2, x.argsort(-1)), x.take_along_dim(x.argmax(0, keepdim=True), 0)), [X]),
    "gather expanded": (lambda x, n: x.gather(2, n[:, :, None].expand(-1, -1, 3)), [X, TOKENS]),
    "scatter": (lambda x, y: (x.slice_scatter(y[:, :, :2], 2, 1, 3), x.select_scatter(y[..., 0], -1, 2)), [X, Y]),
    "scatter of a part": (lambda t, x: torch.cat([t, x], 1).slice_scatter(x * 2, 1, t.shape[1]), [TEXT, X]),
    "scatter beside whole": (
        lambda x: (
            (j := torch.cat([x.new_ones(2, 3, 6).cumsum(1), x], 1))
            .slice_scatter(x * 2, 1, 3)
            .slice_scatter(j[:, 1:3] * 3, 1, 1, 3)
        ),
        [X],
    ),
    "scatter into whole": (
        lambda x: x.new_ones(2, x.shape[1] + 4, 6).cumsum(1).slice_scatter(x * 2, 1, 3, 3 + x.shape[1])[:, 1:],
        [X],
    ),
    "scatter into zeros": (
        lambda x: x.new_zeros(2, x.shape[1] + 3, 6).slice_scatter(x.new_ones(2, 3, 6), 1, 0, 3).slice_scatter(x, 1, 3),
        [X],
    ),
    "scatter all": (lambda x, y: (x.slice_scatter(y, 1), x.select_scatter(y[0], 0, 1)), [X, Y]),
    "sums": (lambda x: (x.sum(-1), x.mean((0, 2), True), x.std(-1), x.var(0), x.prod(2), x.logsumexp(-1)), [X]),
    "extremes": (lambda x: (*x.max(-1), *x.min(0, True), x.amax((0, 2)), x.argmin(-1), *x.median(2), *x.topk(2)), [X]),
    "norms": (lambda x: (x.norm(dim=-1), F.normalize(x, dim=-1), *torch.var_mean(x, 2), *torch.std_mean(x, 0)), [X]),
    "logic": (lambda m: (m.any(-1), m.all(0), m.count_nonzero(2), torch.any(m, (0, 2))), [FLAGS]),
    "along": (lambda x: (x.softmax(-1), x.log_softmax(0), x.cumsum(2), *x.sort(-1), F.glu(x), *x.cummax(0)), [X]),
    "safe softmax": (lambda x: aten._safe_softmax(x, -1), [X]),
    "moved along": (
        lambda x: (x.flip(-1), x.flip((0, 2)), x.roll(1, 2), F.pad(x, (1, 2)), F.pad(x, (0, 0, 0, 0, 1, 0))),
        [X],
    ),
    "triangle": (lambda b: (b.tril(), b.triu(1)), [BATCH]),
    "layer norm": (lambda x, row: (F.layer_norm(x, (6,), row, row), F.rms_norm(x, (6,), row)), [X, ROW]),
    "fused rms norm": (lambda x, row: aten._fused_rms_norm(x, [6], row, 1e-6), [X, ROW]),
    "group norm": (lambda b: F.group_norm(b, 3), [BATCH]),
    "convolution": (lambda b, c: F.conv1d(b, c), [BATCH, CHANNELS]),
    "narrow products": (
        lambda x, y, scale, integers: (
            torch._scaled_mm(
                *(x.flatten(0, 1).to(torch.float8_e4m3fn), y.to(torch.float8_e4m3fn).t()),
                *(x.abs().sum(-1).view(-1, 1), scale, scale[0].bfloat16()),
                out_dtype=torch.bfloat16,
            ),
            torch._scaled_mm(x[0].to(torch.float8_e4m3fn), y.to(torch.float8_e4m3fn).t(), scale[0, 0], scale[0, 1]),
            torch._int_mm((x[0] * 9).to(torch.int8), integers),
        ),
        [WIDE, (torch.randn(32, 16), None), (torch.rand(1, 32), None), (torch.randint(9, (16, 8)).char(), None)],
    ),
    "linear": (lambda x, w, row: (F.linear(x, w, row), x @ w, x.flatten(0, 1) @ w, x @ row, x[0] @ row), [X, W, ROW]),
    "vector": (lambda x, row: torch.addmv(x[0, :, 0], x[0], row), [X, ROW]),
    "batched": (lambda b: (b.mT @ b, torch.baddbmm(b.mT @ b, b.mT, b)), [BATCH]),
    "batch of one": (lambda b, w: (w[None] @ b, w.expand(b.shape[0], -1, -1) @ b, b.mT @ w), [BATCH, W]),
    "columns": (lambda x, w: (w @ x.mT, w @ x[0].t()), [X, W]),
    "einsum": (lambda x, w: torch.einsum("bsd,de->ebs", x, w), [X, W]),
    "rotary": (
        lambda x, y: (lambda a, b: torch.stack([-b, a], -1).flatten(-2))(*x.unflatten(-1, (-1, 2)).unbind(-1)) * y,
        [X, Y],
    ),
    # Numbers and tables of the whole length: this rank's part of them is taken.
    "length": (lambda x: (x / x.shape[1], x * x.numel(), x[:, :, : x.shape[1] // 2]), [X]),
    "positions": (lambda x: x + torch.arange(x.shape[1])[:, None], [X]),
    "position table": (lambda x, t: (x + t[: x.shape[1]], x * t[-x.shape[1] :] + t[: x.shape[1]]), [X, TABLE]),
    "made of shapes": (lambda x: x * torch.ones(x.shape[1], 1).cumsum(0) + x.new_ones(x.shape), [X]),
    "sums of ones": (lambda x: (x + x.new_ones(x.shape).sum(), x * torch.zeros(x.shape).add(2)), [X]),
    "whole expanded": (lambda x, row: x + row.expand(x.shape), [X, ROW]),
    "whole in cat": (lambda x, t: torch.cat([x, t[:8].repeat(2, 1, 1)], -1), [X, TABLE]),
    "whole in stack": (lambda x, t: torch.stack([x, t[:8].repeat(2, 1, 1)]), [X, TABLE]),
    "whole index": (lambda x, i: x.gather(2, i), [X, (torch.randint(6, (2, 8, 3)), None)]),
    "whole scatter": (lambda x, t: x.select_scatter(t[:8], 0, 1), [X, TABLE]),
    "whole batch": (lambda b, w: b.mT @ w.repeat(4, 1, 1), [BATCH, W]),
    "whole positions of parts": (
        lambda t, x: (j := torch.cat([t, x], 1)) + torch.arange(j.shape[1])[:, None],
        [TEXT, X],
    ),
    "whole positions of a row": (lambda x: (r := x.flatten(0, 1)) * torch.arange(len(r))[:, None], [X]),
    "whole positions of parts in a row": (
        lambda t, x: (r := torch.cat([t, x], 1).view(-1)) * torch.arange(len(r)),
        [TEXT, X],
    ),
    "open views": (lambda x: (x.view(2, 2, -1, 6), x.view(2, -1, 4, 6), x.unflatten(1, (4, -1)), x.view(-1)), [X]),
    "one row a rank": (lambda x: x.view(2, 2, 4, 6).cumsum(2) + torch.arange(2)[:, None, None], [X]),
    "joint open view": (lambda t, x: torch.cat([t, x], 1).view(2, -1, 2, 6), [TEXT, X]),
    "slices of all": (lambda x: (x[:, :8], x[:, -8:], x[:, :99], aten.slice.Tensor(x, 1, -99)), [X]),
    "split of all": (lambda x: (*x.split(8, 1), *x.chunk(1, 1)), [X]),
}


# What is traced before decomposition may hold composite ops; those that are in the table are in these.
COMPOSITE: tuple[str, ...] = (
    "casts",
    "dropout",
    "views",
    "heads",
    "split view",
    "slices",
    "splits",
    "joint narrow",
    "along",
    "rotary",
)
COMPOSITE += ("layer norm", "group norm", "linear", "complex", "polar", "cat")


@pytest.mark.parametrize(("name", "pre_dispatch"), [(n, False) for n in ACCEPTED] + [(n, True) for n in COMPOSITE])
def test_what_a_rule_claims_is_what_the_ranks_have(
    name: str, pre_dispatch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Here outputs may be any Sharded, to see the claim; a program's must be plain.
    monkeypatch.setattr(sequence, "_check_outputs", lambda call: None)
    function, inputs = ACCEPTED[name]
    tensors = [t for t, _ in inputs]
    graph = _trace(function, inputs, pre_dispatch)
    assert sf.analyze(graph) == 0
    claims = sf.check_claims(graph, tensors, pytree.tree_leaves(function(*tensors)))
    assert any(claims)


def _trace(
    function: Callable[..., Any], inputs: list[tuple[Tensor, int | None]], pre_dispatch: bool = False
) -> GraphModule:
    def forward(*xs: Tensor) -> list[Tensor]:
        parts = [x if dim is None else sf.shard(x, dim) for x, (_, dim) in zip(xs, inputs, strict=True)]
        return pytree.tree_leaves(function(*parts))

    return sf.trace(forward, *(t for t, _ in inputs), pre_dispatch=pre_dispatch)


MIXES = "mixes positions across the shard"
UNKNOWN = "is not known to keep positions apart"
OTHER_EXTENT = "entries of .* beside a sharded dim of"
DIFFERENT = "operands that are split differently"

REFUSED: dict[str, tuple[Callable[..., Any], list[tuple[Tensor, int | None]], str]] = {
    "index of another length": (lambda x, n: x.gather(2, n.new_zeros(2, 4, 3)), [X, INDEX], OTHER_EXTENT),
    "table in two places": (
        lambda x, t: torch.addmm(t, x[0], t),
        [(torch.randn(2, 8, 8), 1), (torch.randn(8, 8), None)],
        "both whole and as this rank's part",
    ),
    "other dim": (lambda x, y: x + y, [X, (torch.randn(2, 8, 6), 2)], DIFFERENT),
    "text and image": (lambda t, x: torch.cat([t, t], 1) + x, [TEXT, X], DIFFERENT),
    "random": (lambda x: F.dropout(x, 0.5, training=True), [X], UNKNOWN),
    "mean over tokens": (lambda x: x.mean(1), [X], MIXES),
    "sum of all": (lambda x: x.sum(), [X], MIXES),
    "norm over tokens": (lambda x: F.normalize(x, dim=1), [X], MIXES),
    "argmax of all": (lambda x: x.argmax(), [X], MIXES),
    "softmax": (lambda x: x.softmax(1), [X], MIXES),
    "cumsum": (lambda x: x.cumsum(1), [X], MIXES),
    "sort": (lambda x: x.sort(1), [X], MIXES),
    "flip": (lambda x: x.flip(1), [X], MIXES),
    "roll": (lambda x: x.roll(1, 1), [X], MIXES),
    "roll of all": (lambda x: x.roll(1), [X], MIXES),
    "triangle": (lambda x: x.tril(), [X], MIXES),
    "pad": (lambda x: F.pad(x, (0, 0, 1, 0)), [X], "pads every rank's part"),
    "repeat": (lambda x: x.repeat(1, 2, 1), [X], MIXES),
    "norm of tokens": (lambda x: F.layer_norm(x, (8, 6)), [X], MIXES),
    "group norm": (lambda x: F.group_norm(x.mT, 3), [X], "is a native_group_norm, which mixes positions"),
    "batch norm": (lambda x: F.batch_norm(x.mT, None, None, training=True), [X], UNKNOWN),
    "convolution": (lambda x, c: F.conv1d(x.mT, c), [X, CHANNELS], "is a convolution, which mixes positions"),
    "pooling": (lambda x: F.max_pool1d(x.mT, 2), [X], UNKNOWN),
    "scores": (lambda x, y: x @ y.mT, [X, Y], "use torch.nn.functional.scaled_dot_product_attention"),
    "contraction": (lambda x, y: x.mT @ y, [X, Y], "sums over the sharded dim"),
    "dot": (lambda x: x[0, :, 0].dot(x[1, :, 1]), [X], "sums over the sharded dim"),
    "contraction of one": (lambda x, w: x.mT @ w, [X, (torch.randn(8, 6), None)], "sums over the sharded dim"),
    "linear over tokens": (lambda x, w: F.linear(x.mT, w), [X, (torch.randn(6, 8), None)], "sums over the sharded dim"),
    "select": (lambda x: x[:, 0], [X], "takes one position of the shard"),
    "unbind": (lambda x: x.unbind(1), [X], "takes the shard apart"),
    "slice": (lambda x: x[:, 1:], [X], "cuts 1:8 out of dim 1, across the shard"),
    "slice with step": (lambda x: x[:, ::2], [X], "across the shard"),
    "slice at a fixed length": (lambda x: aten.slice.Tensor(x, 1, 0, 6), [X], "cuts 0:6 out of dim 1"),
    "last tokens": (lambda x: aten.slice.Tensor(x, 1, -6), [X], "across the shard"),
    "joint cut": (lambda t, x: torch.cat([t, x], 1)[:, 1:], [TEXT, X], "cuts 1:12 out of dim 1"),
    "joint cut of a batch": (lambda t, x: torch.cat([t, x], 1).flatten(0, 1)[:2], [TEXT, X], "cuts 0:2"),
    "split": (lambda x: x.split(2, 1), [X], "cuts 0:2 out of dim 1"),
    "split by a fixed length": (lambda x: x.split(6, 1), [X], "cuts 0:6 out of dim 1"),
    "cat of batches": (lambda x: torch.cat([x.flatten(0, 1)] * 2), [X], "concatenates this rank's part"),
    "view across": (lambda x: x.view(2, 3, 16), [X], "is no part of one dim"),
    "split view, odd rows": (lambda x: x.view(2, -1, 4, 6), [(torch.randn(2, 12, 6), 1)], "is no part of one dim"),
    "joint split view": (lambda t, x: torch.cat([t, x], 1).view(2, -1, 4, 6), [TEXT, X], "is no part of one dim"),
    "dtype view": (lambda x: x.mT.contiguous().view(torch.int16), [X], MIXES),
    "table": (lambda x, i: x[:, i], [X, INDEX], "looks positions up across the shard"),
    "sharded table": (lambda x, n: x[0][n], [X, TOKENS], "looks positions up across the shard"),
    "embedding": (lambda x, n: F.embedding(n, x[0]), [X, (torch.randint(6, (2, 8)), None)], MIXES),
    "mask index": (lambda x, i: x[:, :, i], [X, (torch.tensor([True, False] * 3), None)], "picks positions by a mask"),
    "index select": (lambda x, i: x.index_select(1, i), [X, INDEX], MIXES),
    "gather": (lambda x: x.gather(1, x.argsort(-1)[:, :, :3]), [X], MIXES),
    "slice scatter": (lambda x: x.slice_scatter(x.new_zeros(2, 2, 6), 1, 0, 2), [X], "writes across the shard"),
    "slice scatter of a shard": (lambda x: torch.cat([x, x], 1).slice_scatter(x, 1, 4, 12), [X], "writes across"),
    "slice scatter in steps": (lambda x: x.new_ones(2, 16, 6).slice_scatter(x, 1, 0, 16, 2), [X], "writes across"),
    "select scatter": (lambda x: x.select_scatter(x.new_zeros(2, 6), 1, 0), [X], "writes across the shard"),
    "index put": (lambda x, i: x.index_put((i,), x.new_zeros(())), [X, INDEX], UNKNOWN),
    "bincount": (lambda n: torch.bincount(n.flatten(), minlength=8), [TOKENS], UNKNOWN),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_differ_on_the_whole_is_refused(name: str) -> None:
    function, inputs, message = REFUSED[name]
    graph = _trace(function, inputs)
    with pytest.raises(ShardingError, match=message):
        sf.analyze(graph)


def test_every_entry_of_the_table_is_tested() -> None:
    seen = set()
    for function, inputs in ACCEPTED.values():
        for pre_dispatch in (False, True):
            graph = _trace(function, inputs, pre_dispatch)
            seen |= {n.target.overloadpacket for n in graph.graph.nodes if isinstance(n.target, OpOverload)}
    # Not compared: what is uninitialized, a product that is always refused, and ops of constants.
    others = {aten.empty_like, aten.new_empty, aten.dot, aten.contiguous, aten.lift_fresh_copy}
    assert {p for p in RULES if "torchtrt_md" not in str(p)} - others - seen == set()


@st.composite
def views(draw: st.DrawFn) -> tuple[list[int], Sharded, list[int]]:
    """A shape, a sharding of it and another shape of as many elements."""
    sizes = st.integers(1, 4)
    before, after = draw(st.lists(sizes, max_size=2)), draw(st.lists(sizes, max_size=2))
    pieces = draw(st.lists(st.integers(2, 6), min_size=1, max_size=2))
    # what the ranks divide, what they do not, and beside it what every rank has
    totals = [draw(st.sampled_from([2 * held, 2 * held - 1, held][: 3 if i else 2])) for i, held in enumerate(pieces)]
    parts = map(Part, pieces, totals)
    state = Sharded.of(len(before), parts, sf.SIZE, draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    old = [*before, state.whole(sf.SIZE), *after]
    left, new = math.prod(old), [1] * draw(st.integers(1, 5))
    for factor in range(2, left + 1):
        while left % factor == 0:
            new[draw(st.integers(0, len(new) - 1))] *= factor
            left //= factor
    return old, state, new


@given(views())
@settings(max_examples=300, deadline=None)
def test_a_view_takes_the_sharded_dim_along_or_is_refused(case: tuple[list[int], Sharded, list[int]]) -> None:
    old, state, new = case
    after = carried_by_view(state, old, new, sf.SIZE)
    if after is None:
        return
    whole = torch.arange(math.prod(old))
    for rank in range(sf.SIZE):
        local = sf.part(whole.view(old), state, rank).reshape(local_shape(new, after))
        assert torch.equal(local, sf.part(whole.view(new), after, rank))


def test_a_view_that_is_undone_gives_the_sharding_back() -> None:
    state = Sharded(1, (4, 2))
    merged = carried_by_view(state, [2, 12, 5], [2 * 12 * 5], 2)
    assert merged == Sharded(0, (4, 2), outer=2, inner=5)
    assert carried_by_view(merged, [120], [2, 12, 5], 2) == state


def test_an_empty_view_is_refused() -> None:
    assert carried_by_view(Sharded(0, (4,)), [8, 0], [0], 2) is None


@pytest.mark.parametrize(
    ("start", "stop", "pieces"),
    [(0, 18, (4, 2, 3)), (0, 8, (4,)), (8, 18, (2, 3)), (8, 12, (2,)), (1, 8, ()), (0, 4, ()), (8, 8, ())],
)
def test_cuts_at_the_borders_of_parts_only(start: int, stop: int, pieces: tuple[int, ...]) -> None:
    assert cut(Sharded(0, (4, 2, 3)), start, stop, 2) == (Sharded(0, pieces) if pieces else None)


def test_a_refusal_names_the_op_both_shapes_and_what_to_do() -> None:
    graph = _trace(lambda x, t: torch.cat([x.flatten(0, 1), t.expand(8, 6)]), [X, ROW])
    with pytest.raises(ShardingError) as caught:
        sf.analyze(graph)
    message = str(caught.value)
    assert message.startswith(
        "cat (aten.cat.default) concatenates this rank's part of one sequence with something else"
    )
    assert "over axis 'cp' of 2 ranks: view [8, 6], this rank's part of [16, 6] on dim 0; " in message
    assert "expand [8, 6], equal on all ranks" in message
    assert "Instead: split every part on this dim" in message
