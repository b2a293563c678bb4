"""Attention over a split sequence as models have it: masks, tokens that stay whole, any length, any number of heads.

Each program is run on all ranks, in fp64, and compared with the model itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

import torchtrt_md as md
from torchtrt_md.errors import ShardingError
from torchtrt_md.lowering import lower
from torchtrt_md.lowering.layout import kv_repeats
from torchtrt_md.program import Coordinate, ShardedProgram, Value, value_of
from torchtrt_md.verification.simulate import simulate

STRATEGIES = ("ulysses", "allgather_kv", "ring")
WIDTH = 12
ops = torch.ops.torchtrt_md


def values(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


class Attended(nn.Module):
    """Attention of ``heads`` and ``kv_heads`` over what ``sequence`` makes of the inputs, by a mask of them."""

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], heads: int = 4, kv_heads: int = 4) -> None:
        super().__init__()
        self.function, self.heads, self.kv_heads = function, heads, kv_heads
        self.wq = nn.Parameter(values(WIDTH, heads * 6) / 4)
        self.wk = nn.Parameter(values(WIDTH, kv_heads * 6) / 4)
        self.wv = nn.Parameter(values(WIDTH, kv_heads * 6) / 3)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.function(self.attend, *inputs)

    def attend(self, x: Tensor, over: Tensor | None = None, **options: Any) -> Tensor:
        over = x if over is None else over
        sides = ((x, self.wq, self.heads), (over, self.wk, self.kv_heads), (over, self.wv, self.kv_heads))
        q, k, v = ((t @ w).view(*t.shape[:2], h, -1).transpose(1, 2) for t, w, h in sides)
        options["enable_gqa"] = self.heads != self.kv_heads
        return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).flatten(2)


def lowered(model: nn.Module, inputs: tuple[Tensor, ...], size: int, strategy: Any, plan: Any = None) -> ShardedProgram:
    parallel = md.ContextParallel("cp", strategy, plan=plan or {})
    program = md.capture(model.eval(), inputs, mesh=md.Mesh(cp=size), parallel=parallel)
    return lower(program, placement="split" if strategy == "ring" else "engine")


def check(model: nn.Module, inputs: tuple[Tensor, ...], size: int, strategy: str, plan: Any = None) -> ShardedProgram:
    """What every rank returns is what the model does, and each has a part of something."""
    program = lowered(model, inputs, size, strategy, plan)
    names = [source.name for source in program.sources.values() if isinstance(source, Value)]
    with torch.no_grad():
        expected = model(*inputs)
    for outputs in simulate(program, dict(zip(names, inputs, strict=True))):
        for output, whole in zip(outputs, expected, strict=True):
            torch.testing.assert_close(output, whole, rtol=1e-7, atol=1e-7)
    assert any(isinstance(source, Coordinate) for source in program.sources.values())
    return program


def calls(program: ShardedProgram, target: Any) -> list[Node]:
    return list(program.graphs[0].graph.find_nodes(op="call_function", target=target))


# --- what models do; each takes an attention and the inputs ---


def split(x: Tensor, dim: int = 1) -> Tensor:
    return md.split(x, dim, "cp")


def gather(x: Tensor, dim: int = 1) -> Tensor:
    return md.gather(x, dim, "cp")


def padding(x: Tensor, kept: Tensor) -> Tensor:
    """[B, S] numbers -> a mask of the keys of which they are positive; the first is always."""
    return ((kept > 0) | (torch.arange(kept.shape[1]) < 1))[:, None, None, :]


def bias(x: Tensor, *extents: int) -> Tensor:
    """Additive, of the inputs' values."""
    return x.flatten()[: extents[-1]].sin() + torch.arange(extents[-2], dtype=x.dtype)[:, None].cos()


def masked(kind: str, attend: Any, x: Tensor, kept: Tensor) -> tuple[Tensor, ...]:
    n, split_x = x.shape[1], split(x)
    if kind == "padding":
        mask = padding(x, kept)
    elif kind == "split padding":
        mask = padding(x, kept * split(kept))
    elif kind == "additive":
        mask = (1.0 - padding(x, kept).to(x.dtype)) * torch.finfo(torch.float32).min
    elif kind == "bias":
        mask = bias(kept, n, n)
    elif kind == "bias of heads":
        mask = bias(kept, n, n)[None] * torch.arange(1, 5, dtype=x.dtype)[:, None, None]
    elif kind == "of rows":  # made of queries that are split
        mask = (split_x.sum(-1) > 0)[:, None, :, None] | (torch.arange(n) < 3)
    elif kind == "one column":
        mask = (split_x.sum(-1) > 0)[:, None, :, None] | torch.ones(1, dtype=torch.bool)
    else:
        assert kind == "window"
        mask = (torch.arange(n)[:, None] - torch.arange(n)).abs() < 3
    return (gather(attend(split_x, attn_mask=mask)),)


def joint(attend: Any, text: Tensor, image: Tensor, kept: Tensor) -> tuple[Tensor, ...]:
    """Text and image split apart, and a mask in the order text, image."""
    x = torch.cat([split(text), split(image)], 1)
    y = attend(x, attn_mask=padding(x, kept) & (bias(kept, x.shape[1], x.shape[1]) > -0.5)) + x.mean(-1, keepdim=True)
    t, i = y.split([text.shape[1], image.shape[1]], 1)
    return gather(t), gather(i), gather(y)


def whole_text(attend: Any, text: Tensor, image: Tensor, kept: Tensor, mask: bool = False) -> tuple[Tensor, ...]:
    """Text is whole on every rank, also behind the attention; only the image is split."""
    x = torch.cat([text.sin(), split(image), text.new_ones(len(text), 1, WIDTH)], 1)
    x = F.layer_norm(x, (WIDTH,)) + torch.arange(x.shape[1], dtype=x.dtype)[:, None]  # a table of both
    y = attend(x, attn_mask=padding(x, kept) if mask else None)
    t = y[:, : text.shape[1]].cumsum(1)
    return t, gather(y[:, text.shape[1] : -1]), y[:, -1], y[:, 0]


def keys_of_both(attend: Any, text: Tensor, image: Tensor, kept: Tensor) -> tuple[Tensor, ...]:
    """Text attends to itself, causally and whole; the image, which is split, to both."""
    image = split(image)
    t = attend(text, is_causal=True)
    return t, gather(attend(image, torch.cat([text, image], 1)))


def crossed(attend: Any, text: Tensor, image: Tensor, kept: Tensor) -> tuple[Tensor, ...]:
    """A split image over whole text, over split text, and whole text over a split image; each masked."""
    kept = kept[:, : text.shape[1]]
    mask = padding(text, kept)
    over_image = bias(text, text.shape[1], image.shape[1])
    image = split(image)
    return (
        gather(attend(image, text, attn_mask=mask)),
        gather(attend(image, text, attn_mask=padding(text, split(kept)))),
        gather(attend(image, split(text), attn_mask=padding(text, split(kept)))),
        attend(text, image, attn_mask=over_image),
        attend(text, torch.cat([split(text), image], 1), is_causal=True),
    )


def causal(attend: Any, x: Tensor) -> tuple[Tensor, ...]:
    x = split(x)
    return (gather(attend(x + attend(x, is_causal=True).mean(-1, keepdim=True), is_causal=True)),)


def causal_out_of_step(attend: Any, x: Tensor, other: Tensor) -> tuple[Tensor, ...]:
    """Causal attention where a rank's queries are not at the positions of its keys."""
    part, others = split(x), split(other)
    both = attend(torch.cat([part, others], 1), is_causal=True)
    return (
        gather(both[:, : x.shape[1]]),
        gather(both[:, x.shape[1] :]),
        gather(attend(part, others, is_causal=True)),
        gather(attend(part, other, is_causal=True)),
        gather(attend(part, x, is_causal=True)),
        attend(x, others, is_causal=True),
        gather(attend(torch.cat([other, part], 1), is_causal=True)[:, other.shape[1] :]),
    )


def twice(function: Any, attend: Any, x: Tensor) -> tuple[Tensor, ...]:
    """The same, and an attention that is not causal."""
    return *function(attend, x), *not_causal(attend, x)


def not_causal(attend: Any, x: Tensor) -> tuple[Tensor, ...]:
    x = split(x)
    return (gather(attend(x + attend(x).mean(-1, keepdim=True) / x.shape[1])),)


def hidden_altogether(attend: Any, x: Tensor) -> tuple[Tensor, ...]:
    mask = (torch.arange(x.shape[1]) > 3)[:, None] & (x.sum(-1) > x.sum(-1).median())[:, None, None]
    return (gather(attend(split(x), attn_mask=mask)),)


MASKS = ("padding", "split padding", "additive", "bias", "bias of heads", "of rows", "one column", "window")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", MASKS)
def test_a_mask_is_the_ranks_own_wherever_it_comes_from(kind: str, strategy: str) -> None:
    for batch, size, length in ((1, 2, 16), (2, 4, 13), (2, 8, 3)):
        inputs = values(batch, length, WIDTH), values(batch, length)
        check(Attended(functools.partial(masked, kind)), inputs, size, strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["joint", "whole text", "whole text, masked", "keys of both", "crossed"])
def test_text_beside_an_image(name: str, strategy: str) -> None:
    """Of lengths that the ranks divide, and of others; text may be shorter than there are ranks."""
    function: Any = {
        "joint": joint,
        "whole text": whole_text,
        "whole text, masked": functools.partial(whole_text, mask=True),
        "keys of both": keys_of_both,
        "crossed": crossed,
    }[name]
    for size, text, image in ((2, 8, 16), (4, 5, 13), (4, 1, 9), (4, 3, 3), (8, 5, 3)):
        if text > 2 or "whole" in name:
            kept = values(2, text + image + ("whole" in name))
            check(Attended(function), (values(2, text, WIDTH), values(2, image, WIDTH), kept), size, strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("function", [causal, not_causal, hidden_altogether])
def test_any_length(function: Callable[..., tuple[Tensor, ...]], strategy: str) -> None:
    """37 positions on 4 ranks: of 10 each; 5, where the last rank has none that there is; 3, and 3 on 8."""
    for size, length in ((4, 37), (4, 5), (2, 13), (4, 3), (8, 3)):
        check(Attended(function), (values(1, length, WIDTH),), size, strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("size", "length", "keys"), [(2, 8, 16), (4, 16, 8), (4, 13, 22), (2, 9, 5), (4, 3, 5), (8, 6, 3)]
)
def test_causal_attention_of_other_positions_than_its_keys(size: int, length: int, keys: int, strategy: str) -> None:
    check(Attended(causal_out_of_step), (values(2, length, WIDTH), values(2, keys, WIDTH)), size, strategy)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "sent"),
    [
        (4, 2, 4, (4, 4)),  # each of two key/value heads goes to two ranks
        (4, 1, 4, (4, 4)),
        (8, 2, 4, (8, 4)),
        (6, 6, 4, (8, 8)),
        (6, 3, 4, (8, 4)),  # one more group of heads
        (5, 5, 2, (6, 6)),
        (3, 1, 2, (4, 4)),
        (12, 3, 2, (12, 6)),
        (4, 2, 2, (4, 2)),
    ],
)
def test_ulysses_with_any_number_of_heads(heads: int, kv_heads: int, size: int, sent: tuple[int, int]) -> None:
    program = check(Attended(not_causal, heads, kv_heads), (values(1, 8, WIDTH),), size, "ulysses")
    for node in calls(program, ops.attention.default):
        assert tuple(size * value_of(x).shape[1] for x in node.all_input_nodes[:2]) == sent


def test_a_mask_for_each_head_with_heads_that_the_ranks_do_not_divide() -> None:
    def function(attend: Any, x: Tensor) -> tuple[Tensor, ...]:
        mask = bias(x, 9, 9)[None] * torch.arange(1, 7, dtype=x.dtype)[:, None, None]
        return (gather(attend(split(x), attn_mask=mask)),)

    for heads, kv_heads in ((6, 6), (6, 2)):
        check(Attended(function, heads, kv_heads), (values(1, 9, WIDTH),), 4, "ulysses")


def test_the_image_is_never_gathered_for_text_that_is_whole() -> None:
    """What goes between the ranks, per attention: an exchange there and one back, and the text's result."""
    inputs = values(1, 8, WIDTH), values(1, 64, WIDTH), values(1, 73)

    def function(attend: Any, text: Tensor, image: Tensor, kept: Tensor) -> tuple[Tensor, ...]:
        x = torch.cat([text, split(image)], 1)
        return (attend(x)[:, :8],)

    program = check(Attended(function), inputs, 4, "ulysses")
    (gathered,) = calls(program, ops.all_gather.default)
    assert value_of(gathered).numel() == 8 * 4 * 6
    assert len(calls(program, ops.all_to_all.default)) == 2


def test_nothing_is_done_about_lengths_and_heads_that_divide() -> None:
    program = check(Attended(not_causal), (values(1, 16, WIDTH),), 4, "allgather_kv")
    kinds = {str(node.target) for node in program.graphs[0].graph.nodes if node.op == "call_function"}
    assert not kinds & {"aten.expand.default", "aten.full_like.default"}
    for node in calls(program, ops.attention.default):
        assert node.args[3] is None


def test_layers_have_one_mask_in_common() -> None:
    def function(attend: Any, text: Tensor, image: Tensor, kept: Tensor) -> tuple[Tensor, ...]:
        x, mask = torch.cat([split(text), split(image)], 1), padding(text, kept)
        for _ in range(3):
            x = x + attend(x, attn_mask=mask).mean(-1, keepdim=True)
        return (gather(x[:, :5]), gather(x[:, 5:]))

    inputs = values(1, 5, WIDTH), values(1, 13, WIDTH), values(1, 18)
    program = check(Attended(function), inputs, 4, "allgather_kv")
    assert len({node.args[3] for node in calls(program, ops.attention.default)}) == 1


@pytest.mark.parametrize(
    ("function", "strategy", "problem"),
    [
        (
            causal,
            "ring",
            "a sequence that the ranks do not divide, and other attentions over axis 'cp' are causal rings",
        ),
        (lambda attend, x: (attend(split(x)),), "ulysses", "output 0 .* 13 positions, which the ranks do not divide"),
        (
            lambda attend, x: (split(x[:, :1]),),
            "ulysses",
            "has 1 entries on dim 1, of which each of 4 ranks would get 1",
        ),
        (
            lambda attend, x: causal(attend, x[:, :2]),
            "ring",
            "2 entries on dim 1, of which each of 4 ranks would get 2",
        ),
        (lambda attend, x: (split(F.pad(x, (0, 0, 5, 0))).view(1, 9, 2, WIDTH),), "ulysses", "views the whole"),
    ],
)
def test_what_a_length_cannot_be(function: Any, strategy: str, problem: str) -> None:
    model = Attended(functools.partial(twice, function) if function is causal else function)
    with pytest.raises(ShardingError, match=problem):
        lowered(model, (values(1, 13, WIDTH),), 4, strategy)


def test_a_ring_in_an_engine_takes_no_mask() -> None:
    for length in (16, 13):
        inputs = values(1, length, WIDTH), values(1, length)
        kind = "padding" if length == 16 else None
        model = Attended(functools.partial(masked, kind) if kind else lambda attend, x, kept: not_causal(attend, x))
        parallel = md.ContextParallel("cp", "ring", plan={})
        program = md.capture(model, inputs, mesh=md.Mesh(cp=2), parallel=parallel)
        with pytest.raises(ShardingError, match="and a ring in the engine takes none"):
            lower(program, placement="engine")


def test_a_mask_and_padding_through_verification_in_bfloat16() -> None:
    """Rounding, too: what is behind the end, hidden by the mask, must not be seen."""
    inputs = values(1, 13, WIDTH), values(1, 13)
    for strategy in STRATEGIES:
        model = Attended(functools.partial(masked, "additive")).to(torch.bfloat16)
        given = tuple(x.to(torch.bfloat16) for x in inputs)
        program = lowered(model, given, 4, strategy)
        assert md.verify(program, model, given).error <= 0.1


@pytest.mark.parametrize("heads", [(4, 4, 4), (24, 8, 8), (6, 3, 4), (7, 7, 4), (5, 1, 3)])
def test_repeats_make_the_ranks_divide_the_heads(heads: tuple[int, int, int]) -> None:
    count, kv, size = heads
    times = kv_repeats(count, kv, size)
    assert count % (kv * times) == 0
    assert times == 1 or (kv * times) % size == 0 or times == count // kv


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("length", [8, 7])
def test_a_mask_of_each_position_beside_each_other(length: int, strategy: str) -> None:
    """As of documents that are packed into one sequence.  The refusal names the way that is then taken."""
    x, documents = values(2, length, WIDTH), torch.arange(length).div(3, rounding_mode="floor").expand(2, -1)

    def packed(attend: Any, x: Tensor, documents: Tensor, gathers: bool) -> tuple[Tensor, ...]:
        x, rows = md.split(x, 1, "cp"), md.split(documents, 1, "cp")
        columns = md.gather(rows, 1, "cp") if gathers else rows
        mask = (rows[:, :, None] == columns[:, None, :])[:, None]
        return (md.gather(attend(x, attn_mask=mask), 1, "cp"),)

    refused = Attended(functools.partial(packed, gathers=False))
    with pytest.raises(ShardingError, match="split differently: on dims 1 and 2 of its result") as raised:
        lowered(refused, (x, documents), 2, strategy)
    assert 'gather one of the operands: md.gather(x, dim, "cp")' in raised.value.fix
    model = Attended(functools.partial(packed, gathers=True))
    program = lowered(model, (x, documents), 2, strategy)
    for outputs in simulate(program, dict(zip((v.name for v in program.inputs), (x, documents), strict=True))):
        torch.testing.assert_close(outputs, model(x, documents))


def test_what_sorts_tokens_by_their_experts_has_a_way_out() -> None:
    """As transformers' grouped products do."""

    def grouped(attend: Any, x: Tensor) -> tuple[Tensor, ...]:
        flat = md.split(x, 1, "cp").flatten(0, 1)
        return (flat[flat.argmax(-1).argsort()],)

    with pytest.raises(ShardingError, match=r"sort.* mixes positions across the shard") as raised:
        lowered(Attended(grouped), (values(1, 8, WIDTH),), 2, "ulysses")
    assert "model.set_experts_implementation('batched_mm')" in raised.value.fix
