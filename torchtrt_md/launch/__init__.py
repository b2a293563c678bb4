"""``Launch``: this process among the ranks of its launch, shared by all programs that it runs.

agree          votes: all ranks go on, or all raise the same error
watchdog       ends a process whose GPU waits for too long
communicator   a group for each axis of a mesh, and its binding to engines
host           which host a process is on, and whether it still runs
shared_gpu     ranks that share a GPU, where the user asks for it
private        the private names of PyTorch that these need
"""

from __future__ import annotations

import faulthandler
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from torchtrt_md.errors import LaunchError
from torchtrt_md.launch import communicator, private
from torchtrt_md.launch.agree import Agreement, said_ended
from torchtrt_md.launch.shared_gpu import check_apart, nccl_may
from torchtrt_md.launch.watchdog import Watchdog
from torchtrt_md.mesh import Mesh

T = TypeVar("T")
log = logging.getLogger(__name__)
_LOCKED_SECONDS = 8.0  # more than the watchdog takes to end the process by itself
_calling = threading.RLock()  # held by the thread that is in a call of a runner
_bounds: list[float] = []  # of the waits under way, in seconds; Python may let go of a runner within another wait


class Launch:
    """What the runners of a process have in common.

    There is one for each process group, timeout and device; :meth:`join` gives it.

    Attributes:
        agreement: the votes of the ranks.
        device: this rank's GPU, or the CPU.
        watchdog: of what is enqueued on the device.
        groups: of the meshes that programs were connected on.
        hosts: for each rank the number of its host.
        shares_gpus: are there ranks that share a GPU?  What is timed there says nothing of other launches.
        tested: the self-tests that passed, by mesh, name and target; the same on all ranks.
    """

    def __init__(self, agreement: Agreement, device: torch.device, shares_gpus: bool = False) -> None:
        self.agreement, self.device, self.shares_gpus = agreement, device, shares_gpus
        self.rank, self.size, self.timeout = agreement.rank, agreement.size, agreement.timeout
        self.groups: list[dist.ProcessGroup] = []
        self.hosts = agreement.hosts()
        self.watchdog = Watchdog(
            self.timeout,
            rank=self.rank,
            abort=lambda: private.abort(self.groups, device),
            lost=lambda: agreement.board.failed or said_ended(agreement.board.ended()),
        )
        self.tested: set[tuple[Mesh, str, str]] = set()

    @classmethod
    def join(cls, timeout: float, *, device: torch.device | None = None, cpu: bool = False) -> Launch:
        """This process's launch.  The ranks vote on their devices.

        Args:
            timeout: seconds of silence after which another rank is given up.
            device: this rank's GPU; the current one by default.
            cpu: without a GPU, run on the CPU.

        Raises:
            LaunchError: no process group, no GPU, or one GPU for two ranks.
        """
        agreement = Agreement(timeout)
        on_cpu = cpu and not torch.cuda.is_available()
        found, shares = (torch.device("cpu"), False) if on_cpu else _own_gpu(agreement, device)
        held = _launches.setdefault(agreement.board, {})
        if (timeout, found) not in held:
            held[timeout, found] = cls(agreement, found, shares)
        return held[timeout, found]

    def name_program(self, what: str) -> str:
        """A name that no other program of this process has.  All ranks make theirs in the same order."""
        self.agreement.board.programs += 1
        return f"program {self.agreement.board.programs} ({what})"

    @contextmanager
    def one_thread(self, about: str) -> Iterator[None]:
        """Refuse what another thread of this process is at: votes and collectives of two would mix.

        Raises:
            LaunchError: on this rank.
        """
        if not _calling.acquire(blocking=False):
            raise LaunchError(
                f"{about} was called from two threads at once",
                fix="call all runners of a process from one thread, in the same order on every rank",
            )
        try:
            yield
        finally:
            _calling.release()

    def together(self, about: str, step: Callable[[], T]) -> T:
        """See :meth:`~torchtrt_md.launch.agree.Agreement.together`."""
        start = time.perf_counter()
        result = self.agreement.together(about, step)
        log.info("rank %d: %s took %.2f s", self.rank, about, time.perf_counter() - start)
        return result

    def meet(self, about: str, step: Callable[[], T]) -> T:
        """Do a step that itself waits for the other ranks, as where NCCL makes a communicator, and vote on it.

        A rank that fails before it comes there leaves the others in a wait that no error ends.  So the watchdog ends
        them: once a rank has failed or ended, or after ``timeout`` seconds.

        Raises:
            MDError: on every rank that is left, naming the ranks that failed.
        """

        def watched() -> T:
            with self.bounded(about, on_all=True), self.agreement.board.working(meeting=True):
                return step()

        return self.together(about, watched)

    @contextmanager
    def bounded(self, about: str, *, on_all: bool = False) -> Iterator[None]:
        """End the process where the body is not done within ``timeout`` seconds; see :meth:`Watchdog.waiting`.

        Where it holds Python's lock, as TensorRT's ``setCommunicator`` does, no thread of Python runs; faulthandler's,
        which needs none, then ends the process with its stack and exit code 1.  A process has one such timer: what the
        program set itself is cleared.
        """
        _bounds.append(self.timeout + _LOCKED_SECONDS)
        _arm()
        try:
            with self.watchdog.waiting(about, on_all=on_all):
                yield
        finally:
            _bounds.pop()
            _arm()

    def connect(self, mesh: Mesh) -> dict[str, dist.ProcessGroup]:
        """This rank's group along each axis of more than one rank, its communicator made.  Collective.

        Raises:
            MDError: on every rank: a mesh of another size than the launch, or no communicators.
        """

        def step() -> dict[str, dist.ProcessGroup]:
            mesh.check_launch(self.size)
            return communicator.connect(mesh, self.device)

        groups = self.meet(f"the communicators of {mesh}", step)
        self.groups += [group for group in groups.values() if group not in self.groups]
        return groups

    @property
    def share(self) -> tuple[int, int]:
        """This rank's number among the ranks of its host, and how many these are."""
        mine = [rank for rank, host in enumerate(self.hosts) if host == self.hosts[self.rank]]
        return mine.index(self.rank), len(mine)

    def in_turns(self, about: str, step: Callable[[], T]) -> T:
        """Do a step on the first rank of each host, then on the others, which find in a cache what those made."""
        first = self.hosts.index(self.hosts[self.rank]) == self.rank
        made = [self.together(about, step if mine else lambda: None) for mine in (first, not first)]
        return cast(T, made[0] if first else made[1])


def _arm() -> None:
    """Let faulthandler, which has one timer, watch the innermost of what is under way."""
    if _bounds:
        faulthandler.dump_traceback_later(_bounds[-1], exit=True, file=2)
    else:
        faulthandler.cancel_dump_traceback_later()


_launches: dict[object, dict[tuple[float, torch.device], Launch]] = {}


def _own_gpu(agreement: Agreement, device: torch.device | None) -> tuple[torch.device, bool]:
    """This rank's GPU, once every rank has one, and whether some share theirs."""

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
    gpus, may = zip(*agreement.gather((told, nccl_may()), "the ranks' GPUs"), strict=True)
    return chosen, check_apart(gpus, may)


__all__ = ["Launch"]
