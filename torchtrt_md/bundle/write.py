"""Write a bundle: all of it or nothing, without ever holding an engine in memory."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

import msgspec

from torchtrt_md.bundle.manifest import Manifest
from torchtrt_md.bundle.read import MANIFEST
from torchtrt_md.bundle.structure import check_structure
from torchtrt_md.errors import BundleError


def write_bundle(folder: Path | str, manifest: Manifest, engines: Mapping[str, Path]) -> Manifest:
    """Make ``folder`` the bundle of these engines, whose files are moved into it.

    The bundle is put together beside ``folder`` and renamed into place, its manifest written last; the engine
    files leave their old place only then.  A crash at any point leaves no half bundle and loses no engine.

    Args:
        folder: where; an existing bundle or empty folder is replaced.
        manifest: ``Segment.engine`` is a key of ``engines`` here, and ``files`` is ignored.
        engines: key -> engine file.  Equal files become one.

    Returns:
        The manifest as written: ``Segment.engine`` is a path in the bundle, and ``files`` has its sha256.

    Raises:
        BundleError: a folder that is something else, an engine that is missing or unused, or a manifest that
            contradicts itself.
    """
    folder = Path(folder).resolve()  # a rename onto a link would replace the link, not the folder behind it
    check_destination(folder)
    digests = {key: _digest(path) for key, path in engines.items()}
    written = _finished(manifest, digests)
    check_structure(written)

    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.unfinished"
    try:
        (unfinished / "engines").mkdir(parents=True)
        for key, path in engines.items():
            _link_or_copy(path, unfinished / _name(digests[key]))
        text = msgspec.json.format(msgspec.json.encode(written), indent=2)
        (unfinished / MANIFEST).write_bytes(text + b"\n")
        _put_in_place(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    for path in engines.values():
        if not path.resolve().is_relative_to(folder):  # one of the replaced bundle may be one of this again
            path.unlink(missing_ok=True)
    return written


def check_destination(folder: Path | str) -> None:
    """Refuse to replace what is not a bundle.  Ask before hours of building, not after.

    Raises:
        BundleError: ``folder`` is a file, or a folder that holds something else.
    """
    folder = Path(folder)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise BundleError(f"{folder} is a file, and a bundle is a folder", fix="give another name")
    if not (folder / MANIFEST).is_file() and any(folder.iterdir()):
        raise BundleError(
            f"{folder} is not empty and has no {MANIFEST}, so it is not a bundle and is not replaced",
            fix="give a new folder, or an existing bundle to replace",
        )


def _finished(manifest: Manifest, digests: Mapping[str, str]) -> Manifest:
    used = {segment.engine for segments in manifest.ranks for segment in segments}
    if used != set(digests):
        lacking, unused = sorted(used - set(digests)), sorted(set(digests) - used)
        raise BundleError(
            f"the segments and the engine files do not match: no file for {lacking}, no segment for {unused}",
            fix="pass write_bundle exactly the engines that the segments name",
        )
    ranks = [
        [msgspec.structs.replace(segment, engine=_name(digests[segment.engine])) for segment in segments]
        for segments in manifest.ranks
    ]
    files = {_name(digest): digest for digest in digests.values()}
    return msgspec.structs.replace(manifest, ranks=ranks, files=files)


def _name(digest: str) -> str:
    return f"engines/{digest}.engine"


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BundleError(
            f"the engine file {path} cannot be read: {error.strerror or error}", fix="build the engine again"
        ) from error


def _link_or_copy(source: Path, target: Path) -> None:
    """A second name for the same bytes, so that the first survives a crash; a copy only across file systems."""
    if target.exists():
        return
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _put_in_place(unfinished: Path, folder: Path) -> None:
    if not (folder / MANIFEST).is_file():
        unfinished.replace(folder)  # onto nothing, or onto an empty folder
        return
    # A folder that is not empty cannot be replaced in one step: the old bundle steps aside, whole.
    old = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.old"
    folder.replace(old)
    try:
        unfinished.replace(folder)
    except OSError:
        old.replace(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
