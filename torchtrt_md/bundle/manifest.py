"""``manifest.json``: everything a runner, in any language, must know to run a bundle.

The schema is these structs.  A reader refuses a ``schema`` that it does not know.
"""

from __future__ import annotations

from typing import Any

import msgspec
import torch

from torchtrt_md.choices import Decision
from torchtrt_md.program import Value, dtype_name
from torchtrt_md.segment import Segment

SCHEMA = 4
MANIFEST = "manifest.json"


class Versions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the bundle was made with.  ``flavour`` is "TensorRT" or "TensorRT-RTX", "" where no segment is an engine."""

    torchtrt_md: str
    torch: str
    flavour: str
    tensorrt: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file.

    ``placement`` says where attention runs, "engine" or "split", and ``transport`` what does the exchanges between
    segments, "nccl" or a kernel that "store"s.  ``ranks[r]`` holds rank r's segments and
    ``weights[r]`` the path of the safetensors file with its part of the weights, null where it needs none: engines
    may hold their own.  ``constants`` are the arguments that are built in, as far as a call can be compared with them;
    ``opaque`` names those with which it cannot.  A leaf of an argument is named by its path, in ``inputs`` as in both:
    ``mask``, ``mask.0``.  ``positional`` names the arguments that may be passed by position, in order; one of them may
    be nested, and then names no input itself, or be built in.  ``result`` nests the outputs as the model returns them:
    ``{"output": i}``, ``{"constant": x}``, ``{"tuple": [...]}``, ``{"list": [...]}`` or ``{"dict": {...}}``.
    ``files`` gives the sha256 of every other file of the bundle.  ``self_tests`` are engines of one collective each, in
    the order in which all ranks run them first (:mod:`torchtrt_md.selftest`).  ``given`` are the weights
    that the bundle does not have, whole, with how each rank's part is cut; ``joined`` weights are several of these,
    each as the rank holds it, one after the other on dim 0.  ``decisions`` is what was chosen and why; ``tuned_on`` the
    name of the GPU whose times decided, "" where none did.
    """

    schema: int
    mesh: dict[str, int]
    inputs: list[Value]
    outputs: list[Value]
    constants: dict[str, bool | int | float | str | None]
    positional: list[str]
    result: dict[str, Any]
    placement: str
    ranks: list[list[Segment]]
    weights: list[str | None]
    target: str
    versions: Versions
    files: dict[str, str]
    self_tests: list[Segment] = []
    given: list[Value] = []
    joined: dict[str, list[str]] = {}
    transport: str = "nccl"
    decisions: list[Decision] = []
    tuned_on: str = ""
    opaque: list[str] = []

    @property
    def given_names(self) -> set[str]:
        """The weights that are given at load, by the names that segments read."""
        return {value.name for value in self.given} | set(self.joined)


def encode(manifest: Manifest) -> bytes:
    """The manifest as JSON: a dtype is PyTorch's name of it, a source ``[kind, name]``, a sharding ``[dim, axis]``."""
    return msgspec.json.format(msgspec.json.encode(manifest, enc_hook=to_json), indent=2) + b"\n"


def decode(text: bytes) -> Manifest:
    """The manifest of :func:`encode`.

    Raises:
        msgspec.DecodeError: it is no such JSON.
    """
    return msgspec.json.decode(text, type=Manifest, dec_hook=_from_json)


def to_json(value: Any) -> str:
    """What JSON has of a dtype; msgspec asks for what it does not know."""
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    raise NotImplementedError(f"a manifest holds no {type(value).__name__}")


def _from_json(kind: type, name: Any) -> Any:
    # getattr would import some modules of these names, and torch.half has another name of its own
    found = vars(torch).get(name) if kind is torch.dtype and isinstance(name, str) else None
    if not isinstance(found, torch.dtype) or dtype_name(found) != name:
        raise ValueError(f"it has the dtype {name!r}, which PyTorch {torch.__version__} lacks")
    return found
