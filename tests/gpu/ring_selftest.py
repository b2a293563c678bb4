"""One rank of a launch that lets the self-test of rings inside engines judge GPUs that have no kernels for them.

    torchrun --nproc_per_node=2 tests/gpu/ring_selftest.py

The gate on the compute capability is opened, so that an engine is built and run that is known to be wrong there; the
self-test must refuse it on every rank.  Each rank prints ``SAID {json}``.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

import torchtrt_md as md
from torchtrt_md.errors import MDError
from torchtrt_md.launch import Launch
from torchtrt_md.runtime.selftest import check_ring


def main() -> None:
    vars(importlib.import_module("torchtrt_md.build.flavour"))["_RING_CAPABILITY"] = (8, 0)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device, timeout=timedelta(seconds=60))
    ranks = dist.get_world_size()
    launch = Launch.join(60.0, device=device)
    groups = launch.connect(md.Mesh(cp=ranks))
    said: dict[str, object] = {"rank": dist.get_rank(), "refused": "", "error": None}
    try:
        said["error"] = check_ring(
            "cp",
            ranks,
            torch.bfloat16,
            128,
            8,
            8,
            256,
            group=groups["cp"],
            launch=launch,
            target="sm80",
        )
    except MDError as error:
        said["refused"] = f"{type(error).__name__}: {error}"
    sys.stdout.write(f"SAID {json.dumps(said)}\n")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
