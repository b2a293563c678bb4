"""Weights that are given: read from files as Hugging Face writes them, a part at a time, and refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from torchtrt_md.checkpoint import Checkpoint
from torchtrt_md.errors import WeightsError
from torchtrt_md.mesh import Mesh
from torchtrt_md.program import Sharding, UnevenSharding, part, rows_of

MESH = Mesh(dp=2, tp=2)
WHOLE = {
    "rows": torch.arange(64.0).view(8, 8),
    "odd": torch.arange(35).view(5, 7),
    "scale": torch.tensor(3.0, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 4),
}
INDEX = "model.safetensors.index.json"


def written(folder: Path, **changes: Any) -> Path:
    """Two files and their index; ``changes`` are of the index."""
    names = list(WHOLE)
    placed: dict[str, str] = {}
    for index, held in enumerate((names[:2], names[2:])):
        file = f"model-0000{index + 1}-of-00002.safetensors"
        save_file({name: WHOLE[name] for name in held}, folder / file)
        placed |= dict.fromkeys(held, file)
    placed = {name: file for name, file in {**placed, **changes}.items() if file is not None}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": placed}))
    return folder


def beside_another(folder: Path) -> Path:
    save_file({"consolidated.rows": WHOLE["rows"].clone(), **WHOLE}, folder / "consolidated.safetensors")
    return written(folder)


SOURCES: dict[str, Callable[[Path], Any]] = {
    "index": written,
    "the index itself": lambda folder: written(folder) / INDEX,
    "index beside another checkpoint": beside_another,
    "tensors": lambda folder: WHOLE,
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_rank_reads_its_part_of_every_kind_of_cut(source: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(SOURCES[source](tmp_path))
    assert checkpoint.forms == {
        "rows": ("float32", (8, 8)),
        "odd": ("int64", (5, 7)),
        "scale": ("bfloat16", ()),
        "empty": ("float32", (0, 4)),
    }
    cuts: list[tuple[str, tuple[Sharding | UnevenSharding, ...]]] = [
        ("rows", ()),
        ("rows", (Sharding(0, "tp"),)),
        ("rows", (Sharding(1, "tp"), Sharding(0, "dp"), Sharding(1, "dp"))),
        ("rows", (UnevenSharding(0, "tp", (1, 3)),)),
        ("rows", (UnevenSharding(1, "tp", copies=2),)),
        ("odd", (UnevenSharding(1, "tp"),)),
        ("scale", ()),
        ("empty", ()),
    ]
    for rank in range(4):
        for name, shardings in cuts:
            found, expected = checkpoint.part(name, shardings, MESH, rank), part(WHOLE[name], shardings, MESH, rank)
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected), (name, shardings, rank)


@pytest.mark.parametrize("shardings", [(), (Sharding(0, "tp"),), (Sharding(1, "tp"),)])
def test_what_was_read_stays_when_the_file_is_written_to(shardings: tuple[Sharding, ...], tmp_path: Path) -> None:
    file = written(tmp_path) / "model-00001-of-00002.safetensors"
    found = Checkpoint(tmp_path).part("rows", shardings, MESH, 3)
    with file.open("r+b") as out:
        out.write(b"\0" * file.stat().st_size)
    assert found.is_contiguous()
    assert torch.equal(found, part(WHOLE["rows"], shardings, MESH, 3))


def twice(folder: Path) -> Path:
    save_file({"rows": WHOLE["rows"]}, folder / "a.safetensors")
    save_file({"rows": WHOLE["rows"]}, folder / "b.safetensors")
    return folder


def two_indices(folder: Path) -> Path:
    (written(folder) / f"other.{INDEX}").write_text("{}")
    return folder


def no_index(folder: Path) -> Path:
    (folder / INDEX).write_text('{"weight_map": [1]}')
    return folder


def cut_short(folder: Path) -> Path:
    file = written(folder) / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    return folder


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no file": (lambda folder: folder, "there is no safetensors file in"),
    "no folder": (lambda folder: folder / "nothing", "nothing is not a whole safetensors file: No such file"),
    "a name in two files": (twice, r"the weight 'rows' is in more than one file of .*, b\.safetensors among them"),
    "two indices": (two_indices, "has 2 indices: model.safetensors.index.json, other.model.safetensors.index.json"),
    "no index": (no_index, "index.json is no index of a checkpoint"),
    "a file cut short": (cut_short, "model-00002-of-00002.safetensors is not a whole safetensors file"),
    "a file that is not there": (
        lambda folder: written(folder, rows="gone.safetensors"),
        "the weight 'rows' is in 'gone.safetensors', and there is no such file beside it",
    ),
    "a file elsewhere": (
        lambda folder: written(folder, rows="../x.safetensors"),
        "the weight 'rows' is in '../x.safetensors', and there is no such file beside it",
    ),
    "a weight in another file": (
        lambda folder: written(folder, rows="model-00002-of-00002.safetensors"),
        r"the weight 'rows' is in .*model-00001-of-00002\.safetensors, and the index does not say so",
    ),
    "a weight that the index lacks": (lambda folder: written(folder, odd=None), "the weight 'odd' is in .*the index"),
    "a weight that no file has": (
        lambda folder: written(folder, more="model-00002-of-00002.safetensors"),
        "the index says that the weight 'more' is in .*00002.safetensors, and it is not",
    ),
    "a tensor on meta": (lambda folder: {"w": torch.empty(2, device="meta")}, "'w' that was given is on meta"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_whole_checkpoint_is_refused(kind: str, tmp_path: Path) -> None:
    source, message = REFUSED[kind]
    with pytest.raises(WeightsError, match=message):
        Checkpoint(source(tmp_path))


def test_tied_weights_of_several_names_must_be_equal(tmp_path: Path) -> None:
    a = torch.randn(300, 7)
    other = a.clone()
    other[299, 6] += 1
    tensors: dict[str, Tensor] = {"a": a, "b": a.clone(), "other": other}
    save_file(tensors, tmp_path / "w.safetensors")
    for source in (tensors, tmp_path):
        checkpoint = Checkpoint(source)
        checkpoint.check_equal(["a", "b"])
        with pytest.raises(WeightsError, match="the weights 'a' and 'other' are tied in the model, and differ in"):
            checkpoint.check_equal(["a", "b", "other"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool])
@pytest.mark.parametrize("shape", [(), (5,), (0, 4), (3, 4), (200, 4), (8, 1, 4), (2, 300, 4), (1, 2, 500, 1)])
def test_rows_of_a_weight_are_few_and_tell_others_apart(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    whole = torch.arange(math.prod(shape)).remainder(7).reshape(shape).to(dtype)
    rows = rows_of(whole)
    assert rows.numel() <= max(64 * (shape[-1] if shape else 1), 5)
    if len(shape) < 2 or math.prod(shape[:-1]) <= 64:
        assert rows.numel() == whole.numel(), "of few rows all"
    assert torch.equal(rows.float(), rows_of(whole.clone()).float())
    assert rows.data_ptr() != whole.data_ptr() or not whole.numel()
    if dtype == torch.float32 and whole.numel():
        assert not torch.equal(rows, rows_of(whole + 1))
        assert torch.equal(rows_of(whole.mT.contiguous().mT if len(shape) > 1 else whole), rows), "however it lies"
