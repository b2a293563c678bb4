"""Whether ranks can store into each other's memory: asked of all of them, before any waits for one that cannot."""

from __future__ import annotations

import torch

from torchtrt_md.errors import LaunchError
from torchtrt_md.launch import Launch
from torchtrt_md.launch.shared_gpu import STORES_SWITCH, stores_may
from torchtrt_md.mesh import Mesh


def check_access(launch: Launch, mesh: Mesh) -> None:
    """See that the GPUs of each group of ranks are of one host, and have access to each other.  Collective.

    Raises:
        LaunchError: on every rank, naming the ranks.
    """
    groups = [(axis, ranks) for axis in mesh.names for ranks in mesh.groups(axis)]
    for axis, ranks in groups:
        if len({launch.hosts[rank] for rank in ranks}) > 1:
            raise LaunchError(
                f"transport='store' is for GPUs of one host, and ranks {', '.join(map(str, ranks))} of axis {axis!r}"
                " are on several",
                fix="use transport='nccl', or give each host whole groups of the axis",
            )
    pairs = pairs_without_access(launch, mesh)
    if pairs:
        raise LaunchError(
            f"transport='store' needs GPUs with access to each other's memory, and these have none: {', '.join(pairs)}",
            fix="use transport='nccl'; nvidia-smi topo -p2p w shows which GPUs have access;"
            f" ranks that share a GPU need {STORES_SWITCH}=1",
        )


def pairs_without_access(launch: Launch, mesh: Mesh) -> list[str]:
    """The ranks of one group of which one cannot write the other's memory, in words.  Collective."""
    groups = [ranks for axis in mesh.names for ranks in mesh.groups(axis)]
    uuids = launch.agreement.gather(launch.together("looking at the GPUs", lambda: _uuid(launch.device)), "their GPUs")
    peers = {rank for ranks in groups if launch.rank in ranks for rank in ranks if rank != launch.rank}
    own = {rank: uuids[rank] for rank in sorted(peers)}
    mine = launch.together("looking at the GPUs' access", lambda: without_access(launch.device, own))
    told = launch.agreement.gather(mine, "the GPUs whose memory they can write")
    return [f"rank {rank} to rank {peer}" for rank, lacking in enumerate(told) for peer in lacking]


def _uuid(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def without_access(device: torch.device, peers: dict[int, str]) -> list[int]:
    """The ranks whose GPUs this one cannot write.

    Args:
        peers: rank -> the UUID of its GPU.  Of one that this process does not see nothing is known: making the shared
            memory shows it.
    """
    seen = {_uuid(torch.device("cuda", index)): index for index in range(torch.cuda.device_count())}
    known = {rank: seen[uuid] for rank, uuid in peers.items() if uuid in seen}
    return [rank for rank, index in known.items() if not _can_write(device, index)]


def _can_write(device: torch.device, index: int) -> bool:
    if index == device.index:  # ranks that share a GPU
        return stores_may()
    return torch.cuda.can_device_access_peer(device, index)
