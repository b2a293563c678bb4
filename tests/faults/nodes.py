"""Launches over two nodes, both on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rank_processes import free_port

import torchtrt_md as md
from faults import injections
from faults.cases import AT_ONCE, Outcome
from faults.exports import environment
from faults.processes import MARK, SLACK, TIMEOUT, Ended, Launch, running, tell
from torchtrt_md.launch import Launch as Joined
from torchtrt_md.launch import host
from torchtrt_md.launch.agree import Agreement
from torchtrt_md.runtime.bring_up import bring_up

PER_HOST = 2
_SECONDS = 300.0  # of torchrun: starts of Python, PyTorch and Inductor
_CLOSE = 1e-4


def by_torchrun(folder: Path) -> Outcome:
    """Two agents, each with a rank of its own: right results at every door, then a named error and no process left."""
    injections.export(folder / "exported")
    bundle = injections.eager(folder / "exported", folder / "bundle.mdtrt")
    mark = uuid.uuid4().hex
    env = {**environment(), "OMP_NUM_THREADS": "1", MARK: mark, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    command += ["--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    script = [str(Path(__file__).with_name("two_nodes.py")), str(bundle), str(folder)]
    logs = [folder / f"node{node}.log" for node in range(2)]
    agents = []
    for node, log in enumerate(logs):
        with log.open("wb") as file:
            agents.append(
                subprocess.Popen([*command, f"--node_rank={node}", *script], env=env, stdout=file, stderr=file)
            )
    until = time.monotonic() + _SECONDS
    try:
        codes: list[int | None] = [agent.wait(max(until - time.monotonic(), 0.1)) for agent in agents]
    except subprocess.TimeoutExpired:
        codes = [agent.poll() for agent in agents]
    left = running(mark)
    for agent in agents:
        agent.kill()
    outcome = Outcome("torchrun --nnodes=2: every door, then rank 1 is killed in a step", 0.0, codes, "")
    records = [folder / f"{rank}.json" for rank in range(2)]
    told = [json.loads(record.read_text()) if record.exists() else {} for record in records]
    for rank, own in enumerate(told):
        env_ = own.get("env", {})
        if (env_.get("LOCAL_RANK"), env_.get("GROUP_RANK"), env_.get("RANK")) != ("0", str(rank), str(rank)):
            outcome.problems.append(f"rank {rank} told {env_}")
        for door in ("compile", "backend", "load"):
            if not own.get(door, 1.0) < _CLOSE:
                outcome.problems.append(f"rank {rank}, {door}: the error is {own.get(door)}")
    outcome.said, outcome.seconds = told[0].get("error", ""), told[0].get("seconds", 0.0)
    if "rank 1 has ended" not in outcome.said and "rank 1 ended before" not in outcome.said:
        outcome.problems.append(f"rank 0 said {outcome.said!r}")
    if not all(codes):
        outcome.problems.append(f"torchrun ended with {codes}")
    if left:
        outcome.problems.append(f"processes {left} are left")
    if outcome.problems:
        outcome.problems += [log.read_text()[-3000:] for log in logs]
    return outcome


# --- four ranks, two on each of two hosts, as far as they can tell ---


def _as_on_two_hosts(rank: int) -> None:
    name = f"host{rank // PER_HOST}"
    host.host = lambda: f"{name}|boot|pid"  # type: ignore[assignment]
    os.environ["LOCAL_RANK"] = str(rank % PER_HOST)


def end(rank: int, ends: Sequence[int]) -> dict[str, Any]:
    """Take turns as for a cache, and vote; then some ranks end, and the others vote again."""
    _as_on_two_hosts(rank)
    launch = Joined.join(TIMEOUT, cpu=True)
    launch.in_turns("building", lambda: tell(turn=time.time()))
    launch.together("all have built", lambda: None)
    told = {"hosts": launch.hosts}
    tell(joined=told)
    if rank in ends:
        tell(strike=time.time())
        os._exit(9)
    Agreement(TIMEOUT).vote(None, "a vote on two hosts")
    return told


def _run(function: Callable[..., Any], args: tuple[Any, ...], folder: Path) -> tuple[list[Ended], list[float]]:
    """The ranks, and when each had its turn."""
    launch = Launch(function, args, folder / "launch", 2 * PER_HOST, patience=TIMEOUT * 2 + SLACK)
    launch.start()
    ended = launch.wait()
    turns = [next((line["turn"] for line in launch.told(rank) if "turn" in line), 0.0) for rank in range(launch.size)]
    return ended, turns


def _judge(outcome: Outcome, folder: Path, ends: Sequence[int], says: Sequence[str], seconds: float) -> Outcome:
    ended, turns = _run(end, (list(ends),), folder)
    outcome.codes = [rank.code for rank in ended]
    if not max(turns[0], turns[2]) <= min(turns[1], turns[3]) or 0.0 in turns:
        outcome.problems.append(f"the first rank of each host does not come first: {turns}")
    for rank, one in enumerate(ended):
        if rank in ends:
            continue
        outcome.seconds, outcome.said = max(outcome.seconds, one.seconds), one.error
        if one.code != 1 or not all(word in one.error for word in says) or one.seconds > seconds + SLACK:
            outcome.problems.append(f"rank {rank}, {one.seconds:.1f} s, {one.code}: {one.error or one.output[-1500:]}")
    return outcome


def one_rank_ends(folder: Path) -> Outcome:
    """The rank beside it sees it at once, and so all learn of it."""
    outcome = Outcome("two hosts: a rank ends, which its own host sees", 0.0, [], "")
    return _judge(outcome, folder, [3], ["rank 3 ended before it came to a vote on two hosts"], AT_ONCE)


def one_host_ends(folder: Path) -> Outcome:
    """Nobody is left to see it: the others must wait, and must not look for its processes among their own."""
    outcome = Outcome("two hosts: all ranks of one end, which the other cannot see", 0.0, [], "")
    says = [f"rank {rank} did not come to a vote on two hosts within {TIMEOUT:g} s" for rank in (2, 3)]
    return _judge(outcome, folder, [2, 3], says, TIMEOUT)


def _copies(rank: int) -> str:
    _as_on_two_hosts(rank)
    launch = Joined.join(TIMEOUT, cpu=True)
    how: dict[str, Any] = {"self_tests": [], "target": "", "transport": "store"}
    bring_up(launch, md.Mesh(dp=2, tp=2), [], lambda name: None, [], **how).close()  # type: ignore[arg-type,return-value]
    return ""


def copies(folder: Path) -> Outcome:
    """``transport="store"`` along an axis that lies across hosts is refused on all ranks."""
    outcome = Outcome("two hosts: transport='store' between them", 0.0, [], "")
    ended, _ = _run(_copies, (), folder)
    outcome.codes = [rank.code for rank in ended]
    for rank, one in enumerate(ended):
        outcome.seconds, outcome.said = max(outcome.seconds, one.seconds), one.error
        if one.code != 1 or "transport='store' is for GPUs of one host, and ranks 0, 2 of axis 'dp'" not in one.error:
            outcome.problems.append(f"rank {rank}: {one.error or one.output[-1500:]}")
    return outcome
