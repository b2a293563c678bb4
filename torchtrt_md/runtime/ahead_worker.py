"""A process that compiles graphs ahead of another: ``python -m torchtrt_md.runtime.ahead_worker DEVICE``.

It reads names of files, one a line, each a :class:`~torchtrt_md.runtime.ahead.Job`, and answers each with a line.  It
ends with the one that started it, whose end closes its input.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
from pathlib import Path
from queue import SimpleQueue

import torch

from torchtrt_md.errors import first_line
from torchtrt_md.graph.reader import graph_from_json
from torchtrt_md.runtime import private
from torchtrt_md.runtime.ahead import DONE, READY, Job
from torchtrt_md.runtime.inductor import compiled, prepare


def main() -> None:
    """Serve standard input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Inductor prints is no answer
    asked: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_read, args=(asked,), daemon=True).start()
    device = torch.device(sys.argv[1])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    prepare(device)
    private.import_inductor(device)
    print(READY, file=answers, flush=True)
    while True:
        print(_answer(Path(asked.get()), device).replace("\n", " "), file=answers, flush=True)


def _read(asked: SimpleQueue[str]) -> None:
    """Pass on what is asked; the end of it is that of this process, whatever is under way."""
    for line in sys.stdin:
        asked.put(line.strip())
    os._exit(0)


def _answer(file: Path, device: torch.device) -> str:
    try:
        job: Job = pickle.loads(file.read_bytes())
        private.set_inductor_switches(job.switches)
        compiled(graph_from_json(job.graph), job.operands, device)
    except Exception as error:  # whatever it is, the other one compiles the graph by itself
        return f"{type(error).__name__}: {first_line(error)}"
    return DONE


if __name__ == "__main__":
    main()
