"""Votes: all ranks learn that all are fine, or what is wrong on which, before any of them acts.

The votes have a gloo group of their own: they work while a GPU hangs, they do not disturb the order of
the NCCL collectives, and every one has a deadline.
"""

from __future__ import annotations

import atexit
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist

from torchtrt_md import errors
from torchtrt_md.errors import LaunchError, MDError

T = TypeVar("T")


class Failure(NamedTuple):
    """An error in the form that travels: ranks may not be able to unpickle each other's exceptions."""

    kind: str
    problem: str
    fix: str
    at: str

    @classmethod
    def of(cls, error: MDError) -> Failure:
        return cls(type(error).__name__, error.problem, error.fix, error.at)


class Agreement:
    """All ranks of the launch, voting.  Making one is itself collective.

    Args:
        timeout: seconds that any wait on the other ranks may take.

    Raises:
        LaunchError: no process group, or ranks that do not arrive.
    """

    def __init__(self, timeout: float) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise LaunchError(
                "there is no process group: this process was not launched as one of several ranks",
                fix="start it with torchrun --nproc_per_node=N, and call torch.distributed.init_process_group first",
            )
        if timeout <= 0:
            raise LaunchError(f"a timeout of {timeout} s leaves no time to agree", fix="give seconds, more than 0")
        self.rank, self.size, self.timeout = dist.get_rank(), dist.get_world_size(), timeout
        with self._deadline("the start of the votes"):
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout), group_desc="torchtrt_md votes")
        self._group = cast(dist.ProcessGroup, group)
        # A gloo group that is left to the interpreter's end aborts the process there, now and then.
        atexit.register(self.close)

    def vote(self, error: MDError | None, about: str) -> None:
        """Say whether this rank is fine; return if all are.

        One all_reduce of three integers when all are fine.

        Args:
            error: what is wrong on this rank, or None.
            about: what is voted on, for messages; equal on all ranks.

        Raises:
            MDError: some rank has an error.  Every rank raises the same message, which names the ranks; its
                class is that of the errors where they agree, else LaunchError.
            LaunchError: a rank did not vote within the timeout, or voted on something else.
        """
        topic = zlib.crc32(about.encode())
        ballot = torch.tensor([error is not None, topic, -topic], dtype=torch.int64, device="cpu")
        with self._deadline(about):
            dist.all_reduce(ballot, op=dist.ReduceOp.MAX, group=self._group)
        failed, highest, lowest = ballot.tolist()
        if highest != -lowest:  # the ranks' topics differ
            raise LaunchError(
                f"the ranks are at different steps: {grouped(self._exchange(about, about))}",
                fix="make the same calls, in the same order, on every rank",
            )
        if failed:
            mine = None if error is None else Failure.of(error)
            found = self._exchange(mine, about)
            raise combined({rank: f for rank, f in enumerate(found) if f is not None}, self.size) from error

    def together(self, about: str, step: Callable[[], T]) -> T:
        """Do a step that may fail on some ranks, then vote: it returns on all ranks or raises on all.

        Errors that are not this package's own are voted on as LaunchError, with their class and message.

        Raises:
            MDError: as :meth:`vote`.
        """
        result: T | None = None
        error: MDError | None = None
        try:
            result = step()
        except MDError as own:
            error = own
        except Exception as other:  # whatever it is, the others must not wait for it
            error = LaunchError(f"{about} failed: {type(other).__name__}: {other}")
            error.__cause__ = other
        self.vote(error, about)
        return cast(T, result)

    def gather(self, value: T, about: str) -> list[T]:
        """Every rank's value (a small object that pickles), in rank order.

        Raises:
            LaunchError: a rank did not answer within the timeout, or is at another step.
        """
        self.vote(None, about)
        return self._exchange(value, about)

    def close(self) -> None:
        """Leave the group.  Not collective."""
        atexit.unregister(self.close)
        if dist.is_initialized():
            with suppress(RuntimeError, ValueError):  # a group that broke, or that the user's own clean-up took along
                dist.destroy_process_group(self._group)

    def _exchange(self, value: T, about: str) -> list[T]:
        found: list[T | None] = [None] * self.size
        with self._deadline(about):
            dist.all_gather_object(found, value, group=self._group)
        return cast(list[T], found)

    @contextmanager
    def _deadline(self, about: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        except (RuntimeError, ValueError) as error:  # gloo has no classes for a deadline or a lost peer
            waited = time.monotonic() - start
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise LaunchError(
                f"this rank waited {waited:.1f} s (at most {self.timeout:g}) for the other ranks to agree on {about},"
                f" in vain: {reason}",
                fix="see the other ranks' output: one has failed or ended, or did not come to this call",
            ) from error


def combined(failures: Mapping[int, Failure], size: int) -> MDError:
    """One error for all ranks, from what failed on some of ``size``."""
    by_failure: dict[Failure, list[int]] = {}
    for rank, failure in failures.items():
        by_failure.setdefault(failure, []).append(rank)
    kinds = {failure.kind for failure in by_failure}
    kind = getattr(errors, kinds.pop(), LaunchError) if len(kinds) == 1 else LaunchError
    problem = "\n".join(f"{_who(ranks, size)}: {failure.problem}" for failure, ranks in by_failure.items())
    fixes = dict.fromkeys(f.fix for f in by_failure if f.fix)
    places = dict.fromkeys(f.at for f in by_failure if f.at)
    return cast(MDError, kind(problem, fix="; ".join(fixes), at="; ".join(places)))


def grouped(values: Sequence[object]) -> str:
    """Ranks by what they have: ``rank 0 has 'a', ranks 1, 2 have 'b'``."""
    ranks: dict[object, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    return ", ".join(
        f"{_who(members, 0)} {'has' if len(members) == 1 else 'have'} {value!r}" for value, members in ranks.items()
    )


def _who(ranks: Sequence[int], size: int) -> str:
    if len(ranks) == size and size > 1:
        return "every rank"
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
