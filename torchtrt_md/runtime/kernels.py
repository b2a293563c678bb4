"""Kernels that TensorRT-RTX compiled, kept in a file between processes.

TensorRT-RTX compiles an engine's kernels for the GPU when a context first runs.  Engines of one process share a cache
of them; kept in a file, it spares the next process the compiling.  TensorRT-RTX itself refuses a file of another GPU,
driver or version, and what is refused is compiled anew, so that a file can cost time and never a result.  Its kernels
are code: keep the folder where only you can write.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torchtrt_md.errors import LaunchError
from torchtrt_md.whole_file import write_whole

log = logging.getLogger(__name__)
_KERNELS = ".kernels"


class KernelCache:
    """The cache of a process's engines, and its file.

    Args:
        cache: TensorRT's; see :func:`torchtrt_md.runtime.engine.runtime_cache`.
        file: where it is kept, of :func:`kernel_file`.

    Attributes:
        found: whether the file was there and TensorRT took it.

    Raises:
        LaunchError: the file cannot be read.
    """

    def __init__(self, cache: Any, file: Path) -> None:
        self.cache, self.file, self._held = cache, file, stored(file)
        self.found = bool(self._held) and bool(cache.deserialize(self._held))
        if self._held and not self.found:
            log.warning("TensorRT does not take the kernels of %s, which are compiled anew", file)

    def save(self) -> None:
        """Write the file, if there is anything new."""
        data = bytes(memoryview(self.cache.serialize()))
        if data != self._held:
            store(self.file, data)


def stored(file: Path) -> bytes:
    """What a file of kernels holds; nothing where there is none.

    Raises:
        LaunchError: it cannot be read.
    """
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise LaunchError(
            f"the kernels in {file} cannot be read: {error.strerror or error}",
            fix="give kernel_cache a folder that can be read and written, or leave it out",
        ) from error


def store(file: Path, data: bytes) -> None:
    """Write a file of kernels: it appears whole or not at all, and ranks may write the same one.

    Where it cannot be written there is a warning: the call under way is right without it, and other ranks are in it.
    """
    try:
        write_whole(file, data)
    except OSError as error:
        log.warning("the compiled kernels cannot be kept in %s: %s", file, error.strerror or error)


def kernel_file(folder: Path, engines: Iterable[Path], version: str, gpu: str) -> Path:
    """The file of these engines' kernels: another for other engines, another TensorRT or another kind of GPU.

    Args:
        folder: where such files are.
        engines: whose names are made of their content, as in a bundle and in the engine cache.
        version: of TensorRT.
        gpu: what kind of GPU it is.
    """
    parts = [version, gpu, *sorted({engine.name for engine in engines})]
    return folder / (hashlib.sha256("\n".join(parts).encode()).hexdigest() + _KERNELS)


def default_folder() -> Path:
    """The user's: ``$TORCHTRT_MD_CACHE/kernels``, else ``~/.cache/torchtrt_md/kernels``."""
    from torchtrt_md.build.cache import user_folder

    return user_folder() / "kernels"
