"""What all tests share: this folder's models, one set of threads, and real ranks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # `import models` from any folder

from rank_processes import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Two processes, started by the first test that needs them."""
    started = Ranks(tmp_path_factory.mktemp("ranks") / "store")
    yield started
    started.close()
