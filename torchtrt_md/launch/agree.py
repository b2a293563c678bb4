"""Agreement: all ranks learn that all are fine, or what is wrong on which, before any of them acts.

Ranks vote through the key-value store that the process group was made with (:mod:`torchtrt_md.launch.board`).  It works
while a GPU hangs, does not disturb the order of NCCL's collectives, and needs no group of its own, so nothing about it
is collective but the votes.

In a slot is what its rank votes on, its error and its value; or who gave the rank up.  Every rank reads all slots.  So
all ranks return, or all raise the same error, a rank that comes too late among them.

A rank is given up after ``timeout`` seconds of silence, and at once where its process has ended on this host.  Work is
not silence: while a rank is in :meth:`Agreement.together` a thread says so, however long the step takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar, cast

from torchtrt_md import errors
from torchtrt_md.errors import LaunchError, MDError, RankMismatchError
from torchtrt_md.launch import host
from torchtrt_md.launch.board import BEAT_SECONDS, Ballot, Failure, board, store_errors

T = TypeVar("T")
_POLL_SECONDS = (0.0, 1e-4, 1e-3, 1e-2, 5e-2)  # between looks at the slots: each for a while, the last from then on
_LOOKS = 50
_LEAVING_SECONDS = 2.0  # between the end of a process's connections and its own


class Together(Protocol):
    """What the stages need of an agreement; :class:`Alone` is that of a single process."""

    rank: int
    size: int

    def together(self, about: str, step: Callable[[], T], /) -> T: ...

    def same(self, value: T, about: str, /) -> T: ...

    def gather(self, value: T, about: str, /) -> list[T]: ...


class Alone:
    """One process that answers to nobody, such as an export."""

    rank, size = 0, 1

    def together(self, about: str, step: Callable[[], T], /) -> T:
        return step()

    def same(self, value: T, about: str, /) -> T:
        return value

    def gather(self, value: T, about: str, /) -> list[T]:
        return [value]


class Agreement:
    """All ranks of the launch, voting.

    Args:
        timeout: seconds of silence after which another rank is given up.

    Raises:
        LaunchError: no process group.
    """

    def __init__(self, timeout: float) -> None:
        if timeout <= 0:
            raise LaunchError(f"a timeout of {timeout} s leaves no time to agree", fix="give seconds, more than 0")
        self.board, self.timeout = board(timeout), timeout
        self.rank, self.size = self.board.rank, self.board.size

    def vote(self, error: MDError | None, about: str) -> None:
        """Say whether this rank is fine; return if all are.

        Args:
            error: what is wrong on this rank, or None.
            about: what is voted on, for messages; equal on all ranks.

        Raises:
            MDError: some rank has an error.  Every rank raises the same message, which names the ranks; its
                class is that of the errors where they agree, else LaunchError.
            LaunchError: a rank was silent for too long, or voted on something else.
        """
        self._exchange(Ballot(self.rank, about, None if error is None else Failure.of(error)), error)

    def together(self, about: str, step: Callable[[], T]) -> T:
        """Do a step that may fail on some ranks, then vote: it returns on all ranks or raises on all.

        Errors that are not this package's own are voted on as LaunchError, with their class and message.

        Raises:
            MDError: as :meth:`vote`.
        """
        result: T | None = None
        error: MDError | None = None
        try:
            with self.board.working():
                result = step()
        except MDError as own:
            if getattr(own, "agreed", False):  # by a vote within the step, in which all ranks were
                raise
            error = own
        except Exception as other:  # whatever it is, the others must not wait for it
            error = LaunchError(f"{about} failed: {type(other).__name__}: {other}".removesuffix(": "))
            error.__cause__ = other
        self.vote(error, about)
        return cast(T, result)

    def gather(self, value: T, about: str) -> list[T]:
        """Every rank's value (a small object that pickles), in rank order.

        Raises:
            MDError: as :meth:`vote`.
        """
        return [cast(T, ballot.value) for ballot in self._exchange(Ballot(self.rank, about, value=value), None)]

    def same(self, value: T, about: str) -> T:
        """The value, which must be equal on all ranks.

        Raises:
            RankMismatchError: on every rank, with who has what.
            MDError: as :meth:`vote`.
        """
        found = self.gather(value, about)
        if any(other != found[0] for other in found):
            raise _agreed(
                RankMismatchError(
                    f"the ranks differ in {about}: {grouped(found)}",
                    fix="compile and call the same, with the same options and inputs, on every rank",
                )
            )
        return value

    def hosts(self) -> list[int]:
        """For each rank the number of its host, counted from 0 in the order of the ranks.  Collective."""
        self.vote(None, "where the ranks are")  # behind it, all have told
        with store_errors("where the ranks are"):
            told = [host.host_of(told) or f"rank {rank}" for rank, told in enumerate(self.board.processes())]
        return [list(dict.fromkeys(told)).index(home) for home in told]

    def check_in_step(self) -> None:
        """Ask before a call of a program, of which only the ranks' order says that they make the same one.

        Raises:
            LaunchError: on every rank, once a vote has given one up: it may have left a call out.
        """
        if self.board.given_up:
            raise LaunchError(
                f"{self.board.given_up}, so the calls of the ranks may not match any more",
                fix="launch again; with a longer timeout, if that rank was only late",
            )

    def ended(self) -> str:
        """Who has ended, in words, after an error that the end of a process may have caused; "" if nobody is known."""
        until = time.monotonic() + _LEAVING_SECONDS
        while not (found := self.board.ended()) and time.monotonic() < until:
            time.sleep(_POLL_SECONDS[-1])
        return said_ended(found)

    def _exchange(self, mine: Ballot, error: MDError | None) -> list[Ballot]:
        store = self.board.store
        store.patience, store.about = self.timeout, mine.about
        with store_errors(mine.about):
            self.board.write(self.rank, mine)
            self._wait(mine.about)
            ballots = self.board.read()
        found = _verdict(ballots)
        self.board.given_up = self.board.given_up or _gone(ballots)
        if found is not None:
            raise _agreed(found) from error
        return ballots

    def _wait(self, about: str) -> None:
        """Until all slots are written, by their ranks or by whoever gives them up."""
        heard: dict[int, tuple[bytes, float]] = {}  # rank -> its beats, and when they were new
        start = asked = time.monotonic()
        looks = 0
        while missing := self.board.missing():
            time.sleep(_POLL_SECONDS[min(looks // _LOOKS, len(_POLL_SECONDS) - 1)])
            looks += 1
            now = time.monotonic()
            if now - asked < min(BEAT_SECONDS, self.timeout / 4):
                continue
            asked = now
            for rank in missing:
                beats = self.board.beats(rank)
                before, since = heard.get(rank, (beats, start))  # what was heard before this vote says nothing
                heard[rank] = (beats, since if beats == before else now)
                if now - heard[rank][1] > self.timeout:
                    self._give_up(rank, f"did not come to {about} within {self.timeout:g} s")
                elif self.board.has_ended(rank):
                    self._give_up(rank, f"ended before it came to {about}")

    def _give_up(self, rank: int, problem: str) -> None:
        self.board.write(rank, Ballot(self.rank, problem))


def _verdict(ballots: Sequence[Ballot]) -> MDError | None:
    """What all ranks make of the same slots: the error that each of them raises, or None."""
    size = len(ballots)
    lost, gone = _lost(ballots), _gone(ballots)
    failures = {r: b.failure for r, b in enumerate(ballots) if b.by == r and b.failure is not None}
    apart = any(ballot.about != ballots[0].about for ballot in ballots)
    error: MDError | None = None
    if failures:
        error = combined(failures, size, gone)
    elif lost:
        error = LaunchError(
            gone,
            fix=f"see the output of {_who(lost, 0)}: it has failed, has ended, or does not make this call",
        )
    elif apart:
        error = LaunchError(
            f"the ranks are at different steps: {grouped([b.about for b in ballots])}",
            fix="make the same calls, in the same order, on every rank",
        )
    if error is not None:
        error.lost = bool(lost) or apart
    return error


def _lost(ballots: Sequence[Ballot]) -> list[int]:
    """The ranks that were given up."""
    return [rank for rank, ballot in enumerate(ballots) if ballot.by != rank]


def _gone(ballots: Sequence[Ballot]) -> str:
    """Who was given up, and why; "" where nobody was."""
    return "; ".join(f"rank {rank} {ballots[rank].about}" for rank in _lost(ballots))


def _agreed(error: MDError) -> MDError:
    """The error, marked as one that every rank raises."""
    error.agreed = True
    return error


def combined(failures: Mapping[int, Failure], size: int, gone: str = "") -> MDError:
    """One error for all ranks, from what failed on some of ``size``, and who was given up."""
    by_failure: dict[Failure, list[int]] = {}
    for rank, failure in failures.items():
        by_failure.setdefault(failure, []).append(rank)
    kinds = {failure.kind for failure in by_failure}
    kind = getattr(errors, kinds.pop(), LaunchError) if len(kinds) == 1 else LaunchError
    lines = [f"{_who(ranks, size)}: {failure.problem}" for failure, ranks in by_failure.items()]
    problem = "\n".join([gone, *lines] if gone else lines)
    fixes = dict.fromkeys(f.fix for f in by_failure if f.fix)
    places = dict.fromkeys(f.at for f in by_failure if f.at)
    return cast(MDError, kind(problem, fix="; ".join(fixes), at="; ".join(places)))


def check_same(agreement: Together, items: Mapping[str, str], about: str) -> None:
    """Refuse named texts that differ between ranks.  Collective.

    Raises:
        RankMismatchError: on every rank, with who has what of those that differ, and nothing of the others.
        MDError: as :meth:`Agreement.vote`.
    """
    found = agreement.gather(dict(items), about)
    names = dict.fromkeys(name for of in found for name in of)
    apart = {name: [of.get(name, "none") for of in found] for name in names}
    told = [f"{name}: {grouped(texts, str)}" for name, texts in apart.items() if len(set(texts)) > 1]
    if told:
        raise _agreed(
            RankMismatchError(
                f"the ranks differ in {about}: {'; '.join(told)}",
                fix="compile and call the same, with the same options and inputs, on every rank",
            )
        )


def grouped(values: Sequence[object], show: Callable[[object], str] = repr) -> str:
    """Ranks by what they have: ``rank 0 has 'a', ranks 1, 2 have 'b'``."""
    ranks: dict[object, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    return ", ".join(
        f"{_who(members, 0)} {'has' if len(members) == 1 else 'have'} {show(value)}" for value, members in ranks.items()
    )


def said_ended(ranks: Sequence[int]) -> str:
    """``rank 1 has ended``; "" of nobody."""
    return f"{_who(ranks, 0)} {'has' if len(ranks) == 1 else 'have'} ended" if ranks else ""


def _who(ranks: Sequence[int], size: int) -> str:
    if len(ranks) == size and size > 1:
        return "every rank"
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
