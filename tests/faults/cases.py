"""The faults of launches, as data: what strikes whom where, and what must become of every rank.

Each runs in a launch of its own, since processes end in it.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from faults import injections
from faults.processes import SLACK, TIMEOUT, Ended, Launch
from torchtrt_md.bundle import read_manifest
from torchtrt_md.bundle.manifest import encode
from torchtrt_md.launch.watchdog import EXIT_CODE

AT_ONCE, IN_TIME = 5.0, TIMEOUT  # seconds that a fault should take to be an error, on an idle machine
_AT_A_TIME = 6  # launches: most of them wait


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        place: see :data:`faults.injections.PLACES`; "" where all ranks get the signal while they serve.
        code: what the victim's process ends with.
        says: what every survivor must say; one of the alternatives.
        ends: exit codes that survivors may have.
        seconds: from the fault to the last survivor's end, on an idle machine.
        size: ranks.
    """

    name: str
    place: str
    number: int
    code: int
    says: tuple[str, ...]
    ends: tuple[int, ...] = (1,)
    seconds: float = AT_ONCE
    victim: int = 1
    size: int = 2
    store: str = "agent"


@dataclass
class Outcome:
    """What became of a fault.

    Attributes:
        seconds: from the fault to the end of the last process that was to end by itself.
        problems: what was not as it must be.
        said: what a survivor said, its first line.
    """

    name: str
    seconds: float
    codes: list[int | None]
    said: str
    problems: list[str] = field(default_factory=list)


# signal -> its name, and what a Python process ends with that gets it
SIGNALS = {signal.SIGKILL: ("killed", -9), signal.SIGTERM: ("SIGTERM", -15), signal.SIGINT: ("Ctrl-C", 1)}
_GONE = ("rank 1 has ended", "rank 1 ended before it came to")
_FIRST_GONE = (*_GONE, "ranks 0, 1", "ranks 1, 2", "ranks 1, 3")  # one that had the error may have ended by then
_LATE = ("rank 1 did not come to reading the bundle within",)


def faults() -> Iterator[Fault]:
    """All of them."""
    for number, (name, code) in SIGNALS.items():
        for place in injections.PLACES:
            unknown = place == "before load"  # it has told nobody of its process
            # where PyTorch makes groups it may wait without an error: the watchdog ends that
            ends = (1, EXIT_CODE) if place == "while connecting" else (1,)
            seconds = IN_TIME if unknown or len(ends) > 1 else AT_ONCE
            says = _LATE if unknown else _GONE
            yield Fault(f"rank 1: {name} {place}", place, number, code, says, ends, seconds)
    yield Fault("rank 1 of 4: killed in a step", "in a step", 9, -9, _FIRST_GONE, (1,), IN_TIME, size=4)
    waited = ("rank 0 waited",)
    for place in ("while connecting", "in a step"):
        yield Fault(f"rank 1: stopped {place}", place, signal.SIGSTOP, -9, waited, (EXIT_CODE,), IN_TIME)
    late = ("rank 1 did not come to a call of program 1",)
    yield Fault("rank 1: stopped in a vote", "in a vote", signal.SIGSTOP, -9, late, (1,), IN_TIME)
    gone = ("the store of the launch is gone", "rank 0 has ended")
    yield Fault("rank 0, which holds the store: killed in a vote", "in a vote", 9, -9, gone, victim=0, store="rank 0")
    mute = ("rank 1 had no answer from the launch's store",)
    yield Fault(
        "rank 0, which holds the store: stopped in a vote",
        "in a vote",
        signal.SIGSTOP,
        -9,
        mute,
        (EXIT_CODE,),
        IN_TIME,
        victim=0,
        store="rank 0",
    )
    yield Fault("all ranks: SIGTERM while they serve", "", signal.SIGTERM, -15, ())
    yield Fault("all ranks: Ctrl-C while they serve", "", signal.SIGINT, 1, ())


def run(fault: Fault, bundles: Path, folder: Path) -> Outcome:
    """Run one in a launch of its own, on a bundle for as many ranks."""
    stopped = fault.victim if fault.number == signal.SIGSTOP else None
    args = (str(bundles / str(fault.size)), fault.place, fault.victim, int(fault.number))
    launch = Launch(injections.serve, args, folder, fault.size, fault.store, stopped, fault.seconds + SLACK + TIMEOUT)
    launch.start()
    if not fault.place:
        for rank in range(fault.size):
            launch.wait_for("serving", rank)
        launch.struck = time.time()
        for process in launch.processes:
            assert process.pid is not None
            os.kill(process.pid, fault.number)
    return judge(fault, launch.wait(), launch.left())


def judge(fault: Fault, ended: Sequence[Ended], left: Sequence[int]) -> Outcome:
    """What was not as it must be."""
    survivors = [rank for rank in range(fault.size) if fault.place and rank != fault.victim]
    seconds = max(ended[rank].seconds for rank in survivors or range(fault.size))
    said = [(ended[rank].error or ended[rank].output).strip() for rank in survivors]
    outcome = Outcome(fault.name, seconds, [end.code for end in ended], next(iter(said), ""))
    for rank, end in enumerate(ended):
        allowed = fault.ends if rank in survivors else (fault.code,)
        if end.code not in allowed:
            outcome.problems.append(f"rank {rank} ended with {end.code}, not {allowed}: {end.output[-1500:]}")
        if end.killed:
            outcome.problems.append(f"rank {rank} did not end by itself")
    for rank, text in zip(survivors, said, strict=True):
        if not any(word in text for word in fault.says):
            outcome.problems.append(f"rank {rank} does not say any of {fault.says}: {text[-1500:]}")
    if seconds > fault.seconds + SLACK:
        outcome.problems.append(f"it took {seconds:.1f} s")
    if left:
        outcome.problems.append(f"processes {left} are left")
    return outcome


def run_all(folder: Path) -> dict[str, Outcome]:
    """All of them, several at a time; by name."""
    found, bundles = list(faults()), folder / "bundles"
    for size in {fault.size for fault in found}:
        injections.export(folder / "exported", size=size)
        injections.eager(folder / "exported", bundles / str(size))
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        outcomes = pool.map(lambda pair: run(pair[1], bundles, folder / str(pair[0])), enumerate(found))
        return {outcome.name: outcome for outcome in outcomes}


# --- one launch on bundles that are not right ---

# name -> what both ranks must raise
MISLED = {
    "a damaged manifest": ("BundleError: rank 1:", "is not a bundle's manifest"),
    "a truncated file": ("BundleError: rank 1:", "is damaged: its sha256 is"),
    "another bundle": ("LaunchError: the ranks have different bundles:", "rank 1 has"),
    "another rank's program": ("LaunchError: the ranks have different bundles:", "rank 1 has"),
    "another rank's weights": ("BundleError: rank 1:", "is damaged: its sha256 is"),
    "no bundle": ("BundleError: rank 1: there is no bundle at",),
    injections.OUT_OF_MEMORY: ("LaunchError: rank 1: reading the weights failed: MemoryError",),
    "the right bundle": (),
}


def mislead(bundle: Path, folder: Path) -> None:
    """``FOLDER/<name>/<rank>``: the bundle, and on rank 1 what the name says."""
    for name in MISLED:
        for rank in range(2):
            shutil.copytree(bundle, folder / name / str(rank))
    wrong = {name: folder / name / "1" for name in MISLED}
    manifest = read_manifest(bundle)
    mine, other = manifest.weights[1], manifest.weights[0]
    assert mine is not None
    assert other is not None
    assert mine != other
    (wrong["another rank's weights"] / mine).write_bytes((bundle / other).read_bytes())
    _truncate(wrong["a truncated file"] / mine)
    _truncate(wrong["a damaged manifest"] / "manifest.json")
    shutil.rmtree(wrong["no bundle"])
    first, second = manifest.ranks
    swapped = msgspec.structs.replace(manifest, ranks=[second, first], weights=[mine, other])
    (wrong["another rank's program"] / "manifest.json").write_bytes(encode(swapped))
    for name, width, hidden, seed, ranks in (
        ("another bundle", 64, 128, 1, (1,)),
        (injections.OUT_OF_MEMORY, 1024, 16384, 0, (0, 1)),
    ):
        injections.export(folder.parent / "whole", width, hidden, seed=seed)
        injections.eager(folder.parent / "whole", folder.parent / "eager")
        for rank in ranks:
            shutil.rmtree(folder / name / str(rank))
            shutil.copytree(folder.parent / "eager", folder / name / str(rank), copy_function=os.link)


def _truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def run_misled(bundle: Path, folder: Path) -> dict[str, Outcome]:
    """All of them in one launch; by name."""
    folder.mkdir()
    mislead(bundle, folder / "bundles")
    launch = Launch(injections.mislead, (str(folder / "bundles"),), folder / "launch", patience=300.0)
    launch.start()
    ended = launch.wait()
    outcomes = {}
    for name, words in MISLED.items():
        outcome = outcomes[name] = Outcome(f"rank 1 loads: {name}", 0.0, [end.code for end in ended], "")
        for rank, end in enumerate(ended):
            error, seconds = (end.value or {}).get(name, (f"the launch ended: {end.output[-1500:]}", 0.0))
            outcome.seconds, outcome.said = max(outcome.seconds, seconds), error
            if end.code != 0 or not all(word in error for word in words) or bool(error) != bool(words):
                outcome.problems.append(f"rank {rank}: {error}")
            if seconds > TIMEOUT + SLACK:
                outcome.problems.append(f"it took {seconds:.1f} s")
    return outcomes


# --- many calls, many loads ---

FULL = "TORCHTRT_MD_FAULTS_FULL"  # in the environment: as many as in the report
GROWTH = 2 * 2**20  # bytes that a process may grow by in the second half, for all that are not ours


def numbers() -> tuple[int, int]:
    """How many calls and how many loads."""
    return (5000, 50) if os.environ.get(FULL) else (300, 6)


def run_endurance(bundle: Path, folder: Path, calls: int, loads: int) -> Outcome:
    """One launch; what was not flat, or not the same."""
    launch = Launch(injections.endure, (str(bundle), calls, loads), folder, patience=900.0)
    launch.start()
    ended = launch.wait()
    outcome = Outcome(f"{calls} calls and {loads} loads", 0.0, [end.code for end in ended], "")
    for rank, end in enumerate(ended):
        if end.code != 0 or not end.value:
            outcome.problems.append(f"rank {rank} ended with {end.code}: {end.error or end.output[-1500:]}")
            continue
        grown = {what: marks[-1] - marks[len(marks) // 2 - 1] for what, marks in end.value["rss"].items()}
        outcome.seconds = max(outcome.seconds, sum(end.value["seconds"]))
        outcome.said = "resident memory in the second half: " + ", ".join(
            f"{grown[what] / 1024:+.0f} KiB ({what}; {end.value['rss'][what][-1] / 2**20:.0f} MiB in all)"
            for what in ("calls", "loads")
        )
        if max(grown.values()) > GROWTH:
            outcome.problems.append(f"rank {rank} grew: {end.value['rss']}")
        if not end.value["same"]:
            outcome.problems.append(f"rank {rank}: later calls or loads gave other bits than the first")
        for what in ("files", "threads"):
            before, after = end.value[what]
            if after > before:
                outcome.problems.append(f"rank {rank}: {before} {what} after the first load, then {after}")
    return outcome
