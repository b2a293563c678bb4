"""The user's own source line of a graph node, for error messages."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch.fx

_HERE = Path(__file__).parents[1]
_FOLDERS = (Path(torch.__file__).parent, _HERE, (_HERE / "lowering").resolve())
# Frames of the machinery between the user's line and the op; an error points past them.  By whole path: the user's
# own code may well lie in a folder named torch.
MACHINERY = re.compile("|".join(re.escape(f"{folder}{os.sep}") for folder in _FOLDERS) + r"|[/\\]torch_tensorrt[/\\]")
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>.+)\n\s*(?P<code>.*)')


def source_line(node: torch.fx.Node) -> str:
    """``file:line in function: code`` of the innermost frame that is not PyTorch's or ours, or ``""``.

    Capture records Python stacks on every node (``make_fx(record_stack_traces=True)``).
    """
    frames = list(_FRAME.finditer(node.stack_trace or ""))
    for frame in reversed(frames):
        if not MACHINERY.search(frame["file"]):
            return f"{frame['file']}:{frame['line']} in {frame['function'].strip()}: {frame['code'].strip()}"
    return ""
