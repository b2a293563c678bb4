"""Code in a process that has imported PyTorch and nothing of this package: forked, so that it starts in no time."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile

# A line has code and a file for what it prints; the answer is its exit code.
_SERVER = """
import json, os, sys, traceback, torch
for line in sys.stdin:
    code, file = json.loads(line)
    if not (child := os.fork()):
        out = os.open(file, os.O_WRONLY)
        os.dup2(out, 1)
        os.dup2(out, 2)
        failed = 0
        try:
            exec(code, {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            failed = 1
        sys.stdout.flush()
        os._exit(failed)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def _server() -> subprocess.Popen[str]:
    """It ends with this process, which closes its stdin."""
    command = [sys.executable, "-c", _SERVER]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/")


def fresh_python(code: str) -> str:
    """What the code prints."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.NamedTemporaryFile("r") as file:
        server.stdin.write(json.dumps([code, file.name]) + "\n")
        server.stdin.flush()
        ended = server.stdout.readline()
        printed = file.read()
    assert ended == "0\n", printed
    return printed
