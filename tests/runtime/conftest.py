"""What the tests of the runtime share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from runtime.rank_processes import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(tmp_path_factory.mktemp("ranks") / "store")
    yield started
    started.close()
