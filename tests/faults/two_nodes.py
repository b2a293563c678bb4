"""What each rank of ``torchrun --nnodes=2`` runs: every door, and then the second node's rank is killed in a step.

torchrun --nnodes=2 --node_rank=N --nproc_per_node=1 --master_addr=127.0.0.1 --master_port=P two_nodes.py BUNDLE OUT
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

import torchtrt_md as md
from faults import injections
from faults.processes import TIMEOUT
from torchtrt_md.doors.dynamo import backend
from torchtrt_md.runtime.executor import Executor

_ENV = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


def error_of(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result - expected).norm() / expected.norm())


def main() -> None:
    bundle, out = sys.argv[1], Path(sys.argv[2])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    told: dict[str, Any] = {"env": {name: os.environ[name] for name in _ENV}}

    def tell(**what: Any) -> None:
        told.update(what)
        (out / f"{rank}.json").write_text(json.dumps(told))

    model, x = injections.product()
    with torch.no_grad():
        expected = model(x)
        how: dict[str, Any] = {"compute": "inductor", "timeout": TIMEOUT * 6}
        plan: dict[str, Any] = {"mesh": md.Mesh(tp=2), "parallel": md.TensorParallel("tp", injections.PLAN)}
        with md.compile(model, (x,), **plan, **how) as compiled:
            tell(compile=error_of(compiled(x), expected))
        options = {**plan, **how}
        tell(backend=error_of(torch.compile(model, backend=backend, options=options)(x), expected))
    runner = md.load(bundle, timeout=TIMEOUT * 6)
    tell(load=error_of(runner(x), expected))
    if rank == 1:  # of the second node
        injections.before(Executor, "_communicate", lambda: os.kill(os.getpid(), signal.SIGKILL))
    tell(start=time.time())
    try:
        runner(x)
    except md.MDError as error:
        tell(error=f"{type(error).__name__}: {error}", seconds=time.time() - told["start"])
        raise


if __name__ == "__main__":
    main()
