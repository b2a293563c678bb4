"""Choices that were made by timing, kept on disk for later launches of the same program on the same GPUs."""

from __future__ import annotations

import functools
import hashlib
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch

import torchtrt_md
from torchtrt_md.choices import Choices
from torchtrt_md.graph.text import graph_digest
from torchtrt_md.runtime.access import pairs_without_access
from torchtrt_md.whole_file import write_whole

if TYPE_CHECKING:
    from torchtrt_md.session import Session


def keep(choices: Choices, session: Session) -> None:
    """Keep what :func:`tune` found for later launches; nothing where nothing was timed."""
    file = session.choices_file
    if session.launch.rank == 0 and file is not None and choices.tuned_on and read(file) != choices:
        write(choices, file)


def write(choices: Choices, file: Path) -> None:
    """Where they cannot be kept, warn: for this launch they hold as they are."""
    try:
        write_whole(file, msgspec.json.encode(choices))
    except OSError as error:
        warnings.warn(f"what was tuned cannot be kept in {file.parent}: {error.strerror or error}", stacklevel=3)


def read(file: Path) -> Choices | None:
    """Choices that were kept; None where there are none, or the file is damaged."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=Choices)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None


def key(session: Session, default: Choices) -> str:
    """All that the choices depend on, in hexadecimal."""
    options, launch = session.options, session.launch
    gpu = torch.cuda.get_device_name(launch.device) if launch.device.type == "cuda" else "cpu"
    flavour: tuple[str, ...] = ()
    if options.engines:
        from torchtrt_md.build.cache import versions
        from torchtrt_md.build.flavour import flavour as installed

        # As an engine's key has them: other converters leave other ops to PyTorch, and make other engines.
        flavour = (installed().name, installed().version, *versions())
    parts = (
        graph_digest(session.road.lower(replace(default, placement="split")).graphs[launch.rank]),
        sorted(session.program.strategies.items()),
        list(session.program.mesh.axes.items()),
        # where the ranks are: what is sent between hosts is another matter
        launch.agreement.gather((launch.hosts[launch.rank], gpu), "the ranks' GPUs"),
        launch.shares_gpus,
        pairs_without_access(launch, session.program.mesh) if launch.device.type == "cuda" else [],
        (flavour, str(torch.__version__), torchtrt_md.__version__, _sources()),
        (options.tune_seconds, options.placement, options.target, str(options.exchange)),
        (options.transport, options.overlap, options.compute, options.fullgraph, options.transpose_weights),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@functools.cache
def _sources() -> str:
    """What lowers and runs programs, by its source: between releases the version stays while times change."""
    home = Path(torchtrt_md.__file__).parent
    files = sorted((*home.glob("*.py"), *home.glob("*/*.py")))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
