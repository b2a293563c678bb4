"""A process that compiles graphs ahead of another: ``python -m torchtrt_md.runtime.ahead_worker DEVICE``.

It reads names of files, one a line, each a :class:`~torchtrt_md.runtime.ahead.Job`, and answers each with a line.  It
ends with the one that started it, whose end closes its input.
"""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

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
    device = torch.device(sys.argv[1])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    prepare(device)
    private.import_inductor(device)
    print(READY, file=answers, flush=True)
    for line in sys.stdin:
        try:
            job: Job = pickle.loads(Path(line.strip()).read_bytes())
            private.set_inductor_switches(job.switches)
            compiled(graph_from_json(job.graph), job.operands, device)
            answer = DONE
        except Exception as error:  # whatever it is, the other one compiles the graph by itself
            answer = f"{type(error).__name__}: {first_line(error)}"
        print(answer.replace("\n", " "), file=answers, flush=True)


if __name__ == "__main__":
    main()
