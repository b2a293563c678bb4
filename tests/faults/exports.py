"""Faults of exports: processes that end at every point of one, a full disk, and several exports into one folder."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
from bundle import bundle_samples
from rank_processes import warm

from faults import injections
from faults.cases import Outcome
from torchtrt_md import errors
from torchtrt_md.bundle import check_files, read_manifest, write_bundle
from torchtrt_md.bundle.manifest import MANIFEST, Manifest
from torchtrt_md.bundle.read import read_unchanged

# What changes something in the file system, by the names of Python's audit events.
_EVENTS = (
    "os.link",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "fcntl.flock",
    "shutil.copyfile",
    "shutil.rmtree",
)
_SECONDS = 120.0
# It is processes that end here, and not the power.
NOT_TO_DISK = mock.patch.object(os, "fsync", return_value=None)


def write(folder: str, built: str, version: int) -> None:
    """Write version N of a bundle: one engine is of all versions, the other of this one alone."""
    files = bundle_samples.engine_files(Path(built))
    files["first"].write_bytes(f"engine of version {version}".encode() * 1000)
    write_bundle(folder, _manifest(version), files)


def _manifest(version: int) -> Manifest:
    return msgspec.structs.replace(bundle_samples.manifest(), constants={"version": version})


def whole(folder: Path) -> int:
    """The version of the bundle in a folder, all of whose files are there."""
    manifest, _ = read_unchanged(folder, lambda manifest: check_files(folder, manifest))
    version = manifest.constants["version"]
    assert isinstance(version, int)
    return version


def write_until(folder: str, built: str, version: int, last: int) -> None:
    """:func:`write`, in a process that is killed ahead of its change number ``last`` of the file system."""
    count = 0

    def audit(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if event in _EVENTS or writes:
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
    with NOT_TO_DISK:
        write(folder, built, version)


def in_process(function: Callable[..., None], *args: Any) -> int | None:
    """Run it in a process of its own; the exit code."""
    process = warm().Process(target=function, args=args)
    process.start()
    process.join(_SECONDS)
    process.kill()
    process.join()
    return process.exitcode


def crashes(folder: Path, *, older: bool) -> Outcome:
    """An export is killed at each point in turn, and another one follows.

    Args:
        older: there is a bundle in its place.
    """
    name = f"an export is killed at every point, {'over an older bundle' if older else 'into a new folder'}"
    outcome, start, points = Outcome(name, 0.0, [], ""), time.monotonic(), 0
    NOT_TO_DISK.start()
    while True:
        points += 1
        work = folder / str(points)
        out = work / "out"
        if older:
            write(str(out), str(work / "old"), 1)
        code = in_process(write_until, str(out), str(work / "new"), 2, points)
        if code == 0:
            break
        where = f"killed at point {points}"
        try:
            if out.exists() or older:
                found = whole(out)
                if not older and found != 2:
                    outcome.problems.append(f"{where}: version {found} is there")
        except errors.MDError as error:
            outcome.problems.append(f"{where}: {error}")
        write(str(out), str(work / "last"), 3)
        left = sorted(p.name for p in work.iterdir() if p.name.startswith("."))
        engines = {f"engines/{p.name}" for p in (out / "engines").iterdir()}
        if whole(out) != 3 or left or engines != set(read_manifest(out).files):
            outcome.problems.append(f"{where}: the next export left {left}, {engines}")
        shutil.rmtree(work)
    NOT_TO_DISK.stop()
    outcome.seconds, outcome.codes = time.monotonic() - start, [-9]
    outcome.said = f"{points - 1} points: the old bundle or the new one each time, and nothing left by the next export"
    return outcome


def rewrite(folder: str, built: str, first: int, count: int) -> None:
    """Write versions in turn."""
    for version in range(first, first + count):
        write(folder, f"{built}/{version}", version)


def at_once(folder: Path, *, writers: int = 3, count: int = 15) -> Outcome:
    """Processes write versions of one bundle all the time, and a reader finds a whole one at each look."""
    out = folder / "out"
    outcome = Outcome(f"{writers} processes export into one folder at once, {count} times each", 0.0, [], "")
    write(str(out), str(folder / "built"), 0)
    start, looks, seen = time.monotonic(), 0, set[int]()
    processes = [
        warm().Process(target=rewrite, args=(str(out), str(folder / f"built{n}"), n * 1000, count))
        for n in range(1, writers + 1)
    ]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes) and time.monotonic() - start < _SECONDS:
        try:
            seen.add(whole(out))
        except errors.MDError as error:
            outcome.problems.append(f"a reader: {error}")
        looks += 1
    for process in processes:
        process.kill()
        process.join()
    outcome.seconds, outcome.codes = time.monotonic() - start, [process.exitcode for process in processes]
    outcome.said = f"{looks} times a reader found a whole bundle, {len(seen)} different ones"
    if any(outcome.codes):
        outcome.problems.append(f"exit codes {outcome.codes}")
    if whole(out) not in {n * 1000 + count - 1 for n in range(1, writers + 1)} or len(seen) < 2:
        outcome.problems.append(f"at the end version {whole(out)}; seen {sorted(seen)}")
    left = sorted(p.name for p in folder.iterdir() if p.name.startswith("."))
    if left or {f"engines/{p.name}" for p in (out / "engines").iterdir()} != set(read_manifest(out).files):
        outcome.problems.append(f"left over: {left}, {os.listdir(out / 'engines')}")
    return outcome


def full(out: str, told: str, limit: int) -> None:
    """Export over an older bundle with room for less than the weights; tell the error."""
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        injections.export(Path(out), 256, 1024, seed=1)
        error = ""
    except errors.MDError as raised:
        error = f"{type(raised).__name__}: {raised}"
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
    Path(told).write_text(error)


def disk_full(folder: Path, *, tmpfs: bool = False) -> Outcome:
    """The disk has no room for the new bundle: a file may not grow, or a real file system of 1 MiB is full.

    Args:
        tmpfs: mount one, in a namespace of its own; it takes a kernel that lets users do so.
    """
    what = "a file system of 1 MiB is full" if tmpfs else "a file may not grow beyond 64 KiB"
    outcome = Outcome(f"an export, while {what}", 0.0, [], "")
    told, start = folder / "told", time.monotonic()
    if tmpfs:
        place = folder / "disk"
        place.mkdir()
        done = subprocess.run(
            [*MOUNT, str(place), sys.executable, __file__, str(place), str(told)], env=environment(), check=False
        )
        outcome.codes = [done.returncode]
        error, state = told.read_text() if told.exists() else "", json.loads((folder / "told.state").read_text())
    else:
        injections.export(folder / "out")
        before = (folder / "out" / MANIFEST).read_bytes()
        outcome.codes = [in_process(full, str(folder / "out"), str(told), 2**16)]
        error, state = told.read_text(), _state(folder / "out", before)
    outcome.seconds, outcome.said = time.monotonic() - start, error
    words = ("No space left on device",) if tmpfs else ("File too large",)
    if not all(word in error for word in ("BundleError: the bundle ", "cannot be written", *words)):
        outcome.problems.append(f"it raised {error!r}")
    if state != {"same": True, "left": []} or any(outcome.codes):
        outcome.problems.append(f"behind it: {state}, exit codes {outcome.codes}")
    return outcome


MOUNT = ["unshare", "--map-root-user", "--mount", "sh", "-c", 'mount -t tmpfs -o size=1m none "$0" && exec "$@"']


def environment() -> dict[str, str]:
    """So that a process of Python finds what this one finds."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def _state(out: Path, before: bytes) -> dict[str, Any]:
    """Whether the older bundle is there as it was, and what is left beside it."""
    check_files(out, read_manifest(out))
    same = (out / MANIFEST).read_bytes() == before
    return {"same": same, "left": sorted(p.name for p in out.parent.iterdir() if p.name.startswith("."))}


def can_mount() -> bool:
    """Whether this system lets a process mount a file system of its own."""
    try:
        return subprocess.run([*MOUNT, "/mnt", "true"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def killed(folder: Path, stages: tuple[str, ...] = ("capture", "bundle")) -> Outcome:
    """``md.export`` is killed at the beginning of a stage; the next one finds nothing of it in its way."""
    outcome, start = Outcome(f"md.export is killed in the stages {', '.join(stages)}", 0.0, [], ""), time.monotonic()
    injections.export(folder / "out")
    before = (folder / "out" / MANIFEST).read_bytes()
    for stage in stages:
        outcome.codes.append(in_process(injections.export_until, str(folder / "out"), stage))
        state = _state(folder / "out", before)
        if not state["same"] or outcome.codes[-1] != -9:
            outcome.problems.append(f"killed in {stage}: {state}, exit code {outcome.codes[-1]}")
    injections.export(folder / "out", seed=2)
    state = _state(folder / "out", before)
    if state != {"same": False, "left": []}:
        outcome.problems.append(f"the next export: {state}")
    outcome.seconds, outcome.said = time.monotonic() - start, "the older bundle, then the next export's, nothing left"
    return outcome


def main() -> None:
    """In the full file system."""
    place, told = Path(sys.argv[1]), sys.argv[2]
    injections.export(place / "out")
    before = (place / "out" / MANIFEST).read_bytes()
    full(str(place / "out"), told, 0)
    Path(told + ".state").write_text(json.dumps(_state(place / "out", before)))


if __name__ == "__main__":
    main()
