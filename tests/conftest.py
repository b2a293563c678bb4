"""What all tests share: this folder's models, one set of threads, and real ranks."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # `import models` from any folder

# Of this process and all that it starts, before any of them imports torch.  The tests are about what is compiled, not
# how fast it runs: Inductor's kernels are scalar, so it does not build a test program for each instruction set of the
# CPU; it has no pool of processes, of which every rank would start its own; and processes do not fight for cores.
os.environ |= {"TORCHINDUCTOR_VEC_ISA_OK": "0", "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}

import torch
from command_line import Run
from rank_processes import COLLECT, Ranks


def pytest_configure() -> None:
    gc.set_threshold(*COLLECT)


# A test draws the same numbers whatever ran before it, so that a bound on an error holds always, or never: so does its
# file when it is imported, and so do the fixtures that several tests have.


@pytest.hookimpl(tryfirst=True)
def pytest_make_collect_report() -> None:
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def engine_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A cache of built engines that is empty when the tests begin, for this process and all that it starts."""
    os.environ["TORCHTRT_MD_CACHE"] = str(tmp_path_factory.mktemp("engines"))


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache of a test's own, of tests in which something must be built."""
    monkeypatch.setenv("TORCHTRT_MD_CACHE", str(tmp_path / "engine cache"))


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Two processes, started by the first test that needs them."""
    started = Ranks(tmp_path_factory.mktemp("ranks") / "store")
    yield started
    started.close()


@pytest.fixture(scope="module")
def own_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Two processes of a file's own: of tests after which no other may use them, or that count what a process made."""
    started = Ranks(tmp_path_factory.mktemp("ranks") / "store")
    yield started
    started.close()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line."""
    return Run(monkeypatch, capsys)


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The blocks that capture wrote down again."""
    from torchtrt_md.capture.repeated import RepeatedBlocks

    found: list[object] = []
    own = RepeatedBlocks._write_again

    def noted(self: RepeatedBlocks, kind: object, call: object) -> object:
        found.append(call.block)  # type: ignore[attr-defined]
        return own(self, kind, call)  # type: ignore[arg-type]

    monkeypatch.setattr(RepeatedBlocks, "_write_again", noted)
    return found
