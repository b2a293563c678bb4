"""Real launches of the C++ core: by each launcher, and with a rank that dies, hangs or never comes."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

CLEAN = {
    name: value for name, value in os.environ.items() if not name.startswith(("OMPI_", "PMI", "SLURM_", "MASTER_"))
}
SECONDS = 300.0  # the machine may be busy
TIMEOUT = 4.0


class Ended(NamedTuple):
    code: int
    output: str


def free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def plain(programs: Path, *arguments: object, ranks: int = 2, **variables: str) -> list[Ended]:
    """The ranks as processes of their own, told who they are by TRT_MY_RANK."""
    processes = []
    for rank in range(ranks):
        environment = CLEAN | {"TRT_MY_RANK": str(rank), "TRT_WORLD_SIZE": str(ranks)} | variables
        processes.append(
            subprocess.Popen(
                [programs / "mdtrt_launch_test", *map(str, arguments)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return [wait(process) for process in processes]


def wait(process: subprocess.Popen[str]) -> Ended:
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        pytest.fail(f"a rank hangs: {output}")
    return Ended(process.returncode, output)


def faulty(programs: Path, fault: str, at: int, ranks: int = 3) -> list[Ended]:
    """The ranks but the faulty one, which is killed in the end, where it has not ended by itself."""
    port, processes = free_port(), []
    for rank in range(ranks):
        environment = CLEAN | {"TRT_MY_RANK": str(rank), "TRT_WORLD_SIZE": str(ranks), "MDTRT_PORT": port}
        command = [str(programs / "mdtrt_launch_test"), str(TIMEOUT), fault, str(at)]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        return [wait(process) for rank, process in enumerate(processes) if rank != at]
    finally:
        processes[at].kill()
        processes[at].communicate()


Faulty = Callable[[str, int], list[Ended]]
ABSENT = ("never", "early", "stopped", "hangs")
FAULTS = [(fault, at) for fault in ABSENT for at in (1, 2)] + [
    (fault, at)
    for fault in ("killed", "never", "hangs", "collective", "leaves", "fails", "throws", "differs", "works")
    for at in (0, 1)
    if not (fault in ABSENT and at)
]


@pytest.fixture(scope="module")
def of(programs: Path) -> Iterator[Faulty]:
    """What the ranks make of a fault at a rank.  All faults are tried at once: their ranks wait, most of the time."""
    with ThreadPoolExecutor(8) as pool:
        found = {key: pool.submit(faulty, programs, *key) for key in FAULTS}
        yield lambda fault, at: found[fault, at].result()


def assert_all_came(output: str, launcher: str, ranks: int = 2) -> None:
    found = sorted(re.findall(rf"rank (\d) of {ranks}, local rank (\d), by {launcher}: (\d+), (\d+) bytes", output))
    total = str(sum(range(ranks)) * 10)
    sizes = [str(sum(range(ranks)) * 3_000_000 if rank == 0 else 0) for rank in range(ranks)]
    assert [(int(rank), sum_, size) for rank, _, sum_, size in found] == [
        (rank, total, size) for rank, size in enumerate(sizes)
    ]
    assert sorted(local for _, local, _, _ in found) == [str(rank) for rank in range(ranks)]


def test_torchrun(programs: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--no-python", "--nproc_per_node=2"]
    ended = subprocess.run(
        [*command, "--master_port", free_port(), str(programs / "mdtrt_launch_test"), "60"],
        env=CLEAN, capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert_all_came(ended.stdout, "torchrun")


def test_torchrun_with_two_nodes(programs: Path) -> None:
    """Both on this machine: ranks are those of the launch, and GPUs those of the node."""
    command = [sys.executable, "-m", "torch.distributed.run", "--no-python", "--nproc_per_node=2", "--nnodes=2"]
    command += ["--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    nodes = [
        subprocess.Popen(
            [*command, f"--node_rank={node}", str(programs / "mdtrt_launch_test"), "60"],
            env=CLEAN, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for node in range(2)
    ]  # fmt: skip
    output = ""
    for process in nodes:
        told, errors = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, errors
        output += told
    found = re.findall(r"rank (\d) of 4, local rank (\d), by torchrun: (\d+), (\d+) bytes", output)
    assert sorted((rank, local) for rank, local, _, _ in found) == [("0", "0"), ("1", "1"), ("2", "0"), ("3", "1")]
    assert {total for _, _, total, _ in found} == {str(sum(range(4)) * 10)}


@pytest.mark.parametrize(("mpiexec", "name"), [("mpiexec.openmpi", "Open MPI"), ("mpiexec.mpich", "MPICH")])
def test_mpiexec(programs: Path, mpiexec: str, name: str) -> None:
    found = shutil.which(mpiexec)
    assert found is not None
    options = ["--allow-run-as-root", "--oversubscribe"] if name == "Open MPI" else []
    ended = subprocess.run(
        [found, *options, "-n", "3", str(programs / "mdtrt_launch_test"), "60"],
        env=CLEAN | {"MDTRT_PORT": free_port()}, capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert_all_came(ended.stdout, name, ranks=3)


def test_slurms_variables(programs: Path) -> None:
    port = free_port()
    processes = []
    for rank in range(2):
        of_rank = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NTASKS": "2", "SLURM_NNODES": "1"}
        processes.append(
            subprocess.Popen(
                [programs / "mdtrt_launch_test", "60"],
                env=CLEAN | of_rank | {"SLURM_JOB_ID": "7", "MDTRT_PORT": port},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    ended = [wait(process) for process in processes]
    assert [e.code for e in ended] == [0, 0], ended
    assert_all_came("".join(e.output for e in ended), "Slurm")


def test_nvidias_variables_and_a_file_that_was_there_before(programs: Path, tmp_path: Path) -> None:
    """Local ranks are then counted on the host.  A file of an old launch, or half of one, leads nobody astray."""
    for old in ("", "mdtrt 1 " + "0" * 32 + f" {socket.gethostname()} {free_port()}\n", "b7" * 128):
        (tmp_path / "id").write_text(old)
        ended = plain(programs, 60, ranks=4, TRT_NCCL_ID_FILE=str(tmp_path / "id"))
        assert [e.code for e in ended] == [0] * 4, ended
        assert_all_came("".join(e.output for e in ended), "TRT_MY_RANK", ranks=4)
        assert not list(tmp_path.iterdir())


def test_a_process_that_nobody_launched_is_told_how(programs: Path) -> None:
    ended = subprocess.run([programs / "mdtrt_launch_test"], env=CLEAN, capture_output=True, text=True, timeout=SECONDS)
    assert ended.returncode == 1
    assert "torchrun --no-python --nproc_per_node=2" in ended.stderr


def test_a_port_that_is_taken_is_named(programs: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = str(server.getsockname()[1])
        ended = plain(programs, 1, MDTRT_PORT=port)
    assert [e.code for e in ended] == [1, 1]
    assert f"port {port} (MDTRT_PORT) is in use" in ended[0].output
    assert "set MDTRT_PORT" in ended[0].output
    assert "did not find rank 0 at 127.0.0.1:" + port in ended[1].output


def test_strangers_at_the_port_are_sent_away(programs: Path) -> None:
    """Some that speak another language, a rank of another launch, and one that says nothing."""
    port = free_port()
    environment = CLEAN | {"TRT_WORLD_SIZE": "2", "MDTRT_PORT": port, "MDTRT_JOB": "mine"}
    command = [str(programs / "mdtrt_launch_test"), "60"]

    def rank(number: int, **variables: str) -> subprocess.Popen[str]:
        own = environment | {"TRT_MY_RANK": str(number)} | variables
        return subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    first = rank(0)
    strangers = [stranger(port, text) for text in (b"GET / HTTP/1.1\r\n\r\n", b"\x05\0\0\0\0[1,2]", b"\xff" * 64, b"")]
    other = rank(1, MDTRT_JOB="another")
    time.sleep(1)
    assert other.poll() is None  # it waits for a rank 0 of its own
    ended = [wait(process) for process in (first, rank(1))]
    other.kill()
    other.communicate()
    for connection in strangers:
        connection.close()
    assert [e.code for e in ended] == [0, 0], ended


def stranger(port: str, text: bytes) -> socket.socket:
    """Connects, as soon as somebody listens, and says this."""
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            connection = socket.create_connection(("127.0.0.1", int(port)))
            connection.sendall(text)
            return connection
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_second_rank_of_the_same_number_is_refused(programs: Path) -> None:
    port = free_port()
    environment = CLEAN | {"TRT_WORLD_SIZE": "3", "MDTRT_PORT": port}
    command = [str(programs / "mdtrt_launch_test"), "4"]
    processes = [
        subprocess.Popen(
            command,
            env=environment | {"TRT_MY_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1", "1")
    ]
    outputs = [wait(process) for process in processes]
    assert [e.code for e in outputs] == [1, 1, 1]
    assert sum("there is a rank 1 already" in e.output for e in outputs) == 1
    assert "rank 2 did not come to the start of the launch within 4 s" in outputs[0].output


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("fault", ABSENT)
def test_a_rank_that_does_not_come_is_named_by_all(of: Faulty, fault: str, at: int) -> None:
    step = "the start of the launch" if fault in ("never", "early") else "a step"
    for ended in of(fault, at):
        assert ended.code == 1
        assert f"LaunchError: rank {at} did not come to {step} within {TIMEOUT:g} s" in ended.output


@pytest.mark.parametrize("at", [0, 1])
def test_a_rank_that_dies_is_named_at_once(of: Faulty, at: int) -> None:
    for ended in of("killed", at):
        assert ended.code == 1
        assert re.search(rf"LaunchError: rank {at} ended before (it came to a step|the vote on a step)", ended.output)


@pytest.mark.parametrize("fault", ["never", "hangs"])
def test_without_rank_0_the_others_say_so(of: Faulty, fault: str) -> None:
    for ended in of(fault, 0):
        assert ended.code == 1
        said = "did not find rank 0 at" if fault == "never" else r"rank 0 was silent for|rank \d ended before"
        assert re.search(said, ended.output)


@pytest.mark.parametrize("at", [0, 1])
def test_what_waits_in_a_collective_ends_with_exit_code_70(of: Faulty, at: int) -> None:
    for ended in of("collective", at):  # the rank was killed
        assert ended.code == 70, ended
        assert f"rank {at} has ended." in ended.output
        assert "was waiting for a collective" in ended.output
    for ended in of("leaves", at):  # it lives, and does not come
        assert ended.code == 70, ended
        assert re.search("waited .* for a collective|has ended", ended.output)


@pytest.mark.parametrize("at", [0, 1])
def test_an_error_of_one_rank_is_raised_by_all(of: Faulty, at: int) -> None:
    for ended in of("fails", at):
        assert ended == Ended(1, f"BundleError: rank {at}: its bundle is damaged\n  Instead: copy it\n")
    for ended in of("throws", at):
        assert ended == Ended(1, f"LaunchError: rank {at}: a step failed: out of luck\n")
    for ended in of("differs", at):
        assert ended.code == 1
        assert "the ranks are at different steps: rank 0 at" in ended.output
        assert "'another step'" in ended.output


@pytest.mark.parametrize("at", [0, 1])
def test_work_is_not_silence(of: Faulty, at: int) -> None:
    assert [ended.code for ended in of("works", at)] == [0, 0]
