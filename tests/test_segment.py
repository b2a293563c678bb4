"""Segments: how their tensors are named, and that a manifest holds them as they are."""

from __future__ import annotations

import json

import graphs
import msgspec
import pytest
import torch
from bundle import bundle_samples

from torchtrt_md.bundle.manifest import decode, encode
from torchtrt_md.program import Coordinate, Sharding, Value, Weight
from torchtrt_md.segment import Binding, Collective, Part, Segment, Wire

SEGMENT = Segment(
    runs="engine",
    file="engines/a",
    axis="cp",
    inputs=(
        Binding("x", Wire("input", "x"), torch.bfloat16, (2, 8)),
        Binding("at", Wire("coordinate", "cp"), torch.int32, (1,)),
        Binding("w", Wire("weight", "up.weight"), torch.float8_e4m3fn, (8, 16), transposed=True),
        Binding("again", Wire("weight", "up.weight"), torch.float8_e4m3fn, (16, 8)),
        Binding("scalar", Wire("weight", "scale"), torch.float32, ()),
    ),
    outputs=(Binding("h", Wire("value", "h"), torch.bfloat16, (2, 16)),),
    collectives=(Collective("all_gather", "cp", 2, torch.bfloat16, 16, 32),),
    name="block 0",
)


def test_a_wire_is_told_as_kind_and_name() -> None:
    assert str(Wire("weight", "up.weight")) == "weight:up.weight"
    assert f"{Wire('input', 'mask.0')}" == "input:mask.0"


def test_the_wires_of_a_programs_placeholders() -> None:
    assert Wire.of(Value("x", (2,), torch.float32)) == Wire("input", "x")
    assert Wire.of(Weight("w", (2,), torch.float32)) == Wire("weight", "w")
    assert Wire.of(Coordinate("cp")) == Wire("coordinate", "cp")


def test_a_transposed_weight_is_bound_to_one_of_the_models_shape() -> None:
    x, _, turned, as_is, _ = SEGMENT.inputs
    assert turned.source_shape == as_is.source_shape == as_is.shape == (16, 8)
    assert (x.weight, turned.weight) == (None, "up.weight")


def test_each_weight_is_named_once_in_order() -> None:
    assert SEGMENT.weights == ("up.weight", "scale")


def test_a_manifest_holds_it_as_it_is() -> None:
    manifest = bundle_samples.manifest(ranks=[[SEGMENT], [SEGMENT, SEGMENT]])
    read = decode(encode(manifest))
    assert read == manifest
    (segment,) = read.ranks[0]
    assert all(isinstance(b.source, Wire) and isinstance(b.dtype, torch.dtype) for b in segment.inputs)
    assert all(isinstance(s, Sharding) for v in read.inputs for s in v.sharding)
    assert encode(read) == encode(manifest)


def test_in_json_a_dtype_is_its_name_and_a_source_a_pair() -> None:
    written = json.loads(encode(bundle_samples.manifest(ranks=[[SEGMENT]])))
    segment = written["ranks"][0][0]
    assert segment["inputs"][2] == {
        "name": "w",
        "source": ["weight", "up.weight"],
        "dtype": "float8_e4m3fn",
        "shape": [8, 16],
        "transposed": True,
    }
    assert segment["collectives"][0]["dtype"] == "bfloat16"
    assert written["inputs"][0]["sharding"] == [[0, "cp"]]


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ('"bfloat16"', '"bfloat17"', "it has the dtype 'bfloat17', which PyTorch .* lacks"),
        ('"bfloat16"', '"nn"', "it has the dtype 'nn', which PyTorch .* lacks"),
        ('"bfloat16"', "16", "it has the dtype 16, which PyTorch .* lacks"),
        ('"coordinate"', '"rank"', "Invalid enum value 'rank'"),
        ('"transposed"', '"turned"', "unknown field `turned`"),
    ],
)
def test_what_is_no_segment_is_refused(right: str, wrong: str, message: str) -> None:
    text = encode(bundle_samples.manifest(ranks=[[SEGMENT]])).decode()
    assert right in text
    with pytest.raises(msgspec.DecodeError, match=message):
        decode(text.replace(right, wrong).encode())


def test_parts_that_compute_the_same_have_one_digest() -> None:
    a, b = (graphs.trace(lambda x: torch.relu(x) + 1, torch.ones(2)) for _ in range(2))
    other = graphs.trace(lambda x: torch.relu(x) + 2, torch.ones(2))
    renamed = msgspec.structs.replace(SEGMENT, name="block 1")
    assert Part(SEGMENT, a).digest == Part(renamed, b).digest != Part(SEGMENT, other).digest
    assert Part(SEGMENT).digest == ""
    assert Part(renamed).runs == "engine"
