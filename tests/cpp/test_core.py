"""The C++ core beside Python: what one reads and refuses, the other does, too."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from bundle.mutations import change, changed_bytes
from safetensors.torch import load_file

from cpp import samples
from torchtrt_md.build.flavour import flavour
from torchtrt_md.bundle.manifest import Manifest
from torchtrt_md.bundle.read import parse_manifest
from torchtrt_md.bundle.structure import mesh_of
from torchtrt_md.bundle.weights import save_weights
from torchtrt_md.checkpoint import DTYPES
from torchtrt_md.errors import BundleError
from torchtrt_md.program import dtype_name, part
from torchtrt_md.selftest import OPS, RING, expected, operand


def check(programs: Path, *command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([programs / "mdtrt_check", *map(str, command)], capture_output=True, text=True, timeout=500)


def lines(found: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert found.returncode == 0, found.stderr
    return [json.loads(line) for line in found.stdout.splitlines()]


def test_the_samples_are_those_that_python_writes() -> None:
    for name, text in samples.texts().items():
        assert (samples.FOLDER / f"{name}.json").read_bytes() == text, "run python tests/cpp/samples.py"


def test_the_dtypes_are_those_of_pytorch(programs: Path) -> None:
    table = {line["name"]: line for line in lines(check(programs, "dtypes"))}
    found = {dtype_name(d): d.itemsize for d in vars(torch).values() if isinstance(d, torch.dtype)}
    assert {name: table[name]["itemsize"] for name in found} == found
    assert {name: line["safetensors"] for name, line in table.items() if line["safetensors"]} == DTYPES


def test_c_plus_plus_refuses_the_manifests_that_python_refuses(programs: Path, tmp_path: Path) -> None:
    texts = list(samples.texts().values())
    verdicts: dict[str, str | None] = {}
    for count in range(3000):
        chance = random.Random(count)
        data = chance.choice(texts)
        if count % 3:
            content = json.loads(data)
            change(content, chance, keep_types=count % 3 == 1)
            data = json.dumps(content).encode()
        else:
            data = changed_bytes(data, chance)
        (tmp_path / str(count)).write_bytes(data)
        try:
            parse_manifest(data, Path("m"))
            verdicts[str(count)] = None
        except BundleError as error:
            verdicts[str(count)] = error.problem
    read = refused = 0
    for line in lines(check(programs, "manifests", tmp_path)):
        python, cpp = verdicts[line["file"]], line["problem"]
        if cpp is not None and "is twice in one object" in cpp:
            continue  # Python's JSON takes the last of them
        assert (python is None) == (cpp is None), f"{line['file']}: Python says {python}, C++ {cpp}"
        read, refused = read + (cpp is None), refused + (cpp is not None)
    assert read > 100
    assert refused > 1000


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8, 17])
def test_self_tests_have_the_values_of_python(programs: Path, ranks: int) -> None:
    found = lines(check(programs, "self-tests", ranks))
    assert {line["op"] for line in found} == set(OPS) - {RING}
    assert len(found) == ranks * (len(OPS) - 1)
    for line in found:
        right = expected(line["op"], ranks, line["rank"])
        assert line["operand"] == operand(ranks, line["rank"]).flatten().tolist()
        assert line["expected"] == right.flatten().tolist()


def test_damaged_weights_are_read_or_refused(programs: Path, tmp_path: Path) -> None:
    save_weights({"a": torch.ones(4, 4), "b": torch.arange(3), "c": torch.zeros(0)}, tmp_path / "w")
    (found,) = lines(check(programs, "hostile-safetensors", tmp_path / "w", 1000))
    assert found["refused"] > 500


def test_each_rank_takes_its_part_as_in_python(programs: Path, tmp_path: Path) -> None:
    path = samples.FOLDER / "two_axes.json"
    manifest: Manifest = parse_manifest(path.read_bytes(), path)
    whole = {v.name: torch.randn(v.shape).to(v.dtype) for v in manifest.inputs}
    save_weights(whole, tmp_path / "in")
    assert lines(check(programs, "parts", path, tmp_path / "in")) == []
    mesh = mesh_of(manifest)
    for rank in range(mesh.size):
        mine = load_file(tmp_path / f"in.rank{rank}")
        for v in manifest.inputs:
            assert torch.equal(mine[v.name], part(whole[v.name], v.sharding, mesh, rank))
    assert (tmp_path / "in.again").read_bytes() == (tmp_path / "in").read_bytes()


def test_the_installed_tensorrt_is_taken_by_its_own_numbers_alone(programs: Path, tensorrt: str) -> None:
    numbers = [int(n) for n in flavour().version.split(".")]
    found = check(programs, "guard", tensorrt, "TensorRT-RTX", *numbers)
    assert (found.returncode, found.stdout) == (0, "the library is that\n"), found.stderr
    for place in range(4):
        other = [n + (i == place) for i, n in enumerate(numbers)]
        found = check(programs, "guard", tensorrt, "TensorRT-RTX", *other)
        assert found.returncode == 1
        assert f"of version {flavour().version}" in found.stderr
        assert f"compiled for TensorRT-RTX {'.'.join(map(str, other))}" in found.stderr


@pytest.mark.parametrize("numbers", [None, "11.1.0.106"])
def test_the_other_flavour_is_refused(programs: Path, tensorrt: str, numbers: str | None) -> None:
    """By its numbers, and where these are equal by its own name."""
    found = check(programs, "guard", tensorrt, "TensorRT", *(numbers or flavour().version).split("."))
    assert found.returncode == 1
    assert "it would call the wrong functions" in found.stderr
    assert ("libtensorrt_rtx.so.1" if numbers is None else flavour().version) in found.stderr
