"""Reading a bundle: nothing in the folder is trusted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from fresh_python import fresh_python

from bundle import bundle_samples
from torchtrt_md.bundle import check_files, check_versions, manifest_digest, rank_files, read_manifest, write_bundle
from torchtrt_md.bundle.manifest import Versions
from torchtrt_md.bundle.weights import save_weights
from torchtrt_md.errors import BundleError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return bundle_samples.bundle(tmp_path / "model")


def edit(folder: Path, change: Callable[[Any], object]) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"there is no bundle at .*nowhere"):
        read_manifest(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": "one"}', "{}"])
def test_not_a_manifest(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match="is not a bundle's manifest"):
        read_manifest(folder)


def test_a_newer_schema_is_refused_by_its_number_whatever_else_it_holds(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"schema": 7, "meshes": []}')
    with pytest.raises(BundleError, match="schema 7 and this version of torchtrt_md reads schema 4"):
        read_manifest(folder)


@pytest.mark.parametrize("schema", [1, 2, 3])
def test_a_bundle_of_an_older_schema_must_be_exported_again(folder: Path, schema: int) -> None:
    edit(folder, lambda c: c.update(schema=schema))
    message = rf"has schema {schema} and this version.* reads schema 4\n.*or export it again"
    with pytest.raises(BundleError, match=message):
        read_manifest(folder)


def test_a_field_of_the_wrong_type_is_named(folder: Path) -> None:
    edit(folder, lambda c: c["ranks"][1][0]["inputs"][0].update(shape="large"))
    with pytest.raises(BundleError, match=r"Expected `array`, got `str` - at `\$.ranks"):
        read_manifest(folder)


def test_an_unknown_field_is_refused(folder: Path) -> None:
    edit(folder, lambda c: c.update(extra=1))
    with pytest.raises(BundleError, match="unknown field `extra`"):
        read_manifest(folder)


EDITS: dict[str, Callable[[Any], object]] = {
    "segments for 1 ranks and Mesh": lambda c: c["ranks"].pop(),
    "the manifest's mesh {'cp': 0} is not one": lambda c: c.update(mesh={"cp": 0}),
    "which is not among the manifest's files": lambda c: c["ranks"][0][0].update(file="engines/other.engine"),
    "'../../etc/passwd', which is not inside the bundle": lambda c: c["files"].update({"../../etc/passwd": ""}),
    "'/etc/passwd', which is not inside the bundle": lambda c: c["files"].update({"/etc/passwd": ""}),
    "'engines/../../x', which is not inside the bundle": lambda c: c["files"].update({"engines/../../x": ""}),
    "communicates on axis 'tp'": lambda c: c["ranks"][0][0].update(axis="tp"),
    "its communicator is that of axis None": lambda c: c["ranks"][0][0].update(axis=None),
    "all_gather over 4 ranks": lambda c: c["ranks"][0][0]["collectives"][0].update(ranks=4),
    "segment 0 of rank 0 reads 'value:h', which nothing before it makes": lambda c: c["ranks"][0].reverse(),
    "reads 'input:z', which nothing before it makes": lambda c: c["ranks"][1][0]["inputs"][0].update(
        source=["input", "z"]
    ),
    "binds 'input:x' as float32 [4, 8], and it is float32 [2, 8]": lambda c: c["ranks"][0][0]["inputs"][0].update(
        shape=[4, 8]
    ),
    "binds 'coordinate:cp' as int64 [1], and it is int32 [1]": lambda c: c["ranks"][0][0]["inputs"][1].update(
        dtype="int64"
    ),
    "binds 'value:h' as float32 [4, 8], and it is float16 [4, 8]": lambda c: c["ranks"][0][1]["inputs"][0].update(
        dtype="float32"
    ),
    "no segment of rank 1 writes 'output:output0'": lambda c: c["ranks"][1].pop(),
    "writes 'output:other', which is no output": lambda c: c["ranks"][0][1]["outputs"][0].update(
        source=["output", "other"]
    ),
    "writes 'value:h' a second time": lambda c: c["ranks"][0][1]["outputs"][0].update(
        source=["value", "h"], dtype="float16"
    ),
    "binds a tensor of its engine twice": lambda c: c["ranks"][0][0]["inputs"][1].update(name="x"),
    "more than one input 'x'": lambda c: c["constants"].update(x=1),
    "more than one positional argument 'x'": lambda c: c["positional"].append("x"),
    "cannot be sharded on dim 0 along axis 'cp'": lambda c: c["inputs"][0].update(shape=[3, 8]),
    "cannot be sharded on dim 2 along axis 'cp'": lambda c: c["inputs"][0].update(sharding=[[2, "cp"]]),
    "result has a part that is not understood: {'output': 1}": lambda c: c.update(
        result={"dict": {"a": {"output": 1}}}
    ),
    "has 0 self-tests, and its engines ask for 1; the first that differs is the self-test of all_gather": lambda c: c[
        "self_tests"
    ].clear(),
    "has 2 self-tests, and its engines ask for 1": lambda c: c["self_tests"].append(c["self_tests"][0]),
    "float32 on axis 'cp' is not of the form that schema 4 gives it": lambda c: c["self_tests"][0]["inputs"][0].update(
        shape=[2, 16]
    ),
    "float32 on axis 'cp' runs 'engines/other.engine', which is not among": lambda c: c["self_tests"][0].update(
        file="engines/other.engine"
    ),
    "an engine has a permute_tensor in float16, which engines do not have": lambda c: [
        segments[0]["collectives"][0].update(op="permute_tensor") for segments in c["ranks"]
    ],
    "an engine has a ring_attention in float64, which engines do not have": lambda c: [
        segments[0]["collectives"][0].update(op="ring_attention", dtype="float64") for segments in c["ranks"]
    ],
    "result has a part that is not understood: {'set': []}": lambda c: c.update(result={"list": [{"set": []}]}),
}


@pytest.mark.parametrize("message", EDITS)
def test_a_manifest_that_contradicts_itself(folder: Path, message: str) -> None:
    edit(folder, EDITS[message])
    with pytest.raises(BundleError) as raised:
        read_manifest(folder)
    assert message in str(raised.value)


SPLIT_EDITS: dict[str, Callable[[Any], object]] = {
    "Invalid enum value 'python'": lambda c: c["ranks"][0][0].update(runs="python"),
    "placement is 'middle', which is none of engine, split": lambda c: c.update(placement="middle"),
    "runs as eager and has a communicator of axis 'cp'": lambda c: c["ranks"][0][1].update(axis="cp"),
    "runs as inductor and has a communicator of axis 'cp'": lambda c: c["ranks"][0][2].update(axis="cp"),
    "segment 1 of rank 0 runs as inductor and has a all_gather on axis 'cp'": lambda c: c["ranks"][0][1].update(
        runs="inductor"
    ),
    "has a all_gather over 2 ranks of axis 'tp' of": lambda c: c["ranks"][0][1]["collectives"][0].update(axis="tp"),
    "has a all_gather over 4 ranks of axis 'cp' of": lambda c: c["ranks"][0][1]["collectives"][0].update(ranks=4),
    "the manifest has weights for 1 ranks": lambda c: c["weights"].pop(),
    "segment 0 of rank 1 reads 'weight:up', and rank 1 has no file of weights": lambda c: c.update(
        weights=[c["weights"][0], None]
    ),
    "the weights of rank 1 are in 'weights/other', which is not among": lambda c: c["weights"].__setitem__(
        1, "weights/other"
    ),
    "takes 'weight:up' of shape [8, 4, 4] transposed": lambda c: c["ranks"][0][0]["inputs"][1].update(shape=[8, 4, 4]),
    "takes 'input:x' of shape [2, 8] transposed": lambda c: c["ranks"][0][0]["inputs"][0].update(transposed=True),
    "takes 'value:h' of shape [2, 16] transposed": lambda c: c["ranks"][0][0]["outputs"][0].update(transposed=True),
    "binds 'weight:up' as float32 [8, 16], and it is float32 [16, 8]": lambda c: c["ranks"][0][2]["inputs"][1].update(
        transposed=True, shape=[16, 8]
    ),
    "binds 'weight:up' as float16 [16, 8], and it is float32 [16, 8]": lambda c: c["ranks"][0][2]["inputs"][1].update(
        dtype="float16"
    ),
    "writes 'weight:up', which is no output": lambda c: c["ranks"][0][0]["outputs"][0].update(source=["weight", "up"]),
    "reads 'output:output1', which nothing before it makes": lambda c: c["ranks"][0][2]["inputs"][0].update(
        source=["output", "output1"], shape=[4, 8]
    ),
    "binds a tensor of its graph twice": lambda c: c["ranks"][0][2]["inputs"][0].update(name="w"),
}


@pytest.mark.parametrize("message", SPLIT_EDITS)
def test_a_manifest_of_parts_that_contradicts_itself(tmp_path: Path, message: str) -> None:
    folder = bundle_samples.split_bundle(tmp_path / "model")
    edit(folder, SPLIT_EDITS[message])
    with pytest.raises(BundleError) as raised:
        read_manifest(folder)
    assert message in str(raised.value)


def test_what_a_graph_returns_may_be_named_alike(tmp_path: Path) -> None:
    """A graph is bound by order; returning its input as it came is one name on both sides."""
    folder = bundle_samples.split_bundle(tmp_path / "model")
    edit(folder, lambda c: c["ranks"][0][2]["outputs"][0].update(name="whole"))
    assert read_manifest(folder).ranks[0][2].outputs[0].name == "whole"


@pytest.mark.parametrize("damaged", ["segment", "weights"])
def test_the_files_of_a_rank_are_its_segments_and_its_weights(tmp_path: Path, damaged: str) -> None:
    files = bundle_samples.split_files(tmp_path / "built")
    save_weights({"up": torch.ones(16, 8)}, files["weights 1"])
    manifest = write_bundle(tmp_path / "out", bundle_samples.split_manifest(), files)
    name = manifest.ranks[0][1].file if damaged == "segment" else manifest.weights[0]
    assert name is not None
    assert len(rank_files(manifest, 0)) == 4
    (tmp_path / "out" / name).write_bytes(b"?")
    with pytest.raises(BundleError, match=f"{name} is damaged"):
        check_files(tmp_path / "out", manifest, rank_files(manifest, 0))
    if damaged == "weights":
        check_files(tmp_path / "out", manifest, rank_files(manifest, 1))


def test_a_bundle_without_engines_runs_under_any_tensorrt() -> None:
    manifest = msgspec.structs.replace(bundle_samples.split_manifest(), versions=Versions("0.1.0", "2.14.0", "", ""))
    with pytest.raises(BundleError, match="the bundle was built with"):
        check_versions(manifest)
    graphs = [[msgspec.structs.replace(s, runs="eager") for s in segments] for segments in manifest.ranks]
    check_versions(msgspec.structs.replace(manifest, ranks=graphs))


def test_a_changed_byte_is_found_and_named(folder: Path) -> None:
    manifest = read_manifest(folder)
    first, second = (segment.file for segment in manifest.ranks[0])
    content = bytearray((folder / second).read_bytes())
    content[500] ^= 1
    (folder / second).write_bytes(content)
    check_files(folder, manifest, [first])
    with pytest.raises(BundleError) as raised:
        check_files(folder, manifest)
    assert second in str(raised.value)
    assert manifest.files[second] in str(raised.value)
    assert str(raised.value).count(manifest.files[second]) >= 2, "the expected hash, beside the file's name"


def test_a_missing_file_is_named(folder: Path) -> None:
    manifest = read_manifest(folder)
    engine = manifest.ranks[0][0].file
    (folder / engine).unlink()
    with pytest.raises(BundleError, match=f"{engine} cannot be read: No such file"):
        check_files(folder, manifest)


def test_a_file_that_the_manifest_lacks(folder: Path) -> None:
    with pytest.raises(BundleError, match="'engines/x' is not among the files"):
        check_files(folder, read_manifest(folder), ["engines/x"])


def test_the_digest_changes_with_any_file(tmp_path: Path) -> None:
    first = bundle_samples.bundle(tmp_path / "a")
    again = bundle_samples.bundle(tmp_path / "b")
    other = bundle_samples.bundle(tmp_path / "c", target="sm80")
    assert manifest_digest(first) == manifest_digest(again) != manifest_digest(other)


def test_the_installed_version_runs() -> None:
    check_versions(bundle_samples.manifest())


@pytest.mark.parametrize(
    ("flavour", "version", "fix"),
    [
        ("TensorRT-RTX", "1.7.1.116", "pip install tensorrt-rtx==1.7.1.116"),
        ("TensorRT", "11.2.0.5", "pip install tensorrt==11.2.0.5"),
    ],
)
def test_another_version_is_refused_with_what_to_install(flavour: str, version: str, fix: str) -> None:
    here = bundle_samples.installed()
    manifest = msgspec.structs.replace(
        bundle_samples.manifest(), versions=Versions("0.1.0", "2.14.0", flavour, version)
    )
    with pytest.raises(BundleError) as raised:
        check_versions(manifest)
    for part in (f"{flavour} {version}", f"{here.flavour} {here.tensorrt}", fix):
        assert part in str(raised.value)


def test_reading_loads_no_tensorrt(folder: Path) -> None:
    code = (
        "import sys; from torchtrt_md.bundle import read_manifest, check_files;"
        f"check_files({str(folder)!r}, read_manifest({str(folder)!r}));"
        "assert not {'tensorrt', 'tensorrt_rtx', 'torch_tensorrt'} & set(sys.modules)"
    )
    fresh_python(code)
