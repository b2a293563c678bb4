"""The processes of a bundle's ranks, without a server: what a call gives, and how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch

import torchtrt_md as md
from serve.op_by_op import op_by_op
from serve.triton_server import processes_of, wait_until
from torchtrt_md.bundle import read_manifest
from torchtrt_md.doors.triton_model import TritonModel
from torchtrt_md.errors import InputError, LaunchError
from torchtrt_md.program import Sharding, Value
from torchtrt_md.serve import supervisor
from torchtrt_md.serve.shared import SharedTensors, writes
from torchtrt_md.serve.supervisor import Supervisor

ROOT = Path(__file__).resolve().parents[2]
NAME = "input"  # of the argument of torch.nn.Sequential


MODEL = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.GELU()).eval()
SPLIT = (Sharding(0, "dp"),)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of which each rank reads a part and returns a part."""
    out = tmp_path_factory.mktemp("bundle") / "rows"
    x = torch.randn(2, 16, 32)
    md.export(MODEL, (x,), mesh=md.Mesh(dp=2), parallel=md.DataParallel("dp"), compute="inductor", out=out)
    (read,), (returned,) = read_manifest(out).inputs, read_manifest(out).outputs
    whole = [msgspec.structs.replace(value, shape=(4, 16, 32), sharding=SPLIT) for value in (read, returned)]
    op_by_op(out, inputs=whole[:1], outputs=whole[1:])
    return out


@pytest.fixture(scope="module")
def running(bundle: Path) -> Iterator[tuple[Supervisor, list[str]]]:
    """The ranks, and what they were said to have ended of."""
    reasons: list[str] = []
    up = Supervisor(bundle, python=sys.executable, timeout=60.0, on_failure=reasons.append)
    yield up, reasons
    up.close()
    assert not processes_of(bundle)


def test_a_call_takes_and_gives_whole_tensors_of_which_each_rank_has_a_part(
    running: tuple[Supervisor, list[str]],
) -> None:
    for seed in range(2):
        x = torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(seed))
        (y,) = running[0].call({NAME: x}).values()
        with torch.no_grad():
            torch.testing.assert_close(y, MODEL(x))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "input 'input' is missing"),
        (
            {NAME: torch.zeros(1, 16, 32)},
            r"input 'input' is torch.float32 \[1, 16, 32\], and the bundle takes .*\[4, 16",
        ),
        ({NAME: torch.zeros(4, 16, 32, dtype=torch.float64)}, "input 'input' is torch.float64"),
    ],
    ids=["missing", "shape", "dtype"],
)
def test_what_would_be_broadcast_or_cast_in_silence_is_refused(
    running: tuple[Supervisor, list[str]], given: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        running[0].call(given)
    assert running[0].failure is None


def test_ranks_that_do_not_answer_are_ended(
    running: tuple[Supervisor, list[str]], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    up, reasons = running
    monkeypatch.setattr(up, "_timeout", 1.0)
    monkeypatch.setattr(supervisor, "GRACE_SECONDS", 1.0)
    served = TritonModel.__new__(TritonModel)  # what the server of the other tests does not ask yet
    served._supervisor = up
    assert served.is_ready() is True
    ranks = processes_of(bundle)
    assert sorted(ranks) == [0, 1]
    for process in ranks.values():
        os.kill(process, signal.SIGSTOP)
    start = time.monotonic()
    for _ in range(2):
        with pytest.raises(LaunchError, match="rank 0, 1 did not answer within 2 s") as caught:
            up.call({NAME: torch.zeros(4, 16, 32)})
        assert "load the model again" in caught.value.fix
    assert time.monotonic() - start < 30.0
    assert served.is_ready() is False
    wait_until(lambda: not processes_of(bundle), "every process has ended")
    wait_until(lambda: len(reasons) == 1, "the failure is told")
    assert "did not answer within 2 s" in reasons[0]


def test_a_bundle_that_cannot_be_loaded_says_why_and_leaves_no_process(bundle: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    subprocess.run(["cp", "-r", str(bundle), str(broken)], check=True)
    file = broken / read_manifest(broken).ranks[1][-1].file
    file.write_text("damaged")
    reasons: list[str] = []
    with pytest.raises(LaunchError, match=rf"{file} is damaged: its sha256 is"):
        Supervisor(broken, python=sys.executable, timeout=60.0, on_failure=reasons.append)
    assert not processes_of(broken)
    assert reasons == []  # there is no model yet to unload


def test_the_ranks_end_with_the_process_that_called_them(bundle: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from torchtrt_md.serve.supervisor import Supervisor\n"
        "up = Supervisor(Path(sys.argv[1]), python=sys.executable, timeout=60.0)\n"
        "print('up', flush=True); time.sleep(600)"
    )
    caller = subprocess.Popen(
        [sys.executable, "-c", code, str(bundle)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert caller.stdout is not None
    assert caller.stdout.readline() == b"up\n"
    assert len(processes_of(bundle)) == 2
    caller.kill()
    caller.wait()
    wait_until(lambda: not processes_of(bundle), "every process has ended", 60.0)


@pytest.mark.parametrize("gpus", [[0], [0, 0], [0, 1, 2]])
def test_each_rank_has_a_gpu_of_its_own(bundle: Path, gpus: list[int]) -> None:
    with pytest.raises(LaunchError, match="the bundle has 2 ranks and is to run on the GPUs"):
        Supervisor(bundle, python=sys.executable, gpus=gpus)


def test_one_rank_of_those_that_have_the_same_writes_it() -> None:
    mesh = md.Mesh(cp=2, tp=2)
    everywhere = Value("y", (4,), torch.float32)
    split = Value("y", (4,), torch.float32, (Sharding(0, "cp"),))
    assert [writes(everywhere, mesh, rank) for rank in range(4)] == [True, False, False, False]
    assert [writes(split, mesh, rank) for rank in range(4)] == [True, False, True, False]


def test_tensors_of_all_dtypes_are_shared(bundle: Path) -> None:
    dtypes = [torch.bool, torch.int8, torch.bfloat16, torch.float64]
    values = [Value(str(i), (3, 5)[: i % 3], dtype) for i, dtype in enumerate(dtypes)]
    manifest = msgspec.structs.replace(read_manifest(bundle), inputs=values, outputs=values[::-1])
    here = SharedTensors(manifest)
    there = SharedTensors(manifest, os.dup(here.descriptor))
    for name, tensor in (*here.inputs.items(), *here.outputs.items()):
        tensor.copy_(torch.randint(0, 2, tensor.shape))
        other = there.inputs if tensor is here.inputs[name] else there.outputs
        assert torch.equal(other[name], tensor)
        assert tensor.data_ptr() != other[name].data_ptr()
    for of in (here, there):
        of.close()
