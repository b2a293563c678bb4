"""Ranks share a GPU only where all of them were told that they may."""

from __future__ import annotations

import pytest
import torch

from torchtrt_md.errors import LaunchError
from torchtrt_md.launch.shared_gpu import NCCL_SWITCH, STORES_SWITCH, check_apart, own_gpu
from torchtrt_md.runtime.access import without_access


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv(NCCL_SWITCH, raising=False)
    monkeypatch.delenv(STORES_SWITCH, raising=False)


def test_a_rank_without_a_gpu_of_its_own_is_refused(one_gpu: None) -> None:
    assert own_gpu(0) == torch.device("cuda", 0)
    with pytest.raises(LaunchError, match=f"local rank 1 has no GPU of its own.*\n?.*{NCCL_SWITCH}=1"):
        own_gpu(1)


def test_a_rank_may_share_where_nccl_may(one_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NCCL_SWITCH, "1")
    assert own_gpu(3) == torch.device("cuda", 0)


def test_no_gpu_at_all_is_refused_in_any_case(one_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NCCL_SWITCH, "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(LaunchError, match="has 0"):
        own_gpu(0)


@pytest.mark.parametrize("may", [(False, False), (True, False)])
def test_all_ranks_must_be_told(may: tuple[bool, ...]) -> None:
    with pytest.raises(LaunchError, match="ranks share a GPU"):
        check_apart(["host cuda:0 (A)", "host cuda:0 (A)"], may)


def test_ranks_that_share_by_request_and_ranks_that_do_not_share_go_on() -> None:
    assert check_apart(["host cuda:0 (A)", "host cuda:0 (A)"], [True, True])
    assert not check_apart(["host cuda:0 (A)", "host cuda:1 (B)"], [False, False])


def test_stores_have_a_switch_of_their_own(one_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("", (), {"uuid": "A"}))
    assert without_access(torch.device("cuda", 0), {1: "A"}) == [1]
    monkeypatch.setenv(STORES_SWITCH, "1")
    assert without_access(torch.device("cuda", 0), {1: "A"}) == []
