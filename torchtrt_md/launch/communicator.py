"""An NCCL communicator for each axis, shared with PyTorch, and its binding to an engine."""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from torchtrt_md.errors import CommunicatorError
from torchtrt_md.launch import private
from torchtrt_md.mesh import Mesh

# A prototype of our own: ctypes.pythonapi.PyCapsule_New is one object that other libraries set up for themselves.
_new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)
# Binding took 196 MiB each time, of one engine and of two: benchmarks/results/2026-11-22-memory-of-binding-h200-x2.md
_NEEDED_BYTES = 256 << 20
_NAME = b"ncclComm_t"  # a capsule keeps the pointer to its name, so the name must live as long as the module


def connect(mesh: Mesh, device: torch.device) -> dict[str, dist.ProcessGroup]:
    """The group of this rank along each axis, of more than one rank, its communicator made.  Collective.

    PyTorch makes a communicator at a group's first collective, so each group runs a tiny one here.

    Raises:
        CommunicatorError: the launch has no NCCL backend, or NCCL fails.
    """
    axes = [axis for axis in mesh.names if mesh.axis_size(axis) > 1]
    if not axes:
        return {}
    groups = {}
    try:
        on_gpu = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with on_gpu:
            own = device_mesh(mesh, device.type)
            for axis in axes:
                groups[axis] = own.get_group(axis)
                dist.all_reduce(torch.zeros(1, device=device), group=groups[axis])
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise CommunicatorError(
            f"there is no communicator for axes {axes} of {mesh}: {error}",
            fix="see the output of the other ranks: one may have failed.  On GPUs call"
            ' torch.distributed.init_process_group("nccl") with one GPU per rank; NCCL_DEBUG=INFO says more',
        ) from error
    return groups


_meshes: dict[tuple[Mesh, str], tuple[dist.ProcessGroup, DeviceMesh]] = {}


def device_mesh(mesh: Mesh, device_type: str) -> DeviceMesh:
    """One DeviceMesh for each mesh of a launch: a program at several shapes needs no new communicators."""
    launch = dist.group.WORLD
    assert launch is not None
    held = _meshes.get((mesh, device_type))
    if held is None or held[0] is not launch:
        held = _meshes[mesh, device_type] = (launch, mesh.to_device_mesh(device_type))
    return held[1]


def check_memory(device: torch.device) -> None:
    """Refuse to bind where NCCL will find no memory: a rank that fails there leaves the others in their handshake.

    Raises:
        CommunicatorError: this GPU is full.
    """
    free, _ = torch.cuda.mem_get_info(device)
    if free < _NEEDED_BYTES:
        torch.cuda.empty_cache()  # what PyTorch holds and does not use
        free, _ = torch.cuda.mem_get_info(device)
    if free < _NEEDED_BYTES:
        raise CommunicatorError(
            f"{device} has {free >> 20} MiB of free memory, and an engine's communicator takes up to"
            f" {_NEEDED_BYTES >> 20}",
            fix="free GPU memory: nvidia-smi shows what else holds it; or use fewer or smaller inputs on a rank",
        )


def bind(context: Any, group: dist.ProcessGroup, device: torch.device, *, engine: str, axis: str) -> object:
    """Give an engine's execution context the communicator of its axis.

    Returns:
        The capsule that was handed over; keep it as long as the context.

    Raises:
        CommunicatorError: there is no communicator, or the engine refuses it.
    """
    pointer = private.communicator_pointer(group, device)
    if not pointer:
        raise CommunicatorError(
            f"the group of axis {axis!r} has no NCCL communicator on {device}",
            fix="give every rank a GPU of its own and let the process group use NCCL",
        )
    capsule: object = _new_capsule(pointer, _NAME, None)
    if context.set_communicator(capsule) is not True:
        raise CommunicatorError(
            f"{engine} did not take the NCCL communicator of axis {axis!r}; without it, it would compute wrong values",
            fix="see the line of TensorRT above: where NCCL failed, free GPU memory; NCCL_DEBUG=INFO says more.  Else"
            " export the bundle again: its manifest says that this engine has collectives on that axis",
        )
    return capsule
