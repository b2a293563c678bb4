"""The manifest of a program: what was built, in the words that a runner reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

import torchtrt_md
from torchtrt_md.build.engine import Binding, Engine
from torchtrt_md.build.flavour import flavour
from torchtrt_md.build.parts import BuiltPart
from torchtrt_md.bundle import manifest
from torchtrt_md.errors import BundleError
from torchtrt_md.lowering.schedule import ScheduledCollective
from torchtrt_md.parallel import Placement
from torchtrt_md.program import Output, ShardedProgram, Value, dtype_name


def manifest_of(
    program: ShardedProgram,
    ranks: Sequence[Sequence[manifest.Segment]],
    *,
    placement: Placement,
    target: str,
    weights: Sequence[str | None] | None = None,
    transport: str = "nccl",
    decisions: Sequence[manifest.Decision] = (),
    tuned_on: str = "",
) -> manifest.Manifest:
    """The manifest of a program whose ranks have these segments; its files' hashes are not in it yet.

    Raises:
        BundleError: the model returns what a bundle cannot name.
    """
    return manifest.Manifest(
        schema=manifest.SCHEMA,
        mesh=dict(program.mesh.axes),
        inputs=[_tensor(value) for value in program.inputs],
        outputs=[_tensor(value) for value in program.outputs],
        constants={name: _scalar(value) for name, value in program.constants.items()},
        positional=list(program.positional),
        result=_result(program),
        placement=placement,
        ranks=[list(segments) for segments in ranks],
        weights=list(weights or [None] * len(ranks)),
        transport=transport,
        decisions=list(decisions),
        tuned_on=tuned_on,
        target=target,
        versions=manifest.Versions(
            torchtrt_md=torchtrt_md.__version__,
            torch=str(torch.__version__),
            flavour=flavour().name,
            tensorrt=flavour().version,
        ),
        files={},
    )


def engine_segment(engine: Engine) -> manifest.Segment:
    """The one segment of a rank whose whole program is one engine."""
    return _segment("engine", engine.file.name, "", engine.axis, engine.inputs, engine.outputs, engine.collectives)


def part_segment(part: BuiltPart, file: str) -> manifest.Segment:
    """The segment of one part, which is in this file."""
    return _segment(part.runs, file, part.name, part.axis, part.inputs, part.outputs, part.collectives)


def _segment(
    runs: Any,
    file: str,
    name: str,
    axis: str | None,
    inputs: Sequence[Binding],
    outputs: Sequence[Binding],
    collectives: Sequence[ScheduledCollective],
) -> manifest.Segment:
    return manifest.Segment(
        runs=runs,
        file=file,
        name=name,
        axis=axis,
        inputs=[_binding(b) for b in inputs],
        outputs=[_binding(b) for b in outputs],
        collectives=[_collective(c) for c in collectives],
    )


def _binding(b: Binding) -> manifest.Binding:
    return manifest.Binding(b.name, b.source, dtype_name(b.dtype), list(b.shape), b.transposed)


def _collective(c: ScheduledCollective) -> manifest.Collective:
    return manifest.Collective(c.op, c.axis, c.size, dtype_name(c.dtype), c.elements, c.bytes_sent)


def _tensor(value: Value) -> manifest.Tensor:
    return manifest.Tensor(
        value.name, dtype_name(value.dtype), list(value.shape), [(s.dim, s.axis) for s in value.sharding]
    )


def _scalar(value: object) -> bool | int | float | str | None:
    assert value is None or isinstance(value, (bool, int, float, str))
    return value


def _result(program: ShardedProgram) -> dict[str, Any]:
    """How the outputs nest in what the model returns; a model output of its own class becomes a dict."""
    leaves = [{"output": leaf.index} if isinstance(leaf, Output) else {"constant": leaf} for leaf in program.out_leaves]
    nested = pytree.tree_unflatten([_Leaf(leaf) for leaf in leaves], program.out_spec)
    return _nested(nested)


class _Leaf:
    def __init__(self, value: dict[str, Any]) -> None:
        self.value = value


def _nested(node: Any) -> dict[str, Any]:
    if isinstance(node, _Leaf):
        constant = node.value.get("constant")
        if not isinstance(constant, (type(None), bool, int, float, str)):
            raise BundleError(
                f"the model returns a {type(constant).__name__}, which a bundle cannot hold",
                fix="return tensors and plain values only",
            )
        return node.value
    if isinstance(node, Mapping):
        return {"dict": {str(key): _nested(value) for key, value in node.items()}}
    if isinstance(node, (tuple, list)):
        return {"list" if isinstance(node, list) else "tuple": [_nested(value) for value in node]}
    raise BundleError(
        f"the model returns a {type(node).__name__}, whose parts a bundle cannot name",
        fix="return a tensor, tuple, list or dict (return_dict=False in diffusers)",
    )
