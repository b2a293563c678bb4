"""The probes against the builds that they foretell."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from networks import network
from torch import Tensor, nn

import torchtrt_md as md
from torchtrt_md.build import layers, probes
from torchtrt_md.build.flavour import flavour
from torchtrt_md.errors import BuildError

pytestmark = pytest.mark.usefixtures("own_cache")  # each test builds what it needs

DTYPES = {"BF16": torch.bfloat16, "HALF": torch.float16, "FLOAT": torch.float32}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("probe", [probes.exchanges, probes.gathers_beside_attention])
def test_probes_answer_once(probe: Callable[[str], bool], dtype: str) -> None:
    answer = probe(dtype)
    assert isinstance(answer, bool)
    misses = probe.cache_info().misses  # type: ignore[attr-defined]
    assert probe(dtype) is answer
    assert probe.cache_info().misses == misses  # type: ignore[attr-defined]


class Exchange(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.ops.torchtrt_md.all_to_all(x, 0, 0, "tp", 2)
        return result


@pytest.mark.parametrize("dtype", DTYPES)
def test_exchanges_agrees_with_a_build(dtype: str, tmp_path: Path) -> None:
    program = md.capture(Exchange(), (torch.randn(4, 64).to(DTYPES[dtype]),), mesh=md.Mesh(tp=2))
    if probes.exchanges(dtype):
        assert len(md.build(program, tmp_path, ranks=[0])) == 1
    else:
        with pytest.raises(BuildError, match="no ALL_TO_ALL"):
            md.build(program, tmp_path, ranks=[0])


class Moved(nn.Module):
    def __init__(self, op: str) -> None:
        super().__init__()
        self.op = op

    def forward(self, x: Tensor) -> Tensor:
        ops = torch.ops.torchtrt_md
        arguments = {"all_gather": (0,), "all_to_all": (0, 0), "broadcast": (0,)}
        result: Tensor = getattr(ops, self.op)(x, *arguments[self.op], "tp", 2)
        return result


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 2, 3)])
@pytest.mark.parametrize("op", layers.MOVES)
def test_integers_of_64_bits_are_moved(op: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    """In two words where TensorRT has no such collective."""
    program = md.capture(Moved(op), (torch.arange(math.prod(shape)).view(shape),), mesh=md.Mesh(tp=2))
    (built,) = md.build(program, tmp_path, ranks=[0])
    assert [b.dtype for b in built.segment.outputs] == [torch.int64]
    net, *_ = network(program)
    (found,) = layers.communications(flavour(), net)
    assert (found.op, found.dtype) == (op, "INT64" if probes.moves(op, "INT64") else "INT32")


def test_words_hold_every_integer() -> None:
    """The arithmetic of ``layers.add_in_words``; TensorRT's own runs on GPUs only."""
    bounds = [torch.iinfo(torch.int64).min, -(1 << 32), -(1 << 31), 0, 1 << 31, 1 << 32, torch.iinfo(torch.int64).max]
    x = torch.tensor([b + d for b in bounds for d in (-1, 0, 1) if -(1 << 63) <= b + d < 1 << 63])
    x = torch.cat([x, torch.randint(-(1 << 62), 1 << 62, (1000,)) * 2 + 1])
    word, half = layers.WORD, layers.WORD // 2
    high = x.div(word, rounding_mode="floor")
    low = (x - high * word) - half
    for part in (high, low):
        assert torch.equal(part.to(torch.int32).long(), part)
    assert torch.equal(high * word + (low + half), x)


class GatherBesideAttention(nn.Module):
    def forward(self, q: Tensor, kv: Tensor) -> Tensor:
        part = torch.ops.torchtrt_md.all_gather(kv, 0, "tp", 2)[1:]
        return nn.functional.scaled_dot_product_attention(q, part, part, scale=1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gathers_beside_attention_agrees_with_a_build(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = probes.gathers_beside_attention(dtype)
    monkeypatch.setattr(probes, "gathers_beside_attention", lambda dtype: True)  # build what was probed
    heads = torch.randn(1, 2, 16, 64).to(DTYPES[dtype])
    program = md.capture(GatherBesideAttention(), (heads, heads.clone()), mesh=md.Mesh(tp=2))
    try:
        built = len(md.build(program, tmp_path, ranks=[0])) == 1
    except BuildError:
        built = False
    assert built == answer
