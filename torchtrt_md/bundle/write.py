"""Write a bundle: all of it or nothing, without ever holding a file in memory."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from torchtrt_md.bundle.limits import MAX_MANIFEST_BYTES
from torchtrt_md.bundle.manifest import MANIFEST, Manifest, encode
from torchtrt_md.bundle.structure import check_structure
from torchtrt_md.errors import BundleError
from torchtrt_md.segment import Segment
from torchtrt_md.whole_file import link_or_copy

_OWN = re.compile("[0-9a-f]{64}")  # files of a bundle are named by their SHA-256
_ENGINES, _GRAPHS, _WEIGHTS = "engines/{}.engine", "graphs/{}.json", "weights/{}.safetensors"
_UNFINISHED = ".unfinished"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_TURN_SECONDS = 300.0  # to rename some files


def write_bundle(folder: Path | str, manifest: Manifest, files: Mapping[str, Path]) -> Manifest:
    """Make ``folder`` the bundle of these files, which are moved into it.

    The bundle is put together beside ``folder``, and the files leave their old place last of all.  A new bundle is
    renamed into place.  Into an older one its files go first, beside those that are there, then the manifest takes the
    place of the old one, then what only the old one named is deleted.  So at any moment, and after a crash at any
    point, a whole bundle is there, the old or the new; what such a crash leaves over, the next export deletes.
    Exports into one folder at once take turns, and the last one stays.

    Args:
        folder: where; an existing bundle or empty folder is replaced.
        manifest: ``Segment.file``, of the self-tests too, and the ``weights`` are keys of ``files`` here, and its own
            ``files`` is ignored.
        files: key -> file: an engine, a graph as JSON, or weights as safetensors.  Equal files become one.

    Returns:
        The manifest as written: ``Segment.file`` and ``weights`` are paths in the bundle, named after the file's
        hash, and ``files`` has its sha256.

    Raises:
        BundleError: a folder that is something else, a file that is missing or unused or used as two things, a
            manifest that contradicts itself, or a disk that is full.
    """
    folder = Path(folder).resolve()  # a rename onto a link would replace the link, not the folder behind it
    check_destination(folder)
    forms = _forms(manifest, files)
    digests = {key: _digest(path) for key, path in files.items()}
    names = {key: forms[key].format(digest) for key, digest in digests.items()}
    written = _finished(manifest, names, {names[key]: digest for key, digest in digests.items()})
    check_structure(written)
    text = encode(written)
    if len(text) > MAX_MANIFEST_BYTES:
        raise BundleError(
            f"the manifest has {len(text)} bytes, and at most {MAX_MANIFEST_BYTES} are read",
            fix="export for fewer ranks, or in fewer parts",
        )

    with workspace(folder) as unfinished, writing(folder):
        for key, path in files.items():
            link_or_copy(path, unfinished / names[key])
        (unfinished / MANIFEST).write_bytes(text)
        for path in unfinished.rglob("*"):
            _sync(path)
        with _turn(folder):
            check_destination(folder)  # another may have been written since
            _put_in_place(unfinished, folder, written)
    for path in files.values():
        if not path.resolve().is_relative_to(folder):  # one of the replaced bundle may be one of this again
            path.unlink(missing_ok=True)
    return written


@contextmanager
def workspace(folder: Path | str) -> Iterator[Path]:
    """A folder to make a bundle in, beside its place, so that files move there by a rename.

    It is deleted afterwards.  One that a killed process left is deleted by the next export to the same place.

    Raises:
        BundleError: there can be none.
    """
    folder = Path(folder).resolve()
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _turn(folder):
            for left in folder.parent.glob(f".{glob.escape(folder.name)}.*{_UNFINISHED}"):
                with suppress(OSError), _opened(left) as descriptor:
                    if _lock(descriptor):  # its process would hold it
                        shutil.rmtree(left, ignore_errors=True)
            made = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}{_UNFINISHED}"
            made.mkdir()
            held = os.open(made, _FOLDER)
            _lock(held)
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        os.close(held)


@contextmanager
def writing(folder: Path | str) -> Iterator[None]:
    """Name what the system refuses while a bundle is made.

    Raises:
        BundleError: the disk is full, or cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:  # a library that cannot be loaded, say
            raise
        raise BundleError(
            f"the bundle {folder} cannot be written: {error.strerror}: {error.filename or folder}",
            fix="make room there, or give a folder that can be written; an older bundle there is as it was",
        ) from error


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
    if any(folder.iterdir()) and not _is_manifest(folder / MANIFEST):
        raise BundleError(
            f"{folder} is not empty and has no {MANIFEST} of a bundle, so it is not a bundle and is not replaced",
            fix="give a new folder, or an existing bundle to replace",
        )


def _is_manifest(file: Path) -> bool:
    """Is it one of any version?  Other programs have files of this name, too."""
    try:
        with file.open("rb") as opened:
            found = msgspec.json.decode(opened.read(MAX_MANIFEST_BYTES + 1))
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return False
    return isinstance(found, dict) and {"schema", "mesh", "ranks", "files"} <= found.keys()


def _form(segment: Segment) -> str:
    return _ENGINES if segment.runs == "engine" else _GRAPHS


def _forms(manifest: Manifest, files: Mapping[str, Path]) -> dict[str, str]:
    """Key of ``files`` -> where a file of its kind lies in a bundle, with ``{}`` for its hash."""
    uses = [(s.file, _form(s)) for segments in (*manifest.ranks, manifest.self_tests) for s in segments]
    uses += [(key, _WEIGHTS) for key in manifest.weights if key is not None]
    forms = dict(uses)
    for key, form in uses:
        if forms[key] != form:
            raise BundleError(
                f"the file {key!r} is used as two things: {form.format('*')} and {forms[key].format('*')}",
                fix="give each engine, graph and file of weights a key of its own",
            )
    if set(forms) != set(files):
        lacking, unused = sorted(set(forms) - set(files)), sorted(set(files) - set(forms))
        raise BundleError(
            f"the manifest and the files do not match: no file for {lacking}, no use for {unused}",
            fix="pass write_bundle exactly the files that the segments and weights name",
        )
    return forms


def _finished(manifest: Manifest, names: Mapping[str, str], files: dict[str, str]) -> Manifest:
    def named(segments: Sequence[Segment]) -> list[Segment]:
        return [msgspec.structs.replace(segment, file=names[segment.file]) for segment in segments]

    ranks = [named(segments) for segments in manifest.ranks]
    weights = [None if key is None else names[key] for key in manifest.weights]
    return msgspec.structs.replace(
        manifest, ranks=ranks, weights=weights, self_tests=named(manifest.self_tests), files=files
    )


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BundleError(f"the file {path} cannot be read: {error.strerror or error}", fix="export again") from error


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, _FOLDER)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Lock a folder for this process, until it is closed or the process ends.

    Returns:
        Whether it is locked now; None where the file system locks no folders, as some of networks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """One export at a time changes what is beside ``folder``.

    Raises:
        BundleError: another one does not come to its end.
    """
    until = time.monotonic() + _TURN_SECONDS
    with _opened(folder.parent) as descriptor:
        while _lock(descriptor) is False:
            if time.monotonic() > until:
                raise BundleError(
                    f"another export has been putting a bundle into {folder.parent} for {_TURN_SECONDS:g} s",
                    fix="see what became of it, then export again",
                )
            time.sleep(0.02)
        yield


def _put_in_place(unfinished: Path, folder: Path, written: Manifest) -> None:
    if not (folder / MANIFEST).is_file():
        unfinished.replace(folder)  # onto nothing, or onto an empty folder
        _sync(folder.parent)
        return
    added = []
    try:
        for name in written.files:
            place = folder / name
            place.parent.mkdir(exist_ok=True)
            if not place.exists():
                added.append(place)
            (unfinished / name).replace(place)  # names are hashes, so one of the old bundle has these bytes already
        for path in {folder, *((folder / name).parent for name in written.files)}:
            _sync(path)
        (unfinished / MANIFEST).replace(folder / MANIFEST)
    except BaseException:
        for place in added:
            place.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # the new bundle is there, whatever of the old one stays
        _sync(folder)
        for form in (_ENGINES, _GRAPHS, _WEIGHTS):
            for path in folder.glob(form.format("*")):
                if _OWN.fullmatch(path.stem) and path.relative_to(folder).as_posix() not in written.files:
                    path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Let it be on the disk before what follows is."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # there is nothing of the kind here
            raise
    finally:
        os.close(descriptor)
