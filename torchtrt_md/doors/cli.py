"""The command line: ``torchtrt-md export FILE --mesh cp=4 -o BUNDLE``, ``torchtrt-md inspect BUNDLE``."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

# What imports PyTorch, which takes seconds, is imported behind the first line of output.
import torchtrt_md
from torchtrt_md.checks import COMPUTES, EXCHANGE_DTYPES, FORMATS, PLACEMENTS, TRANSPORTS, check_choice, check_place
from torchtrt_md.doors.flags import for_command_line
from torchtrt_md.errors import LaunchError, MDError, PlanError
from torchtrt_md.mesh import Mesh
from torchtrt_md.parallel import STRATEGIES, ContextParallel, DataParallel, Parallel, Strategy, TensorParallel

if TYPE_CHECKING:
    from torchtrt_md.bundle.manifest import Manifest
    from torchtrt_md.doors.export import Exported
    from torchtrt_md.segment import Collective
    from torchtrt_md.verification import Report

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
console = Console(highlight=False, soft_wrap=True)
# What an axis of this name is for, where the model file does not say.
_BY_NAME: dict[str, Callable[[str], Parallel]] = {"cp": ContextParallel, "tp": TensorParallel, "dp": DataParallel}
# Over these together one sequence is split, by the strategy of the first that is there where none is asked for.
_ONE_SEQUENCE: dict[str, Strategy] = {"ring": "ring", "ulysses": "ulysses"}


def _print_version(asked: bool) -> None:
    if asked:
        console.print(f"torchtrt-md {torchtrt_md.__version__}")
        raise typer.Exit


@app.callback()
def _commands(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and end")
    ] = False,
) -> None:
    """Compile a PyTorch model to run on several GPUs at once: TensorRT engines, with NCCL inside or between them."""


@app.command()
def export(
    file: Annotated[Path, typer.Argument(help="Python file whose model() returns (model, args, kwargs)")],
    mesh: Annotated[
        str, typer.Option(help="axes and sizes: cp=4 (context), tp=4 (tensor parallel), ring=2,ulysses=2 (USP)")
    ],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="the bundle, a folder")] = None,
    format: Annotated[
        str, typer.Option(help="bundle, or a model for Triton, made of one: triton-python or triton")
    ] = "bundle",
    strategy: Annotated[
        str,
        typer.Option(
            help="context parallel attention: ulysses, allgather_kv, ring or auto",
            show_default="the file's, else ulysses",
        ),
    ] = "",
    placement: Annotated[str, typer.Option(help="where attention runs: engine, split or auto")] = "auto",
    compute: Annotated[
        str, typer.Option(help="what runs all that is not attention or a collective: tensorrt or inductor")
    ] = "tensorrt",
    transport: Annotated[
        str, typer.Option(help="what does the exchanges between engines: nccl, or store (GPUs of one host)")
    ] = "nccl",
    exchange_dtype: Annotated[
        str, typer.Option(help="what queries, keys and values are sent as between engines: model, or float8")
    ] = "model",
    target: Annotated[
        str, typer.Option(help="GPU to build for: sm75, sm80, sm86, sm89, sm120, sm121, portable, current")
    ] = "portable",
    verify: Annotated[bool, typer.Option(help="prove the program against the dense model first")] = True,
    weights: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="the checkpoint of a model on meta: a folder of safetensors files"),
    ] = None,
    weight_streaming: Annotated[
        bool, typer.Option("--weight-streaming", help="engines whose weights can stay in host memory")
    ] = False,
    strip_weights: Annotated[
        bool, typer.Option("--strip-weights", help="leave the weights out; they are given when it is run")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="stop once the program is proven; build nothing")] = False,
    dump: Annotated[Path | None, typer.Option(help="folder for the graphs before and after each pass")] = None,
    seed: Annotated[int, typer.Option(help="PyTorch's seed when the file is run")] = 0,
    model_device: Annotated[str, typer.Option(help="where the file makes its model")] = "cpu",
    report: Annotated[Path | None, typer.Option(help="JSON file for what the tables say")] = None,
) -> None:
    """Capture, lower, verify, build and bundle a model; needs no GPU."""
    sizes = Mesh.parse(mesh)
    check_choice("placement", placement, PLACEMENTS)
    check_choice("compute", compute, COMPUTES)
    check_choice("transport", transport, TRANSPORTS)
    check_choice("exchange_dtype", exchange_dtype, EXCHANGE_DTYPES)
    check_choice("format", format, FORMATS)
    if strategy:
        check_choice("strategy", strategy, STRATEGIES)
    for name, path, folder in (("out", out, True), ("dump", dump, True), ("report", report, False)):
        # What replaces a bundle asks more of its folder, below.
        if path is not None and not (name == "out" and path.exists()):
            check_place(f"--{name}", path, folder=folder)
    if out is None and not dry_run:
        raise PlanError("there is no place for the bundle", fix="pass -o BUNDLE, or --dry-run to build nothing")
    console.print(f"torchtrt-md {torchtrt_md.__version__}: {file} on {sizes}")

    from torchtrt_md.build.flavour import flavour
    from torchtrt_md.bundle.write import check_destination
    from torchtrt_md.checkpoint import Checkpoint
    from torchtrt_md.doors.export import Stages, prove
    from torchtrt_md.doors.export import export as run
    from torchtrt_md.doors.triton import check_new
    from torchtrt_md.doors.user_file import check_user_file, read_user_file

    if out is not None:
        (check_destination if format == "bundle" else check_new)(out)
    check_user_file(file, model_device)
    if not dry_run:
        flavour().check_target(target)
    if weights is not None:
        Checkpoint(weights)  # reads what the files say of themselves
    user = read_user_file(file, seed, model_device)
    parallel = _parallel(sizes, user.parallel, strategy)
    parameters = sum(p.numel() for p in user.model.parameters())
    console.print(f"[bold]{type(user.model).__name__}[/], {parameters / 1e6:.1f} M parameters")
    with console.status("") as status:

        def progress(stage: str, detail: str, seconds: float | None) -> None:
            if seconds is None:
                status.update(f"{stage}  {detail}")
            else:
                console.print(f"  [green]{stage:8}[/] {seconds:6.2f} s  {detail}")

        call = (user.model, user.args, user.kwargs)
        how: dict[str, Any] = {"mesh": sizes, "parallel": parallel, "placement": placement, "check": verify}
        how |= {"weights": weights, "compute": compute, "exchange_dtype": exchange_dtype}
        if out is None or dry_run:
            inside = format == "triton"
            proven = prove(*call, stages=Stages(progress), dump=dump, coordinates_inside=inside, **how)
        else:
            how |= {"weight_streaming": weight_streaming, "strip_weights": strip_weights, "transport": transport}
            how |= {"out": out, "target": target, "format": format, "progress": progress, "dump": dump}
            exported = run(*call, **how)
    if out is None or dry_run:
        from torchtrt_md.lowering.schedule import schedule

        _print_collectives(schedule(proven.lowered.graphs[0]))
        _print_errors(proven.report)
        return
    _print_collectives(c for segment in exported.manifest.ranks[0] for c in segment.collectives)
    _print_errors(exported.report)
    if format == "bundle":
        _print_files(exported)
    else:
        _print_model(exported.folder)
    if report is not None:
        _write_report(exported, report)


@app.command()
def inspect(
    bundle: Annotated[Path, typer.Argument(help="the bundle, a folder")],
    as_json: Annotated[bool, typer.Option("--json", help="the manifest as JSON")] = False,
    layers: Annotated[
        bool, typer.Option("--layers", help="the layers of a rank's engines, as TensorRT tells them; needs a GPU")
    ] = False,
    rank: Annotated[int, typer.Option(min=0, help="whose engines --layers shows")] = 0,
) -> None:
    """What a bundle is: its mesh, inputs, segments, engines, collectives and versions.  Needs no GPU."""
    if not as_json:
        console.print(f"torchtrt-md {torchtrt_md.__version__}: {bundle}")

    from torchtrt_md.bundle.manifest import encode
    from torchtrt_md.bundle.read import read_manifest

    manifest = read_manifest(bundle)
    if as_json:
        print(encode(manifest).decode(), end="")
        return
    if layers:
        _print_layers(bundle, manifest, rank)
        return
    _print_bundle(bundle, manifest)


@app.command()
def triton(
    bundle: Annotated[Path, typer.Argument(help="the bundle, a folder")],
    out: Annotated[Path, typer.Option("--out", "-o", help="the model's folder in Triton's model repository")],
    format: Annotated[
        str,
        typer.Option(
            help="triton-python (a process for each rank) or triton (engines alone, for Triton's TensorRT backend)"
        ),
    ] = "triton-python",
    python: Annotated[str, typer.Option(help="the interpreter that runs the ranks; Triton's own by default")] = "",
) -> None:
    """Make a bundle a model that Triton Inference Server loads; needs no GPU."""
    check_choice("format", format, FORMATS[1:])
    console.print(f"torchtrt-md {torchtrt_md.__version__}: {bundle}")

    from torchtrt_md.doors.triton import triton as run

    _print_model(run(bundle, out, format=format, python=python))  # type: ignore[arg-type]


def _print_model(folder: Path) -> None:
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        console.print(f"  {path}  {path.stat().st_size:,} bytes")
    console.print(f"Serve it: tritonserver --model-repository={folder.resolve().parent}")


def _print_layers(folder: Path, manifest: Manifest, rank: int) -> None:
    from torchtrt_md.bundle import check_files, check_versions
    from torchtrt_md.runtime.inspect import layers_of

    if rank >= len(manifest.ranks):
        raise LaunchError(f"the bundle has {len(manifest.ranks)} ranks, and no rank {rank}", fix="give one of them")
    segments = {s.file: s for s in manifest.ranks[rank] if s.runs == "engine"}
    if not segments:
        raise LaunchError(f"rank {rank} of this bundle has no engine", fix="leave --layers out")
    check_versions(manifest)
    check_files(folder, manifest, segments)
    for file, segment in segments.items():
        lines = layers_of(folder / file, manifest.target)
        console.print(f"[bold]{segment.name or file}[/]: {len(lines)} layers")
        for line in lines:
            console.print(f"  {line}", markup=False)


def _print_bundle(folder: Path, manifest: Manifest) -> None:
    from torchtrt_md.bundle.structure import mesh_of
    from torchtrt_md.program import dtype_name

    v = manifest.versions
    console.print(f"[bold]{folder}[/]: {mesh_of(manifest)}, placement {manifest.placement}, target {manifest.target}")
    built = f", {v.flavour} {v.tensorrt}" if v.flavour else ", no engines"
    console.print(f"made by torchtrt_md {v.torchtrt_md}, torch {v.torch}{built}; schema {manifest.schema}")
    table = Table("", "name", "dtype", "shape", "split", title="Inputs and outputs", title_justify="left")
    for kind, values in (("input", manifest.inputs), ("output", manifest.outputs)):
        for value in values:
            split = ", ".join(f"dim {dim} over {axis}" for dim, axis in value.sharding)
            table.add_row(kind, value.name, dtype_name(value.dtype), str(list(value.shape)), split)
    for name, constant in manifest.constants.items():
        table.add_row("built in", name, "", repr(constant), "")
    for name in manifest.opaque:
        table.add_row("built in", name, "", "not to be compared with", "")
    console.print(table)
    table = Table("segment", "runs as", "axis", "collectives", "weights", "file", title="Rank 0", title_justify="left")
    for index, segment in enumerate(manifest.ranks[0]):
        of = Counter(c.op for c in segment.collectives)
        told = ", ".join(f"{count} {op}" for op, count in of.items())
        table.add_row(
            f"{index} {segment.name}", segment.runs, segment.axis or "", told, str(len(segment.weights)), segment.file
        )
    console.print(table)
    _print_collectives(c for segment in manifest.ranks[0] for c in segment.collectives)
    if manifest.given:
        console.print(f"{len(manifest.given)} weights are not in it, and are given when it is loaded")
    for test in manifest.self_tests:
        console.print(f"run first: {test.name}")
    for decision in manifest.decisions:
        console.print(f"{decision.what}: {decision.chosen}, {decision.why}")


def _write_report(exported: Exported, path: Path) -> None:
    import msgspec

    measured = exported.report
    segments = [segment for segments in exported.manifest.ranks for segment in segments]
    engines = {Path(segment.file).name for segment in segments if segment.runs == "engine"}
    written = [path for path in sorted(exported.folder.rglob("*")) if path.is_file()]
    content = {
        "seconds": exported.seconds,
        "engine_seconds": [engine.seconds for engine in exported.engines],
        "engine_bytes": [
            path.stat().st_size for path in written if path.name in engines or path.name.startswith("model.plan.rank")
        ],
        "versions": exported.manifest.versions,
        "target": exported.manifest.target,
        "error": measured and measured.error,
        "dense_error": measured and measured.dense_error,
        "structure_error": measured and measured.structure_error,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n")


def _parallel(mesh: Mesh, own: list[Parallel] | None, strategy: str) -> list[Parallel]:
    if own is None:
        own = []
        joint = tuple(axis for axis in _ONE_SEQUENCE if axis in mesh.names)
        if joint:
            own.append(ContextParallel(joint if len(joint) > 1 else joint[0], _ONE_SEQUENCE[joint[0]]))
        for axis in mesh.names:
            if axis in joint:
                continue
            if axis not in _BY_NAME:
                raise PlanError(
                    f"axis {axis!r} of --mesh does not say what is parallel along it",
                    fix="name axes cp (context parallel), ring and ulysses (the same over two axes), tp (tensor"
                    " parallel) or dp (data of its own), or give the model file a list `parallel`, such as"
                    f" [md.ContextParallel({axis!r}, plan=...)]",
                )
            own.append(_BY_NAME[axis](axis))
    if not strategy:
        return own
    if not any(isinstance(p, ContextParallel) for p in own):
        raise PlanError(
            f"--strategy {strategy} is for context parallelism, and no axis is context parallel",
            fix="leave it out, or use a mesh with cp=...",
        )
    return [
        dataclasses.replace(p, strategy=strategy) if isinstance(p, ContextParallel) else p  # type: ignore[arg-type]
        for p in own
    ]


def _print_collectives(collectives: Iterable[Collective]) -> None:
    from torchtrt_md.program import dtype_name

    table = Table("op", "axis", "dtype", title="Collectives of one step, per rank", title_justify="left")
    for name in ("bytes sent each", "how many", "bytes sent"):
        table.add_column(name, justify="right")
    counts = Counter(collectives)
    total = 0
    for c, count in counts.items():
        sent = c.bytes_sent * count
        total += sent
        table.add_row(c.op, f"{c.axis} ({c.ranks})", dtype_name(c.dtype), f"{c.bytes_sent:,}", str(count), f"{sent:,}")
    table.add_section()
    table.add_row("", "", "", "", str(sum(counts.values())), f"{total:,}")
    console.print(table)


def _print_errors(report: Report | None) -> None:
    from torchtrt_md.program import dtype_name

    if report is None:
        console.print("[yellow]Not verified against the dense model.[/]")
        return
    dtype = dtype_name(report.dtype)
    table = Table("relative error, worst rank", title="Against the dense model", title_justify="left")
    table.add_column("program", justify="right")
    table.add_column("dense model's own rounding", justify="right")
    precision = dtype_name(report.precision or report.dtype)
    table.add_row(f"in {precision}: is it the same function", f"{report.structure_error:.2e}", "-")
    table.add_row(f"in {dtype}: is it as accurate", f"{report.error:.3e}", f"{report.dense_error:.3e}")
    console.print(table)
    for note in report.notes:
        console.print(f"[yellow]{note}[/]")


def _print_files(exported: Exported) -> None:
    from torchtrt_md.bundle import rank_files

    for kept in exported.kept:
        where = f", at {kept.at}" if kept.at else ""
        console.print(f"[yellow]In PyTorch:[/] {kept.count} x {kept.op}: {kept.reason}{where}")
    for path in sorted(p for p in exported.folder.rglob("*") if p.is_file()):
        name = path.relative_to(exported.folder).as_posix()
        ranks = [rank for rank in range(len(exported.manifest.ranks)) if name in rank_files(exported.manifest, rank)]
        what = f"ranks {', '.join(map(str, ranks))}" if len(ranks) > 1 else f"rank {ranks[0]}" if ranks else ""
        console.print(f"  {path}  {path.stat().st_size:,} bytes  {what}")
    ranks_ = exported.program.mesh.size
    console.print(f"Run it: torchrun --nproc_per_node={ranks_} -m torchtrt_md.run {exported.folder}")


def main() -> None:
    """Run the command line; an error of this package is a message, not a traceback."""
    try:
        app()
    except MDError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[red]{type(error).__name__}[/]: ", end="")
        print(for_command_line(error), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
