"""README's table and chart of whole models, from the committed reports of whole_models.py.

    python benchmarks/figures.py            # writes both
    python benchmarks/figures.py --check    # fails where README says otherwise

Which report is taken for which model and number of GPUs is in ``MODELS``; all figures come from the reports.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "benchmarks/results"
CHART = "docs/whole-models.svg"
BEGIN, END = "<!-- made by benchmarks/figures.py -->\n", "<!-- end -->\n"
GPUS = (1, 2, 4)
_ALONE = r"\*"
NCCL, STORES = "ours, Inductor", "ours, Inductor, stores"
FLOAT8 = "ours, Inductor, stores, float8 exchanges"
ROWS = {
    NCCL: 'torchtrt_md, `compute="inductor"`',
    STORES: '**torchtrt_md**, the same with `transport="store"`',
    FLOAT8: 'torchtrt_md, and with `exchange_dtype="float8"`',
}


@dataclass(frozen=True)
class Model:
    """A model of the table.

    Attributes:
        key: its name in the reports.
        title: for people.
        short: in the chart.
        reports: number of GPUs -> the report's name in benchmarks/results.
        peer: what its best peer is; None where its library has none for several GPUs, and the dense model is compared.
    """

    key: str
    title: str
    short: str
    reports: Mapping[int, str]
    peer: str | None


MODELS = (
    Model(
        "flux",
        "FLUX.1, 57 blocks, 4096 + 512 tokens",
        "FLUX.1",
        {1: "2026-11-22-flux-h200", 2: "2026-11-23-flux-backends-h200-x2", 4: "2026-11-22-flux-beside-h200-x4"},
        "Best peer: diffusers with `torch.compile` in a CUDA graph, by its Ulysses (on 4 with cuDNN attention only)",
    ),
    Model(
        "flux2048",
        "FLUX.1 at 2048 x 2048, 16,384 + 512 tokens",
        "FLUX.1 at 2048 px",
        {2: "2026-11-23-flux2048-float8-exchanges-h200-x2"},
        "Peer: as above",
    ),
    Model(
        "flux",
        "FLUX.1 in float8 by torchao",
        "FLUX.1 in float8",
        {4: "2026-11-22-float8-h200-x4"},
        "Peer: as above",
    ),
    Model(
        "llama",
        "Llama at the width of 8B, 16 layers, 2048 tokens",
        "Llama",
        {2: "2026-11-23-llama-summed-h200-x2", 4: "2026-11-22-llama-scattered-h200-x4"},
        "Peer: DTensor (tensor parallel, not sequence parallel) and `torch.compile`, in a CUDA graph",
    ),
    Model(
        "llama8192",
        "Llama, 8192 tokens",
        "Llama, 8192 tokens",
        {2: "2026-11-23-llama8192-h200-x2"},
        "Peer: as above; it passes the causal mask as a tensor",
    ),
    Model(
        "cosmos3",
        "Cosmos 3, 4 layers, 42,752 tokens",
        "Cosmos 3",
        {2: "2026-11-22-cosmos3-alone-h200-x2", 4: "2026-11-22-cosmos3-h200-x4"},
        None,
    ),
    Model(
        "cosmos3whole",
        "Cosmos 3, all 36 layers",
        "Cosmos 3, 36 layers",
        {2: "2026-11-23-cosmos3-whole-h200-x2"},
        None,
    ),
    Model(
        "wan",
        "Wan2.1 14B, 4 blocks, 720p",
        "Wan2.1 14B",
        {2: "2026-11-23-wan-float8-exchanges-h200-x2", 4: "2026-11-22-wan-peer-h200-x4"},
        "Best peer: diffusers' Ulysses, as for FLUX.1",
    ),
)


@dataclass(frozen=True)
class Figure:
    """One candidate on some GPUs: ms a call, in turns with the others or alone, and its error."""

    ms: float
    alone: bool
    error: float


def figures(model: Model) -> dict[int, dict[str, Figure]]:
    """Number of GPUs -> candidate -> what was measured; the best peer is ``"peer"``, the dense model ``"dense"``."""
    found: dict[int, dict[str, Figure]] = {}
    for gpus, name in model.reports.items():
        candidates = json.loads((ROOT / RESULTS / f"{name}.json").read_text())["models"][model.key]["candidates"]
        timed = {n: f for n, c in candidates.items() if (f := _figure(c)) is not None}
        ours = {n: f for n, f in timed.items() if n in ROWS}
        at = found.setdefault(gpus, ours)
        peers = [f for n, f in timed.items() if candidates[n]["peer"] and candidates[n]["ranks"] == gpus]
        dense = [f for n, f in timed.items() if candidates[n]["peer"] and candidates[n]["ranks"] == 1]
        if peers and model.peer is not None:
            at["peer"] = min(peers, key=lambda f: f.ms)
        if dense:
            at["dense"] = min(dense, key=lambda f: f.ms)
    return found


def _figure(candidate: Mapping[str, Any]) -> Figure | None:
    ms, alone = candidate["ms"].get("median"), candidate["alone_ms"]
    if ms is None and alone is None:
        return None
    return Figure(alone if ms is None else ms, ms is None, candidate["relative_error"])


def table() -> str:
    """The table of README."""
    lines = ["| | 1 GPU | 2 GPUs | 4 GPUs | error |", "|---|---:|---:|---:|---:|"]
    for model in MODELS:
        found = figures(model)
        reports = ", ".join(f"[{gpus}]({RESULTS}/{name}.md)" for gpus, name in model.reports.items())
        title = f"**{model.title}** ({reports}; dense model's error {_dense_error(model):.2g})"
        if model.peer is not None:
            lines.append(_row(f"{title}. {model.peer}", "peer", found))
        else:
            other = "The dense model, compiled by PyTorch; no peer was timed on several GPUs"
            lines.append(_row(f"{title}. {other}", "dense", found))
        lines += [_row(label, name, found) for name, label in ROWS.items() if any(name in at for at in found.values())]
    return "\n".join(lines) + "\n"


def _dense_error(model: Model) -> float:
    """That of the report with the most GPUs."""
    name = model.reports[max(model.reports)]
    found = json.loads((ROOT / RESULTS / f"{name}.json").read_text())["models"][model.key]["dense_error"]
    return float(found)


def _row(label: str, name: str, found: Mapping[int, Mapping[str, Figure]]) -> str:
    cells, errors = [], []
    for gpus in GPUS:
        its = found.get(gpus, {}).get(name)
        if name == "dense":
            its = _dense(found) if gpus == 1 else None
        if its is None:
            cells.append("")
            continue
        peer = found.get(gpus, {}).get("peer")
        ratio = f" ({its.ms / peer.ms:.2f})" if peer is not None and name != "peer" else ""
        cells.append(f"{its.ms:.1f}{_ALONE if its.alone else ''}{ratio}")
        errors.append(its.error)
    return f"| {label} | {' | '.join(cells)} | {max(errors):.2g} |"


def _dense(found: Mapping[int, Mapping[str, Figure]]) -> Figure | None:
    """The dense model on one GPU: of the report with the most GPUs, which has it in turns with ours."""
    return next((found[gpus]["dense"] for gpus in sorted(found, reverse=True) if "dense" in found[gpus]), None)


def _best_ours(at: Mapping[str, Figure]) -> float:
    """Of those that send what the peers send."""
    return min(at[name].ms for name in (NCCL, STORES) if name in at)


def chart(path: Path) -> None:
    """The chart: what ours take over the best peer's time, and how much faster several GPUs are than one."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "torchtrt_md", "font.size": 9, "svg.fonttype": "none"})
    from matplotlib import pyplot

    canvas, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    bars = [
        (f"{model.short}, {gpus} GPU{'s' if gpus > 1 else ''}", at)
        for model in MODELS
        for gpus, at in figures(model).items()
        if "peer" in at
    ]
    for place, (_, at) in enumerate(reversed(bars)):
        ratio = _best_ours(at) / at["peer"].ms
        left.barh(place, ratio, color="#76b900")
        left.text(ratio - 0.01, place, f"{ratio:.2f}", va="center", ha="right")
    left.set_yticks(range(len(bars)), [name for name, _ in reversed(bars)])
    left.axvline(1.0, color="black", linewidth=1)
    left.set_xlim(0, 1.05)
    left.set_xlabel("time of torchtrt_md over that of the best peer (1.0)")
    for model in MODELS:
        found = figures(model)
        one = found[1]["peer"] if "peer" in found.get(1, {}) else _dense(found)
        if one is None or model.key == "llama":  # its dense model was timed without torch.compile
            continue
        ours = {gpus: _best_ours(at) for gpus, at in found.items() if gpus > 1}
        gpus = [1, *ours]
        right.plot(gpus, [1.0, *(one.ms / ms for ms in ours.values())], marker="o", label=model.short)
    right.plot(GPUS, GPUS, color="black", linewidth=1, linestyle=":", label="as many times as GPUs")
    right.set_xticks(GPUS)
    right.set_xlabel("GPUs")
    right.set_ylabel("times as fast as the dense model,\ncompiled by PyTorch, on one GPU")
    right.legend(frameon=False)
    canvas.savefig(path, metadata={"Date": None})
    pyplot.close(canvas)


def with_table(readme: str) -> str:
    """README with the table as it is now."""
    before, _, rest = readme.partition(BEGIN)
    _, _, behind = rest.partition(END)
    return f"{before}{BEGIN}{table()}{END}{behind}"


def main(check: Annotated[bool, typer.Option(help="change nothing; fail where README says otherwise")] = False) -> None:
    """Write README's table and chart, or look at the table."""
    readme = ROOT / "README.md"
    made = with_table(readme.read_text())
    if check:
        raise typer.Exit(int(made != readme.read_text()))
    readme.write_text(made)
    chart(ROOT / CHART)


if __name__ == "__main__":
    typer.run(main)
