"""Read a bundle: trust nothing in the folder until it is checked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from torchtrt_md.bundle.files import digest, read_bytes
from torchtrt_md.bundle.limits import MAX_MANIFEST_BYTES
from torchtrt_md.bundle.manifest import MANIFEST, SCHEMA, Manifest, decode
from torchtrt_md.bundle.structure import check_structure
from torchtrt_md.errors import BundleError

# What msgspec raises for bytes that are no JSON of the right form: bad UTF-8 and deep nesting have errors of their own.
NO_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class _Schema(msgspec.Struct):
    """The one field that every schema has, so that a newer manifest is refused by its number."""

    schema: int


def read_manifest(folder: Path | str) -> Manifest:
    """The bundle's manifest, whole and consistent with itself.  Its files are not opened.

    Raises:
        BundleError: no bundle there, a schema this version does not know, or a manifest that contradicts itself.
    """
    return parse_manifest(_manifest_bytes(folder), Path(folder) / MANIFEST)


def parse_manifest(text: bytes, path: Path) -> Manifest:
    """A manifest from its text; ``path`` is for messages.

    Raises:
        BundleError: as :func:`read_manifest`.
    """
    try:
        schema = msgspec.json.decode(text, type=_Schema).schema
    except NO_JSON as error:
        raise BundleError(f"{path} is not a bundle's manifest: {error}", fix="export the bundle again") from error
    if schema != SCHEMA:
        raise BundleError(
            f"{path} has schema {schema} and this version of torchtrt_md reads schema {SCHEMA}",
            fix="install the version of torchtrt_md that wrote the bundle (versions.torchtrt_md in that file),"
            " or export it again",
        )
    try:
        manifest = decode(text)
    except NO_JSON as error:
        raise BundleError(f"{path} does not follow schema {SCHEMA}: {error}", fix="export the bundle again") from error
    check_structure(manifest)
    return manifest


def manifest_digest(folder: Path | str) -> str:
    """sha256 of the manifest's bytes.  Equal digests mean equal bundles: the manifest holds every file's hash.

    Raises:
        BundleError: no bundle there.
    """
    return hashlib.sha256(_manifest_bytes(folder)).hexdigest()


def read_unchanged(folder: Path | str, check: Callable[[Manifest], None]) -> tuple[Manifest, str]:
    """A bundle that an export may be replacing at this moment: the manifest of the old one or of the new, checked.

    Args:
        check: reads files that the manifest names, and raises where one is not as it says.

    Returns:
        The manifest and the sha256 of its bytes.

    Raises:
        BundleError: as :func:`read_manifest`.
        MDError: of ``check``.
    """
    while True:
        text = _manifest_bytes(folder)
        try:
            manifest = parse_manifest(text, Path(folder) / MANIFEST)
            check(manifest)
        except BundleError:
            if _manifest_bytes(folder) == text:
                raise
            continue  # its files went with it; the new one is read
        return manifest, hashlib.sha256(text).hexdigest()


def rank_files(manifest: Manifest, rank: int) -> list[str]:
    """The files of the bundle that a rank needs: what its segments and the self-tests run, and its weights."""
    weights = manifest.weights[rank]
    files = [segment.file for segment in (*manifest.ranks[rank], *manifest.self_tests)]
    return list(dict.fromkeys(files if weights is None else [*files, weights]))


def check_files(folder: Path | str, manifest: Manifest, only: Iterable[str] | None = None) -> None:
    """Compare files of the bundle with their sha256 in the manifest.

    Args:
        only: paths within the bundle, :func:`rank_files` for those of one rank; None checks every file.

    Raises:
        BundleError: a file that is missing, is no plain file, or is changed, with the expected and the found hash.
    """
    for name in manifest.files if only is None else dict.fromkeys(only):
        _check_listed(folder, manifest, name)
        _check_digest(folder, manifest, name, digest(folder, name))


def read_file(folder: Path | str, manifest: Manifest, name: str, limit: int) -> bytes:
    """The bytes of a file of the bundle, those that its sha256 in the manifest is of.

    Args:
        limit: the most bytes that it may have.

    Raises:
        BundleError: as :func:`check_files`, or a file of more than ``limit`` bytes.
    """
    _check_listed(folder, manifest, name)
    data = read_bytes(folder, name, limit)
    _check_digest(folder, manifest, name, hashlib.sha256(data).hexdigest())
    return data


def check_versions(manifest: Manifest) -> None:
    """Refuse a bundle that the installed TensorRT cannot run: an engine runs only under the version that built it.

    A bundle of graphs alone needs no TensorRT.

    Raises:
        BundleError: with the flavour and version of both, and what to install.
        BuildError: no TensorRT is installed.
    """
    if not any(segment.runs == "engine" for segments in manifest.ranks for segment in segments):
        return
    from torchtrt_md.build.flavour import flavour  # imports TensorRT: not before a bundle is really loaded

    here, built = flavour(), manifest.versions
    if (here.name, here.version) != (built.flavour, built.tensorrt):
        package = {"TensorRT": "tensorrt", "TensorRT-RTX": "tensorrt-rtx"}.get(built.flavour, built.flavour)
        raise BundleError(
            f"the bundle was built with {built.flavour} {built.tensorrt} and {here.name} {here.version} is installed;"
            " an engine runs only under the exact version that built it",
            fix=f"pip install {package}=={built.tensorrt}, or export the bundle again with the installed version",
        )


def _check_listed(folder: Path | str, manifest: Manifest, name: str) -> None:
    if name not in manifest.files:
        raise BundleError(f"{name!r} is not among the files of {folder}", fix="export the bundle again")


def _check_digest(folder: Path | str, manifest: Manifest, name: str, found: str) -> None:
    expected = manifest.files[name]
    if found != expected:
        raise BundleError(
            f"{Path(folder) / name} is damaged: its sha256 is {found} and the manifest says {expected}",
            fix="copy the bundle again, whole, or export it again",
        )


def _manifest_bytes(folder: Path | str) -> bytes:
    try:
        return read_bytes(folder, MANIFEST, MAX_MANIFEST_BYTES)
    except BundleError as error:
        raise BundleError(
            f"there is no bundle at {folder}: {error.problem}", fix="give the folder that the export wrote, whole"
        ) from error
