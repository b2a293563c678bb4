"""The command line: ``torchtrt-md export FILE --mesh cp=4 -o BUNDLE``."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import typer
from rich.console import Console
from rich.table import Table

from torchtrt_md.errors import MDError, PlanError
from torchtrt_md.mesh import Mesh
from torchtrt_md.parallel import ContextParallel, Parallel, TensorParallel
from torchtrt_md.program import dtype_name

if TYPE_CHECKING:
    from torchtrt_md.doors.export import Exported

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
console = Console(highlight=False, soft_wrap=True)
# What an axis of this name is for, where the model file does not say.
_BY_NAME = {"cp": ContextParallel, "tp": TensorParallel}


@app.callback()
def _commands() -> None:
    """One TensorRT engine per rank from a sharded PyTorch model, the NCCL communication inside the engine."""


@app.command()
def export(
    file: Annotated[Path, typer.Argument(help="Python file whose model() returns (model, args, kwargs)")],
    mesh: Annotated[str, typer.Option(help="axes and their sizes: cp=4 (context) or tp=4 (tensor parallel)")],
    out: Annotated[Path, typer.Option("--out", "-o", help="the bundle, a folder")],
    strategy: Annotated[str, typer.Option(help="context parallel attention: ulysses, allgather_kv, ring or auto")] = "",
    placement: Annotated[str, typer.Option(help="where attention runs: engine, split or auto")] = "auto",
    target: Annotated[
        str, typer.Option(help="GPU to build for: sm80, sm86, sm89, sm120, portable, current")
    ] = "portable",
    verify: Annotated[bool, typer.Option(help="prove the program against the dense model first")] = True,
    dump: Annotated[Path | None, typer.Option(help="folder for the graphs before and after each pass")] = None,
    seed: Annotated[int, typer.Option(help="PyTorch's seed when the file is run")] = 0,
    model_device: Annotated[str, typer.Option(help="where the file makes its model")] = "cpu",
    report: Annotated[Path | None, typer.Option(help="JSON file for what the tables say")] = None,
) -> None:
    """Capture, lower, verify, build and bundle a model; needs no GPU."""
    from torchtrt_md.doors.export import export as run
    from torchtrt_md.doors.user_file import read_user_file

    user = read_user_file(file, seed, model_device)
    sizes = Mesh.parse(mesh)
    parallel = _parallel(sizes, user.parallel, strategy)
    parameters = sum(p.numel() for p in user.model.parameters())
    console.print(f"[bold]{type(user.model).__name__}[/], {parameters / 1e6:.1f} M parameters, on {sizes}")
    with console.status("") as status:

        def progress(stage: str, detail: str, seconds: float | None) -> None:
            if seconds is None:
                status.update(f"{stage}  {detail}")
            else:
                console.print(f"  [green]{stage:8}[/] {seconds:6.2f} s  {detail}")

        exported = run(
            user.model,
            user.args,
            user.kwargs,
            mesh=sizes,
            parallel=parallel,
            out=out,
            target=target,
            check=verify,
            placement=_placement(placement),
            dump=dump,
            progress=progress,
        )
    _print_collectives(exported)
    _print_errors(exported)
    _print_files(exported)
    if report is not None:
        _write_report(exported, report)


def _write_report(exported: Exported, path: Path) -> None:
    import msgspec

    measured = exported.report
    content = {
        "seconds": exported.seconds,
        "engine_seconds": [engine.seconds for engine in exported.engines],
        "engine_bytes": [(exported.folder / name).stat().st_size for name in exported.manifest.files],
        "versions": exported.manifest.versions,
        "target": exported.manifest.target,
        "error": measured and measured.error,
        "dense_error": measured and measured.dense_error,
        "structure_error": measured and measured.structure_error,
    }
    path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n")


def _placement(given: str) -> Literal["auto", "engine", "split"]:
    for known in get_args(Literal["auto", "engine", "split"]):
        if given == known:
            return known  # type: ignore[no-any-return]
    raise PlanError(f"there is no placement {given!r}", fix="use engine, split or auto")


def _parallel(mesh: Mesh, own: list[Parallel] | None, strategy: str) -> list[Parallel]:
    if own is None:
        own = []
        for axis in mesh.names:
            if axis not in _BY_NAME:
                raise PlanError(
                    f"axis {axis!r} of --mesh does not say what is parallel along it",
                    fix="name axes cp (context parallel) or tp (tensor parallel), or give the model file a list"
                    f" `parallel`, such as [md.ContextParallel({axis!r}, plan=...)]",
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


def _print_collectives(exported: Exported) -> None:
    table = Table("op", "axis", "dtype", title="Collectives of one step, per rank", title_justify="left")
    for name in ("bytes sent each", "how many", "bytes sent"):
        table.add_column(name, justify="right")
    counts = Counter(c for segment in exported.manifest.ranks[0] for c in segment.collectives)
    total = 0
    for c, count in counts.items():
        sent = c.bytes_sent * count
        total += sent
        table.add_row(c.op, f"{c.axis} ({c.ranks})", dtype_name(c.dtype), f"{c.bytes_sent:,}", str(count), f"{sent:,}")
    table.add_section()
    table.add_row("", "", "", "", str(sum(counts.values())), f"{total:,}")
    console.print(table)


def _print_errors(exported: Exported) -> None:
    report = exported.report
    if report is None:
        console.print("[yellow]Not verified against the dense model.[/]")
        return
    dtype = dtype_name(report.dtype)
    table = Table("relative error, worst rank", title="Against the dense model", title_justify="left")
    table.add_column("program", justify="right")
    table.add_column("dense model's own rounding", justify="right")
    table.add_row("in fp64: is it the same function", f"{report.structure_error:.2e}", "-")
    table.add_row(f"in {dtype}: is it as accurate", f"{report.error:.3e}", f"{report.dense_error:.3e}")
    console.print(table)


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
        print(error, file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
