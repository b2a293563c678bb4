"""What Dynamo calls in place of a graph that was compiled: flat inputs, weights among them.

One graph may serve several modules: equal layers of a model, or two models of one class, which Dynamo tells apart by
nothing but the weights that it passes.  So a call is of a *set* of weights.  A set is laid out for the engines when it
is first seen, and what was compiled is shared.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from torchtrt_md.capture.async_private import arrived
from torchtrt_md.capture.dynamo import GraphInput, PlacedOutput, WrittenInput
from torchtrt_md.capture.dynamo_private import local_tensor
from torchtrt_md.doors.views import View
from torchtrt_md.errors import InputError
from torchtrt_md.program import Output
from torchtrt_md.runtime.autocast import without_autocast
from torchtrt_md.runtime.weights import same_values


class Compiled(Protocol):
    """A compiled program, as a :class:`~torchtrt_md.runtime.runner.Runner` is."""

    def call(
        self, bind: Callable[[], Mapping[str, Tensor]], /, *, weights: Any = None, about: str = ""
    ) -> Mapping[str, Tensor]:
        """The outputs by name, of inputs that ``bind`` gives by name, or refuses."""

    def with_weights(self, others: Callable[[], Mapping[str, Tensor]], /) -> Any:
        """A set of weights, which ``others`` gives by name or refuses, laid out as it reads them.  Collective."""

    def close(self) -> None:
        """Let go of memory."""


class WeightSet:
    """The weights of one module.

    Args:
        tensors: as Dynamo passes them; held, so that no other tensors come to lie in their place.
        laid_out: what the runner made of them; None for those that it was made with.
    """

    def __init__(self, tensors: Sequence[Tensor], laid_out: Any = None) -> None:
        self.tensors, self.laid_out = tuple(tensors), laid_out
        self._locals, self._sharded = [local_tensor(t) for t in tensors], any(isinstance(t, DTensor) for t in tensors)
        # Writes through a DTensor and through its local part are counted apart.
        counted = {id(t): t for t in (*tensors, *self._locals) if not t.is_inference()}
        self._counted = list(counted.values())
        self._versions, self._places = self._state()

    def _state(self) -> tuple[list[int], list[int]]:
        # A DTensor that another was swapped for has another local part now.
        held = map(local_tensor, self.tensors) if self._sharded else self._locals
        return list(map(_version, self._counted)), list(map(Tensor.data_ptr, held))

    def changed(self) -> int | None:
        """The index of a weight that was written to in place, moved or swapped since; None where there is none."""
        versions, places = self._state()
        if versions == self._versions and places == self._places:
            return None
        for index, (tensor, was) in enumerate(zip(self._locals, self._places, strict=True)):
            outer = self.tensors[index]
            written = any(
                t is outer or t is tensor for t, v in zip(self._counted, self._versions, strict=True) if t._version != v
            )
            if written or places[index] != was:
                return index
        return None


_version = operator.attrgetter("_version")


class FlatCall:
    """A function of a Dynamo graph's flat inputs.  Collective: every rank makes the same calls.

    Args:
        inputs: of the graph.
        feeds: name of the program's input -> index among the graph's.
        weights: index among the graph's -> names of the program's weights that it is.
        unused: the program's inputs that the graph has not, with what to pass for them.
        results: for each output of the graph the program's, or the constant that it is.
        written: what the program returns for inputs that the graph writes to.
        views: index of a result -> what it is a view of.
        waits: indices of inputs that the graph itself waits for: they may be in flight.
        outputs: names of the program's outputs.
        runner: runs the program.
    """

    def __init__(
        self,
        *,
        inputs: Sequence[GraphInput],
        feeds: Mapping[str, int],
        weights: Mapping[int, Sequence[str]],
        unused: Mapping[str, Tensor],
        results: Sequence[object],
        written: Sequence[WrittenInput],
        views: Mapping[int, View],
        waits: Sequence[int],
        outputs: Sequence[str],
        runner: Compiled,
    ) -> None:
        self._inputs, self._feeds, self._unused, self._results = inputs, feeds, unused, results
        self._names, self._outputs, self._runner = weights, outputs, runner
        fed = set(feeds.values())
        self._waits, self._views = sorted(waits), views
        self._values = [(i, inputs[i].name, *_like(inputs[i].example)) for i in sorted(fed)]
        self._written = [(feeds[leaf.name], self._outputs[leaf.index]) for leaf in written]
        self._numbers = [(i, e.name, e.example) for i, e in enumerate(inputs) if isinstance(e.example, (int, float))]
        self._fixed = [i for i, e in enumerate(inputs) if i not in fed and e.kind != "constant"]
        first = WeightSet([inputs[i].example for i in self._fixed])
        self._sets = {tuple(map(id, first.tensors)): first}
        self._current = self._first = first
        # With torch.compiler.reset() Dynamo lets go of this; the end of the process closes runners by itself.
        weakref.finalize(self, runner.close).atexit = False

    def __call__(self, *flat: Any) -> list[Any]:
        """The graph's outputs.

        Raises:
            InputError: on every rank: what Dynamo passes is not what the graph was compiled for.
        """
        ready = [arrived(x) for x in flat]
        for index in self._waits:
            torch.ops._c10d_functional.wait_tensor(local_tensor(ready[index]))
        known = self._known(ready) or self._add(ready)
        number = list(self._sets.values()).index(known)

        def bind() -> Mapping[str, Tensor]:
            self._check(ready)
            check_apart([index for index, _ in self._written], self._inputs, ready)
            self._check_unchanged(known)
            fed = {name: arrived(local_tensor(ready[index])) for name, index in self._feeds.items()}
            return {**self._unused, **fed}

        with without_autocast():
            about = f" with weights {number}" if number else ""
            out = self._runner.call(bind, weights=known.laid_out, about=about)
        for index, output in self._written:
            local_tensor(ready[index]).detach().copy_(out[output])
        results = [self._result(out, leaf) for leaf in self._results]
        for index, view in self._views.items():
            results[index] = view.of(ready, results)
        return results

    def _result(self, out: Mapping[str, Tensor], leaf: object) -> Any:
        if not isinstance(leaf, Output):
            return leaf
        tensor = out[self._outputs[leaf.index]]
        return leaf.placed(tensor) if isinstance(leaf, PlacedOutput) else tensor

    def _known(self, flat: Sequence[Any]) -> WeightSet | None:
        tensors = [flat[i] for i in self._fixed]
        if not all(map(operator.is_, tensors, self._current.tensors)):
            found = self._sets.get(tuple(map(id, tensors)))
            if found is None:
                return None
            self._current = found
        return self._current

    def _add(self, flat: Sequence[Any]) -> WeightSet:
        tensors = [flat[i] for i in self._fixed]

        def others() -> Mapping[str, Tensor]:
            self._check_constants(flat)
            return {name: local_tensor(flat[i]).detach() for i, names in self._names.items() for name in names}

        added = WeightSet(tensors, self._runner.with_weights(others))
        self._sets[tuple(map(id, tensors))] = self._current = added
        return added

    def _check_constants(self, flat: Sequence[Any]) -> None:
        """Refuse other values of a tensor that is neither an input nor a weight: the program has the first one's."""
        for index, first in zip(self._fixed, self._first.tensors, strict=True):
            ours, theirs = local_tensor(first), local_tensor(flat[index])
            if index in self._names or ours is theirs:
                continue
            if not same_values(ours, theirs):
                raise InputError(
                    f"{self._inputs[index].name!r} is a tensor, no parameter and no buffer, with other values than"
                    " when the graph was compiled: those of another module of this class, or new ones",
                    fix="register it as a buffer, in place of a plain tensor: register_buffer(name, tensor,"
                    " persistent=False); where it was replaced, call torch.compiler.reset()",
                )

    def _check(self, flat: Sequence[Any]) -> None:
        for index, name, shape, dtype, placed in self._values:
            given = flat[index]
            if given.shape != shape or given.dtype != dtype:
                raise _changed(name, f"{dtype} {list(shape)}", f"{given.dtype} {list(given.shape)}")
            if placed is not None or isinstance(given, DTensor):
                now = _like(given)[2]
                if now != placed:
                    raise _changed(name, f"placed as {placed}", f"placed as {now}")
        for index, name, number in self._numbers:
            if flat[index] != number:
                raise _changed(name, number, flat[index])

    def _check_unchanged(self, known: WeightSet) -> None:
        changed = known.changed()
        if changed is not None:
            raise InputError(
                f"{self._inputs[self._fixed[changed]].name!r} was changed or replaced after the model was compiled, and"
                " engines hold what it was",
                fix="call torch.compiler.reset(), so that the next call compiles with the new values",
            )


def _like(tensor: Tensor) -> tuple[torch.Size, torch.dtype, object]:
    """The shape, the dtype, and for a DTensor where its parts are."""
    placed = (tensor.placements, tensor.device_mesh) if isinstance(tensor, DTensor) else None
    return tensor.shape, tensor.dtype, placed


def check_apart(written: Sequence[int], inputs: Sequence[GraphInput], flat: Sequence[Any]) -> None:
    """Refuse to write to an input that shares memory with another: the program reads each as it was passed.

    Args:
        written: indices of inputs.
        flat: what is passed for ``inputs``.

    Raises:
        InputError: naming the two.
    """
    for index in written:
        ours = _memory(flat[index])
        for other, each in enumerate(flat):
            if other == index or not isinstance(each, Tensor):
                continue
            theirs = _memory(each)
            if ours[0] == theirs[0] and ours[1] < theirs[2] and theirs[1] < ours[2]:
                raise InputError(
                    f"the graph writes to the input {inputs[index].name!r}, which shares memory with the input"
                    f" {inputs[other].name!r}",
                    fix="pass a clone() of one of them",
                )


def _memory(tensor: Tensor) -> tuple[int, int, int]:
    """The storage of a tensor and where in it the elements are, in bytes."""
    local = local_tensor(tensor)
    width = local.element_size()
    last = sum((size - 1) * stride for size, stride in zip(local.shape, local.stride(), strict=True))
    first = int(local.storage_offset()) * width
    return local.untyped_storage().data_ptr(), first, first + (last + 1) * width * bool(local.numel())


def _changed(name: str, was: object, now: object) -> InputError:
    return InputError(
        f"the input {name!r} is {now}, and the graph was compiled for {was}",
        fix="leave Dynamo's guards on: they compile anew for it",
    )
