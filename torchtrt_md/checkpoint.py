"""Weights that are given beside a model or a bundle: whole, by name, in safetensors files or as tensors at hand.

Of a file no more is read than a rank's part of one weight, when it is asked for, into memory of its own.  Nothing of a
file stays mapped: what is written to it later changes no weight, and a load holds a shard and one weight at most.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import torch
from torch import Tensor

from torchtrt_md.errors import WeightsError
from torchtrt_md.mesh import Mesh
from torchtrt_md.program import Sharding, UnevenSharding, dtype_name, part, rows_of

Given: TypeAlias = Mapping[str, Tensor] | Path | str | None

# PyTorch's name of a dtype -> the format's.
DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
INDEX = ".safetensors.index.json"
_CPU = torch.device("cpu")
_NAMED = 5  # names in a message
_COMPARED = 64 << 20  # bytes of two weights at once


class Checkpoint:
    """Whole weights by name.

    Args:
        source: tensors by name, as ``state_dict()`` returns them; a safetensors file; a folder of one checkpoint; or
            its index (``model.safetensors.index.json``).  Where a folder has an index, the files are those that it
            names, else all that there are.

    Attributes:
        where: what the source is, for messages.
        forms: name -> dtype, as PyTorch names it, and shape.

    Raises:
        WeightsError: no such file, one that is damaged, a name that is in two, or an index that is wrong.
    """

    def __init__(self, source: Mapping[str, Tensor] | Path | str) -> None:
        self._tensors: Mapping[str, Tensor] = {}
        self._files: dict[str, Path] = {}
        self.forms: dict[str, tuple[str, tuple[int, ...]]] = {}
        if isinstance(source, Mapping):
            self.where = f"the {len(source)} tensors that were given"
            from torchtrt_md.wrappers import held_by  # which imports DTensor: half a second

            inner: dict[str, Tensor] = {}
            for given, value in source.items():  # which it may read when it is asked, and are let go of
                held = held_by(given, value)
                inner |= held if given not in held else {}
                for name, tensor in held.items():
                    self.forms[name] = dtype_name(tensor.dtype), tuple(tensor.shape)
                    if tensor.is_meta:
                        raise WeightsError(
                            f"the weight {name!r} that was given is on meta and has no value",
                            fix="give the checkpoint's own tensors, or its folder",
                        )
            self._tensors = ChainMap(inner, source)  # type: ignore[arg-type]  # of which it asks, and writes nothing
            return
        path = Path(source)
        self.where = str(path)
        index = _index(path)
        if index is None:
            self._read_headers(_files(path), {})
        else:
            placed = _placed(index)
            self._read_headers(dict.fromkeys(placed.values()), placed)

    def check(self, name: str, dtype: torch.dtype, shape: Sequence[int]) -> None:
        """Compare a weight with that of the model.

        Raises:
            WeightsError: it is not there, or has another dtype or shape.
        """
        if name not in self.forms:
            raise self.missing([name])
        if self.forms[name] != (dtype_name(dtype), tuple(shape)):
            there, size = self.forms[name]
            raise WeightsError(
                f"the weight {name!r} is {there} {list(size)} in {self.where}, and the model's is {dtype_name(dtype)}"
                f" {list(shape)}",
                fix="give the checkpoint of this model, and make the model in its dtype: model.to(dtype)",
            )

    def missing(self, names: Sequence[str]) -> WeightsError:
        """The error for weights of the model that are not there."""
        return WeightsError(
            f"the weight {names[0]!r} is not in {self.where}"
            if len(names) == 1
            else f"{len(names)} weights of the model are not in {self.where}: {listed(names)}",
            fix="give the checkpoint of this model; of tied weights it must have one of the names, or"
            " all as state_dict() has them",
        )

    def check_equal(self, names: Sequence[str]) -> None:
        """Refuse tied weights, equal in form, that are there under several names with several values.

        Raises:
            WeightsError: naming the two.
        """
        for name in names[1:]:
            with self._whole(names[0]) as first, self._whole(name) as other:
                a, b = (torch.split(t.contiguous().reshape(-1).view(torch.uint8), _COMPARED) for t in (first, other))
                if not all(map(torch.equal, a, b)):
                    raise WeightsError(
                        f"the weights {names[0]!r} and {name!r} are tied in the model, and differ in {self.where}",
                        fix="untie them in the model, or remove one of them from the checkpoint",
                    )

    def part(self, name: str, shardings: Iterable[Sharding | UnevenSharding], mesh: Mesh, rank: int) -> Tensor:
        """A rank's part of a weight that is there: of a file a contiguous copy on the CPU, of a tensor a view."""
        with self._whole(name) as whole:
            found = part(whole, shardings, mesh, rank)
            if name in self._tensors or found.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
                return found
            return found.clone(memory_format=torch.contiguous_format)

    def sample(self, name: str) -> Tensor:
        """A copy of some rows of a weight that is there; see :func:`rows_of`."""
        with self._whole(name) as whole:
            return rows_of(whole)

    def tensors(self, names: Iterable[str], device: torch.device) -> dict[str, Tensor]:
        """Of these weights the ones that were given as tensors on this device, of which a rank may have views."""
        found = {name: self._tensors[name] for name in names if name in self._tensors}
        return {name: tensor for name, tensor in found.items() if tensor.device == device}

    @contextmanager
    def _whole(self, name: str) -> Iterator[Tensor]:
        """A weight; of a file what is not looked at is not read, and it must not be used afterwards."""
        if name in self._tensors:
            yield self._tensors[name].detach()
            return
        with opened(self._files[name], _CPU) as stored:
            yield stored.get_tensor(name)

    def _read_headers(self, files: Iterable[Path], placed: Mapping[str, Path]) -> None:
        """Learn what is in the files; ``placed`` is what an index says."""
        kinds = {theirs: ours for ours, theirs in DTYPES.items()}
        for file in files:
            with opened(file, _CPU) as stored:
                for name in stored.keys():  # noqa: SIM118
                    if placed and placed.get(name) != file:
                        raise WeightsError(
                            f"the weight {name!r} is in {file}, and the index does not say so",
                            fix="download the checkpoint again, whole",
                        )
                    if name in self._files:
                        raise WeightsError(
                            f"the weight {name!r} is in more than one file of {self.where}, {file.name} among them",
                            fix="give one file, a folder of one checkpoint, or the index of one",
                        )
                    header = stored.get_slice(name)
                    kind = header.get_dtype()
                    self._files[name] = file
                    self.forms[name] = kinds.get(kind, kind), tuple(header.get_shape())
        for name, file in placed.items():
            if name not in self._files:
                raise WeightsError(
                    f"the index says that the weight {name!r} is in {file}, and it is not",
                    fix="download the checkpoint again, whole",
                )


def listed(names: Sequence[str]) -> str:
    """Some names, for a message."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(repr, names[:_NAMED])) + more


@contextmanager
def opened(file: Path, device: torch.device) -> Iterator[Any]:
    """A safetensors file, as the library reads it.

    Raises:
        WeightsError: it is no whole one.
    """
    from safetensors import SafetensorError, safe_open  # only programs with weights of their own need it

    if file.exists() and not file.is_file():  # the library would wait for a pipe to be written
        raise WeightsError(f"{file} is no plain file", fix="give a safetensors file, or a folder of them")
    try:
        with safe_open(file, framework="pt", device=str(device)) as stored:
            yield stored
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{file} is not a whole safetensors file: {error}", fix="copy or download it again, whole"
        ) from error


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise WeightsError(f"there is no safetensors file in {path}", fix="give the folder of the model's checkpoint")
    return files


def _index(path: Path) -> Path | None:
    """The index of a checkpoint of several files, where there is one."""
    if not path.is_dir():
        return path if path.name.endswith(INDEX) else None
    found = sorted(path.glob(f"*{INDEX}"))
    if len(found) > 1:
        raise WeightsError(
            f"{path} has {len(found)} indices: {', '.join(file.name for file in found)}",
            fix="give the one that is meant, in place of the folder",
        )
    return found[0] if found else None


class _Index(msgspec.Struct):
    """The form that Hugging Face writes; it has more, which says nothing about where a weight is."""

    weight_map: dict[str, str]


def _placed(index: Path) -> dict[str, Path]:
    """The file of each weight, as an index says.

    Raises:
        WeightsError: it is no index, or names a file that is not beside it.
    """
    try:
        named = msgspec.json.decode(index.read_bytes(), type=_Index).weight_map
    except (OSError, msgspec.MsgspecError) as error:
        raise WeightsError(
            f"{index} is no index of a checkpoint: {error}", fix="download the checkpoint again, whole"
        ) from error
    for name, file in named.items():
        if Path(file).name != file or not (index.parent / file).is_file():
            raise WeightsError(
                f"the index {index} says that the weight {name!r} is in {file!r}, and there is no such file beside it",
                fix="download the checkpoint again, whole",
            )
    return {name: index.parent / file for name, file in named.items()}
