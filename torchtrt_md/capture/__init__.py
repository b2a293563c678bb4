"""Capture: a model, its example arguments, a mesh and what is parallel -> a ``ShardedProgram``.

One process captures the graphs of all ranks of any mesh, with no GPU and nothing launched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torchtrt_md.checks import as_parallels, check_call, check_mesh, check_weights

if TYPE_CHECKING:
    from torch import nn

    from torchtrt_md.checkpoint import Given
    from torchtrt_md.mesh import Mesh
    from torchtrt_md.parallel import Parallel
    from torchtrt_md.program import ShardedProgram


def capture(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    mesh: Mesh,
    parallel: Parallel | Sequence[Parallel] = (),
    weights: Given = None,
) -> ShardedProgram:
    """Trace the graph of every rank of ``mesh``.

    Args:
        model: the model, dense or as ``parallelize_module`` left it.  It is not changed.
        args: example positional arguments; tensors give the shapes and dtypes, all else is built in.
        kwargs: example keyword arguments.
        mesh: the mesh of the launch that the program is for.
        parallel: what is parallel: a :class:`ContextParallel`, a :class:`TensorParallel`, or several.  An axis of the
            mesh that nothing else uses needs a :class:`DataParallel`.
        weights: dense weights, for a model whose parameters are DTensors already: this process holds one rank's
            shards only, and other ranks' engines need the whole.  Or of a model whose parameters are on meta, of which
            parts are then read when they are needed: a folder of safetensors files, one file, an index
            (``model.safetensors.index.json``), or tensors by name.

    Raises:
        OptionError: an argument of another type.
        MeshError: an axis that the mesh lacks, or that nothing uses.
        PlanError: a plan that does not fit the model.
        CaptureError: the model cannot be traced.
        WeightsError: the weights that were given are not those of the model.

    Warns:
        PlanWarning: an entry of a plan that applied to nothing in this call.
    """
    check_call(model, args, kwargs)
    check_mesh(mesh)
    check_weights(weights)
    parallels = as_parallels(parallel)
    from torchtrt_md.capture.model import capture_model  # DTensor takes half a second to import

    return capture_model(model, args, dict(kwargs or {}), mesh, parallels, weights)
