"""The private names of PyTorch that a launch needs are there; each test says what goes without its name."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from rank_processes import Ranks

from torchtrt_md.launch import private

nccl = pytest.importorskip("torch._C._distributed_c10d", reason="PyTorch without distributed")


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("_comm_ptr", "engines could not share PyTorch's communicator"),
        ("abort", "a hung GPU would not leave its kernel"),
    ],
)
def test_the_nccl_backend_has(name: str, lost: str) -> None:
    assert hasattr(nccl.ProcessGroupNCCL, name), lost


def find_backend(rank: int) -> str:
    assert dist.group.WORLD is not None
    return type(private.nccl_backend(dist.group.WORLD, torch.device("cpu"))).__name__


def test_a_group_tells_its_backend(ranks: Ranks) -> None:
    assert [outcome.value for outcome in ranks(find_backend)] == ["ProcessGroupGloo"] * 2


def abort_what_is_no_nccl(rank: int) -> None:
    assert dist.group.WORLD is not None
    private.abort([dist.group.WORLD], torch.device("meta"))


def test_an_abort_that_fails_is_no_error(ranks: Ranks) -> None:
    assert [outcome.error for outcome in ranks(abort_what_is_no_nccl)] == ["", ""]
