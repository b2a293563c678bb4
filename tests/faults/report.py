"""Inject every fault and write what happened: ``python tests/faults/report.py``.

It writes the table of docs/reliability.md between its marks, and ends with 1 where something was not as it must be.
5,000 calls and 50 loads are among it; all takes some minutes.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # for the processes that it starts

import torch

from faults import cases, exports, injections, nodes
from faults.cases import Outcome
from faults.processes import TIMEOUT

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- made by tests/faults/report.py -->", "<!-- end -->"
_LONGEST = 200


def outcomes(folder: Path) -> Iterator[tuple[str, list[Outcome]]]:
    """Heading -> what became of its faults."""
    injections.export(folder / "exported")
    bundle = injections.eager(folder / "exported", folder / "bundle.mdtrt")
    yield "Ranks that end or stop", list(cases.run_all(folder / "faults").values())
    yield "Bundles that are not right on one rank", list(cases.run_misled(bundle, folder / "misled").values())
    places = [
        folder / name for name in ("over", "new", "at once", "full", "tmpfs", "killed", "torchrun", "a", "b", "c")
    ]
    for place in places:
        place.mkdir()
    over, new, at_once, full, tmpfs, killed, torchrun, *hosts = places
    found = [exports.crashes(over, older=True), exports.crashes(new, older=False), exports.at_once(at_once)]
    found.append(exports.disk_full(full))
    if exports.can_mount():
        found.append(exports.disk_full(tmpfs, tmpfs=True))
    yield "Exports", [*found, exports.killed(killed)]
    runs = (nodes.one_rank_ends, nodes.one_host_ends, nodes.copies)
    yield "Two nodes", [nodes.by_torchrun(torchrun), *(run(host) for run, host in zip(runs, hosts, strict=True))]
    yield "Many calls and loads", [cases.run_endurance(bundle, folder / "endurance", 5000, 50)]


def table(heading: str, found: list[Outcome], folder: Path) -> str:
    """Markdown."""
    lines = [
        f"### {heading}",
        "",
        "| fault | as it must be | s | exit codes | what was said |",
        "|---|---|---:|---|---|",
    ]
    for one in found:
        said = next(iter(one.said.splitlines()), "").replace(str(folder), "...").replace("|", "\\|")
        said = said if len(said) <= _LONGEST else f"{said[:_LONGEST]} ..."
        codes = ", ".join(map(str, one.codes))
        lines.append(f"| {one.name} | {'no' if one.problems else 'yes'} | {one.seconds:.1f} | {codes} | {said} |")
    return "\n".join(lines)


def main() -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=PAGE, help="the page, with the two marks in it")
    out: Path = parser.parse_args().out
    start, parts, problems = time.monotonic(), [], []
    with tempfile.TemporaryDirectory(prefix="faults-") as work:
        for heading, found in outcomes(Path(work)):
            parts.append(table(heading, found, Path(work)))
            print(parts[-1], flush=True)
            problems += [f"{one.name}: {problem}" for one in found for problem in one.problems]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=PAGE.parent, capture_output=True, text=True, check=False)
    told = (
        f"Made by `{shlex.join(['python', *sys.argv])}` in {time.monotonic() - start:.0f} s, on a state behind commit"
        f" {commit.stdout.strip()[:12] or 'unknown'}: ranks over gloo, {os.cpu_count()} CPU cores, no GPU, Python"
        f" {platform.python_version()}, torch {torch.__version__}. A rank is given up after {TIMEOUT:g} s here."
    )
    before, _, rest = out.read_text().partition(BEGIN)
    out.write_text("\n\n".join([before + BEGIN, told, *parts, END + rest.partition(END)[2]]))
    print("\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
