"""The suite of this folder as tests: one run of it, on all GPUs that there are, and one test for each case."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu.cases import cases
from gpu.report import PASSED, REFUSED

GPUS = torch.cuda.device_count()
DEADLINE = 480
RANKS = 4 if GPUS >= 4 else 2
pytestmark = [
    pytest.mark.skipif(GPUS < 2, reason=f"needs 2 GPUs, this machine has {GPUS}"),
    pytest.mark.timeout(DEADLINE + 60),  # the first test has the suite's time
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Name -> what the report says of the case."""
    out = tmp_path_factory.mktemp("gpu")
    suite = str(Path(__file__).with_name("suite.py"))
    command = [sys.executable, suite, "--ranks", str(RANKS), "--out", str(out)]
    done = subprocess.run([*command, "--deadline", str(DEADLINE)], capture_output=True, text=True, check=False)
    assert (out / "report.json").exists(), done.stderr
    return {result["name"]: result for result in json.loads((out / "report.json").read_text())["results"]}


@pytest.mark.parametrize("name", [case.name for case in cases("cuda", RANKS)])
def test_case(name: str, results: dict[str, dict[str, Any]]) -> None:
    assert results[name]["state"] in (PASSED, REFUSED), results[name]["message"]
