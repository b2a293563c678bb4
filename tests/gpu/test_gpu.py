"""The suite of this folder as tests: one run of it, on all GPUs that there are, and one test for each case.

On one GPU its two ranks share it, which NCCL has from 2.30 on.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu.cases import cases
from gpu.rank import nccl_version
from gpu.report import PASSED, REFUSED

GPUS = torch.cuda.device_count()
DEADLINE = 480
RANKS = 4 if GPUS >= 4 else 2
NCCL = tuple(map(int, nccl_version().split("."))) if GPUS == 1 else ()
pytestmark = [
    pytest.mark.skipif(GPUS < 1, reason="needs a GPU"),
    pytest.mark.skipif(GPUS == 1 and NCCL < (2, 30), reason=f"ranks share a GPU from NCCL 2.30 on, and this is {NCCL}"),
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
