"""``Runner``: a program on this rank, called like the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import torch
from torch import Tensor, nn

from torchtrt_md.bundle.manifest import Manifest
from torchtrt_md.choices import Choices
from torchtrt_md.errors import LaunchError
from torchtrt_md.runtime.agree import Agreement
from torchtrt_md.runtime.executor import Executor
from torchtrt_md.runtime.graphs import Budget, Graphs
from torchtrt_md.runtime.module import as_module
from torchtrt_md.runtime.signature import Signature, prepared
from torchtrt_md.runtime.watchdog import Watchdog

Check = Literal["always", "first"]
MAX_GRAPHS = 8
M = TypeVar("M", bound=nn.Module)


class Runner:
    """This rank's part of a program, called like the model: ``runner(hidden, timestep=t)``.

    Every rank makes the same calls in the same order, from one thread.  :func:`torchtrt_md.load` and
    :func:`torchtrt_md.compile` make it.

    Attributes:
        manifest: what the bundle says, or would say.
        rank: this process.
        device: this rank's GPU, where inputs must be and outputs are.
        check: ``"always"``: all ranks vote on their inputs before each call, so that a wrong input on one rank
            is refused on all.  ``"first"``: they vote before the first call only, which saves the host one small
            gloo all_reduce per call; a wrong input later raises on its own rank alone, and its peers, already in
            a collective, are ended by the watchdog after the timeout.
        agreement: the votes of this launch.
        executor: what a call enqueues.
        summary: what runs where, and why; for people.
        choices: of a program that was just compiled, what was chosen; ``md.export(..., choices=...)`` takes it.
    """

    def __init__(
        self,
        manifest: Manifest,
        executor: Executor,
        waits_for: str,
        *,
        agreement: Agreement,
        watchdog: Watchdog,
        check: Check,
        cuda_graph: bool = False,
        static_outputs: bool = False,
        budget: Budget | None = None,
        nest: Callable[[Mapping[str, Tensor]], Any] | None = None,
        summary: str = "",
        choices: Choices | None = None,
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        self.manifest, self.executor, self.check = manifest, executor, check
        self.summary, self.choices = summary, choices
        self.device = executor.device
        self.agreement, self.rank = agreement, agreement.rank
        self.signature = Signature(manifest)
        self._nest, self._guard = nest or self.signature.nest, guard
        self._watchdog, self._waits_for = watchdog, waits_for
        self._graphs: Graphs | None = None
        self._side: torch.cuda.Stream | None = None
        self._last: tuple[torch.cuda.Stream, torch.cuda.Event] | None = None
        self._agreed = self._closed = False
        if self.device.type == "cuda":
            self._side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            if cuda_graph:
                self._graphs = Graphs(
                    executor.run,
                    budget or Budget(MAX_GRAPHS),
                    self.device,
                    static_outputs=static_outputs,
                    # it waits on this thread, and other ranks may not have come
                    before_capture=lambda: self._watch(torch.cuda.current_stream(self.device)),
                )
            torch.cuda.synchronize(self.device)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program on this rank's inputs.

        Args:
            args: by position, as at export: in the order of ``manifest.positional``, constants among them.
            kwargs: by name; nested arguments as they were nested.  A constant may be given if it is the built-in one;
                what is no tensor, number, string or None cannot be compared, and is left out.
                Tensors are on ``device``, of the global shape, or this rank's chunk where ``manifest.inputs`` has
                a sharding.

        Returns:
            What the model returns, of a bundle dataclasses as dicts, ordered after the current stream's work.

        Raises:
            InputError: on every rank, naming the ranks whose inputs are wrong (``check="first"``: see there).
            LaunchError: another rank did not make this call within the timeout, or an engine could not be run.
        """
        return self._nest(self.run(self._accept(args, kwargs)))

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs by name, of inputs by name that are known to be of the right shapes and dtypes on all ranks.

        Raises:
            LaunchError: the runner is closed, or an engine could not be run.
        """
        if self._closed:
            raise LaunchError("this runner is closed", fix="load or compile again")
        with torch.no_grad():
            if self._side is None:
                return self.enqueue({name: prepared(tensor) for name, tensor in inputs.items()})
            with torch.cuda.device(self.device):
                return self._run_on_gpu(inputs, self._side)

    def _run_on_gpu(self, inputs: Mapping[str, Tensor], side: torch.cuda.Stream) -> dict[str, Tensor]:
        current = torch.cuda.current_stream(self.device)
        # On the default stream TensorRT adds synchronizations of its own, and nothing can be captured.
        stream = side if current.cuda_stream == 0 else current
        # In a capture, events of before it cannot be waited for, and those in it cannot be queried.
        capturing = torch.cuda.is_current_stream_capturing()
        ready = {name: prepared(tensor) for name, tensor in inputs.items()}
        if stream is not current:
            stream.wait_stream(current)
        if not capturing and self._last is not None and self._last[0] != stream:
            stream.wait_event(self._last[1])  # one set of addresses and memory, one run at a time
        with torch.cuda.stream(stream):
            outputs = self.enqueue(ready, graphs=not capturing)
        if not capturing:
            self._watch(stream)
        if stream is not current:
            current.wait_stream(stream)
            for tensor in ready.values():
                tensor.record_stream(stream)
            for tensor in outputs.values():
                tensor.record_stream(current)
        return outputs

    def enqueue(self, inputs: Mapping[str, Tensor], *, graphs: bool = True) -> dict[str, Tensor]:
        """Launch everything on the current stream, unchecked: the part of a call that a CUDA graph can capture.

        Args:
            inputs: by name, contiguous and aligned (:func:`~torchtrt_md.runtime.signature.prepared`).
            graphs: replay a CUDA graph, where this runner makes them.

        Returns:
            The outputs by name, allocated on the current stream, which is not the default one.
        """
        named = {f"input:{name}": tensor for name, tensor in inputs.items()}
        go = self._graphs if self._graphs is not None and graphs else self.executor.run
        return {name.removeprefix("output:"): tensor for name, tensor in go(named).items()}

    @property
    def captured(self) -> int:
        """How many CUDA graphs this runner holds."""
        return sum(c is not None for c in self._graphs.captured.values()) if self._graphs else 0

    def graph_inputs(self) -> dict[str, Tensor]:
        """The tensors that the CUDA graph of the last signature reads, by name; empty where there is none.

        Inputs are copied into them, unless they are these very tensors: who fills them in place saves the copies.
        """
        held = [c for c in self._graphs.captured.values() if c is not None] if self._graphs else []
        return {name.removeprefix("input:"): t for name, t in held[-1].inputs.items()} if held else {}

    def as_module(self, model: M) -> M:
        """A module to put where the model is, which runs this runner: ``pipe.transformer = runner.as_module(...)``.

        Args:
            model: what was compiled or exported.  It is not changed; parameters, ``config``, methods and all else but
                ``forward`` are the model's.  Its weights are not read, so with a bundle they may be on ``meta``.

        Returns:
            A module of a subclass of the model's class.  It is called like the model, with all arguments by position
            or by name: those that were built in must have the values that were built in, and one that is left out
            has the model's default.  It takes and returns what a call of the runner does, and raises what that
            raises.  What would change it (``to`` another device or dtype, ``train``, ``load_state_dict``, adapters),
            a copy, and pickling are refused with MDError.

        Raises:
            InputError: ``forward`` of this model does not take what was compiled.
        """
        return as_module(self, model)

    def settle(self) -> bool:
        """Whether all calls are done, so far as the watchdog knows."""
        return self._watchdog.settle() == 0

    def close(self) -> None:
        """Wait for the calls under way and let go of the program's memory and the votes' group."""
        if self._closed:
            return
        self._closed = True
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._watchdog.close()
        self._graphs = None
        self.executor.close()
        self.agreement.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _accept(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        if self._closed:
            raise LaunchError("this runner is closed", fix="load or compile again")

        def bind() -> dict[str, Tensor]:
            self._guard()
            return self.signature.bind(args, kwargs, self.device)

        if self.check == "first" and self._agreed:
            return bind()
        inputs = self.agreement.together("the inputs of a call", bind)
        self._agreed = True
        return inputs

    def _watch(self, stream: torch.cuda.Stream) -> None:
        event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(stream)
        self._last = (stream, event)
        self._watchdog.watch(event, self._waits_for)
