"""Inductor's graphs compiled by several processes at once, ahead of this one, into the cache that it keeps on disk.

Inductor compiles one graph after another, in Python, while the other cores of the host have nothing to do.  A worker
here compiles a graph as this process would, which then finds it in the cache.  Nothing but time depends on a worker:
what none has begun, or one failed at, this process compiles.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

import torch

from torchtrt_md.errors import first_line
from torchtrt_md.runtime import private
from torchtrt_md.runtime.private import Operand

log = logging.getLogger(__name__)
# PyTorch's own switch for the processes in which Inductor compiles Triton kernels.  Each worker has some of its own.
THREADS = "TORCHINDUCTOR_COMPILE_THREADS"
READY, DONE = "ready", "done"
_MOST = 6
_THREADS = 2  # of a worker
_LONGEST = 300.0  # seconds that a graph is waited for
# Within these the first worker is ready, and what it saves is more than that where there are this many graphs.
_START, _FEW = 20.0, 3
_END = 5.0  # seconds in which a worker that was killed ends
_BYTES = 1 << 30  # of GPU memory that a worker may take: its context, and the kernels that it loads


class Job(NamedTuple):
    """A graph to compile, as JSON, for operands like these, under the switches of this process."""

    graph: bytes
    operands: Sequence[Operand]
    switches: bytes


@contextmanager
def working_ahead(device: torch.device, ranks: int, wanted: bool, needs: int = 0) -> Iterator[Ahead]:
    """Workers that are ready some seconds later, and are gone behind it; none where they cannot be started.

    Args:
        device: that graphs are compiled for.
        ranks: of this host, each of which has workers of its own.
        wanted: whether Inductor will compile anything.
        needs: bytes of GPU memory that this rank is about to fill.
    """
    ahead = Ahead(device)
    try:
        ahead.start(workers(device, ranks, needs) if wanted else 0)
    except Exception as error:  # whatever it is, this rank compiles by itself, and no other waits for it
        log.info("nothing is compiled ahead: %s: %s", type(error).__name__, first_line(error))
        ahead.close()
    try:
        yield ahead
    finally:
        ahead.close()


def workers(device: torch.device, ranks: int, needs: int = 0) -> int:
    """How many there is room for; none for the CPU, nor where the user wants all compiled in one process."""
    if device.type != "cuda" or os.environ.get(THREADS, "2") in ("0", "1") or not private.inductor_keeps():
        return 0
    cores = len(os.sched_getaffinity(0)) // ranks
    free, _ = torch.cuda.mem_get_info(device)
    return max(0, min(_MOST, cores // (_THREADS + 1), (free - needs) // _BYTES // 4))


class Ahead:
    """Workers, and what they were given.

    Args:
        device: that graphs are compiled for.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.compiled = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._waiting: deque[str] = deque()
        self._begun: set[str] = set()
        self._ready = 0  # workers that can begin, or have begun
        self._starting = 0
        self._until = time.monotonic() + _START
        self._changed = threading.Condition()
        self._closed = False
        self._processes: list[subprocess.Popen[str]] = []
        self._marks: dict[str, Path] = {}

    def __bool__(self) -> bool:
        return bool(self._processes) and not self._closed

    def start(self, count: int) -> None:
        """Start some workers."""
        if not count:
            return
        self._folder = tempfile.TemporaryDirectory(prefix="torchtrt_md-", ignore_cleanup_errors=True)
        while len(self._processes) < count:
            self._processes.append(self._started())
        self._starting = count
        for process in self._processes:
            threading.Thread(target=self._feed, args=(process,), daemon=True).start()

    def give(self, jobs: Callable[[], Mapping[str, Job]]) -> None:
        """Let these be compiled, in this order, each by its name; where they cannot be given, by nobody."""
        if not self or self._folder is None:
            return
        made: dict[str, Job] = {}
        try:
            for name, job in jobs().items():
                data = pickle.dumps(job)
                self._marks[name] = _mark(data, self.device)
                if not self._marks[name].exists():  # else Inductor has it, or did
                    (Path(self._folder.name) / name).write_bytes(data)
                    made[name] = job
        except Exception as error:  # a switch that is no data, a disk that is full
            log.info("nothing is compiled ahead: %s: %s", type(error).__name__, first_line(error))
            self.close()
            return
        with self._changed:
            self._waiting += made
            self._changed.notify_all()

    def compiled_here(self, name: str) -> None:
        """Note what this process has, for later ones to look into Inductor's cache and wait for no worker."""
        with suppress(KeyError, OSError):
            self._marks[name].parent.mkdir(parents=True, exist_ok=True)
            self._marks[name].touch()

    def wait(self, name: str) -> None:
        """Until a worker is done with what was given by this name, which is next; not where no worker gets ready."""
        with self._changed:
            if name in self._waiting and len(self._waiting) > _FEW:
                self._changed.wait_for(lambda: self._ready or not self._starting, self._until - time.monotonic())
            if name in self._waiting and self._ready:
                self._waiting.remove(name)
                self._waiting.appendleft(name)
            in_time = self._changed.wait_for(lambda: not self._is_under_way(name), _LONGEST)
            if name in self._waiting:
                self._waiting.remove(name)
        if not in_time:
            log.warning("what is compiled ahead is not waited for any more, after %g s", _LONGEST)
            self.close()

    def _is_under_way(self, name: str) -> bool:
        return not self._closed and (name in self._begun or (name in self._waiting and self._ready > 0))

    def close(self) -> None:
        """End the workers."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for process in self._processes:
            process.kill()
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):  # it cannot be ended while a driver holds it
                process.wait(_END)
        if self._folder is not None:
            self._folder.cleanup()

    def _started(self) -> subprocess.Popen[str]:
        # -P: not what lies in the current folder.
        command = [sys.executable, "-P", "-m", "torchtrt_md.runtime.ahead_worker", str(self.device)]
        # This package may be on the path only.
        paths = os.pathsep.join(path for path in sys.path if isinstance(path, str) and path)
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if log.isEnabledFor(logging.DEBUG) else subprocess.DEVNULL,
            env={**os.environ, THREADS: str(_THREADS), "PYTHONPATH": paths},
            text=True,
        )

    def _feed(self, process: subprocess.Popen[str]) -> None:
        """Give one worker what waits, until it is gone.  In a thread."""
        assert process.stdin is not None
        assert process.stdout is not None
        ready = process.stdout.readline().strip() == READY
        with self._changed:
            self._starting -= 1
            self._ready += ready
            self._changed.notify_all()
        if not ready:
            return
        try:
            while answer := self._compiled_next(process.stdin, process.stdout):
                if answer == DONE:
                    self.compiled += 1
                else:
                    log.info("not compiled ahead: %s", answer)
        finally:
            with self._changed:
                self._ready -= 1
                self._changed.notify_all()

    def _compiled_next(self, questions: IO[str], answers: IO[str]) -> str:
        """What a worker answers to the next graph; "" where it is gone, or not wanted any more."""
        assert self._folder is not None
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting)
            if self._closed:
                return ""
            name = self._waiting.popleft()
            self._begun.add(name)
        try:
            print(Path(self._folder.name) / name, file=questions, flush=True)
            return answers.readline().strip()
        except OSError:
            return ""
        finally:
            with self._changed:
                self._begun.remove(name)
                self._changed.notify_all()


def _mark(job: bytes, device: torch.device) -> Path:
    """A file beside what Inductor keeps, which is there once it has compiled this."""
    of = hashlib.sha256(b"\0".join([job, str(device).encode(), torch.__version__.encode()])).hexdigest()
    return private.inductor_folder() / "torchtrt_md" / of
