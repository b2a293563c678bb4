"""An export that fails or ends at any point leaves the old bundle or the new one."""

from pathlib import Path

import pytest

from faults import exports
from faults.cases import Outcome


def check(outcome: Outcome) -> None:
    assert outcome.problems == []


@pytest.mark.parametrize("older", [True, False])
def test_killed_at_every_point(tmp_path: Path, older: bool) -> None:
    outcome = exports.crashes(tmp_path, older=older)
    check(outcome)
    assert int(outcome.said.split()[0]) >= 10, "there are as many changes of the file system"


def test_several_at_once(tmp_path: Path) -> None:
    check(exports.at_once(tmp_path))


def test_a_file_that_cannot_grow(tmp_path: Path) -> None:
    check(exports.disk_full(tmp_path))


@pytest.mark.skipif(not exports.can_mount(), reason="no file system can be mounted; the test before stands for it")
def test_a_full_file_system(tmp_path: Path) -> None:
    check(exports.disk_full(tmp_path, tmpfs=True))


def test_killed_in_a_stage(tmp_path: Path) -> None:
    check(exports.killed(tmp_path))
