"""Time of each stage that needs no GPU, and the process's peak of memory behind it, by the number of ranks.

    python benchmarks/many_ranks.py

The model is a small FLUX over two samples: 8 heads, 128 image and 64 text tokens, 2 double and 4 single blocks, in
float32.  The batch is split over ``cfg``, and the sequence over ``ring`` and ``ulysses`` together (USP).  Each mesh is
measured in a process of its own, with one thread.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

import torchtrt_md as md
from torchtrt_md.place import place

MESHES = ({"cfg": 1, "ring": 1, "ulysses": 2}, {"cfg": 2, "ring": 2, "ulysses": 2}, {"cfg": 2, "ring": 4, "ulysses": 8})
IMAGE, TEXT, SAMPLES = 128, 64, 2


def flux() -> tuple[torch.nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        num_layers=2,
        num_single_layers=4,
        num_attention_heads=8,
        attention_head_dim=16,
        axes_dims_rope=(4, 6, 6),
        joint_attention_dim=32,
        pooled_projection_dim=24,
        in_channels=16,
    )
    return model.eval(), {
        "hidden_states": torch.randn(SAMPLES, IMAGE, 16),
        "encoder_hidden_states": torch.randn(SAMPLES, TEXT, 32),
        "pooled_projections": torch.randn(SAMPLES, 24),
        "timestep": torch.full((SAMPLES,), 0.5),
        "img_ids": torch.stack([torch.zeros(IMAGE), torch.arange(IMAGE) // 8, torch.arange(IMAGE) % 8], dim=1),
        "txt_ids": torch.zeros(TEXT, 3),
        "return_dict": False,
    }


def measure(axes: dict[str, int]) -> None:
    torch.set_num_threads(1)
    model, kwargs = flux()
    split = dict.fromkeys(("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"), md.Split(0))
    parallel: list[Any] = [md.ContextParallel(("ring", "ulysses"), "ring")]
    if axes["cfg"] > 1:
        parallel.append(md.ContextParallel("cfg", plan={"": split, "proj_out": md.Gather(0)}))
    mesh = md.Mesh({axis: size for axis, size in axes.items() if size > 1 or axis != "cfg"})
    cells = []

    def timed(stage: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = stage()
        cells.append(f"{time.perf_counter() - start:.1f} s, {_peak()} MB")
        return result

    captured = timed(lambda: md.capture(model, (), kwargs, mesh=mesh, parallel=parallel))
    lowered = timed(lambda: md.lower(captured, placement="split"))
    report = timed(lambda: md.verify(lowered, model, (), kwargs))
    timed(lambda: place(lowered, "split"))
    sizes = " x ".join(str(size) for size in axes.values())
    print(
        f"| {mesh.size} ({sizes}) | {len(captured.distinct())} | {' | '.join(cells)} | {report.structure_error:.0e} |"
    )


def _peak() -> int:
    """MB; the most that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main() -> None:
    print("| ranks (cfg x ring x ulysses) | graphs | capture | lower | verify | place | error in fp64 |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for axes in MESHES:
        process = multiprocessing.get_context("spawn").Process(target=measure, args=(axes,))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(process.exitcode)


if __name__ == "__main__":
    main()
