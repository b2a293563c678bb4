"""``load``: from a bundle's folder to a runner, all ranks together."""

from __future__ import annotations

import functools
import socket
from pathlib import Path
from typing import get_args

import torch
import torch.distributed as dist

from torchtrt_md.bundle.manifest import Manifest, Segment
from torchtrt_md.bundle.read import check_files, check_versions, manifest_digest, read_manifest
from torchtrt_md.bundle.structure import mesh_of
from torchtrt_md.errors import LaunchError
from torchtrt_md.mesh import Mesh
from torchtrt_md.runtime import communicator, private
from torchtrt_md.runtime.agree import Agreement, grouped
from torchtrt_md.runtime.engine import Engine, deserialize
from torchtrt_md.runtime.runner import Check, Runner
from torchtrt_md.runtime.watchdog import Watchdog, describe


def load(
    folder: Path | str, *, device: torch.device | None = None, timeout: float = 300.0, check: Check = "always"
) -> Runner:
    """Load this rank's engines of a bundle.  Collective: every rank of the launch calls it.

    Nothing of a bundle is trusted before all ranks found theirs whole, equal and of the installed TensorRT; no
    engine is run before all ranks' engines took their communicators.

    Args:
        folder: the bundle; each rank reads its own copy where hosts do not share a file system.
        device: this rank's GPU; the current one by default.
        timeout: seconds that any wait on another rank may take, while loading and running.
        check: how often the ranks vote on their inputs, see :class:`Runner`.

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
        engines = agreement.together("loading the engines", lambda: _engines(folder, manifest, segments, gpu))
        agreement.together("binding the communicators", lambda: _bind(engines, groups, gpu))
        return Runner(
            manifest,
            engines,
            [_description(e, mesh, agreement.rank) for e in engines],
            device=gpu,
            agreement=agreement,
            watchdog=watchdog,
            check=check,
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
        check_files(folder, manifest, (segment.engine for segment in manifest.ranks[agreement.rank]))
        return manifest, manifest_digest(folder)

    manifest, digest = agreement.together("reading the bundle", read)  # its path may differ between hosts
    digests = agreement.gather(digest, "the bundle's hash")
    if len(set(digests)) > 1:
        raise LaunchError(
            f"the ranks have different bundles: by the manifest's sha256, {grouped([d[:12] for d in digests])}",
            fix="copy the same bundle to every host",
        )
    return manifest


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
    used = {segment.axis for segments in manifest.ranks for segment in segments}
    return [axis for axis in manifest.mesh if axis in used]


def _engines(folder: Path, manifest: Manifest, segments: list[Segment], device: torch.device) -> list[Engine]:
    from torchtrt_md.build.flavour import flavour

    trt = flavour().trt
    with torch.cuda.device(device):
        logger = trt.Logger(trt.Logger.WARNING)
        runtime = trt.Runtime(logger)
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        built_for = f"{manifest.target} (this GPU: {torch.cuda.get_device_name(device)}, {capability})"
        loaded = functools.cache(lambda path: deserialize(runtime, folder / path, built_for))
        return [
            Engine(segment, loaded(segment.engine), f"segment {index} ({segment.engine})", (runtime, logger))
            for index, segment in enumerate(segments)
        ]


def _bind(engines: list[Engine], groups: dict[str, dist.ProcessGroup], device: torch.device) -> None:
    for engine in engines:
        axis = engine.segment.axis
        if axis is not None:
            engine.communicator = communicator.bind(engine.context, groups[axis], device, engine=engine.name, axis=axis)


def _description(engine: Engine, mesh: Mesh, rank: int) -> str:
    axis = engine.segment.axis
    ranks = () if axis is None else mesh.ranks(axis, rank)
    return describe(engine.name, axis, ranks, engine.segment.collectives)
