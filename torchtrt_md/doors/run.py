"""Run a bundle under torchrun: verify it against the dense model on one GPU, time it, report.

torchrun --nproc_per_node=4 -m torchtrt_md.run model.mdtrt --verify model.py --report run.json
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, NoReturn

import torch
import torch.distributed as dist
import typer
from torch import Tensor

from torchtrt_md.bundle.read import manifest_digest, read_manifest
from torchtrt_md.bundle.structure import mesh_of
from torchtrt_md.checks import check_place
from torchtrt_md.doors.flags import for_command_line
from torchtrt_md.doors.load import load
from torchtrt_md.doors.user_file import check_user_file, load_user_file
from torchtrt_md.errors import BundleError, InputError, LaunchError, MDError, OptionError, VerificationError
from torchtrt_md.launch.shared_gpu import own_gpu
from torchtrt_md.program import Value, part
from torchtrt_md.runtime.report import RankReport, Timing, rank_report, report, show_steps
from torchtrt_md.runtime.runner import Runner
from torchtrt_md.runtime.signature import Signature
from torchtrt_md.runtime.timing import call_times
from torchtrt_md.verification.compare import engine_ratio, rounding
from torchtrt_md.verification.dense import Reference, dense_reference, is_on_meta, precision_name
from torchtrt_md.verification.simulate import Precision

WARM_UP = 5
STEP_CALLS = 10
_SHUTDOWN_SECONDS = 30.0

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Comparison(NamedTuple):
    """What was compared, by output: nothing, where ``reference`` is None.

    An error is that of the output's worst part: the dense model's own, times how many times further off the engine is
    there.  ``places`` says which part, and both values.
    """

    reference: str | None
    dense_errors: dict[str, float]
    limits: dict[str, float]
    errors: dict[str, float]
    places: dict[str, str]


@app.command()
def run(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.", show_default=False)],
    verify: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.py", help="Compare with the dense model of this file; without it, outputs must be finite."
        ),
    ] = None,
    iterations: Annotated[int, typer.Option(min=0, help="Timed calls, after 5 that warm up; 0 times nothing.")] = 50,
    report_file: Annotated[
        Path | None, typer.Option("--report", metavar="FILE.json", help="Write what was measured.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds that any wait on another rank may take.")] = 300.0,
    seed: Annotated[int, typer.Option(help="Of the model's weights and of all inputs.")] = 0,
    model_device: Annotated[str, typer.Option(help="Where the file makes its model, as at export.")] = "cpu",
    cuda_graph: Annotated[bool, typer.Option(help="Capture a call in a CUDA graph and replay it.")] = False,
    timing: Annotated[
        bool, typer.Option("--timing", help="Time each engine, collective and op of a call, and engines by layer.")
    ] = False,
    weights: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Of a bundle or model without weights: safetensors, or a folder."),
    ] = None,
    weight_budget: Annotated[
        str, typer.Option(metavar="BYTES", help="Weights that stay on each GPU, or auto; without it, all do.")
    ] = "",
    kernel_cache: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Keep the kernels that TensorRT-RTX compiles there.")
    ] = None,
) -> None:
    """Run a bundle on the GPUs of a torchrun launch, one rank each."""
    try:
        run_bundle(
            bundle,
            verify=verify,
            iterations=iterations,
            report_file=report_file,
            timeout=timeout,
            seed=seed,
            model_device=model_device,
            cuda_graph=cuda_graph,
            timing=timing,
            weights=weights,
            weight_budget=budget_of(weight_budget),
            kernel_cache=kernel_cache or False,
        )
    except MDError as error:
        shown = for_command_line(error)
        print(f"[rank {os.environ.get('RANK', '-')}] {type(error).__name__}: {shown}", file=sys.stderr, flush=True)
        raise typer.Exit(1) from error
    except Exception as error:
        traceback.print_exc()
        raise typer.Exit(1) from error


def run_bundle(
    bundle: Path,
    *,
    verify: Path | None,
    iterations: int,
    report_file: Path | None,
    timeout: float,
    seed: int,
    model_device: str,
    cuda_graph: bool = False,
    timing: bool = False,
    weights: Path | None = None,
    weight_budget: int | Literal["auto"] | None = None,
    kernel_cache: bool | Path = False,
) -> None:
    """What the command does, with errors raised.

    Raises:
        MDError: on every rank.  VerificationError: an output is too far from the dense model's.
    """
    if os.environ.get("RANK", "0") == "0":  # which alone reads and writes these
        if report_file is not None:
            check_place("--report", report_file, folder=False)
        if verify is not None:
            check_user_file(verify, model_device)
    device = join_launch(bundle, timeout)
    stripped = bool(read_manifest(bundle).given)
    runner = load(
        bundle,
        device=device,
        timeout=timeout,
        votes="first",
        cuda_graph=cuda_graph,
        weights=weights if stripped or verify is None else None,
        weight_budget=weight_budget,
        kernel_cache=kernel_cache,
    )
    if verify is None:
        inputs = random_inputs(runner.signature, runner.rank, device, seed)
        compared = Comparison(None, {}, {}, {}, {})
        _check_finite(runner, runner(**inputs))
    else:
        inputs, compared = _compare(runner, verify, seed, model_device, weights, stripped)
    times = _time(runner, inputs, iterations) if iterations else None
    steps = runner.time_steps(inputs, STEP_CALLS) if timing else []
    mine = rank_report(runner, bundle, compared.errors, times, compared.places, steps)
    ranks = runner.agreement.gather(mine, "the ranks' reports")
    whole = report(
        runner.manifest,
        bundle,
        manifest_digest(bundle),
        ranks,
        iterations=iterations,
        reference=compared.reference,
        dense_errors=compared.dense_errors,
        limits=compared.limits,
    )
    if runner.rank == 0:
        whole.show()
        if steps:
            show_steps(steps)
        if report_file is not None:
            whole.write(report_file)
    check_errors(ranks, compared)
    runner.agreement.vote(None, "the end of the run")
    runner.close()


def budget_of(text: str) -> int | Literal["auto"] | None:
    """``--weight-budget`` as :func:`torchtrt_md.load` takes it.

    Raises:
        OptionError: it is no number of bytes.
    """
    if text in ("", "auto"):
        return "auto" if text else None
    if not text.isascii() or not text.isdigit():
        raise OptionError(f"--weight-budget cannot be {text!r}", fix="pass bytes, 0 or more, or auto")
    return int(text)


def join_launch(bundle: Path, timeout: float) -> torch.device:
    """Join the launch that torchrun describes in the environment, with NCCL; return this rank's GPU.

    Raises:
        LaunchError: not started by torchrun, no GPU for this rank, or no process group.
        BundleError: there is no bundle to launch.
    """
    size = mesh_of(read_manifest(bundle)).size
    lacking = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR") if name not in os.environ]
    if lacking:
        raise LaunchError(
            f"{', '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} not set, so this is no launch",
            fix=f"torchrun --nproc_per_node={size} -m torchtrt_md.run {bundle}",
        )
    device = own_gpu(int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl", device_id=device, timeout=timedelta(seconds=timeout))
    except (RuntimeError, ValueError) as error:
        raise LaunchError(
            f"the ranks did not find each other: {error}", fix="see the other ranks' output; NCCL_DEBUG=INFO says more"
        ) from error
    return device


def random_inputs(signature: Signature, rank: int, device: torch.device, seed: int) -> dict[str, Tensor]:
    """This rank's chunk of inputs that are equal on all ranks: normal, False, or 0, which any embedding can look up."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    for name, t in signature.inputs.items():
        if t.dtype.is_floating_point:
            whole = torch.randn(t.shape, generator=generator).to(t.dtype)
        else:
            whole = torch.zeros(t.shape, dtype=t.dtype)
        inputs[name] = part(whole, t.sharding, signature.mesh, rank).contiguous().to(device)
    return inputs


def check_example(signature: Signature, tensors: dict[str, Tensor]) -> None:
    """Refuse example arguments that are not those the bundle was exported with.

    Raises:
        InputError: naming the argument.
    """
    signature.named((), tensors)
    for name, t in signature.inputs.items():
        found = tensors[name]
        if (found.dtype, tuple(found.shape)) != (t.dtype, t.shape):
            raise InputError(
                f"{name!r} is {found.dtype} {list(found.shape)} in the file, and the bundle was built for"
                f" {t.dtype} {list(t.shape)}",
                fix="verify with the file that the bundle was exported from",
            )


def check_errors(ranks: Sequence[RankReport], compared: Comparison) -> None:
    """Raise where an output of some rank is too far from the reference.

    Raises:
        VerificationError: naming the worst rank of each such output.
    """
    problems = []
    for name, allowed in compared.limits.items():
        worst = max(ranks, key=lambda r: r.errors[name])
        if not worst.errors[name] <= allowed:
            problems.append(
                f"output {name!r} of rank {worst.rank} differs from the dense model in {compared.reference} by"
                f" {worst.errors[name]:.3g}, relative; {allowed:.3g} is allowed, and the dense model's own error is"
                f" {compared.dense_errors[name]:.3g}; {worst.places[name]}"
            )
    if problems:
        raise VerificationError(
            "\n".join(problems), fix="check that the file makes the exported model, with the same --seed as at export"
        )


def _compare(
    runner: Runner, file: Path, seed: int, model_device: str, weights: Path | None, stripped: bool
) -> tuple[dict[str, Tensor], Comparison]:
    """Run dense model and engines on the file's inputs; rank 0 alone holds the model, or reads its ``weights``."""
    agreement, signature, device = runner.agreement, runner.signature, runner.device
    held: list[Callable[[], Reference]] = []

    def example() -> dict[str, Tensor]:
        if runner.rank != 0:
            return {}
        from torchtrt_md.capture.arguments import Arguments

        model, args, kwargs = load_user_file(file, seed, model_device)
        if weights is not None and not stripped and not is_on_meta(model):
            raise BundleError(
                f"weights are given, the bundle has its own, and so has the model of {file}", fix="leave --weights out"
            )
        arguments = Arguments.of(model, args, kwargs)
        check_example(signature, dict(arguments.tensors))
        held.append(lambda: dense_reference(model, args, kwargs, signature.flat, device, weights))
        return {name: arguments.tensors[name].detach().to(device) for name in signature.inputs}

    whole = agreement.together("loading the model", example)
    inputs = {}
    for name, t in signature.inputs.items():
        tensor = _broadcast(whole.get(name), t.shape, t.dtype, device)
        inputs[name] = part(tensor, t.sharding, signature.mesh, runner.rank).contiguous()
    reference = agreement.together("the dense model on one GPU", lambda: held.pop()() if held else None)
    torch.cuda.empty_cache()

    outputs = signature.flat(runner(**inputs))
    told = agreement.gather(None if reference is None else _told(reference), "the dense model's errors")[0]
    assert told is not None, "rank 0 holds the reference"
    precision, terms = told
    compared = Comparison(precision_name(precision), {}, {}, {}, {})
    for t in signature.outputs:
        own, (unit, ratio, coarse, noisy) = outputs[t.name], terms[t.name]
        dtype = own.dtype if precision is None else Precision(precision).of(own.dtype)
        expected, sample, noise = (
            None if kind is None else part(_broadcast(whole, *kind, device), t.sharding, signature.mesh, runner.rank)
            for kind, whole in zip(_kinds(t, dtype, noisy), _wholes(reference, t.name), strict=True)
        )
        assert expected is not None
        assert sample is not None
        found = rounding(own, expected, sample, coarse, noise)
        compared.dense_errors[t.name], compared.limits[t.name] = unit, ratio * unit
        compared.errors[t.name], compared.places[t.name] = found.error * unit, found.place
    return inputs, compared


_Terms = dict[str, tuple[float, float, torch.dtype, bool]]
_Kind = tuple[tuple[int, ...], torch.dtype]


def _told(reference: Reference) -> tuple[torch.dtype | None, _Terms]:
    """What every rank must know of the reference beside its tensors: its dtype; by output unit, ratio, dtype, noise."""
    terms = {
        name: (s.unit, max(s.ratio, engine_ratio(s.coarse, reference.terms)), s.coarse, s.noise is not None)
        for name, s in reference.samples.items()
    }
    return reference.precision, terms


def _kinds(output: Value, dtype: torch.dtype, noisy: bool) -> tuple[_Kind, _Kind, _Kind | None]:
    """Shape and dtype of an output's reference, of its sample of rounding, and of the noise of its elements."""
    shape = tuple(output.shape)
    noise = ((*shape, 2) if dtype.is_complex else shape, torch.float32)
    return (shape, dtype), (shape, dtype), noise if noisy else None


def _wholes(reference: Reference | None, name: str) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The tensors of :func:`_kinds`; nothing on the ranks that do not hold them."""
    if reference is None:
        return None, None, None
    sample = reference.samples[name]
    return reference.outputs[name], sample.value, sample.noise


def _broadcast(tensor: Tensor | None, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rank 0's tensor, on every rank."""
    if tensor is None:
        tensor = torch.empty(tuple(shape), dtype=dtype, device=device)
    tensor = tensor.to(dtype).contiguous()
    dist.broadcast(tensor, src=0)
    return tensor


def _check_finite(runner: Runner, returned: object) -> None:
    def check() -> None:
        for name, t in runner.signature.flat(returned).items():
            if t.is_floating_point() and not bool(t.isfinite().all()):
                raise VerificationError(
                    f"output {name!r} is not finite on random inputs", fix="verify with real inputs: --verify FILE.py"
                )

    runner.agreement.together("whether the outputs are finite", check)


def _time(runner: Runner, inputs: dict[str, Tensor], iterations: int) -> Timing:
    """Time calls that are enqueued back to back."""
    times = call_times(
        lambda: runner(**inputs),
        iterations,
        warm_up=WARM_UP,
        begin=lambda: runner.agreement.vote(None, "the start of the timing"),
        device=runner.device,
    )
    return Timing.of(times)


def _leave() -> None:
    """Destroy the process group, for as long as that may take: it waits for ranks that may be gone."""
    leaving = threading.Thread(target=dist.destroy_process_group, daemon=True)
    leaving.start()
    leaving.join(_SHUTDOWN_SECONDS)
    if leaving.is_alive():
        print(f"the process group did not end within {_SHUTDOWN_SECONDS:g} s; left as it is", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    try:
        app(args=None if argv is None else list(argv), prog_name="python -m torchtrt_md.run")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def end_process(code: int) -> NoReturn:
    """End the process now: the destructors of CUDA and NCCL wait on peers that may be gone."""
    if code == 0 and dist.is_initialized():
        _leave()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
