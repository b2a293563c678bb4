"""What the suite found: JSON to keep, and a table made from it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

PASSED, REFUSED, FAILED, NOT_RUN = "passed", "refused as expected", "failed", "not run"
STATES = (PASSED, REFUSED, FAILED, NOT_RUN)


@dataclass
class Result:
    """What became of a case.

    Attributes:
        seconds: of the slowest rank.
        error: relative, of the worst rank, against the dense model in fp64; None where nothing is compared.
        dense_error: the dense model's own.
        message: what there is to tell: of a failure, its cause.
    """

    name: str
    state: str = NOT_RUN
    seconds: float | None = None
    error: float | None = None
    dense_error: float | None = None
    message: str = "the suite had not come to it"


@dataclass
class SuiteReport:
    """A run of the suite, as far as it has come."""

    ranks: int
    command: str
    commit: str
    gpus: list[str]
    results: list[Result]
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def exit_code(self) -> int:
        """0 where all is well, 1 where a case failed, 2 where one was not run."""
        states = {result.state for result in self.results}
        return 1 if FAILED in states else 2 if NOT_RUN in states else 0

    def write(self, folder: Path) -> None:
        """Write ``report.json`` and ``report.md``."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in (("report.json", json.dumps(asdict(self), indent=2)), ("report.md", self.table())):
            unfinished = folder / f".{name}"
            unfinished.write_text(text + "\n")
            unfinished.replace(folder / name)

    def table(self) -> str:
        """Markdown."""
        counts = Counter(result.state for result in self.results)
        hardware = ", ".join(f"{count} x {name}" for name, count in Counter(self.gpus).items()) or "no GPU"
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items() if version)
        lines = [
            f"{self.ranks} ranks on {hardware}. {versions}. Commit {self.commit or 'not known'}.",
            "",
            f"Made by `{self.command}` in {self.seconds:.0f} s: "
            + ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
            + ".",
            "",
            "| case | result | s | error | the dense model's own | |",
            "|---|---|---:|---:|---:|---|",
        ]
        for r in self.results:
            seconds = "" if r.seconds is None else f"{r.seconds:.1f}"
            errors = ["" if e is None else f"{e:.2e}" for e in (r.error, r.dense_error)]
            first = next(iter(r.message.strip().splitlines()), "").replace("|", "\\|")
            lines.append(f"| {r.name} | {r.state} | {seconds} | {errors[0]} | {errors[1]} | {first} |")
        return "\n".join(lines)
