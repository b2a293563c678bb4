"""A model larger than its rank's memory limit, compiled and run: ``meta_memory_probe.py RANK FOLDER``, for test_memory.

The folder has the checkpoint and ``expected.pt``.  Each of the two ranks may take nine tenths of the dense weights.
"""

from __future__ import annotations

import gc
import json
import resource
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from resident import forget_peak, resident
from torch import Tensor, nn

import torchtrt_md as md

WIDTH, HIDDEN, LAYERS, WARM_UP = 2048, 4096, 12, 3
PARALLEL = md.TensorParallel("tp", plan={"layers.*.up": "colwise", "layers.*.down": "rowwise"})


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(torch.nn.functional.gelu(self.up(x)))
        return result


class Deep(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def on_meta(layers: int) -> Deep:
    with torch.device("meta"):
        return Deep(layers).eval()


def run(layers: int, weights: object, x: Tensor) -> Tensor:
    how = {"mesh": md.Mesh(tp=2), "parallel": PARALLEL, "compute": "inductor", "report": False}
    with md.compile(on_meta(layers), (x,), weights=weights, **how) as runner:  # type: ignore[arg-type]
        result: Tensor = runner(x)
        return result.clone()


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    x, expected = torch.load(folder / "expected.pt")
    # Once with few layers: what PyTorch and Inductor load and keep is then there, and the same kernels are compiled.
    torch.manual_seed(0)
    run(WARM_UP, Deep(WARM_UP).state_dict(), x)
    gc.collect()
    dense = sum(p.numel() * p.element_size() for p in on_meta(LAYERS).parameters())
    limit = resident("VmData") + dense * 9 // 10
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    before = forget_peak()
    try:
        found = run(LAYERS, folder / "checkpoint", x)
    except md.MDError:
        print({name: resident(name) for name in ("VmData", "VmPeak", "VmHWM", "VmStk")}, before, limit, file=sys.stderr)
        raise
    peak = resident("VmHWM") - before
    gc.collect()
    error = float((found - expected).norm() / expected.norm())
    try:
        on_meta(LAYERS).to_empty(device="cpu")
        fits = True
    except RuntimeError:  # PyTorch's allocator has none of its own
        fits = False
    print(json.dumps({"dense": dense, "shard": dense // 2, "peak": peak, "error": error, "dense fits": fits}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
