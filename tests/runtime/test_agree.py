"""Votes between two real processes."""

import pickle
import time

import pytest

from runtime.rank_processes import Ranks
from torchtrt_md.errors import BundleError, InputError, LaunchError
from torchtrt_md.runtime.agree import Agreement, Failure, combined, grouped

TIMEOUT = 20.0


def all_fine(rank: int) -> tuple[int, list[dict[str, int]], float]:
    agreement = Agreement(TIMEOUT)
    agreement.vote(None, "nothing")
    result = agreement.together("a step", lambda: rank * 10)
    gathered = agreement.gather({"rank": rank}, "the ranks")
    start = time.perf_counter()
    for _ in range(50):
        agreement.vote(None, "speed")
    seconds = (time.perf_counter() - start) / 50
    agreement.close()
    return result, gathered, seconds


def test_all_fine(ranks: Ranks) -> None:
    for rank, outcome in enumerate(ranks(all_fine)):
        result, gathered, seconds = outcome.value
        assert result == rank * 10
        assert gathered == [{"rank": 0}, {"rank": 1}]
        assert seconds < 0.05, "a vote is small"


def one_fails(rank: int) -> tuple[str, bool] | None:
    agreement = Agreement(TIMEOUT)
    error = InputError("input 'x' has shape [3] and the engines take [4]", fix="pass that shape")
    try:
        agreement.vote(error if rank == 1 else None, "the inputs of a call")
    except InputError as raised:
        agreement.vote(None, "the next call")  # a refused call leaves the votes in order
        agreement.close()
        return str(raised), raised.__cause__ is error
    return None


def test_one_rank_fails_and_all_raise_the_same(ranks: Ranks) -> None:
    (zero, zero_cause), (one, one_cause) = (outcome.value for outcome in ranks(one_fails))
    assert zero == one
    assert "rank 1: input 'x' has shape [3] and the engines take [4]" in zero
    assert "Instead: pass that shape" in zero
    assert (zero_cause, one_cause) == (False, True)


def unexpected(rank: int) -> None:
    agreement = Agreement(TIMEOUT)
    try:
        agreement.together("reading", lambda: 1 // (1 - rank))
    finally:
        agreement.close()


def test_any_exception_of_a_step_is_voted_on(ranks: Ranks) -> None:
    for outcome in ranks(unexpected):
        assert outcome.error == "LaunchError"
        assert "rank 1: reading failed: ZeroDivisionError" in outcome.message


def other_step(rank: int) -> None:
    agreement = Agreement(TIMEOUT)
    try:
        agreement.vote(None, "the inputs of a call" if rank else "the end of the run")
    finally:
        agreement.close()


def test_ranks_at_different_steps(ranks: Ranks) -> None:
    for outcome in ranks(other_step):
        assert outcome.error == "LaunchError"
        assert "rank 0 has 'the end of the run', rank 1 has 'the inputs of a call'" in outcome.message


def one_does_not_come(rank: int) -> None:
    agreement = Agreement(2.0)
    try:
        if rank == 0:
            agreement.vote(None, "the inputs of a call")
    finally:
        if rank == 1:
            time.sleep(4)  # its end of the connection must outlast the other's patience
        agreement.close()


def test_the_wait_for_a_rank_has_a_deadline(ranks: Ranks) -> None:
    start = time.monotonic()
    waited, fine = ranks(one_does_not_come)
    assert time.monotonic() - start < 15
    assert not fine.error
    assert waited.error == "LaunchError"
    assert "(at most 2) for the other ranks to agree on the inputs of a call" in waited.message


def one_leaves(rank: int) -> None:
    agreement = Agreement(TIMEOUT)
    if rank == 1:
        agreement.close()
        return
    start = time.monotonic()
    try:
        agreement.vote(None, "the inputs of a call")
    finally:
        assert time.monotonic() - start < TIMEOUT / 2, "a lost peer is noticed at once"
        agreement.close()


def test_a_rank_that_left(ranks: Ranks) -> None:
    outcome = ranks(one_leaves)[0]
    assert outcome.error == "LaunchError"
    assert "agree on the inputs of a call, in vain" in outcome.message


def test_without_a_launch() -> None:
    with pytest.raises(LaunchError, match=r"torchrun --nproc_per_node=N"):
        Agreement(1.0)


def no_time(rank: int) -> None:
    Agreement(0.0)


def test_without_a_timeout(ranks: Ranks) -> None:
    assert "a timeout of 0.0 s" in ranks(no_time)[0].message


def test_failures_are_put_together() -> None:
    same = combined({0: Failure("BundleError", "p", "f", ""), 1: Failure("BundleError", "p", "f", "")}, 2)
    assert type(same) is BundleError
    assert same.problem == "every rank: p"
    mixed = combined({0: Failure("BundleError", "a", "f", "u.py:1"), 3: Failure("InputError", "b", "g", "")}, 4)
    assert type(mixed) is LaunchError
    assert mixed.problem == "rank 0: a\nrank 3: b"
    assert (mixed.fix, mixed.at) == ("f; g", "u.py:1")
    assert pickle.loads(pickle.dumps(Failure.of(mixed))) == Failure.of(mixed)


def test_grouping() -> None:
    assert grouped(["a", "b", "b"]) == "rank 0 has 'a', ranks 1, 2 have 'b'"
