"""Write a bundle: all of it or nothing, without ever holding a file in memory."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from torchtrt_md.bundle.limits import MAX_MANIFEST_BYTES
from torchtrt_md.bundle.manifest import MANIFEST, Manifest, encode
from torchtrt_md.bundle.structure import check_structure
from torchtrt_md.errors import BundleError
from torchtrt_md.segment import Segment

_WEIGHTS = "weights/{}.safetensors"


def write_bundle(folder: Path | str, manifest: Manifest, files: Mapping[str, Path]) -> Manifest:
    """Make ``folder`` the bundle of these files, which are moved into it.

    The bundle is put together beside ``folder`` and renamed into place, its manifest written last; the files leave
    their old place only then.  A crash at any point leaves no half bundle and loses no file.

    Args:
        folder: where; an existing bundle or empty folder is replaced.
        manifest: ``Segment.file``, of the self-tests too, and the ``weights`` are keys of ``files`` here, and its own
            ``files`` is ignored.
        files: key -> file: an engine, a graph as JSON, or weights as safetensors.  Equal files become one.

    Returns:
        The manifest as written: ``Segment.file`` and ``weights`` are paths in the bundle, named after the file's
        hash, and ``files`` has its sha256.

    Raises:
        BundleError: a folder that is something else, a file that is missing or unused or used as two things, or a
            manifest that contradicts itself.
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

    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.unfinished"
    try:
        unfinished.mkdir()
        for key, path in files.items():
            _link_or_copy(path, unfinished / names[key])
        (unfinished / MANIFEST).write_bytes(text)
        _put_in_place(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    for path in files.values():
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


def _form(segment: Segment) -> str:
    return "engines/{}.engine" if segment.runs == "engine" else "graphs/{}.json"


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


def _link_or_copy(source: Path, target: Path) -> None:
    """A second name for the same bytes, so that the first survives a crash; a copy only across file systems."""
    if target.exists():
        return
    target.parent.mkdir(exist_ok=True)
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
