"""``load``: from a bundle's folder to a runner, all ranks together."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import torch

from torchtrt_md.bundle.limits import MAX_GRAPH_BYTES
from torchtrt_md.bundle.manifest import Manifest
from torchtrt_md.bundle.read import (
    check_files,
    check_versions,
    rank_files,
    read_file,
    read_unchanged,
)
from torchtrt_md.bundle.structure import mesh_of
from torchtrt_md.bundle.weights import rank_weights
from torchtrt_md.errors import LaunchError
from torchtrt_md.graph.json import check_bindings, graph_from_json
from torchtrt_md.launch import Launch
from torchtrt_md.launch.agree import Agreement, grouped
from torchtrt_md.runtime.bring_up import bring_up
from torchtrt_md.runtime.graphs import Budget
from torchtrt_md.runtime.runner import MAX_GRAPHS, Check, Runner
from torchtrt_md.segment import Part, Segment, Wire


def load(
    folder: Path | str,
    *,
    device: torch.device | None = None,
    timeout: float = 300.0,
    check: Check = "always",
    cuda_graph: bool = False,
    static_outputs: bool = False,
    max_graphs: int = MAX_GRAPHS,
    overlap: bool = True,
) -> Runner:
    """Load this rank's part of a bundle.  Collective: every rank of the launch calls it.

    Nothing of a bundle is trusted before all ranks found theirs whole, equal and of the installed TensorRT; no
    engine is run before all ranks' engines took their communicators.

    Args:
        folder: the bundle; each rank reads its own copy where hosts do not share a file system.
        device: this rank's GPU; the current one by default.  A bundle without engines runs on the CPU where there is
            no GPU.
        timeout: seconds of silence after which another rank is given up, while loading and running.
        check: how often the ranks vote on their inputs, see :class:`Runner`.
        cuda_graph: capture a call, engines, attention and NCCL, in a CUDA graph and replay it.
        static_outputs: return what the graph writes, which the next call overwrites, and not a copy of it.
        max_graphs: how many graphs are captured, one for each signature of inputs.
        overlap: run the collectives that are not in engines on a stream of their own.

    Raises:
        MDError: on every rank, naming the ranks that failed: BundleError (damaged, or built with another
            TensorRT), MeshError (a launch of another size), CommunicatorError, LaunchError (all else).
    """
    if check not in get_args(Check):
        raise LaunchError(f"check={check!r} is not understood", fix=f"give one of {', '.join(get_args(Check))}")
    folder = Path(folder)
    manifest = read_together(folder, Agreement(timeout))
    engines = any(segment.runs == "engine" for segments in manifest.ranks for segment in segments)
    launch = Launch.join(timeout, device=device, cpu=not engines)
    mesh, segments = mesh_of(manifest), manifest.ranks[launch.rank]
    parts = launch.together("reading the graphs", lambda: [_part(folder, manifest, segment) for segment in segments])
    weights = launch.together("reading the weights", lambda: rank_weights(folder, manifest, launch.rank, launch.device))
    executor = bring_up(
        launch,
        mesh,
        parts,
        weights.pop,
        [Wire("output", value.name) for value in manifest.outputs],
        target=manifest.target,
        transport=manifest.transport,
        overlap=overlap,
    )
    return Runner(
        manifest,
        executor,
        launch=launch,
        check=check,
        cuda_graph=cuda_graph,
        static_outputs=static_outputs,
        budget=Budget(max_graphs),
        name="a bundle",
    )


def read_together(folder: Path, agreement: Agreement) -> Manifest:
    """The manifest, once every rank has found its bundle whole, of the installed TensorRT and equal to the others'.

    Raises:
        MDError: on every rank, naming the ranks that failed or differ.
    """

    def check(manifest: Manifest) -> None:
        mesh_of(manifest).check_launch(agreement.size)
        check_versions(manifest)
        check_files(folder, manifest, rank_files(manifest, agreement.rank))

    # Its path may differ between hosts.
    manifest, digest = agreement.together("reading the bundle", lambda: read_unchanged(folder, check))
    digests = agreement.gather(digest, "the bundle's hash")
    if len(set(digests)) > 1:
        raise LaunchError(
            f"the ranks have different bundles: by the manifest's sha256, {grouped([d[:12] for d in digests])}",
            fix="copy the same bundle to every host",
        )
    return manifest


def _part(folder: Path, manifest: Manifest, segment: Segment) -> Part:
    if segment.runs == "engine":
        return Part(segment, engine=folder / segment.file)
    graph = graph_from_json(read_file(folder, manifest, segment.file, MAX_GRAPH_BYTES), segment.file)
    check_bindings(graph, segment, segment.file)
    return Part(segment, graph)
