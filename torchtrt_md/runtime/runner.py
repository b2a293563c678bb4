"""``Runner``: a program on this rank, called like the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

import torch
from torch import Tensor, nn

from torchtrt_md.bundle.manifest import Manifest
from torchtrt_md.choices import Choices
from torchtrt_md.errors import LaunchError, MDError, first_line
from torchtrt_md.launch import Launch
from torchtrt_md.launch.watchdog import waits_for
from torchtrt_md.runtime.autocast import without_autocast
from torchtrt_md.runtime.executor import Executor
from torchtrt_md.runtime.graphs import Budget, Graphs
from torchtrt_md.runtime.module import as_module
from torchtrt_md.runtime.signature import Signature, prepared
from torchtrt_md.runtime.steps import Key
from torchtrt_md.runtime.weights import WeightOf, laid_out
from torchtrt_md.segment import Wire

if TYPE_CHECKING:
    from torchtrt_md.runtime.timing import StepTime

Votes = Literal["always", "first"]
MAX_GRAPHS = 8
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class WeightSet:
    """Weights as a runner's segments read them, and the CUDA graphs of calls with them.

    ``values`` are those that differ from the ones that the runner was made with.
    """

    values: Mapping[Key, Tensor]
    graphs: Graphs | None


class Runner:
    """This rank's part of a program, called like the model: ``runner(hidden, timestep=t)``.

    Every rank makes the same calls in the same order, from one thread at a time, of all runners of a launch.  The
    autocast around a call is not the program's, which computes in the dtypes that it was captured with.
    :func:`torchtrt_md.load` and :func:`torchtrt_md.compile` make it.

    Attributes:
        manifest: what the bundle says, or would say.
        rank: this process.
        device: this rank's GPU, where inputs must be and outputs are.
        votes: ``"always"``: all ranks vote on their inputs before each call, so that a wrong input on one rank
            is refused on all.  ``"first"``: they vote before the first call only, which saves the host an
            exchange through the launch's store per call; a wrong input later raises on its own rank alone, and its
            peers, already in a collective, are ended by the watchdog after the timeout.
        agreement: the votes of this launch.
        name: of the program, the same on all ranks and no other program's.
        executor: what a call enqueues.
        summary: what runs where, and why; for people.
        choices: of a program that was just compiled, what was chosen; ``md.export(..., choices=...)`` takes it.
    """

    def __init__(
        self,
        manifest: Manifest,
        executor: Executor,
        *,
        launch: Launch,
        votes: Votes,
        cuda_graph: bool = False,
        static_outputs: bool = False,
        budget: Budget | None = None,
        nest: Callable[[Mapping[str, Tensor]], Any] | None = None,
        name: str = "the program",
        summary: str = "",
        choices: Choices | None = None,
        guard: Callable[[], None] = lambda: None,
        parts_of: Callable[[Mapping[str, Tensor]], WeightOf] | None = None,
        check_others: Callable[[Mapping[str, Tensor]], None] = lambda others: None,
    ) -> None:
        self.manifest, self.executor, self.votes = manifest, executor, votes
        self.summary, self.choices = summary, choices
        self.device = executor.device
        self.agreement, self.rank = launch.agreement, launch.rank
        self.name = launch.name_program(name)
        self.signature = Signature(manifest)
        self._nest, self._guard, self._parts_of = nest or self.signature.nest, guard, parts_of
        self._check_others = check_others
        self._launch, self._watchdog = launch, launch.watchdog
        self._communicates = any(segment.collectives for segment in manifest.ranks[self.rank])
        self._waits_for = waits_for(manifest.ranks[self.rank], self.signature.mesh, self.rank)
        self._static_outputs = static_outputs
        self._side: torch.cuda.Stream | None = None
        self._last: tuple[torch.cuda.Stream, torch.cuda.Event] | None = None
        self._agreed = self._closed = False
        if self.device.type == "cuda":
            self._side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            torch.cuda.synchronize(self.device)
        self._budget = (budget or Budget(MAX_GRAPHS)) if cuda_graph and self.device.type == "cuda" else None
        self._own = WeightSet({}, self._make_graphs({}))
        self._others: list[WeightSet] = []

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
            InputError: on every rank, naming the ranks whose inputs are wrong (``votes="first"``: see there).
            LaunchError: another rank did not make this call within the timeout, or an engine could not be run.
        """
        return self._nest(self.call(lambda: self.signature.bind(args, kwargs, self.device)))

    def call(
        self, bind: Callable[[], Mapping[str, Tensor]], *, weights: WeightSet | None = None, about: str = ""
    ) -> dict[str, Tensor]:
        """Check the inputs, vote on them, and run.

        Args:
            bind: gives this rank's inputs by name, or refuses them.
            weights: of :meth:`with_weights`; by default those that the runner was made with.
            about: what else all ranks must have in common in this call, for messages.

        Returns:
            The outputs by name.

        Raises:
            InputError: as ``bind``, on every rank.
            LaunchError: ranks are in different calls; or as :meth:`__call__`.
        """
        if self._closed:
            raise LaunchError("this runner is closed", fix="load or compile again")
        self.agreement.check_in_step()

        def checked() -> Mapping[str, Tensor]:
            if weights is None:  # others are watched by who has them
                self._guard()
            return bind()

        with self._launch.one_thread(self.name):
            if self.votes == "first" and self._agreed:
                inputs = checked()
            else:
                inputs = self.agreement.together(f"a call of {self.name}{about}", checked)
                self._agreed = True
            return self.run(inputs, weights)

    def with_weights(self, others: Callable[[], Mapping[str, Tensor]]) -> WeightSet:
        """Other weights of the same names, shapes and dtypes, laid out as the segments read them.  Collective.

        Args:
            others: gives them by the model's names, as this process had those that the program was captured with.

        Raises:
            MDError: as ``others``, on every rank.
        """
        segments, parts_of = self.manifest.ranks[self.rank], self._parts_of
        if parts_of is None:
            raise LaunchError("a bundle has its own weights", fix="load it again, with weights=...")
        about = f"other weights for {self.name}"
        held = self.agreement.together(about, others)
        self._check_others(held)
        values = self.agreement.together(about, lambda: laid_out(segments, parts_of(held), self.device))
        self._others.append(WeightSet(values, self._make_graphs(values)))
        return self._others[-1]

    def run(self, inputs: Mapping[str, Tensor], weights: WeightSet | None = None) -> dict[str, Tensor]:
        """The outputs by name, of inputs by name that are known to be of the right shapes and dtypes on all ranks.

        Raises:
            LaunchError: the runner is closed, an engine could not be run, or a collective broke off: another rank has
                failed or ended.
        """
        if self._closed:
            raise LaunchError("this runner is closed", fix="load or compile again")
        try:
            with torch.no_grad(), without_autocast(), self._launch.one_thread(self.name):
                if self._side is None:
                    return self._run_on_cpu(inputs, weights)
                with torch.cuda.device(self.device):
                    return self._run_on_gpu(inputs, weights, self._side)
        except (MDError, torch.OutOfMemoryError):
            raise
        except RuntimeError as error:  # gloo and NCCL say which connection broke, and not which rank
            who = self.agreement.ended()
            raise LaunchError(
                f"{self.name} could not be run: {f'{who}, and ' if who else ''}{first_line(error)}",
                fix="see the output of all ranks, then launch again: one that has failed or ended cannot be replaced",
            ) from error

    def _run_on_cpu(self, inputs: Mapping[str, Tensor], weights: WeightSet | None) -> dict[str, Tensor]:
        ready = {name: prepared(tensor) for name, tensor in inputs.items()}
        if not self._communicates:
            return self.enqueue(ready, weights)
        with self._watchdog.waiting(self._waits_for):
            return self.enqueue(ready, weights)

    def _run_on_gpu(
        self, inputs: Mapping[str, Tensor], weights: WeightSet | None, side: torch.cuda.Stream
    ) -> dict[str, Tensor]:
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
        # NCCL connects to a rank when it first sends to it, and waits for it on this thread.
        with torch.cuda.stream(stream), self._watchdog.waiting(self._waits_for):
            outputs = self.enqueue(ready, weights, graphs=not capturing)
        if not capturing:
            self._watch(stream)
        if stream is not current:
            current.wait_stream(stream)
            for tensor in ready.values():
                tensor.record_stream(stream)
            for tensor in outputs.values():
                tensor.record_stream(current)
        return outputs

    def enqueue(
        self, inputs: Mapping[str, Tensor], weights: WeightSet | None = None, *, graphs: bool = True
    ) -> dict[str, Tensor]:
        """Launch everything on the current stream, unchecked: the part of a call that a CUDA graph can capture.

        Args:
            inputs: by name, contiguous and aligned (:func:`~torchtrt_md.runtime.signature.prepared`).
            weights: of :meth:`with_weights`; by default those that the runner was made with.
            graphs: replay a CUDA graph, where this runner makes them.

        Returns:
            The outputs by name, allocated on the current stream, which is not the default one.
        """
        wired: dict[Key, Tensor] = {Wire("input", name): tensor for name, tensor in inputs.items()}
        of = weights or self._own
        replays = of.graphs if graphs else None
        outputs = self.executor.run({**of.values, **wired}) if replays is None else replays(wired)
        return {value.name: outputs[Wire("output", value.name)] for value in self.manifest.outputs}

    @property
    def captured(self) -> int:
        """How many CUDA graphs this runner holds."""
        return sum(c is not None for c in self._own.graphs.captured.values()) if self._own.graphs else 0

    def graph_inputs(self) -> dict[str, Tensor]:
        """The tensors that the CUDA graph of the last signature reads, by name; empty where there is none.

        Inputs are copied into them, unless they are these very tensors: who fills them in place saves the copies.
        """
        graphs = self._own.graphs
        held = [c for c in graphs.captured.values() if c is not None] if graphs else []
        return {wire.name: t for wire, t in held[-1].inputs.items() if isinstance(wire, Wire)} if held else {}

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

    def time_steps(self, inputs: Mapping[str, Tensor], iterations: int) -> list[StepTime]:
        """How long each step of a call takes on this rank; see :mod:`torchtrt_md.runtime.timing`.  Collective.

        Args:
            inputs: by name, of the right shapes and dtypes, on ``device``.
            iterations: how many calls are timed.

        Raises:
            LaunchError: the runner is closed, or an engine could not be run.
        """
        from torchtrt_md.runtime.timing import time_steps

        if self._closed:
            raise LaunchError("this runner is closed", fix="load or compile again")
        wired: dict[Key, Tensor] = {Wire("input", name): prepared(tensor) for name, tensor in inputs.items()}

        def step() -> list[StepTime]:
            with torch.no_grad(), without_autocast():
                if self._side is None:
                    return time_steps(self.executor, wired, iterations)
                torch.cuda.synchronize(self.device)
                with torch.cuda.device(self.device), torch.cuda.stream(self._side):
                    return time_steps(self.executor, wired, iterations)

        return self._launch.meet(f"timing the steps of {self.name}", step)

    def close(self) -> None:
        """Wait for the calls under way and let go of the program's memory.

        Delete CUDA graphs of your own that hold calls of this runner first: TensorRT lets go of an engine with
        collectives only when no graph holds them (measured: it waits without end).  What is not let go of within the
        timeout ends the process.
        """
        if self._closed:
            return
        self._closed = True
        try:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # each call has its own time, by the watchdog
        finally:
            with self._launch.bounded(f"the end of {self.name}"):
                for weights in (self._own, *self._others):
                    if weights.graphs is not None:
                        weights.graphs.release()
                self._own, self._others = WeightSet({}, None), []
                self.executor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _make_graphs(self, values: Mapping[Key, Tensor]) -> Graphs | None:
        if self._budget is None:
            return None
        return Graphs(
            lambda inputs: self.executor.run({**values, **inputs}),
            self._budget,
            self.device,
            static_outputs=self._static_outputs,
            # it waits on this thread, and other ranks may not have come
            before_capture=lambda: self._watch(torch.cuda.current_stream(self.device)),
            agreed=lambda fine: all(self.agreement.gather(fine, f"a CUDA graph of {self.name}")),
        )

    def _watch(self, stream: torch.cuda.Stream) -> None:
        event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(stream)
        self._last = (stream, event)
        self._watchdog.watch(event, self._waits_for)
