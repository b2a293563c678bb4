"""Weights as safetensors: what is written is what is read, by this package and by the library."""

from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bundle import bundle_samples
from torchtrt_md.bundle.read import read_manifest
from torchtrt_md.bundle.weights import check_weights, load_weights, rank_weights, save_weights
from torchtrt_md.checkpoint import DTYPES
from torchtrt_md.errors import BundleError
from torchtrt_md.segment import Binding, Wire


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_read_as_it_was_written(tmp_path: Path, dtype: str) -> None:
    raw = torch.randint(0, 2 if dtype == "bool" else 256, (96,), dtype=torch.uint8)
    tensor = raw.view(getattr(torch, dtype)).reshape(2, 3, -1)
    save_weights({"w": tensor}, tmp_path / "w")
    assert same(load_weights(tmp_path / "w", ["w"], "cpu")["w"], tensor)
    assert same(load_file(tmp_path / "w")["w"], tensor)


def test_views_scalars_and_tensors_without_elements(tmp_path: Path) -> None:
    whole = torch.randn(6, 8, requires_grad=True)
    tensors = {
        "columns": whole[:, 2:5],
        "rows": whole[2:4],
        "transposed": whole.t(),
        "expanded": torch.randn(1, 3).expand(5, 3),
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 3),
        "odd": torch.tensor([True, False, True]),
        "naïve.名": torch.arange(3),
    }
    save_weights(tensors, tmp_path / "w")
    for loaded in (load_weights(tmp_path / "w", tensors, "cpu"), load_file(tmp_path / "w")):
        assert set(loaded) == set(tensors)
        assert all(same(loaded[name], tensor.detach()) for name, tensor in tensors.items())


def test_no_tensors(tmp_path: Path) -> None:
    save_weights({}, tmp_path / "w")
    assert load_weights(tmp_path / "w", [], "cpu") == load_file(tmp_path / "w") == {}


def test_equal_weights_are_equal_files(tmp_path: Path) -> None:
    a, b = torch.randn(3, 4), torch.arange(5, dtype=torch.int8)
    save_weights({"a": a, "b": b}, tmp_path / "1")
    save_weights({"b": b.clone(), "a": a.t().contiguous().t()}, tmp_path / "2")
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    save_weights({"a": torch.ones(2), "b": torch.zeros(2)}, tmp_path / "w")
    assert set(load_weights(tmp_path / "w", ["b"], "cpu")) == {"b"}


def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    save_weights({"a": torch.ones(2)}, tmp_path / "w")
    with pytest.raises(BundleError, match=r"the weight 'b' is not in .*w, which has 1 others"):
        load_weights(tmp_path / "w", ["a", "b"], "cpu")


@pytest.mark.parametrize(
    "tensor", [torch.ones(2, dtype=torch.complex64), torch.eye(2).to_sparse()], ids=["complex", "sparse"]
)
def test_what_the_format_lacks_is_refused(tmp_path: Path, tensor: Tensor) -> None:
    with pytest.raises(BundleError, match=r"weight 'a' is a .*, which safetensors cannot hold"):
        save_weights({"a": tensor}, tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_a_damaged_or_missing_file(tmp_path: Path) -> None:
    save_weights({"a": torch.ones(20)}, tmp_path / "w")
    content = (tmp_path / "w").read_bytes()
    for damaged in (content[:-1], content[:20], b""):
        (tmp_path / "w").write_bytes(damaged)
        with pytest.raises(BundleError, match="is not a whole safetensors file"):
            load_weights(tmp_path / "w", ["a"], "cpu")
    with pytest.raises(BundleError, match="nowhere is not a whole safetensors file"):
        load_weights(tmp_path / "nowhere", ["a"], "cpu")


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        (Binding("w", Wire("weight", "v"), torch.bfloat16, (6, 4)), "the weight 'v' is not in"),
        (Binding("w", Wire("weight", "w"), torch.float16, (6, 4)), r"BF16 \[6, 4\] in .*says F16 \(float16\) \[6, 4\]"),
        (
            Binding("w", Wire("weight", "w"), torch.bfloat16, (4, 6)),
            r"BF16 \[6, 4\] in .*says BF16 \(bfloat16\) \[4, 6\]",
        ),
        (Binding("w", Wire("weight", "w"), torch.bfloat16, (6, 4), transposed=True), r"\[6, 4\] in .*says .* \[4, 6\]"),
        (Binding("w", Wire("weight", "w"), torch.complex64, (6, 4)), r"says None \(complex64\)"),
    ],
)
def test_the_header_must_be_what_segments_take(tmp_path: Path, binding: Binding, message: str) -> None:
    save_weights({"w": torch.zeros(6, 4, dtype=torch.bfloat16)}, tmp_path / "w")
    check_weights(
        tmp_path / "w",
        [
            Binding("x", Wire("input", "x"), torch.float32, (1,)),
            Binding("w", Wire("weight", "w"), torch.bfloat16, (6, 4)),
            Binding("w", Wire("weight", "w"), torch.bfloat16, (4, 6), transposed=True),
        ],
    )
    with pytest.raises(BundleError, match=message):
        check_weights(tmp_path / "w", [binding])


def test_a_rank_s_weights_are_those_of_its_segments(tmp_path: Path) -> None:
    folder = bundle_samples.split_bundle(tmp_path / "model")
    manifest = read_manifest(folder)
    assert {name: t.tolist() for name, t in rank_weights(folder, manifest, 1, "cpu").items()} == {
        "up": torch.arange(128.0).view(16, 8).tolist()
    }
    assert rank_weights(folder, bundle_samples.manifest(), 0, "cpu") == {}

    engine, eager, inductor = manifest.ranks[0]
    wrong = [b if b.weight is None else msgspec.structs.replace(b, dtype=torch.float16) for b in inductor.inputs]
    changed = msgspec.structs.replace(
        manifest, ranks=[[engine, eager, msgspec.structs.replace(inductor, inputs=wrong)], manifest.ranks[1]]
    )
    with pytest.raises(BundleError, match="weight 'up' is F32"):
        rank_weights(folder, changed, 0, "cpu")
