"""A launch over two nodes: by torchrun, at every door; and with hosts that do not see each other's processes."""

from pathlib import Path

import pytest

from faults import nodes
from torchtrt_md.launch import host


def test_torchrun_with_two_nodes(tmp_path: Path) -> None:
    assert nodes.by_torchrun(tmp_path).problems == []


def test_ranks_of_several_hosts(tmp_path: Path) -> None:
    assert nodes.one_rank_ends(tmp_path).problems == []


def test_a_host_that_is_gone(tmp_path: Path) -> None:
    assert nodes.one_host_ends(tmp_path).problems == []


def test_a_process_of_another_host_is_not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = host.process(1) or pytest.fail("there is no first process")
    assert not host.has_ended(mine)
    name, boot, space, pid, start = mine.split("|")
    assert host.has_ended("|".join((name, boot, space, pid, str(int(start) + 1)))), "another process had the number"
    for other in (("elsewhere", boot, space), (name, "another-boot", space), (name, boot, "pid:[1]")):
        assert not host.has_ended("|".join((*other, "999999999", start))), other
    monkeypatch.setattr(host, "host", lambda: "")
    assert not host.has_ended(""), "it could not tell"
    assert not host.has_ended("|999999999|1")


def test_copies_between_hosts_are_refused(tmp_path: Path) -> None:
    assert nodes.copies(tmp_path).problems == []
