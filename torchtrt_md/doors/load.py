"""``load``: from a bundle's folder to a runner, all ranks together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from torchtrt_md.bundle.given import given_checkpoint, given_weights
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
from torchtrt_md.checkpoint import Checkpoint, Given
from torchtrt_md.errors import LaunchError
from torchtrt_md.graph.json import check_bindings, graph_from_json
from torchtrt_md.launch import Launch
from torchtrt_md.launch.agree import Agreement, check_same, grouped
from torchtrt_md.mesh import Mesh
from torchtrt_md.options import seconds
from torchtrt_md.runtime.bring_up import bring_up
from torchtrt_md.runtime.graphs import Budget
from torchtrt_md.runtime.offers import Offers
from torchtrt_md.runtime.runner import MAX_GRAPHS, Runner, Votes
from torchtrt_md.runtime.weights import WeightGuard, check_parts, check_samples, checksum
from torchtrt_md.segment import Part, Segment, Wire


def load(
    folder: Path | str,
    *,
    device: torch.device | None = None,
    timeout: float = 300.0,
    votes: Votes = "always",
    cuda_graph: bool = False,
    static_outputs: bool = False,
    max_graphs: int = MAX_GRAPHS,
    overlap: bool = True,
    weights: Given = None,
    weight_budget: int | Literal["auto"] | None = None,
    kernel_cache: bool | str | Path = False,
) -> Runner:
    """Load this rank's part of a bundle.  Collective: every rank of the launch calls it.

    Nothing of a bundle is trusted before all ranks found theirs whole, equal and of the installed TensorRT; no
    engine is run before all ranks' engines took their communicators.

    Args:
        folder: the bundle; each rank reads its own copy where hosts do not share a file system.
        device: this rank's GPU; the current one by default.  A bundle without engines runs on the CPU where there is
            no GPU.
        timeout: seconds of silence after which another rank is given up, while loading and running.
        votes: how often the ranks vote on their inputs, see :class:`Runner`.
        cuda_graph: capture a call, engines, attention and NCCL, in a CUDA graph and replay it.
        static_outputs: return what the graph writes, which the next call overwrites, and not a copy of it.
        max_graphs: how many graphs are captured, one for each signature of inputs.
        overlap: run the collectives that are not in engines on a stream of their own.
        weights: of a bundle that was exported with ``strip_weights=True``: the whole model's, as a safetensors file, a
            folder of them, or tensors by name.  Each rank reads its part.  They need not be those that were exported,
            but must be the same on all ranks.
        weight_budget: of a bundle that was exported with ``weight_streaming=True``: bytes of weights that stay on this
            rank's GPU, the rest being streamed from host memory in each call; ``"auto"`` leaves it to TensorRT.  Each
            rank may have its own.  None: all stay.
        kernel_cache: keep the kernels that TensorRT-RTX compiles for the GPU in this folder, or in the user's own
            (True), so that the next start finds them.  They are code: let nobody else write there.

    Raises:
        MDError: on every rank, naming the ranks that failed: BundleError (damaged, or built with another
            TensorRT), MeshError (a launch of another size), CommunicatorError, LaunchError (all else).
    """

    def asked_for() -> Offers:
        if not timeout > 0:
            raise LaunchError(f"a timeout of {timeout} s leaves no time to agree", fix="give seconds, more than 0")
        if votes not in get_args(Votes):
            raise LaunchError(f"votes={votes!r} is not understood", fix=f"give one of {', '.join(get_args(Votes))}")
        return Offers.of(weight_budget, kernel_cache)

    if not dist.is_initialized():
        asked_for()  # what is wrong here comes before that there is no launch
    folder, agreement = Path(folder), Agreement(seconds(timeout))
    manifest = read_together(folder, agreement, asked_for)
    offers = asked_for()
    asked = {"votes": votes, "cuda_graph": cuda_graph, "max_graphs": max_graphs}  # the ranks vote by these
    check_same(agreement, {name: repr(value) for name, value in asked.items()}, "the arguments of load")
    engines = any(segment.runs == "engine" for segments in manifest.ranks for segment in segments)
    launch = Launch.join(timeout, device=device, cpu=not engines)
    mesh, segments = mesh_of(manifest), manifest.ranks[launch.rank]
    parts = launch.together("reading the graphs", lambda: [_part(folder, manifest, segment) for segment in segments])
    checkpoint = launch.together("reading the weights", lambda: given_checkpoint(manifest, weights))
    read = launch.together("reading the weights", lambda: _weights(folder, manifest, launch, checkpoint))
    _check_given(manifest, mesh, read, checkpoint, launch)
    executor = bring_up(
        launch,
        mesh,
        parts,
        read.pop,
        [Wire("output", value.name) for value in manifest.outputs],
        self_tests=[Part(test, engine=folder / test.file) for test in manifest.self_tests],
        target=manifest.target,
        transport=manifest.transport,
        overlap=overlap,
        offers=offers,
    )
    return Runner(
        manifest,
        executor,
        launch=launch,
        votes=votes,
        cuda_graph=cuda_graph,
        static_outputs=static_outputs,
        budget=Budget(max_graphs),
        guard=WeightGuard(_watched(manifest, checkpoint, launch.device)).check,
        name="a bundle",
    )


def _weights(folder: Path, manifest: Manifest, launch: Launch, given: Checkpoint | None) -> dict[str, Tensor]:
    own = rank_weights(folder, manifest, launch.rank, launch.device)
    return own | given_weights(manifest, launch.rank, given, launch.device)


def _watched(manifest: Manifest, given: Checkpoint | None, device: torch.device) -> dict[str, Tensor]:
    """Of the weights that are given as tensors those on this device: what is read of them may be views."""
    return given.tensors([value.name for value in manifest.given], device) if given is not None else {}


def _check_given(
    manifest: Manifest, mesh: Mesh, read: Mapping[str, Tensor], given: Checkpoint | None, launch: Launch
) -> None:
    """Ranks must have been given the weights of one model: nothing else would tell.  Collective.

    Raises:
        RankMismatchError: on every rank, naming the weight.
    """
    axes = {value.name: [s.axis for s in value.sharding] for value in manifest.given}
    axes |= {name: [axis for part in parts for axis in axes[part]] for name, parts in manifest.joined.items()}
    names = sorted({w for segments in manifest.ranks for s in segments for w in s.weights if w in axes})

    def sums() -> list[int | None]:
        return [checksum(read[name]) if name in read else None for name in names]

    if names:
        check_parts(mesh, {name: axes[name] for name in names}, sums, launch.agreement)
    if cut := [value.name for value in manifest.given if value.sharding]:
        assert given is not None, "given_checkpoint has refused it"
        check_samples(mesh, cut, lambda name: given.sample(name) if name in given.forms else None, launch.agreement)


def read_together(folder: Path, agreement: Agreement, first: Callable[[], object] = lambda: None) -> Manifest:
    """The manifest, once every rank has found its bundle whole, of the installed TensorRT and equal to the others'.

    ``first`` is what else a rank may find wrong, before it.

    Raises:
        MDError: on every rank, naming the ranks that failed or differ.
    """

    def check(manifest: Manifest) -> None:
        mesh_of(manifest).check_launch(agreement.size)
        check_versions(manifest)
        check_files(folder, manifest, rank_files(manifest, agreement.rank))

    def read() -> tuple[Manifest, str]:
        first()
        return read_unchanged(folder, check)

    # Its path may differ between hosts.
    manifest, digest = agreement.together("reading the bundle", read)
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
