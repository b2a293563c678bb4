"""Manifests that somebody made to do harm: refused by name, at once."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from bundle import bundle_samples
from torchtrt_md.bundle.manifest import Manifest, decode
from torchtrt_md.bundle.read import parse_manifest
from torchtrt_md.bundle.rendezvous import check_rendezvous
from torchtrt_md.bundle.structure import check_structure
from torchtrt_md.errors import BundleError
from torchtrt_md.mesh import Mesh
from torchtrt_md.segment import Collective

SOON = 20  # seconds of this process; measured 0.6 for 60,000 inputs; quadratic work takes far longer


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = bundle_samples.split_bundle(tmp_path_factory.mktemp("bundle") / "model")
    return (folder / "manifest.json").read_text()


def refusal(content: object) -> str:
    """What the reader says, and that it says so at once."""
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    start = time.process_time()
    with pytest.raises(BundleError) as raised:
        parse_manifest(data, Path("manifest.json"))
    assert time.process_time() - start < SOON
    assert len(str(raised.value)) < 20_000
    return str(raised.value)


@pytest.mark.parametrize(
    "data",
    [
        b'{"schema":2,"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"schema":2,"x":"\xff"}',
        b'{"schema":"\xff"}',
        b'{"schema":' + b"9" * 100_000 + b"}",
        b'{"schema":NaN}',
    ],
    ids=["nested", "bad UTF-8", "bad UTF-8 first", "a long number", "NaN"],
)
def test_bytes_that_are_no_manifest(data: bytes) -> None:
    assert "manifest.json" in refusal(data)


def nested(depth: int) -> Any:
    result: Any = {"output": 0}
    for _ in range(depth):
        result = {"list": [result]}
    return result


def first(content: Any) -> Any:
    """The first binding: x as an input of the engine of rank 0."""
    return content["ranks"][0][0]["inputs"][0]


def exchange(content: Any) -> Any:
    return content["ranks"][0][1]["collectives"][0]


BAD: dict[str, Callable[[Any], object]] = {
    "has an axis 'self'": lambda c: c.update(mesh={"self": 2}),
    "has an axis ''": lambda c: c.update(mesh={"": 2}),
    "has an axis 'c p'": lambda c: c.update(mesh={"c p": 2}),
    "has 17 axes, more than 16": lambda c: c.update(mesh={f"a{i}": 1 for i in range(17)}),
    "is not one: axis 'cp' of the mesh has size -2": lambda c: c.update(mesh={"cp": -2}),
    "segments for 2 ranks and Mesh(cp=9223372036854775807)": lambda c: c.update(mesh={"cp": (1 << 63) - 1}),
    "has 5000 ranks, more than 4096": lambda c: c.update(mesh={"cp": 5000}, ranks=[[]] * 5000, weights=[None] * 5000),
    "transport is 'pigeon', which is none of nccl, store": lambda c: c.update(transport="pigeon"),
    "dtype 'float99'": lambda c: c["inputs"][0].update(dtype="float99"),
    "dtype 'half'": lambda c: first(c).update(dtype="half"),
    "dtype '_dynamo'": lambda c: first(c).update(dtype="_dynamo"),
    "the input 'x' has shape [-4, 8]": lambda c: c["inputs"][0].update(shape=[-4, 8]),
    "the input 'x' has 65 dims": lambda c: c["inputs"][0].update(shape=[1] * 65),
    "the input 'x' has shape [4, 1099511627776], which is": lambda c: c["inputs"][0].update(shape=[4, 1 << 40]),
    "the output 'output0' has shape [0, 4611686018427387904]": lambda c: c["outputs"][0].update(shape=[0, 1 << 62]),
    "segment 0 of rank 0: 'weight:up' has shape [8, -16]": lambda c: c["ranks"][0][0]["inputs"][1].update(
        shape=[8, -16]
    ),
    "has an input without a name": lambda c: c["inputs"][0].update(name=""),
    "more than one output 'output0'": lambda c: c["outputs"][1].update(name="output0"),
    "the collective 'all_hands'": lambda c: exchange(c).update(op="all_hands"),
    "operand of a all_gather of segment 1 of rank 0 has shape [-1]": lambda c: exchange(c).update(elements=-1),
    "all_gather of segment 1 of rank 0 sends -8 bytes": lambda c: exchange(c).update(bytes_sent=-8),
    "'manifest.json' the sha256": lambda c: c["files"].update({"manifest.json": "0" * 64}),
    "the file 'engines/x' the sha256 'short'": lambda c: c["files"].update({"engines/x": "short"}),
    "result is nested deeper than 64": lambda c: c.update(result=nested(65)),
    "understood: {'output': True}": lambda c: c.update(result={"output": True}),
    "understood: {'constant': [1]}": lambda c: c.update(result={"constant": [1]}),
    "Invalid enum value 'pigeon'": lambda c: first(c).update(source=["pigeon", "x"]),
}


@pytest.mark.parametrize("message", BAD)
def test_a_manifest_that_no_writer_makes(text: str, message: str) -> None:
    content = json.loads(text)
    BAD[message](content)
    assert message in refusal(content)


def test_what_the_model_returns_may_be_nested(text: str) -> None:
    parse_manifest(json.dumps(json.loads(text) | {"result": nested(60)}).encode(), Path("m"))


MANY = 60_000


@pytest.mark.parametrize("ending", ["", "twice"])
@pytest.mark.parametrize("where", ["positional", "constants", "inputs", "outputs", "files", "bindings", "values"])
def test_many_names_take_no_time(text: str, where: str, ending: str) -> None:
    """Whether the last of them is refused or not."""
    content = json.loads(text)
    names = [f"p{i}" for i in range(MANY)] + (["p7"] if ending else [])
    segment = content["ranks"][0][0]
    if where == "positional":
        content["positional"] = names
    elif where == "constants":
        content["constants"] = dict.fromkeys(names)
        content["positional"] = names
    elif where in ("inputs", "outputs"):
        content[where] += [{"name": name, "dtype": "float32", "shape": [4]} for name in names]
    elif where == "files":
        content["files"] |= {f"engines/{name}": "0" * (63 if name == "p59999" and ending else 64) for name in names}
    elif where == "bindings":
        segment["inputs"] += [first(content) | {"name": name} for name in names]
    else:
        segment["outputs"] += [
            {"name": f"{name}{i}", "source": ["value", name], "dtype": "float32", "shape": [4]}
            for i, name in enumerate(names)
        ]
    data = json.dumps(content).encode()
    start = time.process_time()
    if ending or where == "outputs":
        with pytest.raises(BundleError):
            parse_manifest(data, Path("m"))
    else:
        parse_manifest(data, Path("m"))
    assert time.process_time() - start < SOON


def test_many_inputs_of_many_ranks(text: str) -> None:
    """The work is of inputs plus ranks, and not times."""
    content = json.loads(text)
    content["inputs"] += [{"name": f"p{i}", "dtype": "float32", "shape": [4]} for i in range(MANY)]
    content.update(mesh={"cp": 4000}, ranks=[[]] * 4000, weights=[None] * 4000)
    content["inputs"][0]["shape"] = [4000, 8]
    assert "no segment of rank 0 writes 'output:output0'" in refusal(content)


# Ranks that wait for each other

GATHER = Collective("all_gather", "cp", 2, torch.float32, 32, 128)
REDUCE = Collective("all_reduce", "tp", 2, torch.float32, 32, 128)


def ranks(*lists: list[Collective]) -> Manifest:
    """Segments of these collectives for each rank, which are one segment or several."""
    whole = bundle_samples.split_manifest()
    eager = whole.ranks[0][1]
    segments = [[msgspec.structs.replace(eager, collectives=[c]) for c in collectives] for collectives in lists]
    return msgspec.structs.replace(whole, ranks=segments)


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (([GATHER], []), "rank 0 stands at its collective 0, all_gather .* rank 1 has finished after 0"),
        (
            ([GATHER], [GATHER, GATHER]),
            "rank 0 has finished after 1 collectives, and rank 1 stands at its collective 1",
        ),
        (
            ([msgspec.structs.replace(GATHER, elements=16)], [GATHER]),
            "rank 0 stands at .* of 16 float32, and rank 1 .* of 32 float32",
        ),
        (
            ([msgspec.structs.replace(GATHER, op="all_to_all")], [GATHER]),
            "rank 0 stands at .* all_to_all .* all_gather",
        ),
        (([msgspec.structs.replace(GATHER, dtype=torch.int32)], [GATHER]), "of 32 int32, and rank 1 .* of 32 float32"),
    ],
)
def test_ranks_that_do_not_meet(lists: tuple[list[Collective], ...], message: str) -> None:
    with pytest.raises(BundleError, match=f"would wait for each other: .*{message}"):
        check_rendezvous(Mesh(cp=2), ranks(*lists).ranks)


def test_each_group_has_its_own_collectives() -> None:
    """Ranks 0 and 2 are a group along cp, 1 and 3 the other: they may differ."""
    mesh = Mesh(cp=2, tp=2)
    check_rendezvous(mesh, ranks([GATHER, REDUCE], [REDUCE], [GATHER, REDUCE], [REDUCE]).ranks)
    with pytest.raises(BundleError, match="rank 2 has finished"):
        check_rendezvous(mesh, ranks([GATHER, REDUCE], [REDUCE], [REDUCE], [REDUCE]).ranks)


def test_a_circle_of_ranks_that_wait() -> None:
    """On each axis the lists agree; together each rank waits for the next."""
    mesh = Mesh(cp=2, tp=2)
    lists = [GATHER, REDUCE], [REDUCE, GATHER], [REDUCE, GATHER], [GATHER, REDUCE]
    with pytest.raises(BundleError, match="would wait for each other"):
        check_rendezvous(mesh, ranks(*lists).ranks)


def test_a_manifest_whose_ranks_do_not_meet_is_not_read(text: str) -> None:
    content = json.loads(text)
    content["ranks"][1][1]["collectives"] = []
    assert "would wait for each other" in refusal(content)
    with pytest.raises(BundleError, match="would wait for each other"):
        check_structure(decode(json.dumps(content).encode()))
