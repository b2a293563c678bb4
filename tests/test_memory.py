"""Weights are not copied per rank: what capturing and building four ranks adds to the dense model's own memory.

TensorRT-RTX takes some 0.35 GB whatever it builds, so the growth with the weights is measured between two sizes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def _measure(width: int) -> dict[str, int]:
    script = Path(__file__).parent / "memory_probe.py"
    command = [sys.executable, str(script), str(width)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    measured: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return measured


def test_capturing_and_building_all_ranks_holds_the_dense_weights_and_one_rank() -> None:
    small, large = _measure(1024), _measure(2048)
    assert large["dense"] > 3 * large["shard"], "shards must be much smaller than the whole for this to mean anything"
    assert large["capture"] < large["shard"] / 2, "capturing copies no weights"
    growth = (large["build"] - small["build"]) / (large["shard"] - small["shard"])
    assert growth < 2.5, f"{growth:.2f} shards beside the dense weights: {small}, {large}"
