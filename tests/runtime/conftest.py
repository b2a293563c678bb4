"""What the tests of the runtime share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rank_processes import Ranks

sys.path.append(str(Path(__file__).parent.parent / "bundle"))  # bundle_samples


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(tmp_path_factory.mktemp("ranks") / "store")
    yield started
    started.close()
