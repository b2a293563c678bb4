"""Writing a bundle: all of it or nothing."""

import errno
import hashlib
import os
from pathlib import Path

import msgspec
import pytest
import torch

from bundle import bundle_samples
from torchtrt_md.bundle import check_files, read_manifest, write_bundle
from torchtrt_md.bundle.weights import save_weights
from torchtrt_md.choices import Decision
from torchtrt_md.errors import BundleError


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    files = bundle_samples.engine_files(tmp_path / "built")
    digest = hashlib.sha256(files["first"].read_bytes()).hexdigest()
    written = write_bundle(tmp_path / "out", bundle_samples.manifest(), files)

    assert read_manifest(tmp_path / "out") == written
    check_files(tmp_path / "out", written)
    path = f"engines/{digest}.engine"
    assert written.files[path] == digest
    assert [segments[0].file for segments in written.ranks] == [path, path]
    assert not any(path.exists() for path in files.values()), "engines are moved, not copied"


def test_equal_engines_become_one_file(tmp_path: Path) -> None:
    files = bundle_samples.engine_files(tmp_path / "built")
    files["second"].write_bytes(files["first"].read_bytes())
    written = write_bundle(tmp_path / "out", bundle_samples.manifest(), files)
    assert len(written.files) == len(list((tmp_path / "out" / "engines").iterdir())) == 2, (
        "that of the self-test is one"
    )


def test_engine_memory_is_not_copied(tmp_path: Path) -> None:
    files = bundle_samples.engine_files(tmp_path / "built")
    inode = files["first"].stat().st_ino
    written = write_bundle(tmp_path / "out", bundle_samples.manifest(), files)
    assert (tmp_path / "out" / written.ranks[0][0].file).stat().st_ino == inode


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
    old = read_manifest(out)
    first, second, test = (segment.file for segment in (*old.ranks[0], *old.self_tests))
    again = {"first": out / first, "second": out / second, "gather test": out / test}
    written = write_bundle(out, bundle_samples.manifest(), again)
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


@pytest.mark.parametrize("content", ['{"name": "a web app", "icons": []}', "[]", "no JSON", '{"schema": 1}'])
def test_another_programs_manifest_is_left_alone(tmp_path: Path, content: str) -> None:
    (tmp_path / "out" / "weights").mkdir(parents=True)
    (tmp_path / "out" / "manifest.json").write_text(content)
    (tmp_path / "out" / "weights" / "mine.safetensors").write_text("years of work")
    with pytest.raises(BundleError, match="is not a bundle and is not replaced"):
        write_bundle(tmp_path / "out", bundle_samples.manifest(), bundle_samples.engine_files(tmp_path / "built"))
    assert (tmp_path / "out" / "manifest.json").read_text() == content
    assert (tmp_path / "out" / "weights" / "mine.safetensors").read_text() == "years of work"


def test_files_that_are_no_bundles_stay_in_one(tmp_path: Path) -> None:
    bundle = bundle_samples.bundle(tmp_path / "out")
    (bundle / "weights").mkdir(exist_ok=True)
    (bundle / "weights" / "mine.safetensors").write_text("years of work")
    (bundle / "engines" / f"{'0' * 64}.engine").write_text("of an older bundle")
    bundle_samples.split_bundle(tmp_path / "out")
    assert (bundle / "weights" / "mine.safetensors").read_text() == "years of work"
    assert not (bundle / "engines" / f"{'0' * 64}.engine").exists()


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
        if self.name == "manifest.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return rename(self, target)

    if point == "link":
        monkeypatch.setattr(os, "link", fail)
    elif point == "manifest":
        monkeypatch.setattr(Path, "write_bytes", fail)
    else:
        monkeypatch.setattr(Path, "replace", fail_second)
    with pytest.raises((MemoryError, BundleError)):
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


def test_files_must_be_those_of_the_segments(tmp_path: Path) -> None:
    files = bundle_samples.engine_files(tmp_path / "built")
    files["third"] = files.pop("second")
    with pytest.raises(BundleError, match=r"no file for \['second'\], no use for \['third'\]"):
        write_bundle(tmp_path / "out", bundle_samples.manifest(), files)
    assert not (tmp_path / "out").exists()


def test_a_missing_engine_file(tmp_path: Path) -> None:
    files = {"first": tmp_path / "a", "second": tmp_path / "b", "gather test": tmp_path / "c"}
    with pytest.raises(BundleError, match="cannot be read: No such file"):
        write_bundle(tmp_path / "out", bundle_samples.manifest(), files)


def test_a_manifest_that_contradicts_itself_is_not_written(tmp_path: Path) -> None:
    files = bundle_samples.engine_files(tmp_path / "built")
    wrong = msgspec.structs.replace(bundle_samples.manifest(), mesh={"cp": 4})
    with pytest.raises(BundleError, match="segments for 2 ranks"):
        write_bundle(tmp_path / "out", wrong, files)
    assert not (tmp_path / "out").exists()


def test_each_kind_of_file_has_its_folder(tmp_path: Path) -> None:
    files = bundle_samples.split_files(tmp_path / "built")
    content = {key: path.read_bytes() for key, path in files.items()}
    written = write_bundle(tmp_path / "out", bundle_samples.split_manifest(), files)

    assert read_manifest(tmp_path / "out") == written
    check_files(tmp_path / "out", written)
    names = {key: hashlib.sha256(data).hexdigest() for key, data in content.items()}
    engine, *graphs = (segment.file for segment in written.ranks[1])
    assert engine == f"engines/{names['engine']}.engine"
    assert graphs == [f"graphs/{names[key]}.json" for key in ("gather", "last")]
    assert written.weights == [f"weights/{names['weights 0']}.safetensors"] * 2
    assert len(written.files) == 4, "ranks of equal weights share a file"
    for key, data in content.items():
        (path,) = (tmp_path / "out").rglob(f"{names[key]}.*")
        assert path.read_bytes() == data
    assert not any(path.exists() for path in files.values())


def test_ranks_of_other_weights_have_files_of_their_own(tmp_path: Path) -> None:
    files = bundle_samples.split_files(tmp_path / "built")
    save_weights({"up": torch.ones(16, 8)}, files["weights 1"])
    first, second = write_bundle(tmp_path / "out", bundle_samples.split_manifest(), files).weights
    assert first != second


@pytest.mark.parametrize("changes", [{"weights": ["engine", "weights 1"]}, {"weights": ["gather", "weights 1"]}])
def test_a_file_is_one_thing(tmp_path: Path, changes: dict[str, object]) -> None:
    files = bundle_samples.split_files(tmp_path / "built")
    with pytest.raises(BundleError, match=r"is used as two things: .*safetensors"):
        write_bundle(tmp_path / "out", bundle_samples.split_manifest(**changes), files)


def test_weights_without_a_file(tmp_path: Path) -> None:
    files = bundle_samples.split_files(tmp_path / "built")
    del files["weights 1"]
    with pytest.raises(BundleError, match=r"no file for \['weights 1'\]"):
        write_bundle(tmp_path / "out", bundle_samples.split_manifest(), files)


def test_a_time_that_json_lacks_is_refused(tmp_path: Path) -> None:
    decisions = [Decision("block 0", "engine", "the other failed", {"inductor": float("inf")})]
    with pytest.raises(BundleError, match="the time of 'inductor' for 'block 0' is inf"):
        bundle_samples.split_bundle(tmp_path / "out", decisions=decisions)
