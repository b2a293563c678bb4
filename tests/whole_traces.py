"""The graph of a capture in which blocks may be written down again, compared with that of its whole trace."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn

import torchtrt_md as md
from torchtrt_md.capture.repeated import RepeatedBlocks
from torchtrt_md.graph.source import source_line
from torchtrt_md.graph.text import graph_text

MODULE = RepeatedBlocks.__init__.__globals__  # torchtrt_md.capture, the function, hides the package's modules


def captured(model: nn.Module, *inputs: Tensor, **named: Any) -> md.ShardedProgram:
    return md.capture(model, inputs, named, mesh=md.Mesh(dp=2), parallel=md.DataParallel("dp"))


def is_that_of_the_whole_trace(model: nn.Module, *inputs: Tensor, **named: Any) -> md.ShardedProgram:
    program = captured(model, *inputs, **named)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODULE, "KNOWN", frozenset())
        whole = captured(model, *inputs, **named)
    assert graph_text(program.graphs[0]) == graph_text(whole.graphs[0])
    names = [[node.name for node in p.graphs[0].graph.find_nodes(op="placeholder")] for p in (program, whole)]
    assert names[0] == names[1]
    lines = [[source_line(node) for node in p.graphs[0].graph.nodes] for p in (program, whole)]
    assert lines[0] == lines[1]
    assert program.out_spec == whole.out_spec
    assert program.out_leaves == whole.out_leaves
    return program
