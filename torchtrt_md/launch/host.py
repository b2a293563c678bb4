"""Which host a process is on, and whether it still runs: a number of a process says nothing on another host."""

from __future__ import annotations

import functools
import os
import socket
from pathlib import Path


@functools.cache
def host() -> str:
    """This host, and on it the numbering of processes that this one is in; "" where there is no way to tell.

    Names alone do not do: hosts of a cluster may all be called ``localhost``, and containers of one host count their
    processes each for itself.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}|{boot}|{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def process(pid: int) -> str:
    """A process of this host, with the time of its start, for numbers are used again; "" if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if stat[0] in "ZX" else f"{host()}|{pid}|{stat[19]}"


def host_of(told: str) -> str:
    """The host of a process, from what :func:`process` told there."""
    return told.rpartition("|")[0].rpartition("|")[0]


def has_ended(told: str) -> bool:
    """Whether a process has ended, from what :func:`process` told of it there; False where it cannot be seen."""
    home = host_of(told)
    return bool(home) and home == host() and process(int(told.split("|")[-2])) != told
