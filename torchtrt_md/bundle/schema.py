"""The JSON Schema of ``manifest.json``, made from the structs that read it.

    python -m torchtrt_md.bundle.schema > docs/manifest.schema.json

It says what the fields are and of which types.  What else makes a manifest consistent is in
:mod:`torchtrt_md.bundle.structure`.
"""

from __future__ import annotations

import inspect
from typing import Any

import msgspec
import torch

from torchtrt_md.bundle.manifest import SCHEMA, Manifest
from torchtrt_md.program import dtype_name

_REF = "#/$defs/{name}"


def json_schema() -> dict[str, Any]:
    """The schema, in JSON Schema's draft 2020-12."""
    (_, parts) = msgspec.json.schema_components([Manifest], schema_hook=_dtype, ref_template=_REF)
    root = parts.pop("Manifest")
    root["properties"]["schema"] = {"const": SCHEMA}
    root["properties"]["result"] = {"$ref": _REF.format(name="Result")}
    parts["Result"] = _result()
    for part in (root, *parts.values()):
        if "description" in part:
            part["description"] = inspect.cleandoc(part["description"])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "manifest.json of a bundle of torchtrt_md",
        **{key: value for key, value in root.items() if key != "title"},
        "$defs": dict(sorted(parts.items())),
    }


def text() -> str:
    """The schema as the file has it."""
    return msgspec.json.format(msgspec.json.encode(json_schema()), indent=2).decode() + "\n"


def _dtype(kind: type) -> dict[str, Any]:
    """A dtype by PyTorch's name of it.  Which there are is PyTorch's to say, and grows."""
    if kind is torch.dtype:
        return {"type": "string", "pattern": "^[a-z][a-z0-9_]*$", "examples": [dtype_name(torch.bfloat16)]}
    raise NotImplementedError(f"a manifest holds no {kind.__name__}")


def _result() -> dict[str, Any]:
    """How the outputs nest: an object of one field, which says what it is."""
    nested = {"$ref": _REF.format(name="Result")}
    forms: dict[str, dict[str, Any]] = {
        "output": {"type": "integer", "minimum": 0},
        "constant": {"type": ["boolean", "number", "string", "null"]},
        "tuple": {"type": "array", "items": nested},
        "list": {"type": "array", "items": nested},
        "dict": {"type": "object", "additionalProperties": nested},
    }
    return {
        "title": "Result",
        "oneOf": [
            {"type": "object", "properties": {kind: form}, "required": [kind], "additionalProperties": False}
            for kind, form in forms.items()
        ],
    }


if __name__ == "__main__":
    print(text(), end="")
