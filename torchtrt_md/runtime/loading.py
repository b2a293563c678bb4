"""``load``: from a bundle's folder to a runner, all ranks together."""

from __future__ import annotations

import functools
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist

from torchtrt_md.bundle.manifest import Manifest, Segment
from torchtrt_md.bundle.read import check_files, check_versions, manifest_digest, rank_files, read_manifest
from torchtrt_md.bundle.structure import mesh_of
from torchtrt_md.bundle.weights import rank_weights
from torchtrt_md.errors import LaunchError
from torchtrt_md.graph.json import check_bindings, graph_from_json
from torchtrt_md.graph.text import graph_digest
from torchtrt_md.runtime import communicator, private
from torchtrt_md.runtime.agree import Agreement, grouped
from torchtrt_md.runtime.assemble import (
    Loaded,
    assemble,
    axes_of,
    bind_engines,
    make_engines,
    test_rings,
    waits_for,
)
from torchtrt_md.runtime.engine import deserialize
from torchtrt_md.runtime.graphs import Budget
from torchtrt_md.runtime.runner import MAX_GRAPHS, Check, Runner
from torchtrt_md.runtime.watchdog import Watchdog


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
    """Load this rank's engines of a bundle.  Collective: every rank of the launch calls it.

    Nothing of a bundle is trusted before all ranks found theirs whole, equal and of the installed TensorRT; no
    engine is run before all ranks' engines took their communicators.

    Args:
        folder: the bundle; each rank reads its own copy where hosts do not share a file system.
        device: this rank's GPU; the current one by default.
        timeout: seconds that any wait on another rank may take, while loading and running.
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
    agreement = Agreement(timeout)
    watchdog: Watchdog | None = None
    try:
        manifest = read_together(folder, agreement)
        gpu = _device_together(device, agreement)
        groups: dict[str, dist.ProcessGroup] = {}
        watchdog = Watchdog(timeout, rank=agreement.rank, abort=lambda: private.abort({**groups}.values(), gpu))
        mesh, segments = mesh_of(manifest), manifest.ranks[agreement.rank]
        guard = watchdog
        groups.update(
            agreement.together(
                "the NCCL communicators", lambda: communicator.connect(mesh, _axes(manifest), gpu, guard)
            )
        )
        loaded, keep = agreement.together("loading the engines", lambda: _loaded(folder, manifest, segments, gpu))
        engines = agreement.together("making the engines' contexts", lambda: make_engines(loaded, gpu, keep))
        agreement.together("binding the communicators", lambda: bind_engines(engines, groups, gpu))
        test_rings(segments, agreement=agreement, groups=groups, device=gpu, watchdog=guard, target=manifest.target)
        executor = agreement.together(
            "assembling the program",
            lambda: assemble(
                loaded,
                engines,
                mesh=mesh,
                rank=agreement.rank,
                groups=groups,
                device=gpu,
                weights=rank_weights(folder, manifest, agreement.rank, gpu),
                outputs=[f"output:{t.name}" for t in manifest.outputs],
                overlap=overlap,
                transport=manifest.transport,
            ),
        )
        return Runner(
            manifest,
            executor,
            waits_for(segments, mesh, agreement.rank),
            agreement=agreement,
            watchdog=watchdog,
            check=check,
            cuda_graph=cuda_graph,
            static_outputs=static_outputs,
            budget=Budget(max_graphs),
        )
    except BaseException:
        if watchdog is not None:
            watchdog.close()
        agreement.close()
        raise


def read_together(folder: Path, agreement: Agreement) -> Manifest:
    """The manifest, once every rank has found its bundle whole, of the installed TensorRT and equal to the others'.

    Raises:
        MDError: on every rank, naming the ranks that failed or differ.
    """

    def read() -> tuple[Manifest, str]:
        manifest = read_manifest(folder)
        mesh_of(manifest).check_launch(agreement.size)
        check_versions(manifest)
        check_files(folder, manifest, rank_files(manifest, agreement.rank))
        return manifest, manifest_digest(folder)

    manifest, digest = agreement.together("reading the bundle", read)  # its path may differ between hosts
    digests = agreement.gather(digest, "the bundle's hash")
    if len(set(digests)) > 1:
        raise LaunchError(
            f"the ranks have different bundles: by the manifest's sha256, {grouped([d[:12] for d in digests])}",
            fix="copy the same bundle to every host",
        )
    return manifest


def find_device(agreement: Agreement, compute: str) -> torch.device:
    """This rank's GPU, or where nothing is to run in TensorRT and there is none, the CPU."""
    if compute == "inductor" and not torch.cuda.is_available():
        return torch.device("cpu")
    return _device_together(None, agreement)


def _device_together(device: torch.device | None, agreement: Agreement) -> torch.device:
    """This rank's GPU, once every rank has one that no other has."""

    def find() -> tuple[torch.device, str]:
        if not torch.cuda.is_available():
            raise LaunchError(
                f"{socket.gethostname()} has no CUDA GPU that PyTorch can use", fix="run engines on a machine with one"
            )
        chosen = torch.device("cuda", torch.cuda.current_device()) if device is None else torch.device(device)
        if chosen.type != "cuda":
            raise LaunchError(f"engines cannot run on {chosen}", fix='give device=torch.device("cuda", LOCAL_RANK)')
        if chosen.index is None:
            chosen = torch.device("cuda", torch.cuda.current_device())
        uuid = str(torch.cuda.get_device_properties(chosen).uuid)
        return chosen, f"{socket.gethostname()} {chosen} ({uuid})"

    chosen, told = agreement.together("finding a GPU", find)
    gpus = agreement.gather(told, "the ranks' GPUs")
    if len(set(gpus)) < len(gpus):
        raise LaunchError(
            f"ranks share a GPU: {grouped(gpus)}",
            fix='call torch.cuda.set_device(int(os.environ["LOCAL_RANK"])) first, or pass load(..., device=...)',
        )
    return chosen


def _axes(manifest: Manifest) -> list[str]:
    """The axes that some rank communicates on, in mesh order: every rank makes their communicators."""
    return axes_of([segment for segments in manifest.ranks for segment in segments], mesh_of(manifest))


@functools.cache
def _runtime(device: torch.device) -> tuple[Any, Any]:
    """TensorRT's runtime and logger, one for each GPU: it complains of every further logger."""
    from torchtrt_md.build.flavour import flavour

    trt = flavour().trt
    with torch.cuda.device(device):
        logger = trt.Logger(trt.Logger.WARNING)
        return trt.Runtime(logger), logger


def deserializer(target: str, device: torch.device) -> tuple[Callable[[Path], Any], object]:
    """What loads engine files onto this GPU, each once, and what must live as long as they do."""
    runtime, logger = _runtime(device)
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    built_for = f"{target} (this GPU: {torch.cuda.get_device_name(device)}, {capability})"

    @functools.cache
    def load_file(path: Path) -> Any:
        with torch.cuda.device(device):
            return deserialize(runtime, path, built_for)

    return load_file, (runtime, logger)


def _loaded(
    folder: Path, manifest: Manifest, segments: list[Segment], device: torch.device
) -> tuple[list[Loaded], object]:
    """This rank's segments with their engines and graphs."""
    load_engine, keep = deserializer(manifest.target, device)
    loaded = []
    for segment in segments:
        if segment.runs == "engine":
            loaded.append(Loaded(segment, load_engine(folder / segment.file)))
        else:
            graph = graph_from_json((folder / segment.file).read_bytes(), segment.file)
            check_bindings(graph, segment, segment.file)
            loaded.append(Loaded(segment, graph, graph_digest(graph)))
    return loaded, keep
