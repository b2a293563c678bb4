"""What can be asked of a compilation: one set of options for ``md.compile`` and for ``torch.compile``."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeGuard

from torchtrt_md.checks import COMPUTES, EXCHANGE_DTYPES, PLACEMENTS, TRANSPORTS, check_choice, refused, shown
from torchtrt_md.errors import OptionError
from torchtrt_md.mesh import Mesh, axis_names
from torchtrt_md.parallel import PARALLELS, Gather, Parallel, Split

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from torchtrt_md.lowering.passes import Exchange

# Options of a few values.  The first is the default.
CHOICES: Mapping[str, tuple[object, ...]] = {
    "placement": PLACEMENTS,
    "compute": ("auto", *COMPUTES),
    "tune": ("auto", True, False),
    "cuda_graph": (False, True),
    "check": (True, False),
    "fullgraph": (False, True),
    "static_outputs": (False, True),
    "votes": ("always", "first"),
    "overlap": (True, False),
    "transport": ("auto", *TRANSPORTS),
    "exchange_dtype": EXCHANGE_DTYPES,
    "transpose_weights": (True, False),
    "report": (True, False),
}


@dataclass(frozen=True)
class Options:
    """How a model is compiled.

    Attributes:
        mesh: the mesh of the launch.  A model that holds DTensors brings its own.
        parallel: what is parallel, where the model is dense; one or several.
        placement: where attention and its collectives run: in the engine, in PyTorch between engines (``"split"``),
            or where the hardware suggests (``"auto"``).
        compute: what runs all that is not attention or a collective; ``"auto"`` takes the faster for each part where
            they are timed, else TensorRT, or Inductor where the flavour has no kernels for the GPU.
        tune: time on the GPUs what was left to choose, and keep the fastest; ``"auto"`` does where ``md.compile`` has
            GPUs and a model with its weights, and not for ``torch.compile``, whose every recompilation would take the
            time again.
        tune_seconds: what is not expected to end within these is not begun.
        cuda_graph: capture each step in a CUDA graph and replay it.
        static_outputs: return what a CUDA graph writes, which the next call overwrites, and not a copy of it.
        max_graphs: how many CUDA graphs, one for each signature of the inputs, are kept.
        target: the GPU that engines are built for, as for :func:`torchtrt_md.build`.
        check: compare with the dense model where it is at hand, and the ranks' weights with each other.
        fullgraph: what cannot be converted is an error, and does not stay in PyTorch.
        cache: the folder of built engines; ``None`` takes the user's own.
        votes: whether the ranks vote on the inputs of each call, or of the first only; see
            :class:`torchtrt_md.runtime.runner.Runner`.
        timeout: seconds that a rank waits for the others.
        overlap: run collectives on a stream of their own beside what does not need them.
        transport: what does the exchanges between engines: NCCL's kernels, or a kernel that stores into the other
            GPUs' memory (GPUs of one host only); ``"auto"`` takes the faster where they are timed, else NCCL.
        exchange_dtype: what queries, keys and values are sent as where the sequence is split: in the ``"model"``'s own
            dtype, or as rows in ``"float8"``, each with a scale (:mod:`torchtrt_md.lowering.float8_rows`).
        transpose_weights: store weights as TensorRT's products read them fastest.
        exchange: how every attention gets what it lacks, in place of what would be chosen.
        report: print what was compiled, on rank 0.

    Raises:
        OptionError: a value that an option cannot have.
    """

    mesh: Mesh | DeviceMesh | None = None
    parallel: Sequence[Parallel] | Parallel = ()
    placement: Literal["auto", "engine", "split"] = "auto"
    compute: Literal["auto", "tensorrt", "inductor"] = "auto"
    tune: bool | Literal["auto"] = "auto"
    tune_seconds: float = 60.0
    cuda_graph: bool = False
    static_outputs: bool = False
    max_graphs: int = 8
    target: str = "portable"
    check: bool = True
    fullgraph: bool = False
    cache: str | Path | None = None
    votes: Literal["always", "first"] = "always"
    timeout: float = 300.0
    overlap: bool = True
    transport: Literal["auto", "nccl", "store"] = "auto"
    exchange_dtype: Literal["model", "float8"] = "model"
    transpose_weights: bool = True
    exchange: Exchange | None = None
    report: bool = True

    def __post_init__(self) -> None:
        single = isinstance(self.parallel, PARALLELS)
        parallel = (self.parallel,) if single or not isinstance(self.parallel, Sequence) else tuple(self.parallel)
        object.__setattr__(self, "parallel", parallel)
        for name, choices in CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        self._check_types()

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """The options that a mapping names, others being what they are by default.

        Raises:
            OptionError: an unknown option, or a value that it cannot have.
        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, n=1)
                raise OptionError(
                    f"there is no option {name!r}; the options are {', '.join(known)}",
                    fix=f"did you mean {close[0]!r}?" if close else "leave it out",
                )
        return cls(**options)

    @property
    def parallels(self) -> tuple[Parallel, ...]:
        """``parallel``, as what it always is once the options are made: a tuple."""
        assert isinstance(self.parallel, tuple)
        return self.parallel

    @property
    def engines(self) -> bool:
        """May any part become an engine?"""
        return self.compute != "inductor"

    def told(self) -> dict[str, str]:
        """What all ranks must have in common, as texts by name: all but where each keeps its cache."""
        own: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("cache", "report")}
        if self.mesh is not None:
            mesh = self.mesh
            names, shape = (
                (mesh.names, mesh.shape) if isinstance(mesh, Mesh) else (axis_names(mesh), tuple(mesh.mesh.shape))
            )
            own["mesh"] = ", ".join(f"{name}={size}" for name, size in zip(names, shape, strict=True))
        told = {name: str(own[name]) if name == "mesh" else repr(own[name]) for name in own if name != "parallel"}
        for index, p in enumerate(self.parallels):
            name = f"parallel[{index}]" if len(self.parallels) > 1 else "parallel"
            told[name] = f"{type(p).__name__}({p.axis!r})"
            told[f"{name}.strategy"] = repr(getattr(p, "strategy", None))
            told |= _told(f"{name}.plan", getattr(p, "plan", None))
        return told

    def _check_types(self) -> None:
        from torch.distributed.device_mesh import DeviceMesh

        from torchtrt_md.lowering.passes import Exchange

        whole = isinstance(self.max_graphs, int) and not isinstance(self.max_graphs, bool)
        for name, fine, allowed in (
            ("mesh", self.mesh is None or isinstance(self.mesh, (Mesh, DeviceMesh)), "a Mesh or a DeviceMesh"),
            (
                "parallel",
                all(isinstance(p, PARALLELS) for p in self.parallels),
                "a ContextParallel, a TensorParallel, a DataParallel, or a list of them",
            ),
            ("max_graphs", whole and self.max_graphs >= 1, "a whole number of at least 1"),
            ("target", isinstance(self.target, str), '"portable", "current" or a GPU such as "sm89"'),
            ("cache", self.cache is None or isinstance(self.cache, (str, Path)), "a folder"),
            (
                "tune_seconds",
                _is_number(self.tune_seconds) and self.tune_seconds > 0,
                "seconds, more than 0",
            ),
            ("timeout", _is_number(self.timeout) and self.timeout > 0, "seconds, more than 0"),
            ("exchange", self.exchange is None or isinstance(self.exchange, Exchange), "a lowering.passes.Exchange"),
        ):
            if not fine:
                raise refused(name, shown(getattr(self, name)), allowed)


def seconds(timeout: object) -> float:
    """The seconds that a rank waits while the options are read, of which ``timeout`` may be the wrong one."""
    return float(timeout) if _is_number(timeout) and timeout > 0 else Options.timeout


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _told(name: str, entry: Any) -> dict[str, str]:
    """A plan without the addresses of its objects: each of its entries by its place in it."""
    if isinstance(entry, Mapping):
        nested: Iterable[tuple[Any, Any]] = entry.items()
    elif isinstance(entry, (list, tuple)):
        nested = enumerate(entry)
    else:
        plain = entry is None or isinstance(entry, (str, Split, Gather))
        return {name: repr(entry) if plain else type(entry).__name__}
    # Itself too: an empty one is not none.
    told = {name: f"a {type(entry).__name__}"}
    for key, value in nested:
        told |= _told(f"{name}[{key!r}]", value)
    return told
