"""One engine in this process: loaded, checked against its bindings, bound and enqueued."""

from __future__ import annotations

import functools
import mmap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchtrt_md.build.flavour import TRT_DTYPES, flavour
from torchtrt_md.errors import BundleError, LaunchError
from torchtrt_md.program import dtype_name
from torchtrt_md.segment import Segment, Wire

_DTYPES = {theirs: dtype for dtype, theirs in TRT_DTYPES.items()}


class Io(NamedTuple):
    """An input or output as the engine itself tells it."""

    name: str
    is_input: bool
    dtype: torch.dtype | str  # TensorRT's name of one that PyTorch lacks
    shape: tuple[int, ...]


class Engine:
    """One segment, ready to be enqueued.  One call at a time: a TensorRT context has one set of addresses.

    Args:
        segment: what the manifest says of it.
        loaded: TensorRT's engine; several of these may have the same one.
        name: for messages.
        keep: what must live as long as the engine: TensorRT's runtime and logger.
        scratch: memory for its activations, of :func:`scratch_bytes` or more.  Engines may share it that run one
            after another on one stream.  None: the engine has its own.
        runtime_cache: what :func:`runtime_cache` made; engines that share one compile equal kernels once.

    Raises:
        BundleError: the engine's inputs and outputs are not those of the segment.
        LaunchError: no memory for its activations, or less scratch than they need.
    """

    def __init__(
        self,
        segment: Segment,
        loaded: Any,
        name: str,
        keep: object = None,
        scratch: Tensor | None = None,
        runtime_cache: Any = None,
    ) -> None:
        check_io(describe_io(loaded), segment, name)
        if scratch is not None:
            check_scratch(scratch.nbytes, scratch_bytes(loaded), name)
        self.segment, self.name = segment, name
        # In this order: Python lets go of them in the same, and a context must end before its engine and its scratch.
        self.context = _context(loaded, scratch is not None, runtime_cache)
        self.loaded, self.keep, self.scratch, self.runtime_cache = loaded, keep, scratch, runtime_cache
        if self.context is None:
            raise LaunchError(
                f"{name} has no room to run: its activations need {_mebibytes(scratch_bytes(loaded))}",
                fix="free GPU memory, or shard the model over more ranks",
            )
        if scratch is not None:
            self.context.set_device_memory(scratch.data_ptr(), scratch.nbytes)
        self.communicator: object = None

    def enqueue(self, tensors: Mapping[Wire, Tensor], stream: int) -> None:
        """Bind and launch.  Nothing is checked here, and nothing but the engine is put on the stream.

        Args:
            tensors: by the sources of the segment's bindings; they must outlive the run.
            stream: the ``cudaStream_t``; not the default stream.

        Raises:
            LaunchError: TensorRT refuses.
        """
        self.bind(tensors)
        self.launch(stream)

    def bind(self, tensors: Mapping[Wire, Tensor]) -> None:
        """Set the addresses for the launches that follow.

        Args:
            tensors: by the sources of the segment's bindings; they must outlive those launches.

        Raises:
            LaunchError: TensorRT refuses an address.
        """
        for binding in (*self.segment.inputs, *self.segment.outputs):
            if not self.context.set_tensor_address(binding.name, tensors[binding.source].data_ptr()):
                raise LaunchError(
                    f"{self.name} refused the address of '{binding.source}'",
                    fix="this is a fault of torchtrt_md: please report it with the lines TensorRT logged",
                )

    def launch(self, stream: int) -> None:
        """Launch on the tensors that were bound, and on whatever they hold by then.

        Args:
            stream: the ``cudaStream_t``; not the default stream.

        Raises:
            LaunchError: TensorRT refuses.
        """
        if not self.context.execute_async_v3(stream):
            raise LaunchError(
                f"{self.name} could not be run",
                fix="see the lines that TensorRT logged above; the other ranks will end",
            )


def scratch_bytes(loaded: Any) -> int:
    """What the activations of a loaded engine need while it runs."""
    return int(loaded.device_memory_size_v2)


def check_scratch(given: int, needed: int, name: str) -> None:
    """Refuse scratch that is too small; TensorRT would write beyond it.

    Raises:
        LaunchError: saying both sizes.
    """
    if given < needed:
        raise LaunchError(
            f"{name} was given {_mebibytes(given)} for its activations, which need {_mebibytes(needed)}",
            fix="share a buffer of the largest scratch_bytes() of the engines that use it",
        )


def runtime_cache(loaded: Any) -> Any:
    """A cache of compiled kernels for engines of one GPU to share; None where the flavour compiles none at run time.

    TensorRT-RTX compiles its kernels for the GPU when a context first runs.
    """
    config = loaded.create_runtime_config()
    return config.create_runtime_cache() if hasattr(config, "create_runtime_cache") else None


def _context(loaded: Any, shares_scratch: bool, cache: Any) -> Any:
    """An execution context, None where TensorRT has no room for it."""
    if not shares_scratch and cache is None:
        return loaded.create_execution_context()
    config = loaded.create_runtime_config()
    if shares_scratch:
        config.set_execution_context_allocation_strategy(flavour().trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    if cache is not None:
        config.set_runtime_cache(cache)
    return loaded.create_execution_context(config)


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


@functools.cache
def trt_runtime(device: torch.device) -> tuple[Any, Any]:
    """TensorRT's runtime and logger, one for each GPU: it complains of every further logger."""
    trt = flavour().trt
    with torch.cuda.device(device):
        logger = trt.Logger(trt.Logger.WARNING)
        return trt.Runtime(logger), logger


def deserialize(runtime: Any, path: Path, built_for: str) -> Any:
    """TensorRT's engine from a file, which is mapped, not read: it is never in host memory twice.

    Raises:
        LaunchError: TensorRT refuses the file on this GPU.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        loaded = runtime.deserialize_cuda_engine(mapped)
    if loaded is None:
        raise LaunchError(
            f"TensorRT does not load {path}, an engine built for {built_for}",
            fix="see the lines that TensorRT logged above; if the GPU is not the target, export again for this GPU",
        )
    return loaded


def describe_io(loaded: Any) -> list[Io]:
    """The inputs and outputs of a loaded engine."""
    found = []
    for name in map(loaded.get_tensor_name, range(loaded.num_io_tensors)):
        kind = loaded.get_tensor_dtype(name).name
        is_input = loaded.get_tensor_mode(name).name == "INPUT"
        found.append(Io(name, is_input, _DTYPES.get(kind, kind), tuple(loaded.get_tensor_shape(name))))
    return found


def check_io(found: Iterable[Io], segment: Segment, name: str) -> None:
    """Refuse an engine whose inputs and outputs are not those that the manifest will bind.

    Raises:
        BundleError: naming the first that differs, and both sides.
    """
    there = {io.name: io for io in found}
    expected = {b.name: Io(b.name, True, b.dtype, b.shape) for b in segment.inputs}
    expected |= {b.name: Io(b.name, False, b.dtype, b.shape) for b in segment.outputs}
    for tensor in sorted(there.keys() | expected.keys()):
        if there.get(tensor) != expected.get(tensor):
            raise BundleError(
                f"{name} has {_told(there.get(tensor), tensor)} and the manifest has"
                f" {_told(expected.get(tensor), tensor)}",
                fix="export the bundle again; do not edit manifest.json by hand",
            )


def _told(io: Io | None, name: str) -> str:
    if io is None:
        return f"no {name!r}"
    dtype = dtype_name(io.dtype) if isinstance(io.dtype, torch.dtype) else io.dtype
    return f"{'input' if io.is_input else 'output'} {io.name!r} {dtype} {list(io.shape)}"
