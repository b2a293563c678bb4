"""A wrong type or value of any argument of a stage is refused by the argument's name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from torch import nn

import torchtrt_md as md
from torchtrt_md.checks import check_export
from torchtrt_md.errors import OptionError
from torchtrt_md.options import Options

MODEL, ARGS, _ = models.mlp()
X = ARGS[0]
ONE = md.Mesh(tp=1)
PROGRAM = md.capture(MODEL, ARGS, mesh=ONE)


def capture(**changes: Any) -> Any:
    return md.capture(**{"model": MODEL, "args": ARGS, "mesh": ONE, **changes})


def lower(**changes: Any) -> Any:
    return md.lower(**{"program": PROGRAM, **changes})


def verify(**changes: Any) -> Any:
    return md.verify(**{"program": PROGRAM, "model": MODEL, "args": ARGS, **changes})


def build(**changes: Any) -> Any:
    return md.build(**{"program": PROGRAM, "folder": "never written", **changes})


def export(**changes: Any) -> None:
    given: dict[str, Any] = {
        "model": MODEL,
        "args": ARGS,
        "kwargs": None,
        "mesh": ONE,
        "parallel": (),
        "out": "out.mdtrt",
        "check": True,
        "compute": "tensorrt",
        "transport": "nccl",
        "choices": None,
        "dense": None,
        "weights": None,
        "coordinates_inside": False,
        "format": "bundle",
        "weight_streaming": False,
        "strip_weights": False,
        "dump": None,
        "progress": print,
    }
    options = {name: changes.pop(name) for name in ("target", "placement", "exchange_dtype") if name in changes}
    check_export(**{**given, **changes})
    Options(**options)


@pytest.mark.parametrize(
    ("stage", "name", "value", "fix"),
    [
        (capture, "model", nn.Linear, "an instance of it: Linear(...)"),
        (capture, "model", "model", "a torch.nn.Module"),
        (capture, "args", X, "args=(x,)"),
        (capture, "args", {"x": X}, "a tuple"),
        (capture, "args", "x", "a tuple"),
        (capture, "kwargs", (X,), "a dict"),
        (capture, "kwargs", {0: X}, "the names of arguments"),
        (capture, "mesh", "tp=1", "Mesh.parse('tp=1')"),
        (capture, "mesh", {"tp": 1}, "Mesh(cp=4)"),
        (capture, "mesh", None, "Mesh(cp=4)"),
        (capture, "parallel", "tp", 'TensorParallel("tp")'),
        (capture, "parallel", ["tp"], 'TensorParallel("tp")'),
        (capture, "parallel", md.TensorParallel, 'TensorParallel("tp")'),
        (capture, "parallel", None, 'TensorParallel("tp")'),
        (capture, "weights", MODEL, "state_dict()"),
        (capture, "weights", {"up.weight": 3}, "tensors by name"),
        (lower, "program", MODEL, "what torchtrt_md.capture"),
        (lower, "placement", "splti", "'engine' or 'split'"),
        (lower, "placement", "auto", "'engine' or 'split'"),
        (lower, "exchanges", ["ulysses"], "a dict"),
        (lower, "exchanges", {"key": "ulysses"}, "Exchange"),
        (lower, "dump", 3, "a folder"),
        (verify, "program", MODEL, "what torchtrt_md.capture"),
        (verify, "model", PROGRAM, "a torch.nn.Module"),
        (verify, "args", X, "args=(x,)"),
        (verify, "kwargs", [X], "a dict"),
        (build, "program", MODEL, "what torchtrt_md.capture"),
        (build, "folder", 3, "a folder"),
        (build, "target", 90, '"portable"'),
        (build, "ranks", 0, "a list of ranks"),
        (build, "ranks", [1], "0"),
        (build, "progress", True, "a function"),
        (export, "model", nn.Linear, "an instance"),
        (export, "args", X, "args=(x,)"),
        (export, "mesh", "tp=1", "Mesh.parse"),
        (export, "parallel", ["tp"], "TensorParallel"),
        (export, "out", 3, "a folder"),
        (export, "target", 90, '"portable"'),
        (export, "check", 1, "True or False"),
        (export, "placement", "splti", "'auto' or 'engine' or 'split'"),
        (export, "compute", "auto", "'tensorrt' or 'inductor'"),
        (export, "transport", "copy", "'nccl' or 'store'"),
        (export, "exchange_dtype", "float16", "'model' or 'float8'"),
        (export, "choices", {}, "md.compile"),
        (export, "dense", {}, "the dense model"),
        (export, "weights", 3, "the folder of the dense model"),
        (export, "coordinates_inside", 1, "True or False"),
        (export, "format", "tritn", "'bundle' or 'triton-python' or 'triton'"),
        (export, "weight_streaming", 1, "True or False"),
        (export, "strip_weights", 1, "True or False"),
        (export, "dump", 3, "a folder"),
        (export, "progress", None, "a function"),
    ],
)
def test_a_wrong_argument_is_named(stage: Callable[..., Any], name: str, value: object, fix: str) -> None:
    with pytest.raises(OptionError, match=f"'{name}' cannot be ") as caught:
        stage(**{name: value})
    assert fix in caught.value.fix


def test_right_arguments_in_every_form(tmp_path: Path) -> None:
    capture(model=copy.deepcopy(MODEL).to("meta"), args=[X], kwargs={}, parallel=[], weights=MODEL.state_dict())
    capture(args=(), kwargs={"x": X}, parallel=(md.TensorParallel("tp", plan={"up": "colwise", "down": "rowwise"}),))
    lower(placement="split", exchanges={}, dump=str(tmp_path))
    lower(dump=tmp_path)
    export()
    export(out=tmp_path, parallel=md.DataParallel("tp"), dense=MODEL, placement="split")
    assert torch.equal(X, ARGS[0])
