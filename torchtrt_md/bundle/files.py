"""Open the files of a bundle: plain files inside its folder, and nothing else.

A folder that came from elsewhere may hold a link to a file of this machine, or a pipe or a device that never ends.
What is no plain file is refused before it is opened, and links are, too: a bundle has none.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from torchtrt_md.errors import BundleError

_COPY = "copy the whole bundle folder to every host"
_KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFLNK: "a link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_path(path: str) -> None:
    """Refuse a path that is not a plain relative one, of printable ASCII, inside the bundle.

    Raises:
        BundleError: naming the path.
    """
    parts = PurePosixPath(path).parts
    plain = parts and path == "/".join(parts) and path.isascii() and path.isprintable() and not set(path) & set("\\:")
    if not plain or path.startswith("/") or ".." in parts:
        raise BundleError(
            f"the manifest names the file {path!r}, which is not inside the bundle",
            fix="export the bundle again; do not edit manifest.json by hand",
        )


def plain_file(folder: Path | str, name: str) -> Path:
    """The path of a file of the bundle, which is a plain file in plain folders.  It is not opened.

    Raises:
        BundleError: a name that leads out of the folder, a missing file, a link, or what is no file.
    """
    check_path(name)
    path = Path(folder)  # the user's own, which may be a link
    parts = PurePosixPath(name).parts
    for depth, part in enumerate(parts, start=1):
        path = path / part
        wanted = stat.S_IFREG if depth == len(parts) else stat.S_IFDIR
        try:
            found = stat.S_IFMT(path.lstat().st_mode)
        except (OSError, ValueError) as error:
            raise _unreadable(Path(folder) / name, error) from error
        if found != wanted:
            raise BundleError(
                f"{path} is {_KINDS.get(found, 'no file')}, and a bundle has {_KINDS[wanted]} there",
                fix=_COPY + (", with what its links lead to (cp -rL)" if found == stat.S_IFLNK else ""),
            )
    return path


@contextmanager
def opened(folder: Path | str, name: str) -> Iterator[io.BufferedReader]:
    """A file of the bundle, open for reading.

    Raises:
        BundleError: as :func:`plain_file`, or the file cannot be read.
    """
    path = plain_file(folder, name)
    try:
        # Should it have become a link or a pipe since: neither followed nor waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise BundleError(f"{path} is no plain file", fix=_COPY)
            yield file
    except OSError as error:
        raise _unreadable(path, error) from error


def read_bytes(folder: Path | str, name: str, limit: int) -> bytes:
    """A whole file of the bundle.

    Args:
        limit: the most bytes that it may have; no more are read.

    Raises:
        BundleError: as :func:`opened`, or a larger file.
    """
    with opened(folder, name) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise BundleError(
            f"{Path(folder) / name} has more than {limit} bytes, the most that are read of such a file",
            fix="export the bundle again; do not edit its files by hand",
        )
    return data


def digest(folder: Path | str, name: str) -> str:
    """The sha256 of a file of the bundle.

    Raises:
        BundleError: as :func:`opened`.
    """
    with opened(folder, name) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unreadable(path: Path, error: OSError | ValueError) -> BundleError:
    reason = error.strerror if isinstance(error, OSError) else None
    return BundleError(f"{path} cannot be read: {reason or error}", fix=_COPY)
