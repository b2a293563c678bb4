"""Weights that are given at load: each rank reads its part, from files or tensors, and what does not fit is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bundle import bundle_samples
from torchtrt_md.bundle.given import given_checkpoint, given_weights
from torchtrt_md.bundle.manifest import Manifest
from torchtrt_md.bundle.structure import check_structure
from torchtrt_md.bundle.weights import rank_weights
from torchtrt_md.errors import BundleError, WeightsError
from torchtrt_md.mesh import Mesh
from torchtrt_md.program import Sharding, Value, Weight, Weights
from torchtrt_md.segment import Binding, Segment, Wire

MESH = Mesh(dp=2, tp=2)
F32 = torch.float32
ROWS, COLUMNS = Sharding(0, "tp"), Sharding(1, "tp")
WHOLE = {
    "q": torch.arange(64.0).view(8, 8),
    "k": torch.arange(32.0).view(4, 8) + 100,
    "out": torch.arange(48.0).view(6, 8) + 200,
    "scale": torch.tensor(3.0),
    "unused": torch.zeros(3),
}
GIVEN = [
    Value("q", (8, 8), F32, (ROWS,)),
    Value("k", (4, 8), F32, (ROWS,)),
    Value("out", (6, 8), F32, (COLUMNS, Sharding(0, "dp"))),
    Value("scale", (), F32),
]


def manifest(**changes: Any) -> Manifest:
    """Each rank reads q and k joined, its part of ``out``, and a scalar; ``table`` is in the bundle."""
    segment = Segment(
        "inductor",
        "first",
        None,
        inputs=(
            Binding("x", Wire("input", "x"), F32, (6, 8)),
            Binding("qk", Wire("weight", "q+k"), F32, (8, 6), transposed=True),
            Binding("out", Wire("weight", "out"), F32, (3, 4)),
            Binding("scale", Wire("weight", "scale"), F32, ()),
        ),
        outputs=(Binding("y", Wire("output", "y"), F32, (6, 8)),),
        collectives=(),
    )
    whole = msgspec.structs.replace(
        bundle_samples.manifest(),
        mesh=dict(MESH.axes),
        inputs=[Value("x", (6, 8), F32)],
        outputs=[Value("y", (6, 8), F32)],
        constants={},
        positional=["x"],
        ranks=[[segment]] * 4,
        weights=[None] * 4,
        files={"first": "0" * 64},
        self_tests=[],
        given=GIVEN,
        joined={"q+k": ["q", "k"]},
    )
    return msgspec.structs.replace(whole, **changes)


def as_captured(rank: int) -> dict[str, Tensor]:
    """What the program itself takes for this rank's part."""
    leaves = [Weight(v.name, v.shape, v.dtype, v.sharding) for v in GIVEN]
    weights = Weights(WHOLE)
    joined = Weight("q+k", (12, 8), F32, parts=(leaves[0], leaves[1]))
    return {w.name: weights.local(w, MESH, rank) for w in (joined, leaves[2], leaves[3])}


def one_file(folder: Path) -> Path:
    save_file(WHOLE, folder / "model.safetensors")
    return folder / "model.safetensors"


def two_files(folder: Path) -> Path:
    names = sorted(WHOLE)
    for index, part in enumerate((names[:2], names[2:])):
        save_file({name: WHOLE[name] for name in part}, folder / f"model-0000{index}-of-00002.safetensors")
    return folder


@pytest.mark.parametrize("source", [one_file, two_files, lambda folder: WHOLE], ids=["file", "folder", "tensors"])
def test_each_rank_has_the_part_that_the_program_took(source: Callable[[Path], Any], tmp_path: Path) -> None:
    check_structure(manifest())
    given = source(tmp_path)
    for rank in range(4):
        found = given_weights(manifest(), rank, given_checkpoint(manifest(), given), "cpu")
        expected = as_captured(rank)
        assert list(found) == sorted(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert rank_weights(tmp_path, manifest(), rank, "cpu") == {}
    assert not torch.equal(as_captured(0)["out"], as_captured(3)["out"])


def test_what_is_given_where_it_is_not_wanted_and_not_where_it_is() -> None:
    with pytest.raises(BundleError, match="exported without its 4 weights"):
        given_weights(manifest(), 0, given_checkpoint(manifest(), None), "cpu")
    whole = bundle_samples.split_manifest()
    with pytest.raises(BundleError, match="weights are given, and the bundle has its own"):
        given_weights(whole, 0, given_checkpoint(whole, WHOLE), "cpu")
    assert given_weights(whole, 0, given_checkpoint(whole, None), "cpu") == {}


@pytest.mark.parametrize("files", [False, True])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": None}, "the weight 'q' is not in"),
        ({"q": WHOLE["q"].half()}, r"the weight 'q' is float16 \[8, 8\] in .*the model's is float32 \[8, 8\]"),
        (
            {"out": WHOLE["out"].t().contiguous()},
            r"the weight 'out' is float32 \[8, 6\] in .*the model's is float32 \[6, 8\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    changed: dict[str, Tensor | None], message: str, files: bool, tmp_path: Path
) -> None:
    given: Any = {name: tensor for name, tensor in {**WHOLE, **changed}.items() if tensor is not None}
    if files:
        save_file(given, tmp_path / "w.safetensors")
        given = tmp_path / "w.safetensors"
    with pytest.raises(WeightsError, match=message):
        given_weights(manifest(), 1, given_checkpoint(manifest(), given), "cpu")


def test_folders_of_none_and_of_two_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="there is no safetensors file in"):
        given_weights(manifest(), 0, given_checkpoint(manifest(), tmp_path), "cpu")
    one_file(tmp_path)
    save_file(WHOLE, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=r"is in more than one file of .*, other\.safetensors among them"):
        given_weights(manifest(), 0, given_checkpoint(manifest(), tmp_path), "cpu")
    (tmp_path / "bad").write_bytes(b"no weights")
    with pytest.raises(WeightsError, match="is not a whole safetensors file"):
        given_weights(manifest(), 0, given_checkpoint(manifest(), tmp_path / "bad"), "cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"given": [*GIVEN, GIVEN[0]]}, "more than one weight 'q'"),
        ({"given": GIVEN[1:]}, "joins 'q\\+k' of"),
        ({"joined": {"q+k": []}}, "joins 'q\\+k' of"),
        ({"joined": {"q+k": ["q", "scale"]}}, "joins 'q\\+k' of"),
        ({"joined": {}}, "reads 'weight:q\\+k', and rank 0 has no file of weights"),
        ({"given": [Value("q", (10, 8), F32, (ROWS,)), *GIVEN[1:]]}, "and it is float32 \\[7, 8\\]"),
        ({"given": [Value("q", (9, 8), F32, (ROWS,)), *GIVEN[1:]]}, "'q' of shape \\[9, 8\\] cannot be sharded"),
        ({"given": [Value("q", (1 << 50, 8), F32, (ROWS,)), *GIVEN[1:]]}, "the weight 'q' has shape"),
        ({"given": [*GIVEN[:3], Value("scale", (), torch.float16)]}, "binds 'weight:scale' as float32"),
    ],
)
def test_a_manifest_whose_given_weights_contradict_it(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        check_structure(manifest(**changes))
