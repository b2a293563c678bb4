"""The JSON Schema file is that of the code, and takes what is written and no field that is not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from cpp import samples

from torchtrt_md.bundle import schema

FILE = Path(__file__).parents[2] / "docs/manifest.schema.json"


def problems(manifest: Any) -> list[str]:
    checker = jsonschema.Draft202012Validator(json.loads(FILE.read_text()))
    return [error.message for error in checker.iter_errors(manifest)]


def test_the_file_is_current() -> None:
    assert FILE.read_text() == schema.text(), "run python -m torchtrt_md.bundle.schema > docs/manifest.schema.json"
    jsonschema.Draft202012Validator.check_schema(json.loads(FILE.read_text()))


@pytest.mark.parametrize("name", ["engines", "parts", "two_axes"])
def test_written_manifests_are_valid(name: str) -> None:
    manifest = json.loads(samples.texts()[name])
    assert problems(manifest) == []
    for field in ("transport", "decisions", "tuned_on"):  # which older writers of this schema may leave out
        del manifest[field]
    assert problems(manifest) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": 99}, "4 was expected"),
        ({"more": 1}, "'more' was unexpected"),
        ({"mesh": {"cp": "2"}}, "'2' is not of type 'integer'"),
        ({"result": {"output": 0, "constant": 1}}, "is not valid under any of the given schemas"),
        ({"result": {"tuple": [{"pigeon": 0}]}}, "is not valid under any of the given schemas"),
        ({"ranks": [[{"runs": "pigeon"}]]}, "'pigeon' is not one of"),
    ],
)
def test_others_are_not(change: dict[str, Any], said: str) -> None:
    manifest = json.loads(samples.texts()["engines"]) | change
    assert any(said in problem for problem in problems(manifest)), problems(manifest)


def test_a_manifest_without_a_field_is_not() -> None:
    manifest = json.loads(samples.texts()["engines"])
    del manifest["versions"]
    assert problems(manifest) == ["'versions' is a required property"]
