"""A real Triton Inference Server on the CPU, of which nothing but the Python backend is needed.

``make test`` unpacks the server that is in nvidia-pytriton's wheel beside the virtual environment's packages, not among
them: the package itself wants an older numpy.
"""

from __future__ import annotations

import ctypes.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

HOME = Path(os.environ.get("TORCHTRT_MD_TRITON", f"{sys.prefix}/triton"))
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
SECONDS = 300.0  # for what takes a few on a machine that nobody else uses


class Server(NamedTuple):
    process: subprocess.Popen[bytes]
    http: str
    grpc: str
    log: Path
    opened: list[Any]  # clients; the server waits half a minute for what they keep open

    def clients(self) -> list[tuple[Any, Any]]:
        """New clients, each with the module that it is of: over HTTP and over gRPC."""
        import tritonclient.grpc
        import tritonclient.http

        over_http = tritonclient.http.InferenceServerClient(self.http, network_timeout=SECONDS)
        over_grpc = tritonclient.grpc.InferenceServerClient(self.grpc)
        self.opened.extend((over_http, over_grpc))
        return [(over_http, tritonclient.http), (over_grpc, tritonclient.grpc)]


@contextmanager
def served(models: Path, work: Path) -> Iterator[Server]:
    """A server of these models, none of which is loaded yet."""
    backends, libraries = _backends(work), [_libpython(), HOME / "nvidia_pytriton.libs"]
    ports = _free_ports(2)
    log = work / "server.log"
    command = [
        str(HOME / "pytriton/tritonserver/bin/tritonserver"),
        *(f"--model-repository={models}", f"--backend-directory={backends}", "--model-control-mode=explicit"),
        *(f"--http-port={ports[0]}", f"--grpc-port={ports[1]}", "--allow-metrics=false"),
    ]
    env = {
        **os.environ,
        "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
        # What the stub embeds takes its place from PATH.
        "PATH": f"{sys.base_prefix}/bin:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        "CUDA_VISIBLE_DEVICES": "",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # without processes for it, which would take longer to start
    }
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=env, stdout=file, stderr=file)
    server = Server(process, f"127.0.0.1:{ports[0]}", f"127.0.0.1:{ports[1]}", log, [])
    try:
        wait_until(lambda: process.poll() is not None or _is_up(server), "the server is up")
        assert process.poll() is None, log.read_text()
        yield server
    finally:
        for client in server.opened:
            client.close()
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            process.kill()


def processes_of(folder: Path) -> dict[int, int]:
    """Rank -> process, of the ranks that run a model's bundle."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().decode().split("\0")
        except OSError:
            continue
        if "torchtrt_md.doors.triton_rank" in command and str(folder) in command[-2]:
            rank = command[-2].partition('"rank": ')[2].partition(",")[0]
            found[int(rank)] = int(path.parent.name)
    return found


def wait_until(condition: Any, what: str, seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.05)


def _is_up(server: Server) -> bool:
    client, _ = server.clients()[0]
    try:
        return bool(client.is_server_live())
    except OSError:
        return False


def _backends(work: Path) -> Path:
    home = HOME / "pytriton/tritonserver"
    if not home.is_dir():
        raise FileNotFoundError(
            f"there is no Triton server at {HOME}: make test puts it there, with"
            f" pip install --no-deps --target {HOME} nvidia-pytriton==0.7.0"
        )
    python = Path(shutil.copytree(home / "backends/python", work / "backends/python"))
    shutil.copy(home / f"python_backend_stubs/{VERSION}/triton_python_backend_stub", python)
    return python.parent


def _libpython() -> Path:
    """The folder of the library of this Python, which the stub embeds."""
    folder, name = sysconfig.get_config_var("LIBDIR"), f"libpython{VERSION}.so.1.0"
    for place in (folder, f"{folder}/{sysconfig.get_config_var('MULTIARCH')}", f"{sys.base_prefix}/lib"):
        if (Path(place) / name).exists():
            return Path(place)
    if ctypes.util.find_library(f"python{VERSION}") is None:
        pytest.skip(f"this Python has no {name}, which Triton's Python backend embeds")
    return Path(folder)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports
