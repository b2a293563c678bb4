"""The watchdog: a process that waits on another rank for too long says what for, and ends.

A rank that failed or took another branch leaves its peers' GPUs in a collective that never returns.  NCCL
inside an engine has no deadline of its own, so this thread is the deadline.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import NamedTuple, Protocol

from torchtrt_md.mesh import Mesh
from torchtrt_md.program import dtype_name
from torchtrt_md.segment import Collective, Segment

EXIT_CODE = 70
_ABORT_SECONDS = 5.0
_BEREFT_SECONDS = 5.0  # between the end of a rank and that of one that waits for it: an error may come by itself


class Pending(Protocol):
    """Work under way; a recorded ``torch.cuda.Event`` is one."""

    def query(self) -> bool:
        """Whether it is done."""


class _Wait(NamedTuple):
    pending: Pending
    what: str
    start: float
    on_all: bool = False


class _Flag:
    done = False

    def query(self) -> bool:
        return self.done


class Watchdog:
    """Ends the process with exit code 70 when work handed to it is not done in time.

    Work is taken to be done in the order it is handed over, and the time of each starts when the one before
    it is done: a long queue of calls is no fault.

    Args:
        timeout: seconds for each piece of work.
        rank: this process, for the message.
        abort: what to do before the end, best effort: abort the communicators.
        lost: says which ranks have ended or failed; "" where none is known to have.
        exit_process: ends the process without clean-up, which would wait on the hung GPU.
        clock: seconds, monotonic.
        poll: seconds between two looks.
    """

    def __init__(
        self,
        timeout: float,
        *,
        rank: int = 0,
        abort: Callable[[], object] = lambda: None,
        lost: Callable[[], str] = lambda: "",
        exit_process: Callable[[int], object] = os._exit,
        clock: Callable[[], float] = time.monotonic,
        poll: float = 0.5,
    ) -> None:
        self.timeout, self.rank, self.abort, self.lost = timeout, rank, abort, lost
        self._exit, self._clock, self._poll = exit_process, clock, min(poll, timeout / 4)
        self._waits: deque[_Wait] = deque()
        self._last_done = clock()
        self._bereft: float | None = None
        self._closed = False
        self._condition = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="torchtrt_md watchdog", daemon=True)
        self._thread.start()

    def watch(self, pending: Pending, what: str) -> None:
        """Expect this work to be done in time; ``what`` says what it may be waiting for."""
        with self._condition:
            self._waits.append(_Wait(pending, what, self._clock()))
            if len(self._waits) == 1:
                self._condition.notify()

    @contextmanager
    def waiting(self, what: str, *, on_all: bool = False) -> Iterator[None]:
        """Expect the body, which blocks this thread, to be done in time.

        Args:
            what: it may be waiting for.
            on_all: it cannot be done without all ranks: once one has ended or failed, it is not waited for.
        """
        flag = _Flag()
        with self._condition:
            self._waits.append(_Wait(flag, what, self._clock(), on_all))
            if len(self._waits) == 1:
                self._condition.notify()
        try:
            yield
        finally:
            flag.done = True

    def settle(self) -> int:
        """Drop what is done and return how much is not.  While it is 0, the thread asks CUDA nothing."""
        with self._condition:
            self._drop_done()
            return len(self._waits)

    def close(self) -> None:
        """Stop watching."""
        with self._condition:
            self._closed = True
            self._waits.clear()
            self._condition.notify()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        _allow_queries_during_captures()
        with self._condition:
            while True:
                self._drop_done()
                if self._closed:
                    return
                if not self._waits:
                    self._condition.wait()
                    continue
                head = self._waits[0]
                waited = self._clock() - max(head.start, self._last_done)
                if waited > self.timeout or (head.on_all and self._is_bereft()):
                    break
                self._condition.wait(self._poll)
        self._expire(head.what, waited)

    def _is_bereft(self) -> bool:
        """Whether a rank has ended or failed a while ago."""
        if not self.lost():
            self._bereft = None
        elif self._bereft is None:
            self._bereft = self._clock()
        return self._bereft is not None and self._clock() - self._bereft > min(_BEREFT_SECONDS, self.timeout / 2)

    def _drop_done(self) -> None:
        while self._waits:
            try:
                if not self._waits[0].pending.query():
                    return
            except RuntimeError as error:  # the GPU itself failed; the thread that uses it next raises that
                print(f"torchtrt_md: rank {self.rank}: {self._waits[0].what}\nfailed: {error}", file=sys.stderr)
            self._waits.popleft()
            self._last_done = self._clock()

    def _expire(self, what: str, waited: float) -> None:
        who = (
            f"{gone}; see its output."
            if (gone := self.lost())
            else ("Another rank has failed, has ended, or did not make this call; its output says why.")
        )
        print(
            f"torchtrt_md: rank {self.rank} waited {waited:.1f} s (at most {self.timeout:g}) for {what}\n{who}"
            f" This process ends with exit code {EXIT_CODE}.",
            file=sys.stderr,
            flush=True,
        )
        aborting = threading.Thread(target=self.abort, daemon=True)  # NCCL's abort may itself hang
        aborting.start()
        aborting.join(_ABORT_SECONDS)
        self._exit(EXIT_CODE)


def _allow_queries_during_captures() -> None:
    """Let this thread query events while another captures a CUDA graph.

    By default CUDA takes a query from any thread for a fault of the capture, and ends it.  This thread
    captures nothing, so only captures of its own are made to count.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:  # no GPU, so no captures
        return
    thread_local = ctypes.c_int(1)  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(thread_local))


def describe(
    engine: str, axis: str | None, ranks: Sequence[int], collectives: Sequence[Collective], *, most: int = 8
) -> str:
    """What a run of one engine may be waiting in: its collectives in order, equal neighbours as one line."""
    if axis is None:
        return f"{engine}, which has no collectives: its GPU hangs, or works for others"
    lines = []
    for (op, dtype, elements), run in groupby(collectives, key=lambda c: (c.op, c.dtype, c.elements)):
        times = len(list(run))
        lines.append(f"  {op} of {elements} x {dtype_name(dtype)}{f', {times} times' if times > 1 else ''}")
    if len(lines) > most:
        lines[most - 1 :] = [f"  ... and {len(lines) - most + 1} more"]
    return "\n".join(
        [f"{engine} on axis {axis!r} (ranks {', '.join(map(str, ranks))}); it is in one of, in this order:", *lines]
    )


def waits_for(segments: Sequence[Segment], mesh: Mesh, rank: int) -> str:
    """What a call may be waiting in, for the watchdog."""
    lines = []
    for index, segment in enumerate(segments):
        axes = dict.fromkeys(c.axis for c in segment.collectives)
        for axis in axes or ([None] if len(segments) == 1 else []):
            mine = [c for c in segment.collectives if c.axis == axis]
            ranks = () if axis is None else mesh.ranks(axis, rank)
            lines.append(describe(named(segment, index), axis, ranks, mine))
    return "\n".join(lines) or "a program without collectives: its GPU hangs, or works for others"


def named(segment: Segment, index: int) -> str:
    """A segment in messages."""
    return f"segment {index} ({segment.name or segment.file})"
