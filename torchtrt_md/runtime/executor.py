"""``Executor``: a rank's steps on two streams, in memory that is made once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from torchtrt_md.runtime.memory import MemoryLayout, lay_out
from torchtrt_md.runtime.push import Shared
from torchtrt_md.runtime.steps import Key, Step, Values

Share = Callable[[str, int], Shared]
Around = Callable[[int, Step], AbstractContextManager[None]]
# What PyTorch's allocator aligns to, and more than TensorRT asks of its bindings.
_ALIGNMENT = 512


class Executor:
    """Enqueues all steps of a call.  One call at a time: its memory is shared between calls.

    Args:
        steps: in order.
        fixed: what is the same in every call: weights and coordinates, by the names that steps read.
        outputs: what a call returns, by the names that steps write.
        device: where it runs.  On the CPU everything is done at once, in order.
        overlap: run collectives on a stream of their own.
        share: makes memory of this size that the ranks of this axis share, for collectives without NCCL; collective.
            None: NCCL does them.
        after_first: called once, when the first call is enqueued.
        layout: of these steps, where it was asked for already.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        *,
        fixed: Mapping[Key, Tensor],
        outputs: Sequence[Key],
        device: torch.device,
        overlap: bool = True,
        share: Share | None = None,
        after_first: Callable[[], None] | None = None,
        layout: MemoryLayout | None = None,
    ) -> None:
        self.steps, self.outputs, self.device = list(steps), tuple(outputs), device
        self._after_first = after_first
        self.layout = layout or lay_out(self.steps, self.outputs, push=share is not None)
        self._side: torch.cuda.Stream | None = None
        if overlap and device.type == "cuda" and any(step.communicates for step in steps):
            # of high priority: its kernels are few and short, and the main stream will wait for them
            self._side = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        memory = [torch.empty(size + _ALIGNMENT, dtype=torch.uint8, device=device) for size in self.layout.blocks]
        self._fixed: Values = dict(fixed)
        for step in self.steps:
            for slot in step.slots:
                if slot.name in self.layout.block_of:
                    block = memory[self.layout.block_of[slot.name]]
                    self._fixed[slot.name] = block[: slot.bytes].view(slot.dtype).view(slot.shape)
        self._shared = {axis: share(axis, size) for axis, size in sorted(self.layout.shared.items())} if share else {}
        self._landings: dict[Key, list[Tensor]] = {}
        for step in self.steps:
            landing = step.landing
            if landing is not None and landing.name in self.layout.shared_of:
                axis, offset = self.layout.shared_of[landing.name]
                everyones = self._shared[axis].results(offset, landing.shape, landing.dtype)
                self._landings[landing.name] = everyones
                self._fixed[landing.name] = everyones[self._shared[axis].me]

    def close(self) -> None:
        """Let go of the engines and of all memory."""
        self.steps.clear()
        self._fixed.clear()
        self._landings.clear()
        self._shared.clear()

    @property
    def memory(self) -> int:
        """Bytes that are kept for what passes between steps."""
        return self.layout.bytes

    def run(self, inputs: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        """Enqueue a call on the current stream, which is not the default one.

        Args:
            inputs: by their wires; contiguous and aligned.

        Returns:
            The outputs by their wires.
        """
        values = {**self._fixed, **inputs}
        if self._side is None:
            self._run_in_order(values)
        else:
            self._run_on_two_streams(values, self._side)
        if self._after_first is not None and not _is_capturing(self.device):
            after_first, self._after_first = self._after_first, None
            after_first()
        return {name: values[name] for name in self.outputs}

    def run_each(self, inputs: Mapping[Key, Tensor], around: Around) -> None:
        """As :meth:`run`, with all steps in a row on the current stream, each within ``around(index, step)``."""
        self._run_in_order({**self._fixed, **inputs}, around)

    def _run_in_order(self, values: Values, around: Around = lambda index, step: nullcontext()) -> None:
        for index, (step, moment) in enumerate(zip(self.steps, self.layout.moments, strict=True)):
            with around(index, step):
                self._run(step, values)
            for value in moment.releases:
                values.pop(value, None)

    def _run_on_two_streams(self, values: Values, side: torch.cuda.Stream) -> None:
        main = torch.cuda.current_stream(self.device)
        reached = {-1: _record(main)}
        ended: dict[int, torch.cuda.Event] = {}
        last = None
        for index, (step, moment) in enumerate(zip(self.steps, self.layout.moments, strict=True)):
            if step.communicates:
                side.wait_event(reached[moment.after])
                self._provide(step, values)
                with torch.cuda.stream(side):
                    self._communicate(step, values)
                last = ended[index] = _record(side)
            else:
                if moment.joins is not None:
                    main.wait_event(ended[moment.joins])
                self._run(step, values)
            if index in self.layout.marks:
                reached[index] = _record(main)
            for value in moment.releases:
                values.pop(value, None)
        if last is not None:
            main.wait_event(last)

    def _run(self, step: Step, values: Values) -> None:
        self._provide(step, values)
        if step.communicates:
            self._communicate(step, values)
        else:
            step.run(values)

    def _communicate(self, step: Step, values: Values) -> None:
        landing = step.landing
        if landing is None or landing.name not in self._landings:
            step.run(values)
            return
        assert step.push is not None
        operand, result = values[step.reads[0]].contiguous(), values[step.slots[0].name]
        self._shared[step.axis].send(step.push, operand, self._landings[landing.name], result)

    def _provide(self, step: Step, values: Values) -> None:
        """Memory for what the step writes over its operand, and for what the call returns; all else has its own."""
        for slot in step.slots:
            if slot.name in self.layout.over:
                values[slot.name] = values[step.reads[0]].view(slot.shape)
            elif slot.name not in values:
                values[slot.name] = torch.empty(slot.shape, dtype=slot.dtype, device=self.device)


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _record(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(stream)
    return event
