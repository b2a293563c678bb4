"""``compile``: from a model to a runner in the process group of a launch, with nothing written but a cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from torchtrt_md.bundle.from_program import manifest_of
from torchtrt_md.capture import capture
from torchtrt_md.capture.torch_private import root_mesh
from torchtrt_md.choices import Choices
from torchtrt_md.errors import LaunchError
from torchtrt_md.launch import Launch
from torchtrt_md.mesh import Mesh
from torchtrt_md.options import Options
from torchtrt_md.program import Output, ShardedProgram
from torchtrt_md.road import Built, Road, Verify, summary_of
from torchtrt_md.runtime.bring_up import bring_up
from torchtrt_md.runtime.executor import Executor
from torchtrt_md.runtime.graphs import Budget
from torchtrt_md.runtime.runner import Runner
from torchtrt_md.runtime.weights import ModelWeights, WeightGuard, check_equal
from torchtrt_md.segment import Part, Wire


def compile(
    model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, **options: Any
) -> Runner:
    """Compile a model in a launched process group, ahead of time.  Collective: every rank calls it.

    Args:
        model: dense, the same on every rank, or as ``parallelize_module`` left it.  It is not changed, and where
            engines take weights as inputs they read the model's own.
        args: example positional arguments; tensors give the shapes and dtypes, all else is built in.
        kwargs: example keyword arguments.
        options: as :class:`torchtrt_md.options.Options` has them; where the model is dense
            ``mesh`` and ``parallel`` are needed.

    Returns:
        A runner that is called like the model and returns what the model returns.

    Raises:
        OptionError: an unknown option, or a value that one cannot have.
        MDError: of the stage that failed, the same on every rank.
    """
    chosen = Options.of(options)
    mesh = _mesh(chosen, model)

    def captured() -> ShardedProgram:
        mesh.check_launch(dist.get_world_size())  # a plan is read against the mesh, so a wrong one is said first
        return capture(model, args, kwargs, mesh=mesh, parallel=chosen.parallels)

    def verify(program: ShardedProgram) -> None:
        from torchtrt_md.verification import verify

        if dist.get_rank() == 0:  # it runs the graphs of all ranks
            verify(program, model, args, kwargs)

    dense = _own_mesh(model) is None
    return compile_program(
        captured, chosen, verify=verify if dense else None, name=type(model).__name__, store_weights=True
    )


def _own_mesh(model: nn.Module) -> DeviceMesh | None:
    """The mesh that ``parallelize_module`` was given; None of a dense model."""
    return next((root_mesh(p.device_mesh) for p in model.parameters() if isinstance(p, DTensor)), None)


def _mesh(options: Options, model: nn.Module) -> Mesh:
    mesh = options.mesh or _own_mesh(model)
    if mesh is None:
        raise LaunchError("compile needs a mesh", fix="pass mesh=md.Mesh(cp=4), or the DeviceMesh of the launch")
    return mesh if isinstance(mesh, Mesh) else Mesh.from_device_mesh(mesh)


def compile_program(
    captured: Callable[[], ShardedProgram],
    options: Options,
    *,
    verify: Verify | None = None,
    name: str = "the program",
    budget: Budget | None = None,
    store_weights: bool = False,
) -> Runner:
    """Compile a captured program.  Collective.

    Args:
        captured: makes the program of which this rank's graph is compiled.
        options: how.
        verify: compares a lowered program with the model, where ``options.check`` is on.  Every rank calls it.
        name: of the model, for the summary.
        budget: of CUDA graphs, shared with other programs.
        store_weights: make the model's parameters views of the blocks that engines read, so that they are held once.

    Raises:
        MDError: of the stage that failed, the same on every rank.
    """
    launch = Launch.join(options.timeout, cpu=options.compute == "inductor")
    launch.agreement.same(options.told(), "their options")
    program = launch.together("capturing the model", captured)
    if options.check:
        check_equal(program, launch.agreement)
    session = Session(launch, program, options, store_weights=store_weights)
    choices = session.tuned() if options.tune else session.default()
    lowered = session.road.lower(choices)
    if options.check and verify is not None:
        session.road.verify(lowered, verify)
    built = session.road.build(lowered, choices)
    runner = session.runner(built, budget, name)
    if options.report and launch.rank == 0:
        print(runner.summary, flush=True)
    return runner


class Session:
    """One program in a launch: its road, and the way up of what was built for this rank."""

    def __init__(
        self, launch: Launch, program: ShardedProgram, options: Options, *, store_weights: bool = False
    ) -> None:
        program.mesh.check_launch(launch.size)
        self.launch, self.program, self.options = launch, program, options
        self.store_weights = store_weights and options.transpose_weights
        self.road = Road(program, options, ranks=[launch.rank], agreement=launch.agreement, turns=launch.in_turns)

    def default(self) -> Choices:
        """What is chosen without timing anything."""
        device = self.launch.device
        return self.road.default(torch.cuda.get_device_capability(device) if device.type == "cuda" else None)

    def tuned(self) -> Choices:
        """What is fastest on these GPUs."""
        from torchtrt_md.tune import tune

        return tune(self, self.default())

    def built(self, choices: Choices) -> Built:
        """Lower, place and build; the ranks vote after each."""
        return self.road.build(self.road.lower(choices), choices)

    def executor(
        self,
        built: Built,
        parts: Sequence[Part] | None = None,
        outputs: Sequence[Wire] | None = None,
        *,
        store: bool = False,
    ) -> Executor:
        """What runs the program, or only these parts of it, which return ``outputs``; see ``store_weights``."""
        program, rank = built.placed.program, self.launch.rank
        weights = ModelWeights(program, rank)
        return bring_up(
            self.launch,
            program.mesh,
            built.parts[rank] if parts is None else parts,
            weights.local,
            outputs or [Wire("output", value.name) for value in program.outputs],
            self_tests=built.self_tests,
            target=self.options.target,
            transport=built.choices.transport,
            overlap=self.options.overlap,
            stored=weights.store if store else None,
        )

    def runner(self, built: Built, budget: Budget | None, name: str) -> Runner:
        """The runner of what was built."""
        lowered, rank = built.placed.program, self.launch.rank
        executor = self.executor(built, store=self.store_weights)
        ranks = [[part.segment for part in parts] for parts in built.parts]
        return Runner(
            manifest_of(lowered, ranks, built.choices, target=self.options.target),
            executor,
            launch=self.launch,
            check=self.options.votes,
            cuda_graph=self.options.cuda_graph,
            static_outputs=self.options.static_outputs,
            budget=budget or Budget(self.options.max_graphs),
            nest=lambda outputs: _nested(lowered, outputs),
            guard=WeightGuard({**lowered.weights.shards, **lowered.weights.whole}).check,
            name=name,
            summary=summary_of(name, built, rank),
            choices=built.choices,
        )


def _nested(program: ShardedProgram, outputs: Mapping[str, Tensor]) -> Any:
    """The outputs as the model itself returns them, in a class of its own where it has one."""
    tensors = [outputs[value.name] for value in program.outputs]
    leaves = [tensors[leaf.index] if isinstance(leaf, Output) else leaf for leaf in program.out_leaves]
    return pytree.tree_unflatten(leaves, program.out_spec)
