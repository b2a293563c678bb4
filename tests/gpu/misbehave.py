"""One rank of a launch in which something goes wrong on purpose: ``misbehave.py WHAT BUNDLE [OTHER]`` under torchrun.

Each rank prints what it saw as ``SAID {json}``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

import torchtrt_md as md
from torchtrt_md.doors.run import random_inputs
from torchtrt_md.errors import MDError

TIMEOUT = 15.0


def say(**what: Any) -> None:
    print("SAID " + json.dumps({"rank": dist.get_rank(), **what}), flush=True)


def finish(code: int = 0) -> None:
    sys.stdout.flush()
    os._exit(code)


def main() -> None:
    what, bundle, *other = sys.argv[1:]
    rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device, timeout=timedelta(seconds=120))
    if what == "load":
        try:
            md.load(other[0] if other and rank == 1 else bundle, timeout=TIMEOUT)
            say(error=None)
        except MDError as error:
            say(error=type(error).__name__, message=str(error))
        finish()
    runner = md.load(bundle, timeout=TIMEOUT, check="first" if what == "hang" else "always")
    inputs = random_inputs(runner.signature, rank, device, seed=0)
    expected = _flat(runner, runner(**inputs))
    torch.cuda.synchronize()
    if what == "same-bits":
        say(**_same_bits(runner, inputs, expected))
    elif what == "wrong-input":
        name, tensor = next(iter(inputs.items()))
        try:
            runner(**{**inputs, name: tensor[..., :-1] if rank == 1 else tensor})
            say(error=None)
        except MDError as error:
            again = _flat(runner, runner(**inputs))
            say(error=type(error).__name__, message=str(error), then=torch.equal(again, expected))
    elif what == "absent":
        if rank == 0:
            try:
                runner(**inputs)
                say(error=None)
            except MDError as error:
                say(error=type(error).__name__, message=str(error))
        else:
            time.sleep(2 * TIMEOUT)
    elif what == "hang":
        if rank == 0:
            runner(**inputs)
            torch.cuda.synchronize()
            say(finished=True)
        else:
            time.sleep(4 * TIMEOUT)
    finish()


def _flat(runner: Any, returned: Any) -> torch.Tensor:
    return torch.cat([t.flatten().float() for t in runner.signature.flat(returned).values()])


def _same_bits(runner: Any, inputs: dict[str, torch.Tensor], expected: torch.Tensor) -> dict[str, bool]:
    """The default stream, a stream of the user's, and a CUDA graph."""
    side = torch.equal(_flat(runner, runner(**inputs)), expected)
    stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        own = _flat(runner, runner(**inputs))
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        captured = runner.enqueue(inputs, graphs=False)
    for tensor in captured.values():
        tensor.zero_()
    graph.replay()
    torch.cuda.synchronize()
    replayed = torch.cat([t.flatten().float() for t in captured.values()])
    return {"side": side, "stream": torch.equal(own, expected), "graph": torch.equal(replayed, expected)}


if __name__ == "__main__":
    main()
