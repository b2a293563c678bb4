"""A case of the suite, what it finds, and the rank that it runs on."""

from __future__ import annotations

import copy
import gc
import json
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from torchtrt_md.errors import MDError
from torchtrt_md.verification.compare import ROUNDING_RATIO, relative_error

Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 60.0  # seconds of silence after which a rank is given up


@dataclass
class Found:
    """What one rank found.

    Attributes:
        error: relative, against the dense model in fp64.
        dense_error: of the dense model in its own dtype.
        refused: the error that was expected, and raised.
        problems: what is not as it must be; none in a case that passed.
        message: what else there is to tell.
    """

    error: float | None = None
    dense_error: float | None = None
    refused: str = ""
    problems: list[str] = field(default_factory=list)
    message: str = ""

    def expect(self, fine: bool, problem: str) -> None:
        """Note the problem unless all is fine."""
        if not fine:
            self.problems.append(problem)

    def compare(self, results: list[Tensor], expected: Tensor, dense_error: float) -> None:
        """Note the first result's error, and whether the others have its bits.  The worst of several comparisons."""
        error = relative_error(results[0], expected)
        self.expect(
            0 < error <= ROUNDING_RATIO * dense_error, f"the error is {error:.3g}, the dense model's {dense_error:.3g}"
        )
        others = {n: relative_error(r, results[0]) for n, r in enumerate(results) if not torch.equal(results[0], r)}
        told = ", ".join(f"call {n} differs by {error:.3g}" for n, error in others.items())
        self.expect(not others, f"later calls gave other bits than the first: {told}")
        if self.error is None or not error <= self.error:
            self.error, self.dense_error = error, dense_error

    def must_refuse(self, kind: type[MDError], step: Callable[[], object], *words: str) -> None:
        """Run a step that must raise this error, with these words in it."""
        try:
            step()
        except MDError as error:
            self.refused = f"{type(error).__name__}: {error}"
            self.expect(isinstance(error, kind), f"it is not a {kind.__name__}")
            for word in words:
                self.expect(word in str(error), f"the error does not say {word!r}")
        else:
            self.problems.append(f"no {kind.__name__} was raised")


@dataclass(frozen=True)
class Case:
    """What every rank of a launch runs.

    Attributes:
        name: no other case's.
        run: on each rank; what it raises is a failure.
        launch: cases of one name share a launch.
        seconds: more is a hang.
        ends: ranks whose processes must end in this case, with their exit codes, None for any but 0; so it is its
            launch's last.
        says: words that must be in the output of the first of them, or of what another rank was to be refused.
    """

    name: str
    run: Callable[[Rank], Found]
    launch: str = "doors"
    seconds: float = 90.0
    ends: Mapping[int, int | None] = field(default_factory=dict)
    says: tuple[str, ...] = ()


class Rank:
    """This process in a launch.

    Args:
        device: its GPU, or the CPU.
        work: the suite's folder for bundles.
        record: the file of what it tells the suite, a JSON object in each line.
        make: name -> the dense model of a case, equal on all ranks, on the CPU.
    """

    def __init__(self, device: torch.device, work: Path, record: Path, make: Callable[[str], Call]) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.device, self.work, self._record, self._make = device, work, record, make
        self._models: dict[str, Call] = {}
        self._references: dict[tuple[str, bool], tuple[Tensor, float]] = {}
        self._mesh: DeviceMesh | None = None

    def tell(self, **what: Any) -> None:
        """Tell the suite."""
        with self._record.open("a") as file:
            file.write(json.dumps({"time": time.time(), **what}) + "\n")

    def end(self, case: str, found: Found, raised: str, seconds: float) -> None:
        """Tell the end of a case."""
        self.tell(end=case, seconds=seconds, raised=raised, **asdict(found))

    def model(self, name: str) -> Call:
        """A copy of a dense model and its arguments, on the device."""
        if name not in self._models:
            torch.manual_seed(0)
            self._models[name] = self._make(name)
        model, args, kwargs = self._models[name]
        return copy.deepcopy(model).to(self.device), placed(args, self.device), placed(kwargs, self.device)

    def reference(self, name: str, engines: bool = False) -> tuple[Tensor, float]:
        """The dense model's result in fp64, and the error of its own; of ``engines``, as TensorRT rounds."""
        if (name, engines) not in self._references:
            model, args, kwargs = self.model(name)
            with torch.no_grad():
                with _BiasApart() if engines else nullcontext():
                    own = first_tensor(model(*args, **kwargs))
                cpu = torch.device("cpu")  # some ops have no fp64 on GPUs
                wide: Any = model.to(cpu, torch.float64)
                args, kwargs = placed(args, cpu), placed(kwargs, cpu)
                if hasattr(wide, "set_experts_implementation"):
                    wide.set_experts_implementation("eager")  # grouped products have none at all
                whole = first_tensor(wide(*placed(args, dtype=torch.float64), **placed(kwargs, dtype=torch.float64)))
                whole = whole.to(self.device)
            self._references[name, engines] = whole, relative_error(own, whole)
        return self._references[name, engines]

    @property
    def mesh(self) -> DeviceMesh:
        """One axis ``tp`` over all ranks."""
        if self._mesh is None:
            self._mesh = init_device_mesh(self.device.type, (self.size,), mesh_dim_names=("tp",))
        return self._mesh

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def clean_up(self) -> None:
        """Let go of what a case left."""
        torch._dynamo.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class _BiasApart(TorchFunctionMode):
    """Linear layers as TensorRT computes them: a product has the network's dtype before its bias is added."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and len(args) == 3 and args[2] is not None:
            return func(*args[:2]) + args[2]
        return func(*args, **(kwargs or {}))


def placed(value: Any, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Any:
    """Nested arguments on a device, their floating tensors in a dtype; None leaves them as they are."""

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(device or leaf.device, dtype if dtype and leaf.is_floating_point() else leaf.dtype)

    return pytree.tree_map(place, value)


def first_tensor(result: Any) -> Tensor:
    """The model's one output, however it is nested."""
    if isinstance(result, Mapping):
        result = list(result.values())
    return next(leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor))
