"""Manifests of two ranks and bundles of them, for the tests of bundles and of the runtime."""

from __future__ import annotations

from pathlib import Path

import msgspec
import torch

from torchtrt_md.bundle.manifest import SCHEMA, Manifest, Versions
from torchtrt_md.bundle.weights import save_weights
from torchtrt_md.bundle.write import write_bundle
from torchtrt_md.choices import Decision
from torchtrt_md.program import Sharding, Value
from torchtrt_md.segment import Binding, Collective, Segment, Wire
from torchtrt_md.selftest import self_test


def manifest(**changes: object) -> Manifest:
    """x [4, 8] is split on dim 0 over ``cp``; two segments on each rank; ``return_dict=False`` is built in."""
    first = Segment(
        runs="engine",
        file="first",
        axis="cp",
        inputs=(
            Binding("x", Wire("input", "x"), torch.float32, (2, 8)),
            Binding("where", Wire("coordinate", "cp"), torch.int32, (1,)),
        ),
        outputs=(Binding("h", Wire("value", "h"), torch.float16, (4, 8)),),
        collectives=(Collective("all_gather", "cp", 2, torch.float16, 16, 32),),
    )
    second = Segment(
        runs="engine",
        file="second",
        axis=None,
        inputs=(
            Binding("h", Wire("value", "h"), torch.float16, (4, 8)),
            Binding("m", Wire("input", "mask.0"), torch.bool, (4,)),
        ),
        outputs=(Binding("y", Wire("output", "output0"), torch.float32, (4, 8)),),
        collectives=(),
    )
    whole = Manifest(
        schema=SCHEMA,
        mesh={"cp": 2},
        inputs=[Value("x", (4, 8), torch.float32, (Sharding(0, "cp"),)), Value("mask.0", (4,), torch.bool)],
        outputs=[Value("output0", (4, 8), torch.float32)],
        constants={"return_dict": False, "mask.1": None},
        positional=["x", "mask"],
        result={"tuple": [{"output": 0}]},
        placement="engine",
        ranks=[[first, second], [first, second]],
        weights=[None, None],
        target="portable",
        versions=installed(),
        files={},
        self_tests=[gather_test()],
    )
    return msgspec.structs.replace(whole, **changes)


def gather_test() -> Segment:
    """The self-test that the first segment asks for."""
    return msgspec.structs.replace(self_test("all_gather", "cp", 2), file="gather test")


def split_manifest(**changes: object) -> Manifest:
    """x [4, 8] goes through an engine, a graph that gathers it, and one for Inductor; each rank has a weight."""
    engine = Segment(
        runs="engine",
        file="engine",
        axis=None,
        inputs=(
            Binding("x", Wire("input", "x"), torch.float32, (2, 8)),
            Binding("w", Wire("weight", "up"), torch.float32, (8, 16), transposed=True),
        ),
        outputs=(Binding("h", Wire("value", "h"), torch.float32, (2, 16)),),
        collectives=(),
        name="block 0",
    )
    eager = Segment(
        runs="eager",
        file="gather",
        axis=None,
        inputs=(Binding("h", Wire("value", "h"), torch.float32, (2, 16)),),
        outputs=(Binding("whole", Wire("output", "output0"), torch.float32, (4, 16)),),
        collectives=(Collective("all_gather", "cp", 2, torch.float32, 32, 128),),
    )
    inductor = Segment(
        runs="inductor",
        file="last",
        axis=None,
        inputs=(
            Binding("whole", Wire("output", "output0"), torch.float32, (4, 16)),
            Binding("w", Wire("weight", "up"), torch.float32, (16, 8)),
        ),
        outputs=(Binding("y", Wire("output", "output1"), torch.float32, (4, 8)),),
        collectives=(),
    )
    split = {
        "inputs": [Value("x", (4, 8), torch.float32, (Sharding(0, "cp"),))],
        "outputs": [Value("output0", (4, 16), torch.float32), Value("output1", (4, 8), torch.float32)],
        "constants": {},
        "positional": ["x"],
        "result": {"tuple": [{"output": 0}, {"output": 1}]},
        "placement": "split",
        "ranks": [[engine, eager, inductor], [engine, eager, inductor]],
        "weights": ["weights 0", "weights 1"],
        "self_tests": [],
        "decisions": [Decision("block 0", "engine", "faster", {"engine": 0.5, "inductor": 0.75})],
        "tuned_on": "NVIDIA H200",
    }
    return msgspec.structs.replace(manifest(), **split | changes)


def split_files(folder: Path) -> dict[str, Path]:
    """The files of :func:`split_manifest`; nothing looks inside, other than at the weights, equal on both ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {key: folder / key for key in ("engine", "gather", "last", "weights 0", "weights 1")}
    for key, path in files.items():
        if key.startswith("weights"):
            save_weights({"up": torch.arange(128.0).view(16, 8), "unused": torch.zeros(3)}, path)
        else:
            path.write_bytes(f"the {key} file".encode())
    return files


def split_bundle(folder: Path, **changes: object) -> Path:
    """The bundle of :func:`split_manifest` on disk."""
    write_bundle(folder, split_manifest(**changes), split_files(folder.parent / f"{folder.name}-built"))
    return folder


def installed() -> Versions:
    """The TensorRT that runs the tests."""
    from torchtrt_md.build.flavour import flavour

    return Versions("0.1.0", "2.14.0", flavour().name, flavour().version)


def engine_files(folder: Path) -> dict[str, Path]:
    """Three files that stand for engines: nothing in the tests of files looks inside."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"first": folder / "a.plan", "second": folder / "b.plan", "gather test": folder / "c.plan"}
    for key, path in files.items():
        path.write_bytes(f"the {key} engine".encode() * 1000)
    return files


def bundle(folder: Path, **changes: object) -> Path:
    """A bundle on disk."""
    write_bundle(folder, manifest(**changes), engine_files(folder.parent / f"{folder.name}-built"))
    return folder
