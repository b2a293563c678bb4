"""Ranks that share a GPU, so that a program for several can be tried on one.  Only where the user asks for it.

NCCL, from 2.30 on, and PyTorch's symmetric memory have a switch each, which are read here as they read them.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

import torch

from torchtrt_md.errors import LaunchError
from torchtrt_md.launch.agree import grouped

NCCL_SWITCH = "NCCL_MULTI_RANK_GPU_ENABLE"
STORES_SWITCH = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"


def nccl_may() -> bool:
    """Was NCCL told to let ranks share a GPU?"""
    return os.environ.get(NCCL_SWITCH) == "1"


def stores_may() -> bool:
    """Was PyTorch told to let ranks that share a GPU have symmetric memory?"""
    return os.environ.get(STORES_SWITCH) == "1"


def own_gpu(local_rank: int) -> torch.device:
    """The GPU of the n-th process of this host: the n-th, or, where ranks may share, one in turn.

    Raises:
        LaunchError: there is none for it.
    """
    gpus = torch.cuda.device_count()
    if local_rank >= gpus and not (gpus and nccl_may()):
        raise LaunchError(
            f"local rank {local_rank} has no GPU of its own: {socket.gethostname()} has {gpus}",
            fix=f"launch as many ranks on a host as it has GPUs{or_share()}",
        )
    return torch.device("cuda", local_rank % gpus)


def check_apart(gpus: Sequence[str], may: Sequence[bool]) -> bool:
    """See that each rank has a GPU of its own, or that all were told that they may share.  Do some?

    Args:
        gpus: what tells a GPU from others, in rank order.
        may: :func:`nccl_may` of each rank.

    Raises:
        LaunchError: ranks share a GPU.
    """
    share = len(set(gpus)) < len(gpus)
    if share and not all(may):
        raise LaunchError(
            f"ranks share a GPU: {grouped(gpus)}",
            fix='call torch.cuda.set_device(int(os.environ["LOCAL_RANK"])) first, or pass load(..., device=...)'
            + or_share(),
        )
    return share


def or_share() -> str:
    """The other thing to do, for the end of a fix."""
    return f"; to try them on fewer GPUs, slowly, set {NCCL_SWITCH}=1 on every rank (NCCL 2.30 or later)"
