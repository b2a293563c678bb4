"""Run a bundle under torchrun: ``load`` gives a ``Runner``, and a runner is called like the model.

loading       the road from a folder to a runner; every step is voted on by all ranks
agree         the votes, over a gloo group of their own
communicator  an NCCL communicator for each axis, bound to the engines
engine        one loaded engine: checked against its bindings, then bound and enqueued
runner        a call: check, vote, enqueue, nest the outputs
signature     the arguments and outputs of a call, against the manifest
watchdog      ends a process that waits on another rank for too long
private       every private name of PyTorch that the runtime needs
"""

from torchtrt_md.runtime.loading import load
from torchtrt_md.runtime.runner import Runner

__all__ = ["Runner", "load"]
