"""The user's own source line of a graph node or an error, for messages."""

from __future__ import annotations

import functools
import inspect
import os
import re
import sysconfig
import traceback
from collections.abc import Sequence
from pathlib import Path
from traceback import FrameSummary
from types import FrameType

import torch.fx

_HERE = Path(__file__).parents[1]
_FOLDERS = (Path(torch.__file__).parent, _HERE, (_HERE / "lowering").resolve())
# Frames of the machinery between the user's line and the op; an error points past them.  By whole path: the user's
# own code may well lie in a folder named torch.  Installed libraries lie below Python's own, and are not part of it.
MACHINERY = re.compile(
    "|".join(re.escape(f"{folder}{os.sep}") for folder in _FOLDERS)
    + rf"|^{re.escape(sysconfig.get_path('stdlib') + os.sep)}(?!site-packages|dist-packages)"
    + r"|[/\\]torch_tensorrt[/\\]|[/\\]typing_extensions\.py$|^<frozen |^<eval_with_key>"
    + r"|[/\\](?:site|dist)-packages[/\\](?:typer|click)[/\\]"  # the command line's, between it and a stage
)
# The code is missing where Python cannot read the file, as for what was typed into a shell.
_FRAME = re.compile(
    r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>.+)(?:\n(?!\s*File ")\s*(?P<code>.*))?'
)


def source_line(node: torch.fx.Node) -> str:
    """``file:line in function: code`` of the innermost frame that is not PyTorch's, Python's or ours, or ``""``.

    A function that is not a ``forward`` may be called from many places, so the line in the ``forward`` that led to it
    follows: ``... (called from file:line in forward)``.  Capture records these frames on every node (:func:`told_now`).
    """
    found = _FRAME.finditer(node.stack_trace or "")
    return _cited([FrameSummary(f["file"], int(f["line"]), f["function"].strip(), line=f["code"] or "") for f in found])


def error_line(error: BaseException) -> str:
    """The same for where an error was raised."""
    return _cited(traceback.extract_tb(error.__traceback__))


def running_line() -> str:
    """The same for the code that is running now; for errors that are raised while the model's own code runs."""
    return _cited(told_frames(traceback.extract_stack()))


def told_frames(stack: Sequence[FrameSummary]) -> list[FrameSummary]:
    """The frames that are told of a stack: of the user's, below the call that entered this package, the innermost.

    Before it the innermost ``forward`` that led to it, where it is none itself.
    """
    here = f"{_HERE}{os.sep}"
    entered = next((i for i, f in enumerate(stack) if f.filename.startswith(here)), 0)
    users = [frame for frame in stack[entered:] if not _is_machinery(frame.filename, frame.name)]
    if not users or users[-1].name == "forward":
        return users[-1:]
    return [frame for frame in reversed(users[:-1]) if frame.name == "forward"][:1] + users[-1:]


def entry() -> FrameType | None:
    """The frame of the call that entered this package, of the code that is running now."""
    found, frame = None, inspect.currentframe()
    while frame is not None:
        found = frame if frame.f_code.co_filename.startswith(f"{_HERE}{os.sep}") else found
        frame = frame.f_back
    return found


def told_now(entered: FrameType | None) -> str:
    """The frames that are told of the code that is running now, as Python formats them.

    It is called for each node of a graph, so it looks at as few frames as it can, and formats equal ones once.

    Args:
        entered: as :func:`entry` found it; what is outside of it is not looked at.
    """
    told: list[tuple[str, int, str]] = []
    frame = inspect.currentframe()
    while frame is not None and frame is not entered:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        if (function == "forward" or not told) and not _is_machinery(file, function):
            told.append((file, frame.f_lineno, function))
            if function == "forward":
                break
        frame = frame.f_back
    return _formatted(tuple(reversed(told)))


@functools.lru_cache(1 << 12)
def _formatted(frames: tuple[tuple[str, int, str], ...]) -> str:
    return "".join(traceback.StackSummary.from_list([FrameSummary(*frame) for frame in frames]).format()).strip()


@functools.cache
def _is_machinery(file: str, function: str) -> bool:
    return MACHINERY.search(file) is not None or (file, function) == ("<string>", "<lambda>")  # make_fx's own


def _cited(stack: Sequence[FrameSummary]) -> str:
    """What to cite of a stack, whose innermost frame is the last."""
    if not (told := told_frames(stack)):
        return ""
    *callers, innermost = told
    code = f": {innermost.line.strip()}" if innermost.line else ""
    calls = [f" (called from {frame.filename}:{frame.lineno} in {frame.name})" for frame in callers]
    return "".join([f"{innermost.filename}:{innermost.lineno} in {innermost.name}{code}", *calls])
