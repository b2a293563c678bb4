"""CUDA graphs of whole calls: engines, attention and NCCL, captured once for each signature and replayed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torchtrt_md.runtime import private
from torchtrt_md.runtime.steps import Key

Values = Mapping[Key, Tensor]
Enqueue = Callable[[Values], dict[Key, Tensor]]
Signature = tuple[tuple[Key, torch.dtype, torch.Size], ...]


@dataclass
class Budget:
    """How many graphs may still be captured; programs of one model at several shapes share one."""

    left: int


@dataclass
class Captured:
    """A graph, and the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: dict[Key, Tensor]
    outputs: dict[Key, Tensor]

    def replay(self, inputs: Values) -> None:
        """Put these inputs where the graph reads, unless they are there, and replay it on the current stream."""
        for name, held in self.inputs.items():
            if held.data_ptr() != inputs[name].data_ptr():
                held.copy_(inputs[name])
        self.graph.replay()


class Graphs:
    """Runs calls, replaying a CUDA graph where there is one of their signature.

    The first call of a signature is run as it is, which also warms everything up, and then captured.  Where that fails
    on a rank there is one warning that names the cause, and all ranks run such calls without graphs from then on.

    Args:
        run: enqueues a call on the current stream.
        budget: of graphs; beyond it new signatures are run without, after one warning.
        device: this rank's GPU.
        static_outputs: return the graph's own memory, which the next call overwrites, and not a copy.
        before_capture: called before a capture, which first waits for all that was enqueued.
        agreed: tells the other ranks whether a capture succeeded, and whether theirs did.
    """

    def __init__(
        self,
        run: Enqueue,
        budget: Budget,
        device: torch.device,
        *,
        static_outputs: bool = False,
        before_capture: Callable[[], None] = lambda: None,
        agreed: Callable[[bool], bool] = lambda fine: fine,
    ) -> None:
        self._run, self._budget, self._device, self._static = run, budget, device, static_outputs
        self._before_capture, self._agreed = before_capture, agreed
        self.captured: dict[Signature, Captured | None] = {}

    def __call__(self, inputs: Values) -> dict[Key, Tensor]:
        """The outputs, in memory of the caller's own unless ``static_outputs``."""
        key = tuple((name, t.dtype, t.shape) for name, t in inputs.items())
        captured = self.captured.get(key)
        if captured is not None:
            captured.replay(inputs)
            if self._static:
                return dict(captured.outputs)
            return {name: out.clone() for name, out in captured.outputs.items()}
        outputs = self._run(inputs)
        if key not in self.captured:
            self.captured[key] = self._capture(inputs)
        return outputs

    def release(self) -> None:
        """Let go of all graphs; others may be captured in their place.

        They are gone then, even where something still refers to them, as an error does that was raised in a replay:
        TensorRT lets go of an engine with collectives only when no graph holds them.
        """
        while self.captured:
            _, captured = self.captured.popitem()
            if captured is not None:
                self._budget.left += 1
                captured.graph.reset()

    def _capture(self, inputs: Values) -> Captured | None:
        if self._budget.left <= 0:
            _warn("no more CUDA graphs are captured: max_graphs are there; calls of new shapes run without one")
            return None
        self._before_capture()
        held = {name: tensor.clone() for name, tensor in inputs.items()}
        graph = torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[self._device.index]
        before = generator.clone_state()
        stream = torch.cuda.current_stream(self._device)
        try:
            # The watchdogs, ours and PyTorch's, ask events from threads of their own, which must not count.
            capturing = torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local")
            with private.own_cublas_workspaces(), capturing:
                outputs = self._run(held)
        except Exception as error:  # CUDA, NCCL, TensorRT and PyTorch each raise their own
            reason = next(iter(str(error).strip().splitlines()), "")
            _warn(f"the CUDA graph could not be captured, and calls run without one: {type(error).__name__}: {reason}")
            torch.cuda.synchronize(self._device)
            generator.graphsafe_set_state(before)  # PyTorch leaves it as if it still was in the capture
            self._agreed(False)
            return None
        if not self._agreed(True):
            _warn("another rank could not capture a CUDA graph, and calls run without one on all ranks")
            return None
        self._budget.left -= 1
        return Captured(graph, held, outputs)


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)
