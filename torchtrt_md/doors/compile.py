"""``compile``: from a model to a runner in the process group of a launch, with nothing written but a cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from torchtrt_md.capture import capture
from torchtrt_md.capture.model import own_mesh
from torchtrt_md.capture.torch_private import root_mesh
from torchtrt_md.checkpoint import Given
from torchtrt_md.doors.agreed import agreed_options, check_fit
from torchtrt_md.errors import LaunchError
from torchtrt_md.graph.text import graph_digest
from torchtrt_md.launch import Launch
from torchtrt_md.launch.agree import check_same
from torchtrt_md.mesh import Mesh
from torchtrt_md.options import Options
from torchtrt_md.parallel import DataParallel
from torchtrt_md.place.choose import choose_compute
from torchtrt_md.program import ShardedProgram, dtype_name
from torchtrt_md.road import Verify
from torchtrt_md.runtime.graphs import Budget
from torchtrt_md.runtime.runner import Runner
from torchtrt_md.runtime.weights import check_equal, checksum
from torchtrt_md.session import Session


def compile(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    weights: Given = None,
    **options: Any,
) -> Runner:
    """Compile a model in a launched process group, ahead of time.  Collective: every rank calls it.

    Args:
        model: dense, the same on every rank, or as ``parallelize_module`` left it.  It is not changed, and where
            engines take weights as inputs they read the model's own.
        args: example positional arguments; tensors give the shapes and dtypes, all else is built in.
        kwargs: example keyword arguments.
        weights: of a model whose parameters are on meta: the folder of its checkpoint in safetensors files, one file,
            an index (``model.safetensors.index.json``), or tensors by name.  Each rank reads its own part of each
            weight, one weight at a time.  It may be another path on another host.
        options: as :class:`torchtrt_md.options.Options` has them; where the model is dense
            ``mesh`` and ``parallel`` are needed.

    Returns:
        A runner that is called like the model and returns what the model returns.

    Raises:
        OptionError: an unknown option, or a value that one cannot have.
        CaptureError: the model has a weight on meta that nothing gives.
        WeightsError: what ``weights`` gives is not the model's.
        MDError: of the stage that failed, the same on every rank.
    """

    def read() -> Options:
        asked = Options.of(options)
        _mesh(asked, model)
        return asked

    chosen = agreed_options(options.get("timeout"), read)
    mesh = _mesh(chosen, model)

    def captured() -> ShardedProgram:
        mesh.check_launch(dist.get_world_size())  # a plan is read against the mesh, so a wrong one is said first
        program = capture(model, args, kwargs, mesh=mesh, parallel=chosen.parallels, weights=weights)
        program.weights.check_values(program.read())
        return program

    def verify(program: ShardedProgram) -> None:
        from torchtrt_md.verification import verify

        if dist.get_rank() == 0:  # it runs the graphs of all ranks
            notes = verify(program, model, args, kwargs).notes
            if chosen.report and notes:
                print("\n".join(notes), flush=True)

    dense = own_mesh(model) is None
    return compile_program(
        captured, chosen, verify=verify if dense else None, name=type(model).__name__, store_weights=True
    )


def _mesh(options: Options, model: nn.Module) -> Mesh:
    mesh = options.mesh or own_mesh(model)
    if mesh is None:
        raise LaunchError("compile needs a mesh", fix="pass mesh=md.Mesh(cp=4), or the DeviceMesh of the launch")
    return mesh if isinstance(mesh, Mesh) else Mesh.from_device_mesh(root_mesh(mesh))


def _given(program: ShardedProgram, options: Options) -> dict[str, str]:
    """The example arguments, in words, by name: tensors, and what is built in, which data of a rank's own may be."""
    own = any(isinstance(p, DataParallel) for p in options.parallels)
    told = {} if own else {name: repr(value) for name, value in program.constants.items()}
    return told | {v.name: f"{dtype_name(v.dtype)} {list(v.shape)}" for v in program.inputs}


def _held(program: ShardedProgram, options: Options) -> dict[str, str]:
    """The tensors that the model's code holds by checksum, and the graphs, in which its numbers are.

    Nothing where ranks have data of their own: what an argument built in may differ.
    """
    if any(isinstance(p, DataParallel) for p in options.parallels):
        return {}
    tensors = {c.name: f"{checksum(c.tensor):016x}" for c in program.weights.constants if not c.tensor.is_meta}
    digests = [graph_digest(graph)[:16] for graph, _ in program.distinct()]
    return tensors | {"the graph": ", ".join(digests)}


def _may_use_inductor(options: Options, capability: tuple[int, int] | None) -> bool:
    """May Inductor run any part?  Without timing ``compute="auto"`` is one or the other."""
    if options.compute != "auto" or options.tune is not False:
        return options.compute != "tensorrt"
    from torchtrt_md.build.flavour import flavour

    name = flavour().name
    return choose_compute("auto", options.placement, flavour=name, capability=capability)[0] == "inductor"


def _times(options: Options, launch: Launch, program: ShardedProgram) -> bool:
    """Are candidates to be timed?

    By itself not where each of them would read its weights from files again, nor where ranks take turns on a GPU.
    """
    if options.tune != "auto":
        return options.tune
    reads = launch.agreement.gather(bool(program.weights.given), "where their weights are")
    return launch.device.type == "cuda" and not launch.shares_gpus and not any(reads)


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
        options: how; the same on all ranks, as :func:`~torchtrt_md.doors.agreed.agreed_options` has them.
        verify: compares a lowered program with the model, where ``options.check`` is on.  Every rank calls it.
        name: of the model, for the summary.
        budget: of CUDA graphs, shared with other programs.
        store_weights: make the model's parameters views of the blocks that engines read, so that they are held once.

    Raises:
        MDError: of the stage that failed, the same on every rank.
    """
    launch = Launch.join(options.timeout, cpu=not options.engines)
    on_gpu = launch.device.type == "cuda"
    capability = torch.cuda.get_device_capability(launch.device) if on_gpu else None
    launch.together("checking the options", lambda: check_fit(options, capability=capability))

    def step() -> ShardedProgram:
        if _may_use_inductor(options, capability):
            from torchtrt_md.runtime.inductor import prepare

            prepare(launch.device)
        return captured()

    program = launch.together("capturing the model", step)
    # A rank may have made it of its own groups, and the axes' communicators are made by all together.
    launch.agreement.same(str(program.mesh), "the mesh that their groups make")
    if options.parallels:  # one model, called with the same everywhere; other graphs may get inputs of their own
        check_same(launch.agreement, _given(program, options), "their example inputs")
    if options.check:
        check_equal(program, launch.agreement)
    session = Session(launch, program, options, store_weights=store_weights)
    choices = session.default()
    if options.parallels:
        held = _held(session.road.lower(choices), options)
        check_same(launch.agreement, held, "what the model's code holds beside weights and inputs")
    tuned = _times(options, launch, program)
    if tuned:
        from torchtrt_md.tune import keep, tune

        choices = tune(session, choices)
    lowered = session.road.lower(choices)
    if options.check and verify is not None:
        session.road.verify(lowered, verify)
    built = session.road.build(lowered, choices)
    runner = session.runner(built, budget, name)
    if tuned:
        keep(choices, session)
    if options.report and launch.rank == 0:
        print(runner.summary, flush=True)
    return runner
