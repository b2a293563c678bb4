"""One rank of a bundle that Triton serves; :class:`torchtrt_md.serve.supervisor.Supervisor` starts it."""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from torchtrt_md.doors.load import load
from torchtrt_md.errors import LaunchError, MDError
from torchtrt_md.program import part
from torchtrt_md.runtime.runner import Runner
from torchtrt_md.serve.shared import SharedTensors, writes
from torchtrt_md.serve.supervisor import GRACE_SECONDS


def main(options: dict[str, Any]) -> int:
    """Load, say so, and answer calls until the supervisor closes the connection; returns the exit code."""
    connection = Connection(options["connection"])
    for descriptor in (options["connection"], options["memory"]):
        os.set_inheritable(descriptor, False)
    orders: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, orders), daemon=True).start()
    try:
        runner = _load(options)
        shared = SharedTensors(runner.manifest, options["memory"])
        _call(runner, shared)  # compiles, captures, and meets the other ranks before anybody waits for an answer
        connection.send(("ready", ""))
        while orders.get() is not None:
            _call(runner, shared)
            connection.send(("done", ""))
    except Exception as error:
        traceback.print_exc()
        text = str(error) if isinstance(error, MDError) else f"{type(error).__name__}: {error}"
        connection.send(("failed", text))
        return 1
    runner.close()
    dist.destroy_process_group()
    return 0


def _listen(connection: Connection, orders: queue.SimpleQueue[str | None]) -> None:
    """Take orders.  When there is nobody to give them, end, if need be from here: a collective may never return."""
    try:
        while True:
            orders.put(connection.recv())
    except (EOFError, OSError):
        orders.put(None)
        time.sleep(GRACE_SECONDS)
        os.killpg(0, signal.SIGKILL)


def _load(options: dict[str, Any]) -> Runner:
    device = None
    if torch.cuda.is_available():
        if options["gpu"] >= torch.cuda.device_count():
            raise LaunchError(
                f"rank {options['rank']} is to run on GPU {options['gpu']}, and this host has"
                f" {torch.cuda.device_count()}",
                fix="give the ranks GPUs that are there, in the model configuration's parameter gpus",
            )
        device = torch.device("cuda", options["gpu"])
        torch.cuda.set_device(device)
    dist.init_process_group(
        "gloo" if device is None else "nccl",
        store=dist.FileStore(options["store"], options["size"]),  # type: ignore[attr-defined]
        rank=options["rank"],
        world_size=options["size"],
        timeout=timedelta(seconds=options["timeout"]),
        device_id=device,
    )
    # All ranks read the same inputs, so there is nothing to vote on at a call.
    return load(
        Path(options["bundle"]),
        device=device,
        timeout=options["timeout"],
        votes="first",
        cuda_graph=options["cuda_graph"],
        static_outputs=True,
    )


def _call(runner: Runner, shared: SharedTensors) -> None:
    signature, mesh = runner.signature, runner.signature.mesh
    inputs = {
        name: part(shared.inputs[name], value.sharding, mesh, runner.rank).to(runner.device)
        for name, value in signature.inputs.items()
    }
    outputs = runner.call(lambda: signature.bind((), inputs, runner.device))
    for value in signature.outputs:
        if writes(value, mesh, runner.rank):
            part(shared.outputs[value.name], value.sharding, mesh, runner.rank).copy_(outputs[value.name])
    if runner.device.type == "cuda":
        torch.cuda.synchronize(runner.device)


if __name__ == "__main__":
    code = main(json.loads(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # destructors of CUDA and NCCL wait on peers that may be gone
