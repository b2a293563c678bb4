"""The board of a launch: the slots that ranks vote in, in the key-value store that the process group was made with.

A vote has a number, and each rank a slot of that number which is written once: by the rank, or by whoever gave it up.
A thread tells the others that a rank works, however long a step takes, and another ends this process where the store
itself falls silent: it is stopped, or its host is cut off, and PyTorch would wait for its answer without end.
"""

from __future__ import annotations

import base64
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from torchtrt_md.errors import LaunchError, MDError, first_line
from torchtrt_md.launch import host, private
from torchtrt_md.launch.watchdog import EXIT_CODE

BEAT_SECONDS = 0.5


class Failure(NamedTuple):
    """An error in the form that travels: ranks may not be able to unpickle each other's exceptions."""

    kind: str
    problem: str
    fix: str
    at: str

    @classmethod
    def of(cls, error: MDError) -> Failure:
        return cls(type(error).__name__, error.problem, error.fix, error.at)


class Ballot(NamedTuple):
    """What is in a rank's slot.  ``by`` is the rank that wrote it: another one gave it up, ``about`` says how."""

    by: int
    about: str
    failure: Failure | None = None
    value: Any = None


class _Store:
    """The store of a launch, which answers within ``patience`` seconds, or this process ends.

    ``left``: the launch is over, and nobody asks any more.
    """

    def __init__(self, inner: Store, rank: int, patience: float) -> None:
        self.inner, self.patience, self.about = inner, patience, "joining the launch"
        self.left = False
        self._rank = rank
        self._asked: dict[int, float] = {}  # by the thread that asks
        threading.Thread(target=self._guard, name="torchtrt_md store guard", daemon=True).start()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self.inner, name)

        def ask(*args: Any) -> Any:
            thread = threading.get_ident()
            self._asked[thread] = time.monotonic()
            try:
                return method(*args)
            finally:
                self._asked.pop(thread, None)

        return ask

    def _guard(self) -> None:
        while not self.left:
            time.sleep(min(BEAT_SECONDS, self.patience / 4))
            asked = min(list(self._asked.values()), default=None)
            if asked is None or time.monotonic() - asked <= self.patience:
                continue
            print(
                f"torchtrt_md: rank {self._rank} had no answer from the launch's store for {self.patience:g} s, in the"
                f" vote on {self.about}\nThe process that holds it is stopped, or its host cannot be reached: it is"
                f" rank 0, or torchrun on the first host. This process ends with exit code {EXIT_CODE}.",
                file=sys.stderr,
                flush=True,
            )
            os._exit(EXIT_CODE)  # the thread that waits cannot be woken


class Board:
    """The slots of a launch's votes: one for each process group and process, which all its agreements share.

    Args:
        patience: seconds within which the store must answer.
    """

    def __init__(self, patience: float) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise LaunchError(
                "there is no process group: this process was not launched as one of several ranks",
                fix="start it with torchrun --nproc_per_node=N, and call torch.distributed.init_process_group first",
            )
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.number = self.programs = 0
        self._processes: dict[int, str] = {}  # rank -> what it told of its process
        self.failed = ""  # who said in the vote under way that it failed, while this rank is in a meeting
        self.given_up = ""  # whom a vote has given up, and why
        self._working = self._meeting = 0
        self._beating: threading.Thread | None = None
        with store_errors("joining the launch"):
            self.store = _Store(PrefixStore("torchtrt_md", private.default_store()), self.rank, patience)
            # A store may outlive a process group; the count tells the launches of one store apart.
            launches = self.store.add(f"launches of {self.rank}", 1)
            self.store.inner = PrefixStore(str(launches), self.store.inner)
            self.store.set(f"process of {self.rank}", host.process(os.getpid()))

    def slot(self, rank: int, number: int | None = None) -> str:
        return f"{self.number if number is None else number}/{rank}"

    def write(self, rank: int, ballot: Ballot) -> Ballot:
        """Write a slot unless it is written; what it holds then."""
        text = base64.b64encode(pickle.dumps(ballot)).decode()
        if ballot.failure is not None:  # for a rank that waits for this one and cannot come to the vote
            self.store.set(f"failed {self.slot(rank)}", ballot.failure.problem)
        return _ballot(self.store.compare_set(self.slot(rank), "", text))

    def missing(self) -> list[int]:
        """The ranks whose slots are empty."""
        if self.store.check([self.slot(rank) for rank in range(self.size)]):
            return []
        return [rank for rank in range(self.size) if not self.store.check([self.slot(rank)])]

    def read(self) -> list[Ballot]:
        """All slots, each written; the vote is over."""
        ballots = [_ballot(text) for text in self.store.multi_get([self.slot(rank) for rank in range(self.size)])]
        if self.number:  # whoever is at this vote has read the one before
            self.store.delete_key(self.slot(self.rank, self.number - 1))
        self.number += 1
        return ballots

    def beats(self, rank: int) -> bytes:
        """Other at each look while the rank works."""
        key = f"work of {rank}"
        return self.store.get(key) if self.store.check([key]) else b""

    def has_ended(self, rank: int) -> bool:
        """Whether the process of a rank has ended, as far as it can be seen from this host."""
        if rank not in self._processes:
            key = f"process of {rank}"
            if not self.store.check([key]):
                return False
            self._processes[rank] = self.store.get(key).decode()
        return host.has_ended(self._processes[rank])

    def processes(self) -> list[str]:
        """What each rank told of its process, in rank order; all have joined."""
        for rank in range(self.size):
            if rank not in self._processes:
                self._processes[rank] = self.store.get(f"process of {rank}").decode()
        return [self._processes[rank] for rank in range(self.size)]

    def ended(self) -> list[int]:
        """The ranks whose processes are known to have ended.  The store is not asked."""
        return [rank for rank, told in sorted(self._processes.items()) if host.has_ended(told)]

    @contextmanager
    def working(self, *, meeting: bool = False) -> Iterator[None]:
        """Say that this rank works, for as long as the body takes.

        Args:
            meeting: the body waits for other ranks, so look whether one of them has failed, and say so in ``failed``.
        """
        self._working += 1
        self._meeting += meeting
        if self._beating is None:
            self._beating = threading.Thread(target=self._beat, name="torchtrt_md heartbeat", daemon=True)
            self._beating.start()
        try:
            yield
        finally:
            self._working -= 1
            self._meeting -= meeting
            if not self._meeting:
                self.failed = ""

    def _beat(self) -> None:
        store = self.store.inner.clone()  # a client of its own: the other may be in use
        while not self.store.left:
            time.sleep(BEAT_SECONDS)
            if self._working:
                try:
                    store.add(f"work of {self.rank}", 1)
                    if self._meeting:
                        self.failed = self._look_for_failures(store)
                except RuntimeError:  # the store has ended, and with it the launch
                    return

    def _look_for_failures(self, store: Store) -> str:
        keys = {rank: f"failed {self.slot(rank)}" for rank in range(self.size) if rank != self.rank}
        told = {rank: store.get(key).decode() for rank, key in keys.items() if store.check([key])}
        return "; ".join(f"rank {rank} has failed: {problem}" for rank, problem in told.items())


def _ballot(text: bytes) -> Ballot:
    return cast(Ballot, pickle.loads(base64.b64decode(text)))


@contextmanager
def store_errors(about: str) -> Iterator[None]:
    """Name what the store raises where it has ended."""
    try:
        yield
    except RuntimeError as broken:
        if isinstance(broken, MDError):
            raise
        raise LaunchError(
            f"the store of the launch is gone, in the vote on {about}: {first_line(broken)}",
            fix="see the output of rank 0, or of torchrun on the first host, which holds it: it has failed or ended",
        ) from broken


_boards: list[tuple[object, Board]] = []  # one, and the process group that it is of


def board(patience: float) -> Board:
    """The board of the process group of now.

    Args:
        patience: seconds within which its store must answer.

    Raises:
        LaunchError: there is none.
    """
    world = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    if not _boards or _boards[0][0] is not world:
        for _, old in _boards:
            old.store.left = True
        _boards[:] = [(world, Board(patience))]
    return _boards[0][1]
