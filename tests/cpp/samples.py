"""The manifests that the C++ tests read: ``python tests/cpp/samples.py`` writes them anew."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import msgspec
import torch

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples/cpp/tests/samples"
if __name__ == "__main__":  # pytest finds both by itself
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from bundle import bundle_samples  # noqa: E402

from torchtrt_md.bundle.manifest import Manifest, Versions  # noqa: E402
from torchtrt_md.bundle.weights import save_weights  # noqa: E402
from torchtrt_md.bundle.write import write_bundle  # noqa: E402
from torchtrt_md.program import Sharding, Value  # noqa: E402
from torchtrt_md.segment import Binding, Collective, Segment, Wire  # noqa: E402
from torchtrt_md.selftest import self_test  # noqa: E402

_VERSIONS = Versions("0.1.0", "2.14.0", "TensorRT-RTX", "1.6.1.120")


def two_axes() -> Manifest:
    """Three engines on each of 4 ranks: x [4, 6, 8] is split on two dims, y on one, z on none."""
    first = Segment(
        runs="engine",
        file="first",
        axis="tp",
        inputs=(
            Binding("x", Wire("input", "x"), torch.bfloat16, (2, 3, 8)),
            Binding("w", Wire("weight", "up"), torch.bfloat16, (8, 16), transposed=True),
        ),
        outputs=(Binding("a", Wire("value", "a"), torch.bfloat16, (2, 6, 16)),),
        collectives=(Collective("all_gather", "tp", 2, torch.bfloat16, 96, 192),),
        name="up",
    )
    second = Segment(
        runs="engine",
        file="second",
        axis="dp",
        inputs=(
            Binding("a", Wire("value", "a"), torch.bfloat16, (2, 6, 16)),
            Binding("at", Wire("coordinate", "dp"), torch.int32, (1,)),
            Binding("w", Wire("weight", "up"), torch.bfloat16, (16, 8)),
        ),
        outputs=(
            Binding("b", Wire("value", "b"), torch.bfloat16, (2, 6, 16)),
            Binding("y", Wire("output", "y"), torch.float32, (2, 6)),
        ),
        collectives=(Collective("all_reduce", "dp", 2, torch.bfloat16, 192, 384),) * 2,
    )
    third = Segment(
        runs="engine",
        file="first",  # the same engine may run twice
        axis=None,
        inputs=(
            Binding("x", Wire("value", "b"), torch.bfloat16, (2, 6, 16)),
            Binding("w", Wire("output", "y"), torch.float32, (2, 6)),
        ),
        outputs=(Binding("a", Wire("output", "z"), torch.int64, (4,)),),
        collectives=(),
    )
    return bundle_samples.manifest(
        mesh={"dp": 2, "tp": 2},
        inputs=[Value("x", (4, 6, 8), torch.bfloat16, (Sharding(0, "dp"), Sharding(1, "tp")))],
        outputs=[Value("y", (4, 6), torch.float32, (Sharding(0, "dp"),)), Value("z", (4,), torch.int64)],
        constants={},
        positional=["x"],
        result={"dict": {"y": {"output": 0}, "rest": {"list": [{"output": 1}, {"constant": None}]}}},
        ranks=[[first, second, third]] * 4,
        weights=["weights"] * 4,
        self_tests=[
            msgspec.structs.replace(self_test("all_reduce", "dp", 2), file="reduce test"),
            msgspec.structs.replace(self_test("all_gather", "tp", 2), file="gather test"),
        ],
    )


def given() -> Manifest:
    """An engine on each of 4 ranks, whose weights are given at load: q and k joined, and a part of ``out``."""
    segment = Segment(
        runs="engine",
        file="first",
        axis=None,
        inputs=(
            Binding("x", Wire("input", "x"), torch.float32, (6, 8)),
            Binding("qk", Wire("weight", "q+k"), torch.float32, (8, 6), transposed=True),
            Binding("out", Wire("weight", "out"), torch.float32, (3, 4)),
        ),
        outputs=(Binding("y", Wire("output", "y"), torch.float32, (6, 8)),),
        collectives=(),
    )
    return bundle_samples.manifest(
        mesh={"dp": 2, "tp": 2},
        inputs=[Value("x", (6, 8), torch.float32)],
        outputs=[Value("y", (6, 8), torch.float32)],
        constants={},
        positional=["x"],
        ranks=[[segment]] * 4,
        weights=[None] * 4,
        self_tests=[],
        given=[
            Value("q", (8, 8), torch.float32, (Sharding(0, "tp"),)),
            Value("k", (4, 8), torch.float32, (Sharding(0, "tp"),)),
            Value("out", (6, 8), torch.float32, (Sharding(1, "tp"), Sharding(0, "dp"))),
        ],
        joined={"q+k": ["q", "k"]},
    )


def texts() -> dict[str, bytes]:
    """The samples by name."""
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder)
        bundle_samples.bundle(built / "engines", versions=_VERSIONS)
        bundle_samples.split_bundle(built / "parts", versions=_VERSIONS)
        files = {key: built / key for key in ("first", "second", "reduce test", "gather test", "weights")}
        for key, path in files.items():
            path.write_bytes(key.encode())
        save_weights({"up": torch.arange(128.0).view(16, 8).bfloat16()}, files["weights"])
        write_bundle(built / "two_axes", msgspec.structs.replace(two_axes(), versions=_VERSIONS), files)
        files["first"].write_bytes(b"first")  # the one before is in its bundle
        whole = msgspec.structs.replace(given(), versions=_VERSIONS)
        write_bundle(built / "given", whole, {"first": files["first"]})
        names = ("engines", "parts", "two_axes", "given")
        return {name: (built / name / "manifest.json").read_bytes() for name in names}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, text in texts().items():
        (FOLDER / f"{name}.json").write_bytes(text)


if __name__ == "__main__":
    main()
