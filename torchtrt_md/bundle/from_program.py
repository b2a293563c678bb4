"""The manifest of a program: what was built, in the words that a runner reads."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

import torchtrt_md
from torchtrt_md.bundle import manifest
from torchtrt_md.choices import Choices
from torchtrt_md.errors import BundleError
from torchtrt_md.program import Output, ShardedProgram, Sharding, Value, Weight
from torchtrt_md.segment import Segment


def manifest_of(
    program: ShardedProgram,
    ranks: Sequence[Sequence[Segment]],
    choices: Choices,
    *,
    target: str,
    weights: Sequence[str | None] | None = None,
    self_tests: Sequence[Segment] = (),
    given: Collection[str] = (),
) -> manifest.Manifest:
    """The manifest of a program whose ranks have these segments; its files' hashes are not in it yet.

    Args:
        given: the weights that segments read and that are not in the bundle.

    Raises:
        BundleError: the model returns what a bundle cannot name, or a weight that is given is cut unevenly.
    """
    return manifest.Manifest(
        schema=manifest.SCHEMA,
        mesh=dict(program.mesh.axes),
        inputs=list(program.inputs),
        outputs=list(program.outputs),
        constants={name: _scalar(value) for name, value in program.constants.items()},
        positional=list(program.positional),
        opaque=list(program.opaque),
        result=_result(program),
        placement=choices.placement,
        ranks=[list(segments) for segments in ranks],
        weights=list(weights or [None] * len(ranks)),
        transport=choices.transport,
        decisions=list(choices.decisions),
        tuned_on=choices.tuned_on,
        target=target,
        versions=_versions(any(segment.runs == "engine" for segments in ranks for segment in segments)),
        files={},
        self_tests=list(self_tests),
        given=_given(program, given),
        joined={s.name: [part.name for part in s.parts] for s in _weights(program) if s.parts and s.name in given},
    )


def _weights(program: ShardedProgram) -> list[Weight]:
    return [source for source in program.sources.values() if isinstance(source, Weight)]


def _given(program: ShardedProgram, names: Collection[str]) -> list[Value]:
    """The whole weights that these are, or are joined of, each once."""
    leaves = [leaf for s in _weights(program) if s.name in names for leaf in (s.parts or (s,))]
    return list({w.name: Value(w.name, w.shape, w.dtype, even(w)) for w in leaves}.values())


def even(weight: Weight) -> tuple[Sharding, ...]:
    """How a weight that is given is cut: into even chunks, which is all that a manifest can say.

    Raises:
        BundleError: it is cut otherwise.
    """
    found = tuple(s for s in weight.shardings if isinstance(s, Sharding))
    if found != weight.shardings:
        raise BundleError(
            f"the weight {weight.name!r} of shape {list(weight.shape)} is not cut into even chunks of its own,"
            " so no bundle without weights can say what a rank takes of it",
            fix="export with strip_weights=False; or choose a number of ranks that divides it, and a plan that neither"
            " repeats it nor cuts it in blocks",
        )
    return found


def _versions(engines: bool) -> manifest.Versions:
    """Of what is installed; of TensorRT only where there are engines, which alone depend on it."""
    name = version = ""
    if engines:
        from torchtrt_md.build.flavour import flavour

        name, version = flavour().name, flavour().version
    return manifest.Versions(torchtrt_md.__version__, str(torch.__version__), name, version)


def _scalar(value: object) -> bool | int | float | str | None:
    assert value is None or isinstance(value, (bool, int, float, str))
    return value


def _result(program: ShardedProgram) -> dict[str, Any]:
    """How the outputs nest in what the model returns; a model output of its own class becomes a dict."""
    leaves = [{"output": leaf.index} if isinstance(leaf, Output) else {"constant": leaf} for leaf in program.out_leaves]
    nested = pytree.tree_unflatten([_Leaf(leaf) for leaf in leaves], program.out_spec)
    return _nested(nested)


def check_keys(program: ShardedProgram) -> None:
    """See that what the model returns has names that a manifest can hold.

    Raises:
        BundleError: a key of a dict is no string.
    """
    nested = pytree.tree_unflatten(list(program.out_leaves), program.out_spec)
    try:
        leaves = pytree.tree_flatten_with_path(nested)[0]
    except ValueError:  # of a class that was registered without keys, which a bundle cannot name either
        return
    for path, _ in leaves:
        for key in path:
            if isinstance(key, pytree.MappingKey) and not isinstance(key.key, str):
                raise BundleError(
                    f"the model returns a dict with the key {key.key!r}, and names in a bundle are strings",
                    fix="return a dict whose keys are strings, or a tuple",
                )


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
