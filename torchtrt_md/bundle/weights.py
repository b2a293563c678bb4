"""A rank's weights as a safetensors file: written and read one tensor at a time.

The format is https://huggingface.co/docs/safetensors: the length of the header, the header as JSON (name -> dtype,
shape, where its bytes are), and the tensors' bytes.  It is read by the library, which maps the file and moves each
tensor to the device as it is asked for.  The library's writer needs all tensors contiguous at once, which would be a
copy of a rank's whole shard, since its parts of the weights are views; so the writer here streams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from torchtrt_md.bundle.files import plain_file
from torchtrt_md.bundle.manifest import Manifest
from torchtrt_md.checkpoint import DTYPES, opened
from torchtrt_md.errors import BundleError, WeightsError
from torchtrt_md.program import dtype_name
from torchtrt_md.segment import Binding

_ALIGNMENT = 8  # of the tensors' bytes in the file


def save_weights(tensors: Mapping[str, Tensor], file: Path, value_of: Callable[[str], Tensor] | None = None) -> None:
    """Write tensors, on any device and of any strides.  Equal tensors under equal names give equal files.

    Args:
        tensors: by name; where ``value_of`` is given their dtypes and shapes only, as of tensors on meta.
        value_of: gives the tensor of a name, which is let go of before the next is asked for.

    Raises:
        BundleError: a tensor that is not dense or of a dtype that the format lacks.
    """
    value_of = value_of or tensors.__getitem__
    # The largest elements first, as the format's own writer has it: every tensor is then aligned for its dtype.
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header, end = {}, 0
    for name in names:
        tensor = tensors[name]
        dtype = DTYPES.get(dtype_name(tensor.dtype))
        if dtype is None or tensor.layout is not torch.strided:
            raise BundleError(
                f"weight {name!r} is a {tensor.layout} tensor of {tensor.dtype}, which safetensors cannot hold",
                fix=f"convert it to a dense tensor of one of {', '.join(DTYPES)}",
            )
        start, end = end, end + tensor.numel() * tensor.itemsize
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = msgspec.json.encode(header)
    text += b" " * (-len(text) % _ALIGNMENT)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little"))
        out.write(text)
        for name in names:
            value = value_of(name)
            assert (value.shape, value.dtype) == (tensors[name].shape, tensors[name].dtype), name
            flat = value.detach().cpu().contiguous().reshape(-1)
            out.write(flat.view(torch.uint8).numpy().data)


def load_weights(file: Path, names: Iterable[str], device: torch.device | str) -> dict[str, Tensor]:
    """Read the tensors of these names, and no others, each straight to the device.

    Raises:
        BundleError: not a whole safetensors file, or a name that it lacks.
    """
    with _opened(file, torch.device(device)) as stored:
        there = set(stored.keys())
        found: dict[str, Tensor] = {}
        for name in names:
            _check_there(name, there, file)
            found[name] = stored.get_tensor(name)
        return found


def check_weights(file: Path, bindings: Iterable[Binding]) -> None:
    """Compare the header of a file of weights with what segments take.  No tensor is read.

    Args:
        bindings: those that are no weights are passed over.

    Raises:
        BundleError: a missing name, or another dtype or shape, naming both.
    """
    with _opened(file, torch.device("cpu")) as stored:
        there = set(stored.keys())
        for binding in bindings:
            name = binding.weight
            if name is None:
                continue
            _check_there(name, there, file)
            header = stored.get_slice(name)
            found = (header.get_dtype(), header.get_shape())
            expected = (DTYPES.get(dtype_name(binding.dtype)), list(binding.source_shape))
            if found != expected:
                raise BundleError(
                    f"weight {name!r} is {found[0]} {found[1]} in {file}, and the manifest says"
                    f" {expected[0]} ({dtype_name(binding.dtype)}) {expected[1]}",
                    fix="copy the bundle again, whole, or export it again",
                )


def rank_weights(folder: Path | str, manifest: Manifest, rank: int, device: torch.device | str) -> dict[str, Tensor]:
    """All weights of the bundle that a rank's segments take, checked against their bindings, as they are in the file.

    Where ``Binding.transposed``, the segment takes the transpose of what is returned here.

    Raises:
        BundleError: as :func:`load_weights` and :func:`check_weights`, or a link in place of the file.
    """
    given = manifest.given_names
    read = [b for segment in manifest.ranks[rank] for b in segment.inputs if b.weight is not None]
    bindings = [b for b in read if b.weight not in given]
    path = manifest.weights[rank]
    if path is None or not bindings:
        return {}
    file = plain_file(folder, path)
    check_weights(file, bindings)
    return load_weights(file, dict.fromkeys(b.weight for b in bindings if b.weight is not None), device)


@contextmanager
def _opened(file: Path, device: torch.device) -> Iterator[Any]:
    """A file of weights.

    Raises:
        BundleError: it is no whole one.
    """
    try:
        with opened(file, device) as stored:
            yield stored
    except WeightsError as error:
        raise BundleError(error.problem, fix="copy the bundle again, whole, or export it again") from error


def _check_there(name: str, there: set[str], file: Path) -> None:
    if name not in there:
        raise BundleError(
            f"the weight {name!r} is not in {file}, which has {len(there)} others",
            fix="copy the bundle again, whole, or export it again",
        )
