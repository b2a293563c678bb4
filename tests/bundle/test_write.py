"""Writing a bundle: all of it or nothing."""

import hashlib
import os
from pathlib import Path

import msgspec
import pytest

from bundle import bundle_samples
from torchtrt_md.bundle import check_files, read_manifest, write_bundle
from torchtrt_md.errors import BundleError


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    files = bundle_samples.engine_files(tmp_path / "built")
    digest = hashlib.sha256(files["first"].read_bytes()).hexdigest()
    written = write_bundle(tmp_path / "out", bundle_samples.manifest(), files)

    assert read_manifest(tmp_path / "out") == written
    check_files(tmp_path / "out", written)
    path = f"engines/{digest}.engine"
    assert written.files[path] == digest
    assert [segments[0].engine for segments in written.ranks] == [path, path]
    assert not any(path.exists() for path in files.values()), "engines are moved, not copied"


def test_equal_engines_become_one_file(tmp_path: Path) -> None:
    files = bundle_samples.engine_files(tmp_path / "built")
    files["second"].write_bytes(files["first"].read_bytes())
    written = write_bundle(tmp_path / "out", bundle_samples.manifest(), files)
    assert len(written.files) == len(list((tmp_path / "out" / "engines").iterdir())) == 1


def test_engine_memory_is_not_copied(tmp_path: Path) -> None:
    files = bundle_samples.engine_files(tmp_path / "built")
    inode = files["first"].stat().st_ino
    written = write_bundle(tmp_path / "out", bundle_samples.manifest(), files)
    assert (tmp_path / "out" / written.ranks[0][0].engine).stat().st_ino == inode


def test_a_bundle_is_replaced_whole(tmp_path: Path) -> None:
    old = read_manifest(bundle_samples.bundle(tmp_path / "out"))
    files = bundle_samples.engine_files(tmp_path / "built")
    files["first"].write_bytes(b"another")
    new = write_bundle(tmp_path / "out", bundle_samples.manifest(), files)
    assert read_manifest(tmp_path / "out") == new != old
    assert {f"engines/{p.name}" for p in (tmp_path / "out" / "engines").iterdir()} == set(new.files)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["built", "out", "out-built"], "nothing is left beside it"


def test_engines_of_the_replaced_bundle_can_be_used_again(tmp_path: Path) -> None:
    out = bundle_samples.bundle(tmp_path / "out")
    first, second = (segment.engine for segment in read_manifest(out).ranks[0])
    written = write_bundle(out, bundle_samples.manifest(), {"first": out / first, "second": out / second})
    check_files(out, written)


def test_an_empty_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    bundle_samples.bundle(tmp_path / "out")
    assert read_manifest(tmp_path / "out").mesh == {"cp": 2}


def test_behind_a_link_the_folder_itself_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    bundle_samples.bundle(tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert read_manifest(tmp_path / "real").mesh == {"cp": 2}


def test_a_folder_that_is_no_bundle_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    files = bundle_samples.engine_files(tmp_path / "built")
    with pytest.raises(BundleError, match="is not a bundle and is not replaced"):
        write_bundle(tmp_path / "out", bundle_samples.manifest(), files)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"
    assert all(path.exists() for path in files.values())


def test_a_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(BundleError, match="is a file"):
        write_bundle(tmp_path / "out", bundle_samples.manifest(), {})


@pytest.mark.parametrize("point", ["link", "manifest", "rename"])
def test_a_failure_at_any_point_leaves_the_old_bundle_and_the_engines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    old = read_manifest(bundle_samples.bundle(tmp_path / "out"))
    files = bundle_samples.engine_files(tmp_path / "built")
    before = {key: path.read_bytes() for key, path in files.items()}

    def fail(*args: object, **kwargs: object) -> None:
        raise MemoryError("the disk is full")

    rename = Path.replace

    def fail_second(self: Path, target: Path) -> Path:
        if self.name.endswith(".unfinished"):
            raise OSError("the disk is full")
        return rename(self, target)

    if point == "link":
        monkeypatch.setattr(os, "link", fail)
    elif point == "manifest":
        monkeypatch.setattr(Path, "write_bytes", fail)
    else:
        monkeypatch.setattr(Path, "replace", fail_second)
    with pytest.raises((MemoryError, OSError)):
        write_bundle(tmp_path / "out", bundle_samples.manifest(), files)
    monkeypatch.undo()
    assert read_manifest(tmp_path / "out") == old
    check_files(tmp_path / "out", old)
    assert {key: path.read_bytes() for key, path in files.items()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["built", "out", "out-built"]


def test_across_file_systems_the_engine_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other_file_system(*args: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_file_system)
    files = bundle_samples.engine_files(tmp_path / "built")
    written = write_bundle(tmp_path / "out", bundle_samples.manifest(), files)
    check_files(tmp_path / "out", written)
    assert not any(path.exists() for path in files.values())


def test_engines_must_be_those_of_the_segments(tmp_path: Path) -> None:
    files = bundle_samples.engine_files(tmp_path / "built")
    files["third"] = files.pop("second")
    with pytest.raises(BundleError, match=r"no file for \['second'\], no segment for \['third'\]"):
        write_bundle(tmp_path / "out", bundle_samples.manifest(), files)
    assert not (tmp_path / "out").exists()


def test_a_missing_engine_file(tmp_path: Path) -> None:
    files = {"first": tmp_path / "a", "second": tmp_path / "b"}
    with pytest.raises(BundleError, match="cannot be read: No such file"):
        write_bundle(tmp_path / "out", bundle_samples.manifest(), files)


def test_a_manifest_that_contradicts_itself_is_not_written(tmp_path: Path) -> None:
    files = bundle_samples.engine_files(tmp_path / "built")
    wrong = msgspec.structs.replace(bundle_samples.manifest(), mesh={"cp": 4})
    with pytest.raises(BundleError, match="engines for 2 ranks"):
        write_bundle(tmp_path / "out", wrong, files)
    assert not (tmp_path / "out").exists()
