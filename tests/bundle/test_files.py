"""Only plain files inside the folder are opened."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from bundle import bundle_samples
from torchtrt_md.bundle import check_files, read_manifest
from torchtrt_md.bundle.files import plain_file, read_bytes
from torchtrt_md.bundle.read import manifest_digest, read_file
from torchtrt_md.bundle.weights import load_weights, rank_weights
from torchtrt_md.errors import BundleError


def bind(path: Path) -> None:
    """A socket; its own path may have 100 characters only."""
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


# What lies in place of a file -> how it is put there, and how it is called.
INSTEAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "endless device": (lambda path: path.symlink_to("/dev/zero"), "a link"),
    "link to a file": (lambda path: path.symlink_to(path.parent.parent / "manifest.json"), "a link"),
    "link to nothing": (lambda path: path.symlink_to("nowhere"), "a link"),
    "pipe": (os.mkfifo, "a pipe"),
    "socket": (bind, "a socket"),
    "folder": (Path.mkdir, "a folder"),
}


@pytest.mark.parametrize("kind", INSTEAD)
@pytest.mark.timeout(20)
def test_what_is_no_plain_file_is_not_opened(tmp_path: Path, kind: str) -> None:
    put, name = INSTEAD[kind]
    folder = bundle_samples.split_bundle(tmp_path / "model")
    manifest = read_manifest(folder)
    weights = manifest.weights[0]
    assert weights is not None
    for file in (manifest.ranks[0][1].file, weights):
        (folder / file).unlink()
        put(folder / file)
        with pytest.raises(BundleError, match=f"{file} is {name}, and a bundle has a file there"):
            check_files(folder, manifest, [file])
        with pytest.raises(BundleError, match=f"is {name}"):
            read_file(folder, manifest, file, 1000)
    with pytest.raises(BundleError, match=f"is {name}"):
        rank_weights(folder, manifest, 0, "cpu")
    (folder / "manifest.json").unlink()
    put(folder / "manifest.json")
    for read in (read_manifest, manifest_digest):
        with pytest.raises(BundleError, match=rf"there is no bundle at .*manifest.json is {name}"):
            read(folder)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_weights_alone_are_a_plain_file(tmp_path: Path, kind: str) -> None:
    INSTEAD[kind][0](tmp_path / "w")
    with pytest.raises(BundleError, match="w is no plain file"):
        load_weights(tmp_path / "w", ["a"], "cpu")


def test_a_linked_folder_leads_nowhere(tmp_path: Path) -> None:
    """Neither out of the bundle nor to another place in it; the bundle itself may be behind a link."""
    folder = bundle_samples.bundle(tmp_path / "model")
    manifest = read_manifest(folder)
    (tmp_path / "link").symlink_to(folder)
    check_files(tmp_path / "link", read_manifest(tmp_path / "link"))
    for elsewhere in (tmp_path / "engines", folder / "others"):
        (folder / "engines").rename(elsewhere)
        (folder / "engines").symlink_to(elsewhere)
        with pytest.raises(BundleError, match=r"engines is a link, and a bundle has a folder there\n.*cp -rL"):
            check_files(folder, manifest)
        (folder / "engines").unlink()
        elsewhere.rename(folder / "engines")
    check_files(folder, manifest)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "/etc/passwd", "a/../../b", "a//b", "./a", "a/.", "a\\b", "C:a", "a\0b", "a\nb", "\ud800"]
)
def test_names_that_are_no_plain_paths(tmp_path: Path, name: str) -> None:
    with pytest.raises(BundleError, match="which is not inside the bundle"):
        plain_file(tmp_path, name)


def test_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot be read: File name too long"):
        plain_file(tmp_path, "x" * 300)


def test_no_more_is_read_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 40)  # which takes no space
    with pytest.raises(BundleError, match="large has more than 1000 bytes"):
        read_bytes(tmp_path, "large", 1000)
    folder = bundle_samples.bundle(tmp_path / "model")
    with (folder / "manifest.json").open("ab") as file:
        file.truncate(1 << 40)
    with pytest.raises(BundleError, match=r"manifest.json has more than 268435456 bytes"):
        read_manifest(folder)


def test_bytes_are_those_of_the_hash(tmp_path: Path) -> None:
    folder = bundle_samples.bundle(tmp_path / "model")
    manifest = read_manifest(folder)
    file = manifest.ranks[0][0].file
    assert read_file(folder, manifest, file, 1 << 20) == b"the first engine" * 1000
    with pytest.raises(BundleError, match=r"'manifest.json' is not among the files"):
        read_file(folder, manifest, "manifest.json", 1 << 20)
    (folder / file).write_bytes(b"another")
    with pytest.raises(BundleError, match=f"{file} is damaged"):
        read_file(folder, manifest, file, 1 << 20)
