"""The engine cache on disk: an engine is built once for what it computes, on what, and by which TensorRT.

A key says all that an engine depends on, and nothing that it does not: nodes have numbers instead of names, so that
equal blocks of a model share an engine, and weights that are inputs of an engine are not in it.  An entry's file name
holds its key and its sha256, so that it comes into being by one rename and ranks may store the same one at once.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

import torchtrt_md
from torchtrt_md.build.flavour import CURRENT, Flavour
from torchtrt_md.build.torch_trt import torch_tensorrt_version, user_converters, user_decompositions
from torchtrt_md.errors import BuildError

FOLDER = "TORCHTRT_MD_CACHE"
UNCACHED = "uncached"  # a folder in which engines are built that the user's cache does not take
MAX_BYTES = 20 * 10**9
_RECENT_SECONDS = 600.0
_ENGINE, _UNFINISHED = ".engine", ".unfinished"


def engine_key(
    digest: str, *, axis: str | None, size: int, target: str, flavour: Flavour, more: Sequence[str] = ()
) -> str:
    """The key of an engine, in hexadecimal.

    Args:
        digest: of the graph that will be converted (:func:`torchtrt_md.graph.text.graph_digest`).
        axis: the mesh axis of the engine's communicator, of ``size`` ranks; None where it needs none.
        target: what to build for.
        flavour: what builds.
        more: what else it depends on, as one with weights inside on these, and on the names of its bindings.
    """
    parts = (
        digest,
        (axis, size),
        (flavour.name, flavour.version),
        (target, _gpu(flavour, target)),
        versions(),
        tuple(more),
    )
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _gpu(flavour: Flavour, target: str) -> str:
    """The GPU in this machine where it is what is built for."""
    if (target != CURRENT and flavour.name == "TensorRT-RTX") or not torch.cuda.is_available():
        return ""
    return f"{torch.cuda.get_device_name()} {torch.cuda.get_device_capability()}"


def versions() -> tuple[str, ...]:
    """Of all that decides what becomes of a graph.  It loads Torch-TensorRT."""
    own = sorted(user_converters() | user_decompositions())
    return (torchtrt_md.__version__, str(torch.__version__), torch_tensorrt_version(), _sources(), *own)


@functools.cache
def _sources() -> str:
    """What converts, by its source: between releases the version stays while converters change."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def user_folder() -> Path:
    """Where caches are that nobody said the folder of: ``$TORCHTRT_MD_CACHE``, else ``~/.cache/torchtrt_md``."""
    return Path(os.environ.get(FOLDER) or Path.home() / ".cache" / "torchtrt_md")


class EngineCache:
    """Engines by key in a folder, which any number of processes may use at once.

    Args:
        folder: where; by default ``$TORCHTRT_MD_CACHE/engines``, else ``~/.cache/torchtrt_md/engines``.
        max_bytes: what :meth:`store` trims the folder to.

    Attributes:
        hits, misses: how often :meth:`find` found an engine, and did not.
        stored: how many engines came into it by :meth:`store`.
        own: of the keys of engines that only this object is to find.
    """

    def __init__(self, folder: Path | None = None, max_bytes: int = MAX_BYTES) -> None:
        self.folder, self.max_bytes = user_folder() / "engines" if folder is None else Path(folder), max_bytes
        self.hits = self.misses = self.stored = 0
        self.own = uuid.uuid4().hex

    def is_writable(self) -> bool:
        """Can engines be kept here?"""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return False
        return os.access(self.folder, os.R_OK | os.W_OK | os.X_OK)

    def find(self, key: str) -> Path | None:
        """The engine's file, whole, or None.  A damaged one is deleted.

        It is safe from :meth:`trim` for the next 10 minutes; open it within that time.
        """
        for path in sorted(self.folder.glob(f"{key}.*{_ENGINE}")):  # in one order, so that all ranks take the same
            try:
                with suppress(PermissionError):  # another user's
                    os.utime(path)  # its last use; before it is read, so that it stays
                if file_digest(path) == path.name.split(".")[1]:
                    self.hits += 1
                    return path
                path.unlink(missing_ok=True)
            except FileNotFoundError:  # another process trimmed it
                continue
        self.misses += 1
        return None

    def has(self, key: str) -> bool:
        """Whether there is an engine, not asking if it is whole."""
        return any(self.folder.glob(f"{key}.*{_ENGINE}"))

    def store(self, key: str, file: Path) -> Path:
        """Move an engine's file into the cache; its path there.

        Raises:
            BuildError: the folder cannot be written.
        """
        place = self.folder / f"{key}.{file_digest(file)}{_ENGINE}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _move(file, place)
            os.utime(place)  # a moved file keeps the time of its build
        except OSError as error:
            raise self._unwritable(error) from error
        self.stored += 1
        self.trim(self.max_bytes)
        return place

    @contextmanager
    def unfinished(self) -> Iterator[Path]:
        """A file in the folder to build an engine into; gone afterwards unless it was stored.

        Raises:
            BuildError: the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error
        file = self.folder / f"{uuid.uuid4().hex}{_UNFINISHED}"
        try:
            yield file
        finally:
            file.unlink(missing_ok=True)

    def trim(self, max_bytes: int) -> None:
        """Delete engines, the least recently used first, until the rest are ``max_bytes`` or less.

        What was used in the last 10 minutes stays, for another rank may be about to load it.
        """
        now = time.time()
        entries = sorted((used, size, path) for path in self._files() for used, size in _use(path))
        total = sum(size for _, size, _ in entries)
        for used, size, path in entries:
            if now - used < _RECENT_SECONDS:
                return
            if total > max_bytes or path.suffix == _UNFINISHED:  # of a process that was killed
                path.unlink(missing_ok=True)
                total -= size

    def _unwritable(self, error: OSError) -> BuildError:
        return BuildError(
            f"the engine cache {self.folder} cannot be written: {error.strerror or error}",
            fix=f"make room there, or set {FOLDER} to a folder that can be written",
        )

    def _files(self) -> list[Path]:
        return [path for path in self.folder.glob("*.*") if path.suffix in (_ENGINE, _UNFINISHED)]


def usable(cache: EngineCache, folder: Path) -> EngineCache:
    """The cache; one in this folder, where engines are needed anyway, if it cannot be written."""
    return cache if cache.is_writable() else EngineCache(folder / UNCACHED)


def _use(path: Path) -> list[tuple[float, int]]:
    """When a file was last used, and its size; nothing where another process has deleted it."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return []
    return [(status.st_mtime, status.st_size)]


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _move(file: Path, place: Path) -> None:
    """Rename, also across file systems: the file appears at its place whole, or not at all."""
    try:
        file.replace(place)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        unfinished = place.with_name(f"{uuid.uuid4().hex}{_UNFINISHED}")
        try:
            shutil.copyfile(file, unfinished)
            unfinished.replace(place)
        finally:
            unfinished.unlink(missing_ok=True)
        file.unlink()
