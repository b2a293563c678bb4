"""After a rank was given up: in processes of this file's own, since that is for good."""

from __future__ import annotations

import time

import models
import torch
from in_pytorch import message_of
from rank_processes import Ranks

import torchtrt_md as md

PLAN = {"": {"x": md.Split(1)}, "out": md.Gather(1)}


def left_out(rank: int) -> list[str]:
    """Rank 0 leaves a call out, and is too late for it."""
    model, (x,), _ = models.attention()
    found = []
    with (
        torch.no_grad(),
        md.compile(
            model,
            (x,),
            mesh=md.Mesh(cp=2),
            parallel=md.ContextParallel("cp", plan=PLAN),
            compute="inductor",
            report=False,
            timeout=3.0,
        ) as runner,
    ):
        runner(x)
        if rank == 0:
            time.sleep(5)
        else:
            found.append(message_of(lambda: runner(x)))
        for _ in range(2):
            found.append(message_of(lambda: runner(x + 1)))
    return found[-2:]


def test_after_a_rank_was_given_up_no_call_is_taken_for_another(own_ranks: Ranks) -> None:
    for outcome in own_ranks(left_out):
        assert not outcome.error, outcome.message
        assert all("rank 0 did not come to a call of" in message for message in outcome.value), outcome.value
        assert "may not match any more" in outcome.value[-1]
