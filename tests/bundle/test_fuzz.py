"""Whatever a manifest, a graph or a file of weights holds: it is read or is a BundleError, soon, in little memory."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import graphs
import msgspec
import pytest
import torch
import torch.nn.functional as F
from resident import forget_peak, resident
from torch import Tensor

import torchtrt_md as md
from bundle import bundle_samples
from bundle.mutations import COUNT, SECONDS, assert_refused_or_read, change, changed_bytes
from torchtrt_md.bundle.read import parse_manifest
from torchtrt_md.bundle.weights import load_weights, save_weights
from torchtrt_md.errors import BundleError
from torchtrt_md.graph.json import graph_from_json, graph_to_json
from torchtrt_md.place import place

MEMORY = 512 << 20
pytestmark = pytest.mark.timeout(600 + SECONDS)


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """What a test takes beyond what it found."""
    before = forget_peak()
    yield
    assert resident("VmHWM") - before < MEMORY


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Those of a program that is two engines and of one in parts."""
    folder = tmp_path_factory.mktemp("bundles")
    bundles = [bundle_samples.bundle(folder / "engines"), bundle_samples.split_bundle(folder / "parts")]
    return [msgspec.json.format((bundle / "manifest.json").read_bytes(), indent=-1) for bundle in bundles]


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj_out = torch.nn.Linear(8, 24), torch.nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        y: Tensor = self.proj_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return F.layer_norm(y, (8,)) + torch.tensor([0.5] * 8)


@pytest.fixture(scope="module")
def written() -> list[bytes]:
    """The graphs of all parts of a small model, and one of a split, a reduction and a factory."""
    parallel = md.ContextParallel("cp", "ulysses", plan={"": {"x": md.Split(1)}, "proj_out": md.Gather(1)})
    captured = md.capture(Attention().eval(), (torch.randn(1, 8, 8),), {}, mesh=md.Mesh(cp=2), parallel=parallel)
    placed = place(md.lower(captured, placement="split"), "split", compute="inductor")
    found = {graph_to_json(part.graph) for part in placed.parts[0] if part.graph is not None}
    other = graphs.trace(lambda x: (x.chunk(2)[1], torch.var_mean(x, 0), x + torch.arange(3)), torch.ones(4, 3))
    return sorted(found | {graph_to_json(other)})


def test_any_bytes_as_a_manifest(manifests: list[bytes]) -> None:
    assert_refused_or_read(
        lambda data: parse_manifest(data, Path("m")), lambda chance: changed_bytes(chance.choice(manifests), chance)
    )


@pytest.mark.parametrize("keep_types", [False, True], ids=["any", "of the type"])
def test_any_values_in_a_manifest(manifests: list[bytes], keep_types: bool) -> None:
    """Other values than of the type fail before the structure is looked at."""
    assert_refused_or_read(
        lambda data: parse_manifest(data, Path("m")), lambda chance: _changed(manifests, chance, keep_types), COUNT // 2
    )


def test_any_bytes_as_a_graph(written: list[bytes]) -> None:
    assert_refused_or_read(graph_from_json, lambda chance: changed_bytes(chance.choice(written), chance))


@pytest.mark.parametrize("keep_types", [False, True], ids=["any", "of the type"])
def test_any_values_in_a_graph(written: list[bytes], keep_types: bool) -> None:
    assert_refused_or_read(graph_from_json, lambda chance: _changed(written, chance, keep_types), COUNT // 2)


def test_any_bytes_as_weights(tmp_path: Path) -> None:
    file = tmp_path / "w"
    save_weights({"a": torch.ones(4, 4), "b": torch.arange(3), "c": torch.zeros(0)}, file)
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")

    def read(data: bytes) -> None:
        file.write_bytes(data)
        load_weights(file, ["a", "b", "c"], "cpu")

    def damaged(chance: random.Random) -> bytes:
        text = changed_bytes(whole[8:header], chance)
        length = len(text) if chance.randrange(8) else chance.randrange(1 << 63)
        return length.to_bytes(8, "little") + text + whole[header:]

    assert_refused_or_read(read, damaged, times=1000)


def test_the_samples_are_read(manifests: list[bytes], written: list[bytes]) -> None:
    for data in manifests:
        parse_manifest(data, Path("m"))
    for data in written:
        graph_from_json(data)
    with pytest.raises(BundleError):
        graph_from_json(manifests[0])


def _changed(samples: list[bytes], chance: random.Random, keep_types: bool) -> bytes:
    content: Any = json.loads(chance.choice(samples))
    change(content, chance, keep_types=keep_types)
    return json.dumps(content).encode()
