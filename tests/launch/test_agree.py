"""Votes between two real processes."""

import os
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from rank_processes import Ranks, warm

from torchtrt_md.errors import BundleError, InputError, LaunchError
from torchtrt_md.launch.agree import Agreement, combined, grouped
from torchtrt_md.launch.board import Failure

TIMEOUT = 20.0


def all_fine(rank: int) -> tuple[int, list[dict[str, int]], float]:
    agreement = Agreement(TIMEOUT)
    agreement.vote(None, "nothing")
    result = agreement.together("a step", lambda: rank * 10)
    gathered = agreement.gather({"rank": rank}, "the ranks")
    seconds = []
    for _ in range(50):
        start = time.perf_counter()
        agreement.vote(None, "speed")
        seconds.append(time.perf_counter() - start)
    return result, gathered, min(seconds)


def test_all_fine(own_ranks: Ranks) -> None:
    for rank, outcome in enumerate(own_ranks(all_fine)):
        result, gathered, seconds = outcome.value
        assert result == rank * 10
        assert gathered == [{"rank": 0}, {"rank": 1}]
        assert seconds < 0.05, "a vote is small"


def one_fails(rank: int) -> tuple[str, bool] | None:
    agreement = Agreement(TIMEOUT)
    error = InputError("input 'x' has shape [3] and the program takes [4]", fix="pass that shape")
    try:
        agreement.vote(error if rank == 1 else None, "the inputs of a call")
    except InputError as raised:
        agreement.vote(None, "the next call")  # a refused call leaves the votes in order
        return str(raised), raised.__cause__ is error
    return None


def test_one_rank_fails_and_all_raise_the_same(own_ranks: Ranks) -> None:
    (zero, zero_cause), (one, one_cause) = (outcome.value for outcome in own_ranks(one_fails))
    assert zero == one
    assert "rank 1: input 'x' has shape [3] and the program takes [4]" in zero
    assert "Instead: pass that shape" in zero
    assert (zero_cause, one_cause) == (False, True)


def unexpected(rank: int) -> None:
    Agreement(TIMEOUT).together("reading", lambda: 1 // (1 - rank))


def test_any_exception_of_a_step_is_voted_on(own_ranks: Ranks) -> None:
    for outcome in own_ranks(unexpected):
        assert outcome.error == "LaunchError"
        assert "rank 1: reading failed: ZeroDivisionError" in outcome.message


def other_step(rank: int) -> None:
    Agreement(TIMEOUT).vote(None, "the inputs of a call" if rank else "the end of the run")


def test_ranks_at_different_steps(own_ranks: Ranks) -> None:
    for outcome in own_ranks(other_step):
        assert outcome.error == "LaunchError"
        assert "rank 0 has 'the end of the run', rank 1 has 'the inputs of a call'" in outcome.message


def one_does_not_come(rank: int) -> None:
    """Rank 1 comes when it was given up already."""
    if rank == 1:
        time.sleep(4)
    Agreement(2.0).vote(None, "the inputs of a call")


def test_a_silent_rank_is_given_up_by_name_and_learns_of_it(own_ranks: Ranks) -> None:
    start = time.monotonic()
    waited, late = own_ranks(one_does_not_come)
    assert time.monotonic() - start < 15
    assert waited == late, "whoever comes too late raises what the others raised"
    assert waited.error == "LaunchError"
    assert "rank 1 did not come to the inputs of a call within 2 s" in waited.message


def next_vote(rank: int) -> None:
    Agreement(TIMEOUT).vote(None, "the next call")


def test_votes_are_in_order_after_a_rank_was_given_up(own_ranks: Ranks) -> None:
    assert [outcome.error for outcome in own_ranks(next_vote)] == ["", ""]


def one_works_for_long(rank: int) -> float:
    def step() -> float:
        time.sleep(5 * rank)
        return time.monotonic()

    return Agreement(1.5).together("building", step)


def test_work_is_not_silence(own_ranks: Ranks) -> None:
    for outcome in own_ranks(one_works_for_long):
        assert not outcome.error, outcome.message


def vote_in_a_step(rank: int) -> list[float]:
    agreement = Agreement(TIMEOUT)

    def measure() -> list[float]:
        if rank == 0:
            raise RuntimeError("CUDA out of memory")
        return agreement.gather(1.0, "a first time")

    return agreement.together("timing a candidate", measure)


def test_a_step_that_votes_itself_fails_on_all_with_the_first_error(own_ranks: Ranks) -> None:
    first, second = own_ranks(vote_in_a_step)
    assert first == second
    assert first.error == "LaunchError"
    assert "rank 0: timing a candidate failed: RuntimeError: CUDA out of memory" in first.message
    assert [outcome.error for outcome in own_ranks(next_vote)] == ["", ""]


def test_values_that_must_be_the_same(own_ranks: Ranks) -> None:
    outcomes = own_ranks(differ_on_one, "split")
    assert [outcome.value for outcome in outcomes] == ["split", "split"]
    for outcome in own_ranks(differ_on_one, "engine"):
        assert outcome.error == "RankMismatchError"
        assert "the ranks differ in the placement: rank 0 has 'split', rank 1 has 'engine'" in outcome.message


def differ_on_one(rank: int, other: str) -> str:
    return Agreement(TIMEOUT).same(other if rank else "split", "the placement")


def end_while_others_wait(rank: int, size: int, store: str, ended: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    agreement = Agreement(600.0)
    agreement.vote(None, "the first call")
    if rank == 1:
        os._exit(3)
    start = time.monotonic()
    try:
        agreement.vote(None, "the second call")
    except LaunchError as error:
        ended.put((time.monotonic() - start, str(error)))


def test_a_rank_whose_process_ended_is_noticed_at_once(tmp_path: Path) -> None:
    context = warm()
    ended = context.Queue()
    processes = [
        context.Process(target=end_while_others_wait, args=(rank, 2, str(tmp_path / "store"), ended))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    seconds, message = ended.get(timeout=120)
    for process in processes:
        process.join(30)
    assert seconds < 30, "not the timeout of 600 s"
    assert "rank 1 ended before it came to the second call" in message


def test_without_a_launch() -> None:
    with pytest.raises(LaunchError, match=r"torchrun --nproc_per_node=N"):
        Agreement(1.0)


def no_time(rank: int) -> None:
    Agreement(0.0)


def test_without_a_timeout(own_ranks: Ranks) -> None:
    assert "a timeout of 0.0 s" in own_ranks(no_time)[0].message


def test_failures_are_put_together() -> None:
    same = combined({0: Failure("BundleError", "p", "f", ""), 1: Failure("BundleError", "p", "f", "")}, 2)
    assert type(same) is BundleError
    assert same.problem == "every rank: p"
    mixed = combined({0: Failure("BundleError", "a", "f", "u.py:1"), 3: Failure("InputError", "b", "g", "")}, 4)
    assert type(mixed) is LaunchError
    assert mixed.problem == "rank 0: a\nrank 3: b"
    lost = combined({0: Failure("BundleError", "a", "f", "")}, 2, "rank 1 ended before it came to a step")
    assert lost.problem == "rank 1 ended before it came to a step\nrank 0: a"
    assert (mixed.fix, mixed.at) == ("f; g", "u.py:1")
    assert pickle.loads(pickle.dumps(Failure.of(mixed))) == Failure.of(mixed)


def test_grouping() -> None:
    assert grouped(["a", "b", "b"]) == "rank 0 has 'a', ranks 1, 2 have 'b'"
