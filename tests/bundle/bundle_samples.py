"""A manifest of two ranks and the bundle of it, for the tests of bundles and of the runtime."""

from __future__ import annotations

from pathlib import Path

import msgspec

from torchtrt_md.bundle.manifest import Binding, Collective, Manifest, Segment, Tensor, Versions
from torchtrt_md.bundle.write import write_bundle


def manifest(**changes: object) -> Manifest:
    """x [4, 8] is split on dim 0 over ``cp``; two segments on each rank; ``return_dict=False`` is built in."""
    first = Segment(
        engine="first",
        axis="cp",
        inputs=[
            Binding("x", "input:x", "float32", [2, 8]),
            Binding("where", "coordinate:cp", "int32", [1]),
        ],
        outputs=[Binding("h", "value:h", "float16", [4, 8])],
        collectives=[Collective("all_gather", "cp", 2, "float16", 16, 32)],
    )
    second = Segment(
        engine="second",
        axis=None,
        inputs=[Binding("h", "value:h", "float16", [4, 8]), Binding("m", "input:mask.0", "bool", [4])],
        outputs=[Binding("y", "output:output0", "float32", [4, 8])],
        collectives=[],
    )
    whole = Manifest(
        schema=1,
        mesh={"cp": 2},
        inputs=[Tensor("x", "float32", [4, 8], [(0, "cp")]), Tensor("mask.0", "bool", [4])],
        outputs=[Tensor("output0", "float32", [4, 8])],
        constants={"return_dict": False, "mask.1": None},
        positional=["x", "mask"],
        result={"tuple": [{"output": 0}]},
        ranks=[[first, second], [first, second]],
        target="portable",
        versions=installed(),
        files={},
    )
    return msgspec.structs.replace(whole, **changes)


def installed() -> Versions:
    """The TensorRT that runs the tests."""
    from torchtrt_md.build.flavour import flavour

    return Versions("0.1.0", "2.14.0", flavour().name, flavour().version)


def engine_files(folder: Path) -> dict[str, Path]:
    """Two files that stand for engines: nothing in the tests of files looks inside."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"first": folder / "a.plan", "second": folder / "b.plan"}
    for key, path in files.items():
        path.write_bytes(f"the {key} engine".encode() * 1000)
    return files


def bundle(folder: Path, **changes: object) -> Path:
    """A bundle on disk."""
    write_bundle(folder, manifest(**changes), engine_files(folder.parent / f"{folder.name}-built"))
    return folder
