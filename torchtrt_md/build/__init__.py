"""Build: a lowered ``ShardedProgram`` -> the engine files of each different rank.

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

    A program that communicates along one axis is one engine; one over several axes is cut as :func:`torchtrt_md.export`
    cuts it, into as few engines as can be that communicate along one axis each.  They come in the order in which a rank
    runs them, and their segments say what passes between them.

    Args:
        program: captured or lowered.
        folder: where the engine files go.
        target: the GPU to build for: ``sm75``, ``sm80``, ``sm86``, ``sm89``, ``sm120``, ``sm121``, ``portable`` or
            ``current``.
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
