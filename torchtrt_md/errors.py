"""The errors this package raises: each says what is wrong, where, and what to do instead.

One class per stage of the road, so that a caller can catch what it can mend.  Every message has the
same shape: the problem, then the user's own source line where there is one, then the way out.
"""

from __future__ import annotations


class MDError(RuntimeError):
    """Base of all errors of this package.

    Args:
        problem: what is wrong, naming the thing (module, input, node, file) and both values that disagree.
        fix: what to do instead.
        at: the user's source line, as :func:`torchtrt_md.graph.source.source_line` renders it.
    """

    def __init__(self, problem: str, *, fix: str = "", at: str = "") -> None:
        self.problem, self.fix, self.at = problem, fix, at
        self.agreed = False  # all ranks of the launch raise it
        self.lost = False  # ranks are gone, or at other steps: nothing that they do together can go on
        parts = [problem]
        if at:
            parts.append(f"  at {at}")
        if fix:
            parts.append(f"  Instead: {fix}")
        super().__init__("\n".join(parts))


class MeshError(MDError, ValueError):
    """A mesh of impossible sizes, an axis that it lacks, or a mesh that does not fit the launch."""


class OptionError(MDError, ValueError):
    """An option that does not exist, or a value that it cannot have."""


class PlanError(MDError, ValueError):
    """A parallel plan that does not fit the model."""


class PlanWarning(UserWarning):
    """What was asked for does nothing: an entry of a plan, a split along an unused axis, a launch that nobody uses."""


class CaptureError(MDError):
    """The model could not be traced into one graph per rank."""


class CollectiveError(MDError):
    """A collective in a form that is not understood, or on groups that are not an axis of the mesh."""


class ShardingError(MDError):
    """An op that would compute something else on a shard than on the whole sequence."""


class RankMismatchError(MDError):
    """Ranks reach different collectives: what would be a hang on GPUs, found at compile time."""


class VerificationError(MDError):
    """The program of all ranks does not compute what the dense model computes."""


class BuildError(MDError):
    """TensorRT cannot build the engine."""


class ConversionError(BuildError):
    """One op cannot be converted.

    Args:
        node: its name in the lowered graph.
    """

    def __init__(self, problem: str, *, fix: str = "", at: str = "", node: str = "") -> None:
        super().__init__(problem, fix=fix, at=at)
        self.node = node


class TargetError(BuildError, ValueError):
    """A target GPU that the installed TensorRT flavour cannot build for."""


class BundleError(MDError):
    """A bundle that is damaged, of another version, or not made for this launch."""


class WeightsError(MDError):
    """Weights that were given as files or tensors are damaged, or not those of the model."""


class InputError(MDError, ValueError):
    """An input at run time that is not what the engines were built for."""


class LaunchError(MDError):
    """Ranks of a launch disagree, or one of them failed."""


class CommunicatorError(LaunchError):
    """Communicators could not be made, or an engine refused its own.  It is never run without one."""


def first_line(error: BaseException) -> str:
    """Of a message; the class, where there is none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
