"""Build: a lowered ``ShardedProgram`` -> one engine file for each different rank.

Engines are built on a machine with or without a GPU, by TensorRT-RTX or TensorRT, whichever is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torchtrt_md.checks import check_build

if TYPE_CHECKING:
    from torchtrt_md.build.engine import BuiltEngine
    from torchtrt_md.program import ShardedProgram


def build(
    program: ShardedProgram,
    folder: str | Path,
    *,
    target: str = "portable",
    ranks: Sequence[int] | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> list[BuiltEngine]:
    """Build the engines of ``ranks`` (all, unless given) into ``folder``.

    Args:
        program: captured or lowered.
        folder: where the engine files go, one for each different rank.
        target: the GPU to build for: ``sm80``, ``sm86``, ``sm89``, ``sm120``, ``portable`` or ``current``.
        ranks: the ranks whose engines are wanted.
        progress: called with a line for each engine begun.

    Raises:
        OptionError: an argument of another type, or a rank that the mesh has not.
        TargetError: the installed TensorRT cannot build for the target.
        BuildError: TensorRT cannot build the program, with the op and the user's line where it is known.
    """
    check_build(program, folder, target, ranks, progress)
    from torchtrt_md.build.program import build_program  # loads TensorRT
    from torchtrt_md.lowering import lower

    lowered = lower(program)
    wanted = range(program.mesh.size) if ranks is None else ranks
    return build_program(lowered, Path(folder), target, wanted, progress)
