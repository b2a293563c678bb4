"""Bundles that start quickly."""

from pathlib import Path
from typing import Any

import msgspec

from torchtrt_md.bundle import read_manifest
from torchtrt_md.bundle.manifest import MANIFEST, encode


def op_by_op(bundle: Path, **changes: Any) -> None:
    """Let PyTorch run a bundle's graphs op by op, as Inductor takes its time to compile; with other changes."""
    whole = read_manifest(bundle)
    ranks = [[msgspec.structs.replace(segment, runs="eager") for segment in segments] for segments in whole.ranks]
    (bundle / MANIFEST).write_bytes(encode(msgspec.structs.replace(whole, **{"ranks": ranks, **changes})))
