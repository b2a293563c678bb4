"""Real ranks for the tests: gloo processes, two unless told, that stay up for the session and run what it is sent.

Processes are forked by a server that has imported what they need, so that one starts in no time.
"""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import runpy
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing

WORLD = 2
SECONDS = 500.0  # models are traced and compiled there, on machines that others may share
# Of the garbage collector: most of a million objects stay, and it looks at each of them.
COLLECT = (20_000, 20, 50)
_PRELOAD = ["torch._dynamo", "torch.export", "torch.distributed.tensor", "torch.fx.experimental.proxy_tensor"]
_PRELOAD += ["torch._inductor.compile_fx", "safetensors", "transformers.models.llama.modeling_llama"]
_PRELOAD += ["transformers.models.qwen3.modeling_qwen3", "diffusers.models.transformers.transformer_flux"]
_PRELOAD += [f"torchtrt_md.{name}" for name in ("doors.compile", "doors.dynamo", "doors.export", "doors.load")]
_PRELOAD += ["torchtrt_md.runtime.selftest"]


@functools.cache
def warm() -> ForkServerContext:
    """The server that forks, once it has imported all."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    first = context.Process(target=int)
    first.start()
    first.join()
    return context


class Outcome(NamedTuple):
    """What a rank's function returned, or the class and message of what it raised."""

    value: Any
    error: str
    message: str


class Ranks:
    """``ranks(function, *args)`` runs ``function(rank, *args)`` on every rank and gives the outcomes in rank order."""

    def __init__(self, store: Path, size: int = WORLD) -> None:
        context = warm()
        self.processes, self.pipes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, str(store), there), daemon=True)
            process.start()
            self.processes.append(process)
            self.pipes.append(here)

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Outcome]:
        for pipe in self.pipes:
            pipe.send((function, args))
        outcomes = []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(SECONDS), f"rank {rank} did not answer within {SECONDS} s"
            outcomes.append(pipe.recv())
        return outcomes

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.close()
            process.join(5)
            process.kill()


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


class Ended(NamedTuple):
    """The exit code of a process, and its stdout and stderr."""

    code: int | None
    output: str


def run_script(script: Path, arguments: Sequence[str], folder: Path, env: Mapping[str, str], size: int) -> list[Ended]:
    """What ``torchrun --nproc_per_node=size script arguments`` starts in ``folder``, forked; each rank's end."""
    context, logs = warm(), [folder / f"{rank}.log" for rank in range(size)]
    launch = {**env, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    launch |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(size))
    processes = []
    for rank, log in enumerate(logs):
        own = {**launch, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [str(script), *arguments]
        processes.append(context.Process(target=_script, args=(command, str(folder), str(log), own), daemon=True))
        processes[-1].start()
    for process in processes:
        process.join(SECONDS)
        process.kill()
        process.join()
    return [Ended(process.exitcode, log.read_text()) for process, log in zip(processes, logs, strict=True)]


def _script(command: list[str], folder: str, log: str, env: dict[str, str]) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    gc.set_threshold(*COLLECT)
    os.environ.update(env)
    os.chdir(folder)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def _serve(rank: int, size: int, store: str, pipe: Connection) -> None:
    gc.set_threshold(*COLLECT)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            dist.destroy_process_group()
            return
        torch.manual_seed(0)  # as in conftest
        try:
            pipe.send(Outcome(function(rank, *args), "", ""))
        except Exception as error:  # it is the test that says what must not be raised
            traceback.print_exc()
            pipe.send(Outcome(None, type(error).__name__, str(error)))
