"""Ranks whose GPUs cannot write each other's memory are told so together, and none waits for another."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from rank_processes import Ranks

from torchtrt_md.errors import LaunchError
from torchtrt_md.launch import Launch
from torchtrt_md.mesh import Mesh
from torchtrt_md.runtime import access
from torchtrt_md.runtime.access import check_access, without_access


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host of four GPUs, of which two and two have access to each other."""
    named = lambda device: types.SimpleNamespace(uuid=f"GPU {torch.device(device).index}")  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_device_properties", named)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: one.index // 2 == other // 2)


def test_the_pairs_that_have_no_access(gpus: None) -> None:
    peers = {rank: f"GPU {rank}" for rank in range(4)}
    assert without_access(torch.device("cuda", 0), {r: u for r, u in peers.items() if r != 0}) == [2, 3]
    assert without_access(torch.device("cuda", 3), {2: "GPU 2"}) == []
    assert without_access(torch.device("cuda", 0), {1: "GPU of a container of its own"}) == []


def checked(rank: int, lacks: bool, apart: bool) -> str:
    launch = Launch.join(30.0, cpu=True)
    with pytest.MonkeyPatch.context() as patch:
        own: Any = (lambda device, peers: sorted(peers)) if lacks and rank == 1 else lambda device, peers: []
        patch.setattr(access, "without_access", own)
        if apart:
            patch.setattr(launch, "hosts", ("one", "other"))
        try:
            check_access(launch, Mesh(cp=2))
        except LaunchError as error:
            return str(error)
    return ""


def test_all_ranks_are_told_of_it(ranks: Ranks) -> None:
    assert [outcome.value for outcome in ranks(checked, False, False)] == ["", ""]
    one, other = (outcome.value for outcome in ranks(checked, True, False))
    assert one == other
    assert "rank 1 to rank 0" in one
    assert "transport='nccl'" in one
    one, other = (outcome.value for outcome in ranks(checked, False, True))
    assert one == other
    assert "ranks 0, 1 of axis 'cp' are on several" in one
