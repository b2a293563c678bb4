"""``load`` up to the GPU: the votes on what the ranks read, between two real processes."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from bundle import bundle_samples
from fresh_python import fresh_python
from rank_processes import Ranks

from torchtrt_md import errors, load
from torchtrt_md.bundle import read_manifest
from torchtrt_md.doors.load import read_together
from torchtrt_md.launch.agree import Agreement

TIMEOUT = 20.0


def read(rank: int, folders: list[str]) -> dict[str, int]:
    return read_together(Path(folders[rank]), Agreement(TIMEOUT)).mesh


def load_it(rank: int, folders: list[str]) -> None:
    load(folders[rank], timeout=TIMEOUT)


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """The same bundle on two hosts."""
    first = bundle_samples.bundle(tmp_path / "host0")
    return [str(first), str(shutil.copytree(first, tmp_path / "host1"))]


def test_the_same_bundle_everywhere(ranks: Ranks, folders: list[str]) -> None:
    assert [outcome.value for outcome in ranks(read, folders)] == [{"cp": 2}, {"cp": 2}]


def test_different_bundles(ranks: Ranks, folders: list[str], tmp_path: Path) -> None:
    folders[1] = str(bundle_samples.bundle(tmp_path / "other", target="sm80"))
    for outcome in ranks(read, folders):
        assert outcome.error == "LaunchError"
        assert "the ranks have different bundles" in outcome.message
        assert "rank 0 has '" in outcome.message
        assert "rank 1 has '" in outcome.message


def test_one_rank_with_a_changed_byte(ranks: Ranks, folders: list[str]) -> None:
    engine = Path(folders[1]) / read_manifest(folders[1]).ranks[1][1].file
    content = bytearray(engine.read_bytes())
    content[-1] ^= 1
    engine.write_bytes(content)
    outcomes = ranks(read, folders)
    assert outcomes[0] == outcomes[1]
    assert outcomes[0].error == "BundleError"
    assert outcomes[0].message.startswith(f"rank 1: {engine} is damaged: its sha256 is ")


def test_one_rank_without_a_bundle(ranks: Ranks, folders: list[str], tmp_path: Path) -> None:
    folders[0] = str(tmp_path / "nowhere")
    for outcome in ranks(load_it, folders):
        assert outcome.error == "BundleError"
        assert f"rank 0: there is no bundle at {folders[0]}" in outcome.message


def test_a_launch_of_another_size(ranks: Ranks, tmp_path: Path) -> None:
    one = bundle_samples.manifest()
    folder = bundle_samples.bundle(tmp_path / "four", mesh={"cp": 2, "tp": 2}, ranks=one.ranks * 2, weights=[None] * 4)
    for outcome in ranks(load_it, [str(folder)] * 2):
        assert outcome.error == "MeshError"
        assert "every rank: Mesh(cp=2, tp=2) has 4 ranks and the launch has 2" in outcome.message
        assert "torchrun --nproc_per_node=4" in outcome.message


def test_another_tensorrt_on_one_rank(ranks: Ranks, folders: list[str]) -> None:
    path = Path(folders[1]) / "manifest.json"
    content = json.loads(path.read_text())
    content["versions"]["tensorrt"] = "9.9.9"
    path.write_text(json.dumps(content))
    for outcome in ranks(load_it, folders):
        assert outcome.error == "BundleError"
        assert "rank 1: the bundle was built with TensorRT-RTX 9.9.9" in outcome.message
        assert "pip install tensorrt-rtx==9.9.9" in outcome.message


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_all_ranks_say_so(ranks: Ranks, folders: list[str]) -> None:
    for outcome in ranks(load_it, folders):
        assert outcome.error == "LaunchError"
        assert "every rank: " in outcome.message
        assert "has no CUDA GPU that PyTorch can use" in outcome.message


def test_without_a_launch(tmp_path: Path) -> None:
    with pytest.raises(errors.LaunchError, match="there is no process group"):
        load(tmp_path)


def test_unknown_votes(tmp_path: Path) -> None:
    with pytest.raises(errors.LaunchError, match="votes='never' is not understood"):
        load(tmp_path, votes="never")  # type: ignore[arg-type]


def load_with_a_wrong_argument(rank: int, folders: list[str], given: dict[str, Any]) -> float:
    start = time.monotonic()
    try:
        load(folders[rank], **{"timeout": 60.0, **(given if rank else {})})
    except errors.MDError as error:
        assert time.monotonic() - start < 30, "nobody waits for the timeout"
        raise error
    return time.monotonic() - start


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"votes": "never"}, "rank 1: votes='never' is not understood"),
        ({"timeout": -1.0}, "rank 1: a timeout of -1.0 s leaves no time to agree"),
        ({"weight_budget": -1}, "rank 1: "),
        ({"votes": "first"}, "the ranks differ in the arguments of load: votes: rank 0 has 'always', rank 1 has"),
    ],
)
def test_an_argument_that_is_wrong_on_one_rank(
    given: dict[str, Any], problem: str, ranks: Ranks, folders: list[str]
) -> None:
    first, second = ranks(load_with_a_wrong_argument, folders, given)
    assert first == second
    assert first.error in ("LaunchError", "OptionError", "RankMismatchError")
    assert first.message.startswith(problem)


def test_importing_the_runtime_loads_no_tensorrt() -> None:
    code = (
        "import sys, torchtrt_md.runtime, torchtrt_md.run;"
        "assert not {'tensorrt', 'tensorrt_rtx', 'torch_tensorrt'} & set(sys.modules)"
    )
    fresh_python(code)
