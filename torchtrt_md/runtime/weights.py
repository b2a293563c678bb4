"""A rank's weights as its segments read them, held once.

An engine may take a weight as [K, N] where the model has [N, K], and one joined of several.  Such a block is a copy,
and where the model's own weight is on the same device there would be two.  So the model's parameter is then made a
view of the block: its values, shape and dtype stay, its strides change.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from operator import attrgetter

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from torchtrt_md.errors import InputError, RankMismatchError
from torchtrt_md.launch.agree import Agreement
from torchtrt_md.mesh import Mesh
from torchtrt_md.program import Constant, ShardedProgram, Weight
from torchtrt_md.runtime.private import body_of
from torchtrt_md.runtime.signature import prepared
from torchtrt_md.runtime.steps import Key, source_key
from torchtrt_md.segment import Segment
from torchtrt_md.wrappers import held_by

WeightOf = Callable[[str], Tensor]
Stored = Callable[[str, Tensor], None]
_CHUNK = 1 << 18  # words that are summed at once; what they make stays in a cache


def laid_out(
    segments: Sequence[Segment], weight_of: WeightOf, device: torch.device, stored: Stored | None = None
) -> dict[Key, Tensor]:
    """The weights as the segments take them, on the device: contiguous, and transposed where one is taken so.

    Args:
        weight_of: gives this rank's part of a weight, on any device.  It is asked once for each.
        stored: called with each weight that lies on the device in another layout only, seen as ``weight_of`` gave it.
    """
    # Of a tensor that is made in inference mode PyTorch counts no writes, and the model's own may become one of these.
    with torch.inference_mode(False), torch.no_grad():
        return _laid_out(segments, weight_of, device, stored)


def _laid_out(
    segments: Sequence[Segment], weight_of: WeightOf, device: torch.device, stored: Stored | None
) -> dict[Key, Tensor]:
    layouts: dict[str, dict[Key, bool]] = {}
    for binding in (b for segment in segments for b in segment.inputs if b.weight is not None):
        layouts.setdefault(binding.source.name, {})[source_key(binding)] = binding.transposed
    found: dict[Key, Tensor] = {}
    for name, keys in layouts.items():
        weight = weight_of(name)
        blocks = {key: prepared((weight.t() if turned else weight).to(device)) for key, turned in keys.items()}
        found |= blocks
        if stored is not None and len(keys) == 1:
            ((key, turned),) = keys.items()
            stored(name, blocks[key].t() if turned else blocks[key])
        del weight
    return found


class ModelWeights:
    """The weights of a program whose model is in this process."""

    def __init__(self, program: ShardedProgram, rank: int) -> None:
        self.program, self.rank = program, rank
        self.sources = {s.name: s for s in program.sources.values() if isinstance(s, Weight)}
        held = {id(t): t for t in program.weights.whole.values()}.values()
        self._owners = Counter(t.untyped_storage().data_ptr() for t in held)

    def local(self, name: str) -> Tensor:
        """This rank's part of a weight; a copy only where it is joined of several, or cut unevenly."""
        return self.program.weights.local(self.sources[name], self.program.mesh, self.rank)

    def store(self, name: str, seen: Tensor) -> None:
        """Let the model's own parameter be this view of a block, where it would else be a second copy of it."""
        source = self.sources[name]
        if not _is_whole(source):
            return
        parts = source.parts or (source,)
        views = torch.split(seen, [part.shape[0] for part in parts]) if source.parts else (seen,)
        for part, view in zip(parts, views, strict=True):
            owner = self.program.weights.whole.get(part.name)
            if owner is not None and self._owners[owner.untyped_storage().data_ptr()] == 1 and _is_sole(owner, view):
                owner.data = view


def _is_whole(weight: Weight) -> bool:
    """Has every rank all of it?"""
    return not weight.shardings and all(map(_is_whole, weight.parts))


def _is_sole(owner: Tensor, view: Tensor) -> bool:
    """Does the parameter alone hold its memory, which is not this block's, so that the view can take its place?"""
    alike = (owner.shape, owner.dtype, owner.device) == (view.shape, view.dtype, view.device)
    storage = owner.untyped_storage()
    return (
        alike
        and owner._base is None
        and not owner.is_inference()
        and storage.nbytes() == owner.nbytes
        and storage.data_ptr() != view.untyped_storage().data_ptr()
    )


_version = attrgetter("_version")


class WeightGuard:
    """Tells when a weight was written to in place or replaced, of which engines may hold a copy laid out for them.

    Or a tensor that the model holds besides, of which they have what it was.

    Args:
        weights: name -> the model's tensor.  Inference tensors count no writes, and are left out.
        holders: name -> the tensor subclass that holds it, and the attribute.  ``model.to()`` gives it another, whose
            writes are counted from then on, if its values are still those.
        constants: what the model holds beside its weights, of which graphs have the values; the same holds for these.
        replaced: gives name, former and present tensor of the weights that were replaced since it was asked last; and
            None as the former one of what was added, and of modules.
        outer: name -> the tensor subclass that holds some of these, a DTensor among them.  What is written through one
            is counted there, and not of what it holds.  ``model.to()`` swaps it for another, and with it the count: so
            its values are compared with what they were at first.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        holders: Mapping[str, tuple[Tensor, str]] | None = None,
        constants: Sequence[Constant] = (),
        replaced: Callable[[], Iterable[tuple[str, Tensor | None, object]]] = tuple,
        outer: Mapping[str, Tensor] | None = None,
    ) -> None:
        held = holders or {}
        self._replaced = replaced
        # What it is called, what reads what is in its place now, and what was.
        self._held: list[tuple[str, Callable[[], object], Tensor]] = [
            *((_weight(name), partial(getattr, *held[name]), w) for name, w in weights.items() if name in held),
            *((_constant(c), c.read, c.tensor) for c in constants if c.read is not None),
        ]
        self._names: list[str] = []
        self._counted: list[Tensor] = []
        self._versions: list[int] = []
        self._bodies: list[int] = []
        for name, weight in weights.items():
            self._count(_weight(name), weight)
        self._outer: list[tuple[str, Tensor, list[int]]] = []
        for name, subclass in (outer or {}).items():
            self._count(_weight(name), subclass)
            self._outer.append((_weight(name), subclass, _sums(subclass)))
        for constant in constants:
            self._count(_constant(constant), constant.tensor)

    def _count(self, name: str, weight: Tensor) -> None:
        if not weight.is_inference():
            self._names.append(name)
            self._counted.append(weight)
            self._versions.append(_version(weight))
            self._bodies.append(body_of(weight))

    def _forget(self, name: str, weight: Tensor) -> None:
        entries = zip(self._names, self._counted, strict=True)
        at = next((i for i, (named, held) in enumerate(entries) if named == name and held is weight), None)
        if at is not None:
            del self._names[at], self._counted[at], self._versions[at], self._bodies[at]

    def check(self) -> None:
        """Raises InputError: a weight was changed.  What is written through ``.data`` is not seen."""
        for name, weight, now in self._replaced():
            if weight is None:
                raise self._changed(_weight(name) if isinstance(now, Tensor) else f"module {name!r}")
            self._follow(_weight(name), weight, now)
        for index, (name, read, weight) in enumerate(self._held):
            now = read()
            if now is not weight:
                self._held[index] = name, read, self._follow(name, weight, now)
        if self._is_untouched():
            return
        self._follow_swapped()
        if self._is_untouched():
            return
        found = zip(self._names, self._counted, self._versions, self._bodies, strict=True)
        raise self._changed(next(n for n, w, version, body in found if (w._version, body_of(w)) != (version, body)))

    def _is_untouched(self) -> bool:
        versions, bodies = list(map(_version, self._counted)), list(map(body_of, self._counted))
        return versions == self._versions and bodies == self._bodies

    def _follow_swapped(self) -> None:
        """Watch the tensor subclasses that others were swapped for, if they hold the same values as at first."""
        for name, subclass, sums in self._outer:
            at = next((i for i, counted in enumerate(self._counted) if counted is subclass), None)
            if at is None or body_of(subclass) == self._bodies[at]:
                continue
            if _sums(subclass) != sums:
                raise self._changed(name)
            self._versions[at], self._bodies[at] = _version(subclass), body_of(subclass)
            if isinstance(subclass, DTensor):
                self._count(name, subclass.to_local())

    def _follow(self, name: str, weight: Tensor, now: object) -> Tensor:
        """Watch what is in a tensor's place now, if it has the same values."""
        before = weight.to_local() if isinstance(weight, DTensor) else weight
        after = now.to_local() if isinstance(now, DTensor) else now
        if not isinstance(after, Tensor) or not same_values(before, after):
            raise self._changed(name)
        self._forget(name, weight)
        self._count(name, after)
        if now is not after and isinstance(now, Tensor):
            self._count(name, now)
        return after

    def _changed(self, name: str) -> InputError:
        return InputError(
            f"the {name} was changed after the model was compiled, and engines may hold what it was",
            fix="compile the model again, or load the bundle again; with torch.compile, after torch.compiler.reset()",
        )


def _sums(subclass: Tensor) -> list[int]:
    """The checksums of the plain tensors that it holds here; none of those on meta."""
    held = [subclass.to_local()] if isinstance(subclass, DTensor) else held_by("", subclass).values()
    return [checksum(tensor) for tensor in held if not tensor.is_meta]


def _weight(name: str) -> str:
    return f"weight {name!r}"


def _constant(constant: Constant) -> str:
    return f"tensor {constant.name!r}, which is no parameter and no buffer,"


def check_equal(program: ShardedProgram, agreement: Agreement) -> None:
    """Refuse weights that differ between ranks which the program says hold the same.  Collective.

    Where each rank has the whole of a weight, it is the whole that must be equal, though a rank computes with a part of
    it: the parts of different models would make up another one.  Where some read parts of a checkpoint, that is asked
    of some rows (:func:`check_samples`).

    Raises:
        RankMismatchError: on every rank, naming the weight and who has what.
    """
    mesh, held = program.mesh, program.weights
    weights = [
        s for s in program.sources.values() if isinstance(s, Weight) and not s.parts and s.name not in held.unrelated
    ]
    agreement.same(f"{len(weights)} of {sum(math.prod(w.shape) for w in weights)} elements", "their weights")
    mine = [w.name for w in weights if w.name in held.whole and w.name not in held.given]
    on_all = set(mine).intersection(*agreement.gather(mine, "which weights they have whole"))
    weights = [replace(w, shardings=()) if w.name in on_all else w for w in weights]

    def sums() -> list[int | None]:
        return [checksum(held.local(w, mesh, agreement.rank)) for w in weights]

    check_parts(mesh, {w.name: [s.axis for s in w.shardings] for w in weights}, sums, agreement)
    check_samples(mesh, [w.name for w in weights if w.shardings], held.sample, agreement)


def check_samples(
    mesh: Mesh, names: Sequence[str], sample: Callable[[str], Tensor | None], agreement: Agreement
) -> None:
    """Refuse weights of several models, of which each rank takes a part.  Collective.

    Args:
        names: of weights, the same on all ranks, of which ranks take different parts.
        sample: rows of the whole weight, the same for all ranks; None where a rank has no more than its part.

    Raises:
        RankMismatchError: on every rank, naming the weight and who has what.
    """

    def sums() -> list[int | None]:
        found = map(sample, names)
        return [None if t is None else checksum(t) for t in found]

    if names:
        check_parts(mesh, dict.fromkeys(names, ()), sums, agreement, where="on all ranks, by some of its rows")


def check_parts(
    mesh: Mesh,
    weights: Mapping[str, Sequence[str]],
    sums: Callable[[], list[int | None]],
    agreement: Agreement,
    *,
    where: str = "on ranks that hold the same part of it",
) -> None:
    """Refuse weights that differ between ranks which hold the same part of them.  Collective.

    Args:
        weights: their names, the same on all ranks, and the axes that cut each.
        sums: gives the checksum of this rank's part of each, None of what it does not hold.
        where: it should have been the same, for messages.

    Raises:
        RankMismatchError: on every rank, naming the weight and who has what.
    """
    found = agreement.gather(agreement.together("the checksums of the weights", sums), "the weights")
    for index, (name, axes) in enumerate(weights.items()):
        parts: dict[tuple[int, ...], dict[int, int]] = {}
        for rank, of in enumerate(found):
            value = of[index]
            if value is not None:
                parts.setdefault(tuple(mesh.coordinate(rank, a) for a in axes), {})[rank] = value
        for held in parts.values():
            if len(set(held.values())) > 1:
                raise RankMismatchError(
                    f"the weight {name!r} is not the same {where}: by checksum, "
                    + ", ".join(f"rank {rank} has {value:016x}" for rank, value in held.items()),
                    fix="load the same checkpoint on every rank, or seed them alike; broadcast what rank 0 has",
                )


def same_values(a: Tensor, b: Tensor) -> bool:
    """Are they of one dtype and shape, and, where neither is on meta, of the same bits?"""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return a.is_meta or b.is_meta or checksum(a) == checksum(b)


def checksum(tensor: Tensor) -> int:
    """A number of 64 bits that tells tensors of one dtype and shape apart, by their bits and where these are."""
    flat = tensor.detach().contiguous().reshape(-1)
    flat = (torch.view_as_real(flat.resolve_conj()).reshape(-1) if flat.is_complex() else flat).view(torch.uint8)
    whole = flat.numel() // 8 * 8
    words = (flat[:whole].clone() if flat.data_ptr() % 8 else flat[:whole]).view(torch.int64)
    factors = torch.arange(1, _CHUNK + 1, device=flat.device) * 0x9E3779B1 + 1
    sums = [(chunk * factors[: chunk.numel()]).sum() for chunk in torch.split(words, _CHUNK)]
    sums.append((flat[whole:].long() * factors[: flat.numel() - whole]).sum())
    total = 0
    for value in torch.stack(sums).tolist():
        total = (total * 0x100000001B3 + value) % (1 << 64)
    return total
