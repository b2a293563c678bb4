"""``Runner``: a loaded bundle on this rank, called like the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor

from torchtrt_md.bundle.manifest import Manifest, Segment
from torchtrt_md.errors import LaunchError
from torchtrt_md.runtime.agree import Agreement
from torchtrt_md.runtime.engine import Engine
from torchtrt_md.runtime.signature import Signature, dtype_of, prepared
from torchtrt_md.runtime.watchdog import Watchdog

Check = Literal["always", "first"]


class Runner:
    """This rank's engines, called like the model: ``runner(hidden, timestep=t)``.

    Every rank makes the same calls in the same order, from one thread.  :func:`torchtrt_md.runtime.loading` makes it.

    Attributes:
        manifest: what the bundle says.
        rank: this process.
        device: this rank's GPU, where inputs must be and outputs are.
        check: ``"always"``: all ranks vote on their inputs before each call, so that a wrong input on one rank
            is refused on all.  ``"first"``: they vote before the first call only, which saves the host one small
            gloo all_reduce per call; a wrong input later raises on its own rank alone, and its peers, already in
            a collective, are ended by the watchdog after the timeout.
        agreement: the votes of this launch.
    """

    def __init__(
        self,
        manifest: Manifest,
        engines: Sequence[Engine],
        descriptions: Sequence[str],
        *,
        device: torch.device,
        agreement: Agreement,
        watchdog: Watchdog,
        check: Check,
    ) -> None:
        self.manifest, self.device, self.check = manifest, device, check
        self.agreement, self.rank = agreement, agreement.rank
        self.signature = Signature(manifest)
        self._watchdog = watchdog
        self._steps = list(zip(engines, descriptions, last_uses([engine.segment for engine in engines]), strict=True))
        self._outputs = {f"output:{t.name}": t.name for t in manifest.outputs}
        mesh = self.signature.mesh
        self._coordinates = {
            f"coordinate:{axis}": torch.tensor([mesh.coordinate(self.rank, axis)], dtype=torch.int32, device=device)
            for axis in mesh.names
        }
        self._side: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._last: tuple[torch.cuda.Stream, torch.cuda.Event] | None = None
        self._agreed = self._closed = False
        torch.cuda.synchronize(device)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the engines on this rank's inputs.

        Args:
            args: by position, as at export: in the order of ``manifest.positional``, constants among them.
            kwargs: by name; nested arguments as they were nested.  A constant may be given if it is the built-in one;
                what is no tensor, number, string or None cannot be compared, and is left out.
                Tensors are on ``device``, of the global shape, or this rank's chunk where ``manifest.inputs`` has
                a sharding.

        Returns:
            What the model returns, dataclasses as dicts, ordered after the current stream's work.

        Raises:
            InputError: on every rank, naming the ranks whose inputs are wrong (``check="first"``: see there).
            LaunchError: another rank did not make this call within the timeout, or an engine could not be run.
        """
        inputs = self._accept(args, kwargs)
        with torch.cuda.device(self.device), torch.no_grad():
            current = torch.cuda.current_stream(self.device)
            # On the default stream TensorRT adds synchronizations of its own.
            stream = self._side if current.cuda_stream == 0 else current
            # In a capture, events of before it cannot be waited for, and those in it cannot be queried.
            capturing = torch.cuda.is_current_stream_capturing()
            ready = {name: prepared(tensor) for name, tensor in inputs.items()}
            if stream is not current:
                stream.wait_stream(current)
            if not capturing and self._last is not None and self._last[0] != stream:
                stream.wait_event(self._last[1])  # one context, one run at a time
            outputs = self.enqueue(ready, stream, after=None if capturing else self._watch)
            if stream is not current:
                current.wait_stream(stream)
                for tensor in (*ready.values(), *outputs.values()):
                    tensor.record_stream(stream)
        return self.signature.nest(outputs)

    def enqueue(
        self,
        inputs: Mapping[str, Tensor],
        stream: torch.cuda.Stream,
        after: Callable[[torch.cuda.Stream, str], None] | None = None,
    ) -> dict[str, Tensor]:
        """Bind and launch all engines, unchecked: the part of a call that a CUDA graph can capture.

        Args:
            inputs: by name, contiguous and aligned (:func:`~torchtrt_md.runtime.signature.prepared`).
            stream: where to run; not the default stream.
            after: called after each engine with the stream and what it may be waiting for.

        Returns:
            The outputs by name, allocated on the current stream.
        """
        live = dict(self._coordinates)
        live.update({f"input:{name}": tensor for name, tensor in inputs.items()})
        outputs: dict[str, Tensor] = {}
        for engine, description, done in self._steps:
            for b in engine.segment.outputs:
                if b.source in self._outputs:
                    tensor = torch.empty(b.shape, dtype=dtype_of(b.dtype), device=self.device)
                    outputs[self._outputs[b.source]] = tensor
                else:  # freed before the stream is done with it, so only that stream may be given the memory again
                    with torch.cuda.stream(stream):
                        tensor = torch.empty(b.shape, dtype=dtype_of(b.dtype), device=self.device)
                live[b.source] = tensor
            engine.enqueue(live, stream.cuda_stream)
            if after is not None:
                after(stream, description)
            for source in done:
                del live[source]
        return outputs

    def settle(self) -> bool:
        """Whether all calls are done, so far as the watchdog knows."""
        return self._watchdog.settle() == 0

    def close(self) -> None:
        """Wait for the calls under way and let go of the engines' memory and the votes' group."""
        if self._closed:
            return
        self._closed = True
        torch.cuda.synchronize(self.device)
        self._watchdog.close()
        self._steps.clear()
        self.agreement.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _accept(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        if self._closed:
            raise LaunchError("this runner is closed", fix="load the bundle again")
        if self.check == "first" and self._agreed:
            return self.signature.bind(args, kwargs, self.device)
        inputs = self.agreement.together("the inputs of a call", lambda: self.signature.bind(args, kwargs, self.device))
        self._agreed = True
        return inputs

    def _watch(self, stream: torch.cuda.Stream, description: str) -> None:
        event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(stream)
        self._last = (stream, event)
        self._watchdog.watch(event, description)


def last_uses(segments: Sequence[Segment]) -> list[list[str]]:
    """For each segment the values that nothing after it reads."""
    last: dict[str, int] = {}
    for index, segment in enumerate(segments):
        for b in (*segment.inputs, *segment.outputs):
            if b.source.startswith("value:"):
                last[b.source] = index
    return [[source for source, at in last.items() if at == index] for index in range(len(segments))]
