"""What TensorRT offers when engines are loaded: used where the flavour has it, refused by name where not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torchtrt_md.build.flavour import flavour
from torchtrt_md.errors import LaunchError, OptionError
from torchtrt_md.runtime.kernels import default_folder

Budget = int | Literal["auto"] | None


@dataclass(frozen=True)
class Offers:
    """What is asked of TensorRT when engines are loaded.

    Attributes:
        weight_budget: bytes of weights that stay on this GPU, the rest being streamed from host memory in each run;
            ``"auto"`` leaves it to TensorRT.  Each rank may have its own.  None: all stay.
        kernel_cache: the folder where compiled kernels are kept; None keeps none.
    """

    weight_budget: Budget = None
    kernel_cache: Path | None = None

    @classmethod
    def of(cls, weight_budget: object, kernel_cache: object) -> Offers:
        """From the arguments of :func:`torchtrt_md.load`.

        Raises:
            OptionError: a value that they cannot have.
        """
        whole = isinstance(weight_budget, int) and not isinstance(weight_budget, bool) and weight_budget >= 0
        if not whole and weight_budget not in (None, "auto"):
            raise OptionError(
                f"weight_budget cannot be {weight_budget!r}", fix='pass bytes, 0 or more, "auto", or None for all'
            )
        if not isinstance(kernel_cache, (bool, str, Path)):
            raise OptionError(
                f"kernel_cache cannot be {kernel_cache!r}", fix="pass a folder, True for the user's own, or False"
            )
        own = default_folder() if kernel_cache is True else None
        folder = own if isinstance(kernel_cache, bool) else Path(kernel_cache)
        return cls(weight_budget, folder)  # type: ignore[arg-type]

    def check(self, engines: int) -> None:
        """Refuse what the installed TensorRT lacks, or what there is no engine for.

        Args:
            engines: how many this rank has.

        Raises:
            LaunchError: naming what was asked for.
        """
        if self == NOTHING:
            return
        asked = "weight_budget" if self.weight_budget is not None else "kernel_cache"
        if not engines:
            raise LaunchError(f"{asked} is for engines, and this program has none", fix=f"leave {asked} out")
        f = flavour()
        if self.kernel_cache is not None and not hasattr(f.trt, "IRuntimeCache"):
            raise LaunchError(
                f"{f.name} {f.version} compiles no kernels when engines run, so there is no kernel_cache",
                fix="leave it out; it is for TensorRT-RTX",
            )


NOTHING = Offers()


def stream_weights(loaded: Any, budget: Budget, name: str) -> None:
    """Let an engine keep this much of its weights on the GPU.  Before any context of it is made.

    Args:
        loaded: TensorRT's engine.
        budget: see :class:`Offers`.
        name: for messages.

    Raises:
        LaunchError: the engine was not built for it, or TensorRT refuses.
    """
    if budget is None:
        return
    streamable = int(loaded.streamable_weights_size)
    if streamable <= 0:
        raise LaunchError(
            f"{name} has no weights that could be streamed, so there is no use for a weight_budget",
            fix="export with weight_streaming=True, or leave weight_budget out",
        )
    wanted = int(loaded.get_weight_streaming_automatic_budget()) if budget == "auto" else min(budget, streamable)
    loaded.weight_streaming_budget_v2 = wanted
    found = int(loaded.weight_streaming_budget_v2)
    if found != wanted:
        raise LaunchError(
            f"{name} was asked to keep {wanted} of its {streamable} bytes of weights on the GPU, and TensorRT keeps"
            f" {found}",
            fix="see the lines that TensorRT logged above; free GPU memory, or give another weight_budget",
        )
