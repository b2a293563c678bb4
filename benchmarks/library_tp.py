"""What a model of transformers computes under the library's own tensor parallelism, on CPU ranks, beside the dense one.

    torchrun --nproc_per_node=2 benchmarks/library_tp.py GemmaForCausalLM

It prints the largest difference of any rank's logits, or last hidden states where there are none, or the first line of
the library's error.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from benchmarks.model_matrix import SAID, made  # noqa: E402
from benchmarks.small_diffusers import Holding  # noqa: E402

_ROUNDING = 1e-5  # of the largest number, in float32


def _result(output: Any) -> tuple[torch.Tensor, str]:
    """What is compared of a model's output, and what to call a number of it."""
    logits = getattr(output, "logits", None)
    return (output.last_hidden_state, "number") if logits is None else (logits, "logit")


def main(name: str) -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    model, args, kwargs = made(name)
    if isinstance(model, Holding):
        model, kwargs = model.model, {**kwargs, **model.held}
    with torch.no_grad():
        expected, what = _result(model(*args, **kwargs))
    folder: list[Any] = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folder)
    if rank == 0:
        model.save_pretrained(folder[0])
    dist.barrier()
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (size,), mesh_dim_names=("tp",))
        sharded = type(model).from_pretrained(folder[0], tp_plan="auto", device_mesh=mesh).eval()
        with torch.no_grad():
            found, _ = _result(sharded(*args, **kwargs))
        off = float((found - expected).abs().max() / expected.abs().max())
        # How much rounding is differs by CPU, and the page is compared with what another one finds.
        said = "differs by rounding alone" if off < _ROUNDING else f"differs by {off:.1e} of the largest {what}"
    except Exception as error:  # whatever it is
        frame = traceback.extract_tb(error.__traceback__)[-1]
        reason = next(iter(str(error).strip().splitlines()), "") or frame.line
        said = f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}: {reason}"
    told: list[Any] = [None] * size
    dist.all_gather_object(told, said)
    if rank == 0:
        shutil.rmtree(folder[0])
        print("\n".join(SAID + line for line in dict.fromkeys(told)), flush=True)
    dist.barrier()
    os._exit(0)  # a rank that failed in a collective would wait for the others


if __name__ == "__main__":
    main(sys.argv[1])
