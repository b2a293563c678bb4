"""The command line in the test's own process, which has imported everything already."""

from __future__ import annotations

import sys

import pytest

from torchtrt_md.doors import cli


class Run:
    """``run(*arguments)`` gives the exit code, and what was printed to stdout and to stderr."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        self.monkeypatch.setattr(sys, "argv", ["torchtrt-md", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return (code, *self.capsys.readouterr())
