"""Weights are not copied per rank: what capturing and building four ranks adds to the dense model's own memory.
And a model on meta may be larger than what a rank may hold.

TensorRT-RTX takes some 0.35 GB whatever it builds, so the growth with the weights is measured between two sizes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from meta_memory_probe import HIDDEN, LAYERS, WIDTH, Layer
from safetensors.torch import save_file


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


def test_a_model_larger_than_the_limit_is_compared_loaded_and_run_by_ranks_that_hold_their_shards(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    torch.manual_seed(1)
    x = torch.randn(4, WIDTH)
    result = x
    placed: dict[str, str] = {}
    for index in range(LAYERS):
        layer = Layer()
        with torch.no_grad():
            result = layer(result)
        held = {f"layers.{index}.{name}": t for name, t in layer.state_dict().items()}
        file = f"model-{index + 1:05}-of-{LAYERS:05}.safetensors"
        save_file(held, folder / file)
        placed |= dict.fromkeys(held, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    torch.save((x, result), tmp_path / "expected.pt")
    script = Path(__file__).parent / "meta_memory_probe.py"
    started = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
            # What is let go of goes back to the system at once, so that the peak is of what was held.
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)},
        )
        for rank in range(2)
    ]
    try:
        for process in started:
            out, err = process.communicate(timeout=400)
            assert process.returncode == 0, err
            measured = json.loads(out.splitlines()[-1])
            assert measured["dense"] == 2 * WIDTH * HIDDEN * 4 * LAYERS
            assert not measured["dense fits"], "the limit must be one that the dense weights exceed"
            assert measured["peak"] <= 1.2 * measured["shard"], measured
            assert measured["error"] < 1e-5
    finally:
        for process in started:
            process.kill()
