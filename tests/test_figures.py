"""README's figures are those of the committed reports."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import figures  # noqa: E402


def test_readme_has_the_table_that_the_reports_make() -> None:
    readme = (ROOT / "README.md").read_text()
    assert figures.with_table(readme) == readme, "run python benchmarks/figures.py"
    assert readme.count(figures.BEGIN) == readme.count(figures.END) == 1
    assert figures.CHART in readme


def test_a_report_that_says_otherwise_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    flux = figures.figures(figures.MODELS[0])
    assert flux[4]["peer"].ms > flux[4][figures.STORES].ms
    alone = next(model for model in figures.MODELS if model.peer is None)
    assert all("peer" not in at for at in figures.figures(alone).values())
    readme = (ROOT / "README.md").read_text()
    monkeypatch.setattr(figures, "MODELS", figures.MODELS[1:])
    assert figures.with_table(readme) != readme


def test_the_chart_is_that_of_the_reports(tmp_path: Path) -> None:
    figures.chart(tmp_path / "chart.svg")
    made, committed = ((path).read_text() for path in (tmp_path / "chart.svg", ROOT / figures.CHART))
    for model in figures.MODELS:
        assert model.short in committed
    assert [line for line in made.splitlines() if "<text" in line] == [
        line for line in committed.splitlines() if "<text" in line
    ], "run python benchmarks/figures.py"


def test_every_report_is_where_a_reader_comes_by() -> None:
    """Those that are less favourable, too."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / figures.RESULTS).glob("*.md")]
    sources = [*(ROOT / "torchtrt_md").rglob("*.py"), *(ROOT / "lowering").glob("*.py")]  # comments name some
    told = {path: path.read_text() for path in (*pages, *sources)}
    for report in (ROOT / figures.RESULTS).glob("*.md"):
        assert any(report.stem in text for path, text in told.items() if path != report), report.stem
