"""Files that several processes keep and read: each appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path


def write_whole(file: Path, data: bytes) -> None:
    """Write a file, in place of an older one, by one rename; its folder is made where there is none.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    unfinished = file.with_name(f"{file.name}.{uuid.uuid4().hex[:8]}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(data)
        unfinished.replace(file)
    except OSError:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for the same bytes, in place of what had it; a copy only across file systems.

    Raises:
        OSError: it cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        try:
            os.link(source.resolve(), unfinished)
        except OSError:
            shutil.copyfile(source, unfinished)
        unfinished.replace(target)  # which does nothing where both are the same file
    finally:
        unfinished.unlink(missing_ok=True)
