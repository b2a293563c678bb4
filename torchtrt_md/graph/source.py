"""The user's own source line of a graph node or an error, and the model's name of an input, for messages."""

from __future__ import annotations

import functools
import inspect
import os
import re
import sysconfig
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from traceback import FrameSummary
from types import FrameType
from typing import TypeVar

import torch.fx

_HERE = Path(__file__).parents[1]
_FOLDERS = (Path(torch.__file__).parent, _HERE, (_HERE / "lowering").resolve())
# Frames of the machinery between the user's line and the op; an error points past them.  By whole path: the user's
# own code may well lie in a folder named torch.  Installed libraries lie below Python's own, and are not part of it.
MACHINERY = re.compile(
    "|".join(re.escape(f"{folder}{os.sep}") for folder in _FOLDERS)
    + rf"|^{re.escape(sysconfig.get_path('stdlib') + os.sep)}(?!site-packages|dist-packages)"
    + r"|[/\\]torch_tensorrt[/\\]|[/\\]torchao[/\\]|[/\\]typing_extensions\.py$|^<frozen |^<eval_with_key>"
    + r"|[/\\](?:site|dist)-packages[/\\](?:typer|click)[/\\]"  # the command line's, between it and a stage
)
_NAME = "user_name"  # in a placeholder's meta
T = TypeVar("T")
# The code is missing where Python cannot read the file, as for what was typed into a shell.
_FRAME = re.compile(
    r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>.+)(?:\n(?!\s*File ")\s*(?P<code>.*))?'
)


def source_line(node: torch.fx.Node) -> str:
    """``file:line in function: code`` of the innermost frame that is not PyTorch's, Python's or ours, or ``""``.

    A function that is not a ``forward`` may be called from many places, so the line in the ``forward`` that led to it
    follows: ``... (called from file:line in forward)``.  Capture records these frames on every node (:func:`told_now`).
    """
    return _line_of(node.stack_trace or "")


def user_name(node: torch.fx.Node) -> str:
    """The model's own name of a weight or an input, which capture notes on its placeholder; else the node's."""
    return str(node.meta.get(_NAME, node.name))


def set_user_name(node: torch.fx.Node, name: str) -> None:
    """Let messages call a placeholder so."""
    node.meta[_NAME] = name


def error_line(error: BaseException) -> str:
    """The same for where an error was raised."""
    return _cited(traceback.extract_tb(error.__traceback__))


def running_line() -> str:
    """The same for the code that is running now; for errors that are raised while the model's own code runs."""
    return _line_of(told_now(entry()))


def _line_of(stack: str) -> str:
    """Of a stack as Python formats it."""
    found = _FRAME.finditer(stack)
    return _cited([FrameSummary(f["file"], int(f["line"]), f["function"].strip(), line=f["code"] or "") for f in found])


def _told(frames: Iterable[tuple[str, str, T]]) -> list[T]:
    """The frames that are told of a stack: of the user's the innermost, and before it, where it is no ``forward``
    itself, the innermost ``forward`` that led to it.

    Args:
        frames: file, function and what stands for it, from the innermost one out.
    """
    told: list[T] = []
    for file, function, frame in frames:
        if (function == "forward" or not told) and not _is_machinery(file, function):
            told.append(frame)
            if function == "forward":
                break
    return told[::-1]


def _is_ours(file: str) -> bool:
    return file.startswith(f"{_HERE}{os.sep}")


def entry() -> FrameType | None:
    """The frame of the call that entered this package, of the code that is running now."""
    found, frame = None, inspect.currentframe()
    while frame is not None:
        found = frame if _is_ours(frame.f_code.co_filename) else found
        frame = frame.f_back
    return found


def told_now(entered: FrameType | None) -> str:
    """The frames that are told of the code that is running now, as Python formats them.

    It is called for each node of a graph, so it looks at as few frames as it can, and formats equal ones once.

    Args:
        entered: as :func:`entry` found it; what is outside of it is not looked at.
    """
    told = _told(_until(inspect.currentframe(), entered))
    return _formatted(tuple((f.f_code.co_filename, f.f_lineno, f.f_code.co_name) for f in told))


def _until(frame: FrameType | None, entered: FrameType | None) -> Iterator[tuple[str, str, FrameType]]:
    while frame is not None and frame is not entered:
        yield frame.f_code.co_filename, frame.f_code.co_name, frame
        frame = frame.f_back


@functools.lru_cache(1 << 12)
def _formatted(frames: tuple[tuple[str, int, str], ...]) -> str:
    return "".join(traceback.StackSummary.from_list([FrameSummary(*frame) for frame in frames]).format()).strip()


@functools.cache
def _is_machinery(file: str, function: str) -> bool:
    return MACHINERY.search(file) is not None or (file, function) == ("<string>", "<lambda>")  # make_fx's own


def _cited(stack: Sequence[FrameSummary]) -> str:
    """What to cite of a stack, whose innermost frame is the last."""
    entered = next((i for i, frame in enumerate(stack) if _is_ours(frame.filename)), 0)
    if not (told := _told((f.filename, f.name, f) for f in reversed(stack[entered:]))):
        return ""
    *callers, innermost = told
    code = f": {innermost.line.strip()}" if innermost.line else ""
    calls = [f" (called from {frame.filename}:{frame.lineno} in {frame.name})" for frame in callers]
    return "".join([f"{innermost.filename}:{innermost.lineno} in {innermost.name}{code}", *calls])
