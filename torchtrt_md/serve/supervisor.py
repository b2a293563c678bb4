"""``Supervisor``: a bundle's ranks as processes of this host, started, called, watched and ended from one process.

    supervisor                                   rank r, one for each GPU
    starts it in a session of its own      ->    loads its part of the bundle, runs it once
                                           <-    ready
    writes the inputs, sends a call        ->    reads its part of the inputs, runs, writes its part of the outputs
                                           <-    done
    closes the connection                  ->    ends; so it does where the supervisor was killed

A rank that ends, fails or does not answer in time ends all: the others wait for it in collectives.  What happened is
the ``failure``, which every later call raises at once.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

from torch import Tensor

from torchtrt_md.bundle.read import read_manifest
from torchtrt_md.bundle.structure import mesh_of
from torchtrt_md.errors import InputError, LaunchError
from torchtrt_md.launch.watchdog import EXIT_CODE
from torchtrt_md.program import Value
from torchtrt_md.serve.shared import SharedTensors

RANK = "torchtrt_md.doors.triton_rank"  # the module that a rank runs
GRACE_SECONDS = 10.0  # for what a rank does beyond its own deadlines: to say what failed, or to end
_BLAME_SECONDS = 1.0  # in which the end of one rank is seen before what it made fail on others


class Supervisor:
    """The ranks of a bundle, up and called from here.

    Args:
        bundle: the folder.
        python: the interpreter that runs the ranks.
        gpus: of each rank, by CUDA's numbers on this host.  Without a GPU, bundles without engines run on the CPU.
        timeout: seconds that a call, or a rank's silence while loading, may take.
        cuda_graph: capture a call in a CUDA graph and replay it.
        on_failure: called once, from a thread of its own, with what ended the ranks.

    Raises:
        LaunchError: a rank could not load its part; all processes have ended then.
        BundleError: there is no bundle.
    """

    def __init__(
        self,
        bundle: Path,
        *,
        python: str,
        gpus: Sequence[int] = (),
        timeout: float = 300.0,
        cuda_graph: bool = False,
        on_failure: Callable[[str], object] = lambda reason: None,
    ) -> None:
        self.manifest = read_manifest(bundle)
        size = mesh_of(self.manifest).size
        gpus = list(gpus) or list(range(size))
        if len(gpus) != size or len(set(gpus)) != size:
            raise LaunchError(
                f"the bundle has {size} ranks and is to run on the GPUs {gpus}", fix="give each rank a GPU of its own"
            )
        self.failure: LaunchError | None = None
        self._timeout, self._on_failure = timeout, on_failure
        self._up = self._closing = False
        self._calling, self._failing = threading.Lock(), threading.Lock()
        self._shared = SharedTensors(self.manifest)
        self._answers: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        self._store = tempfile.mkdtemp(prefix="torchtrt_md-")
        self._processes: list[subprocess.Popen[bytes]] = []
        self._sockets: list[socket.socket] = []
        self._connections: list[Connection] = []
        try:
            for rank, gpu in enumerate(gpus):
                options = {
                    "bundle": str(bundle),
                    "store": f"{self._store}/store",
                    "memory": self._shared.descriptor,
                    "rank": rank,
                    "size": size,
                    "gpu": gpu,
                    "timeout": timeout,
                    "cuda_graph": cuda_graph,
                }
                self._start(python, options)
            for rank in range(size):
                listening = threading.Thread(target=self._listen, args=(rank,), daemon=True)
                listening.start()
                threading.Thread(target=self._watch, args=(rank, listening), daemon=True).start()
            self._gather("ready", None)
            self._up = True
            self._raise_failure()  # of a rank that ended in between
        except BaseException:
            self.close()
            raise

    def call(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs of a call.

        Args:
            inputs: by name, on the CPU, of the global shapes and the dtypes of the manifest.

        Returns:
            By name, of the global shapes; the next call overwrites them.

        Raises:
            InputError: an input is missing, or not what the bundle takes.
            LaunchError: a rank has ended, failed, or did not answer in time; now or before.
        """
        for value in self.manifest.inputs:
            _check(value, inputs.get(value.name))
        with self._calling:
            self._raise_failure()
            for name, tensor in self._shared.inputs.items():
                tensor.copy_(inputs[name])
            for connection in self._connections:
                try:
                    connection.send("call")
                except OSError:
                    break  # it has ended: what is gathered says so
            self._gather("done", self._timeout + GRACE_SECONDS)
            return self._shared.outputs

    def close(self) -> None:
        """End every process, those that ranks started among them."""
        self._closing = True
        deadline = time.monotonic() + GRACE_SECONDS
        for end in self._sockets:
            end.shutdown(socket.SHUT_RDWR)  # a thread reads it, so to close it would tell the rank nothing
            end.close()
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            _kill(process)
        for process in self._processes:
            process.wait()
        self._shared.close()
        shutil.rmtree(self._store, ignore_errors=True)

    def _start(self, python: str, options: Mapping[str, object]) -> None:
        here, there = socket.socketpair()
        with there:
            fds = (there.fileno(), self._shared.descriptor)
            command = [python, "-m", RANK, json.dumps({**options, "connection": there.fileno()})]
            # A session of its own: all that it starts can be ended with it, and Ctrl-C is for the server alone.
            process = subprocess.Popen(command, pass_fds=fds, stdin=subprocess.DEVNULL, start_new_session=True)
        self._processes.append(process)
        self._sockets.append(here)
        self._connections.append(Connection(os.dup(here.fileno())))

    def _gather(self, wanted: str, seconds: float | None) -> None:
        """Wait for the answers of all ranks.

        Raises:
            LaunchError: the failure, also one of before.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        waiting = set(range(len(self._processes)))
        while waiting and self.failure is None:
            try:
                rank, answer = self._answers.get(timeout=deadline and max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                late = ", ".join(map(str, sorted(waiting)))
                self._fail(f"rank {late} did not answer within {seconds:g} s")
                break
            if answer == wanted:
                waiting.discard(rank)
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self.failure is not None:
            raise self.failure.with_traceback(None)  # it is raised again and again, and would keep each one's

    def _listen(self, rank: int) -> None:
        """Take what a rank says, until it has ended."""
        with self._connections[rank] as connection, suppress(EOFError, OSError):
            while True:
                answer, text = connection.recv()
                if answer == "failed":
                    self._blame(rank, text)
                self._answers.put((rank, answer))

    def _blame(self, rank: int, text: str) -> None:
        """A rank says that it failed.  Where another has ended, that is why."""
        until = time.monotonic() + _BLAME_SECONDS
        while self.failure is None and time.monotonic() < until:
            time.sleep(0.01)
        self._fail(f"rank {rank} failed: {text}")

    def _watch(self, rank: int, listening: threading.Thread) -> None:
        """Wait for the end of a rank, which comes by itself only if something is wrong."""
        process = self._processes[rank]
        code = process.wait()
        listening.join(5 * _BLAME_SECONDS)  # it may have said why
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        if code == EXIT_CODE:
            how += ": it waited too long for its GPU or for another rank"
        self._fail(f"rank {rank} (process {process.pid}) {how}")

    def _fail(self, problem: str) -> None:
        with self._failing:
            if self.failure is not None:
                return
            self.failure = LaunchError(
                "the ranks were ended" if self._closing else problem,
                fix="see the output of the ranks in the server's log, and load the model again",
            )
            if not self._closing:
                for process in self._processes:
                    _kill(process)
            self._answers.put((-1, ""))  # whoever waits looks again
        if self._up and not self._closing:
            threading.Thread(target=self._on_failure, args=(str(self.failure),), daemon=True).start()


def _check(value: Value, tensor: Tensor | None) -> None:
    found = "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
    if found != f"{value.dtype} {list(value.shape)}":
        raise InputError(
            f"input {value.name!r} is {found}, and the bundle takes {value.dtype} {list(value.shape)}",
            fix="pass that, or export a bundle for the other",
        )


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a rank and what it started, now."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
