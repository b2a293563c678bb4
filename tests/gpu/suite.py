"""All that is tested on GPUs, in one command, in bounded time, with a report.

    python tests/gpu/suite.py --ranks 2 --out FOLDER

FOLDER gets report.json, report.md, which is its table, and log.txt with the output of launches that went wrong; they
are written anew with each case, so that they are there however the suite ends.  The exit code is 1 where a case failed,
and 2 where one was not run.

Cases share launches.  What all ranks raise alike fails its case, and the launch goes on.  Where a process ends, or all
of them are silent for too long, the case under way fails and the others run in a new launch.  The package need not be
installed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torchtrt_md
from gpu.case import ROOT, Case
from gpu.networks import SIZES
from gpu.report import FAILED, NOT_RUN, PASSED, REFUSED, Result, SuiteReport
from torchtrt_md.launch.shared_gpu import NCCL_SWITCH, STORES_SWITCH

START_SECONDS = 90.0  # of a launch: imports, and NCCL
LEAST_SECONDS = 25.0  # with less left, no launch is started
GRACE_SECONDS = 15.0  # that the others have when a process has ended
_POLL_SECONDS = 0.1
_TAIL = 10000


def write_dist_info(folder: Path) -> None:
    """Write what an installation would: ``torch.compile`` finds the backend's name there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = folder / f"{project['name']}-{torchtrt_md.__version__}.dist-info"
    info.mkdir(parents=True)
    metadata = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {torchtrt_md.__version__}\n"
    (info / "METADATA").write_text(metadata)
    groups = {"console_scripts": project["scripts"], **project["entry-points"]}
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in of.items()) for group, of in groups.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))


@dataclass
class Process:
    """A process, its log and, once it has ended, when."""

    popen: subprocess.Popen[bytes]
    log: Path
    ended: float | None = None

    @property
    def code(self) -> int | None:
        return self.popen.returncode

    def look(self) -> bool:
        """Look whether it has ended."""
        if self.ended is None and self.popen.poll() is not None:
            self.ended = time.time()
        return self.ended is not None

    def kill(self, *, ask: bool = False) -> None:
        """End it and all that it started; ``ask`` for its stacks first."""
        if ask and not self.look():
            self.popen.send_signal(signal.SIGUSR1)
            time.sleep(1.0)
        with suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)  # its session is its own
        self.popen.wait()
        self.look()

    def tail(self, most: int = _TAIL) -> str:
        return self.log.read_text(errors="replace")[-most:]


class Suite:
    """Runs cases and keeps the report.

    Args:
        module: of the cases, as :class:`gpu.rank.Cases`.
        work: a folder for logs, records, bundles and engines.
        deadline: seconds that all may take.
    """

    def __init__(
        self,
        module: str,
        *,
        device: str,
        ranks: int,
        out: Path,
        work: Path,
        deadline: float,
        only: Sequence[str],
        commit: str,
    ) -> None:
        self.module, self.device, self.ranks, self.out, self.work = module, device, ranks, out, work
        self.start = time.time()
        self.until = self.start + deadline
        found: list[Case] = importlib.import_module(module).cases(device, ranks)
        self.cases = {case.name: case for case in found if not only or any(part in case.name for part in only)}
        self.results = {name: Result(name) for name in self.cases}
        gpus = _lines(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]) if device == "cuda" else []
        commit = commit or next(iter(_lines(["git", "-C", str(ROOT), "rev-parse", "HEAD"])), "")
        # Ranks that share a GPU: their times mean nothing, their results do.
        self.shared = {NCCL_SWITCH: "1", STORES_SWITCH: "1"} if len(gpus) in range(1, ranks) else {}
        self.report = SuiteReport(ranks, shlex.join(sys.orig_argv), commit, gpus, list(self.results.values()))
        self.logs: list[str] = []
        self.launches = 0
        write_dist_info(work / "site")
        (work / "bundles").mkdir()

    def run(self) -> SuiteReport:
        """Run all cases, launch by launch."""
        self._write()
        with self._exports() as exported:
            for name in dict.fromkeys(case.launch for case in self.cases.values()):
                if name != "doors":
                    self._wait_for(exported)
                waiting = [case for case in self.cases.values() if case.launch == name]
                while waiting:
                    if self.until - time.time() < LEAST_SECONDS:
                        self._set(waiting, NOT_RUN, "the suite's deadline was too near")
                        break
                    waiting = self._launch(waiting)
        self._write()
        return self.report

    # --- processes ---

    def _start(self, log: str, given: dict[str, Any], env: dict[str, str]) -> Process:
        inherited = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
        threads = "1" if self.device == "cpu" else "4"
        whole = {
            **os.environ,
            **SIZES,
            "PYTHONPATH": os.pathsep.join([str(self.work / "site"), str(ROOT), *inherited]),
            "TORCHTRT_MD_CACHE": str(self.work / "cache"),
            "OMP_NUM_THREADS": threads,
            "TORCHINDUCTOR_COMPILE_THREADS": threads,
            "PYTHONUNBUFFERED": "1",
            **self.shared,
            **env,
        }
        told = {"module": self.module, "device": self.device, "work": str(self.work / "bundles"), **given}
        path = self.work / log
        with path.open("wb") as file:
            popen = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("rank.py")), json.dumps(told)],
                env=whole,
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return Process(popen, path)

    @contextmanager
    def _exports(self) -> Iterator[Process | None]:
        """The process that exports bundles, beside the first launch: it takes the CPU, and little of a GPU."""
        if all(case.launch == "doors" for case in self.cases.values()):
            yield None
            return
        process = self._start("export.log", {"export": True, "ranks": self.ranks}, {})
        try:
            yield process
        finally:
            process.kill()

    def _wait_for(self, exported: Process | None) -> None:
        while exported is not None and not exported.look() and self.until - time.time() > LEAST_SECONDS:
            time.sleep(_POLL_SECONDS)
        if exported is not None and exported.code != 0 and not any("export.log" in log for log in self.logs):
            self.logs.append(f"=== export.log, exit code {exported.code}\n{exported.tail()}")

    def _launch(self, cases: Sequence[Case]) -> list[Case]:
        """Run cases in one launch; those that it did not come to."""
        self.launches += 1
        env = {"WORLD_SIZE": str(self.ranks), "LOCAL_WORLD_SIZE": str(self.ranks), "MASTER_ADDR": "127.0.0.1"}
        env["MASTER_PORT"] = str(_free_port())
        records = [self.work / f"{self.launches}-{rank}.jsonl" for rank in range(self.ranks)]
        processes = []
        for rank, record in enumerate(records):
            record.touch()
            given = {"cases": [case.name for case in cases], "record": str(record), "until": self.until}
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(self._start(f"{self.launches}-{rank}.log", given, {**env, **own}))
        try:
            end = self._watch(processes, records)
        finally:
            for process in processes:
                process.kill()
        told = [_read(record) for record in records]
        left = self._judge(cases, told, processes, end)
        self._write()
        return left

    def _watch(self, processes: Sequence[Process], records: Sequence[Path]) -> str:
        """Until all have ended, or must; why they must."""
        first_end, lines, heard = None, 0, time.time()
        while True:
            now, told = time.time(), [_read(record) for record in records]
            if sum(map(len, told)) != lines:
                lines, heard = sum(map(len, told)), now
                self._judge_ended(told)
                self._write()
            for process in processes:
                process.look()
            if all(process.ended for process in processes):
                return ""
            ended = [p.ended for p in processes if p.ended is not None and p.code != 0]
            first_end = min(ended) if ended else None
            under_way = next((self.cases[line["begin"]] for line in reversed(told[0]) if "begin" in line), None)
            limit = START_SECONDS if under_way is None else under_way.seconds
            why = ""
            if now > self.until:
                why = "the suite's deadline"
            elif first_end is not None and now - first_end > GRACE_SECONDS:
                return "another process had ended"
            elif now - heard > limit:
                why = f"nothing was heard for {limit:.0f} s"
            if why:
                for process in processes:
                    process.kill(ask=True)
                return why
            time.sleep(_POLL_SECONDS)

    # --- verdicts ---

    def _judge_ended(self, told: Sequence[Sequence[dict[str, Any]]]) -> None:
        """Set the results of the cases that all ranks came to the end of."""
        self.report.versions.update(next((line["versions"] for line in told[0] if "versions" in line), {}))
        for name, case in self.cases.items():
            ends = [line for lines in told for line in lines if line.get("end") == name]
            if len(ends) == self.ranks and not case.ends:
                self._set_found(case, ends)

    def _set_found(self, case: Case, ends: Sequence[dict[str, Any]]) -> None:
        result = self.results[case.name]
        result.seconds = max(end["seconds"] for end in ends)
        worst = max(ends, key=lambda end: end["error"] or 0.0)
        result.error, result.dense_error = worst["error"], worst["dense_error"]
        raised = dict.fromkeys(end["raised"] for end in ends if end["raised"])
        problems = dict.fromkeys(problem for end in ends for problem in end["problems"])
        refused = dict.fromkeys(end["refused"] for end in ends if end["refused"])
        if len(refused) > 1:
            problems["the ranks raised different errors"] = None
        if raised or problems:
            result.state, result.message = FAILED, "\n".join([*raised, *problems, *refused])
        elif refused:
            result.state, result.message = REFUSED, next(iter(refused))
        else:
            result.state, result.message = PASSED, ends[0]["message"]  # rank 0's

    def _judge(
        self,
        cases: Sequence[Case],
        told: Sequence[Sequence[dict[str, Any]]],
        processes: Sequence[Process],
        end: str,
    ) -> list[Case]:
        """Set the results of a launch that has ended; the cases that it did not begin."""
        self._judge_ended(told)
        begun = {line["begin"] for lines in told for line in lines if "begin" in line}
        codes = ", ".join(f"rank {rank}: {process.code}" for rank, process in enumerate(processes))
        why = f"{end or 'the processes ended'} (exit codes: {codes})"
        wrong = False
        for case in cases:
            ends = [line for lines in told for line in lines if line.get("end") == case.name]
            if case.name not in begun:
                continue
            if case.ends:
                self._judge_end(case, ends, processes)
                wrong |= self.results[case.name].state == FAILED
            elif len(ends) < self.ranks:
                cut = end == "the suite's deadline"
                said = dict.fromkeys(found for line in ends for found in (line["raised"], *line["problems"]) if found)
                self._set([case], NOT_RUN if cut else FAILED, "\n".join([f"cut off: {why}", *said]))
                wrong = True
        if not begun:
            # none of these would be begun in another launch either
            near = end == "the suite's deadline" or time.time() + LEAST_SECONDS > self.until
            self._set(cases, NOT_RUN if near else FAILED, f"the launch did not begin: {why}")
            wrong = True
        if wrong:
            self.logs += [f"=== {p.log.name}, exit code {p.code}\n{p.tail()}" for p in processes]
        return [case for case in cases if case.name not in begun] if begun else []

    def _judge_end(self, case: Case, ends: Sequence[dict[str, Any]], processes: Sequence[Process]) -> None:
        """Judge a case in which a process must end: by its code and its output, and by what the others found."""
        if ends:
            self._set_found(case, ends)
        else:
            self._set([case], PASSED, "")
        first = next(iter(case.ends))
        result, output = self.results[case.name], "".join([processes[first].tail(), *(end["refused"] for end in ends)])
        problems = [f"the output of rank {first} does not say {word!r}" for word in case.says if word not in output]
        for rank, code in reversed(list(case.ends.items())):
            ended = processes[rank].code
            if not ended if code is None else ended != code:
                problems.insert(0, f"rank {rank} ended with {ended}, and not {'an error' if code is None else code}")
        if problems:
            result.state, result.message = FAILED, "\n".join([*problems, result.message])
        elif result.state == PASSED:
            result.message = result.message or ", ".join(f"rank {r} ended with {processes[r].code}" for r in case.ends)

    def _set(self, cases: Sequence[Case], state: str, message: str) -> None:
        for case in cases:
            self.results[case.name].state, self.results[case.name].message = state, message

    def _write(self) -> None:
        self.report.seconds = time.time() - self.start
        self.report.write(self.out)
        if self.logs:
            (self.out / "log.txt").write_text("\n".join(self.logs))


def _read(record: Path) -> list[dict[str, Any]]:
    """The lines of a record, whole ones only."""
    return [json.loads(line) for line in record.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _lines(command: list[str]) -> list[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.split("\n")[:-1] if done.returncode == 0 else []


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--ranks", type=int, default=2, help="processes; those beyond the GPUs share them, by NCCL 2.30"
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder of the report")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a few cases, without a GPU")
    parser.add_argument("--deadline", type=float, help="seconds; by default 360 for 2 ranks, 480 for more")
    parser.add_argument("--commit", default="", help="for the report, where git cannot tell")
    parser.add_argument("--only", action="append", help="the cases with this in their names; may be repeated")
    parser.add_argument("--cases", default="gpu.cases", help="the module of the cases")
    given = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no process is left behind
    with tempfile.TemporaryDirectory(prefix="gpu-suite-", ignore_cleanup_errors=True) as work:
        suite = Suite(
            given.cases,
            device=given.device,
            ranks=given.ranks,
            out=given.out,
            work=Path(work),
            deadline=given.deadline or (360.0 if given.ranks <= 2 else 480.0),
            only=given.only or (),
            commit=given.commit,
        )
        report = suite.run()
    print(report.table())
    for result in report.results:
        if result.state == FAILED:
            print(f"\nFAILED {result.name}\n{result.message}")
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main())
