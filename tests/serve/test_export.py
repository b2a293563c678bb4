"""An export that ends in a model for Triton, and engines that hold their rank's coordinates."""

from __future__ import annotations

from pathlib import Path

import models
import msgspec
import pytest
import torch
from command_line import Run

import torchtrt_md as md
from serve.test_config import TENSORRT, parsed
from torchtrt_md.bundle import read_manifest
from torchtrt_md.doors.export import Exported
from torchtrt_md.errors import BundleError, OptionError
from torchtrt_md.lowering.rank_constant import with_constants
from torchtrt_md.program import placeholders
from torchtrt_md.serve.config import check_tensorrt

ROOT = Path(__file__).resolve().parents[2]
PLAN = {"": {"x": md.Split(1)}, "out": md.Gather(1)}


def export(out: Path, **changes: object) -> Exported:
    model, args, _ = models.attention()
    parallel = md.ContextParallel("cp", plan=PLAN, strategy="ulysses")
    return md.export(model, args, mesh=md.Mesh(cp=2), parallel=parallel, out=out, **changes)  # type: ignore[arg-type]


def test_coordinates_are_built_into_an_engine_for_each_rank(tmp_path: Path) -> None:
    shared = export(tmp_path / "shared").manifest
    assert [b.name for b in shared.ranks[0][0].inputs] == ["x", "coordinate_cp"]
    with pytest.raises(BundleError, match="reads its coordinate along axis 'cp'"):
        check_tensorrt(msgspec.structs.replace(shared, versions=TENSORRT))

    exported = export(tmp_path / "own", coordinates_inside=True)
    assert exported.report is not None  # these graphs are what was verified, of all ranks together
    assert [engine.ranks for engine in exported.engines] == [(0,), (1,)]
    for rank, segments in enumerate(exported.manifest.ranks):
        assert [b.name for b in segments[0].inputs] == ["x"]
        graph = exported.program.graphs[rank]
        assert [node.name for node in placeholders(graph) if "coordinate" in node.name] == []
        (full,) = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.full.default)
        assert full.args == ([1], rank)
    assert len({segments[0].file for segments in exported.manifest.ranks}) == 2
    check_tensorrt(msgspec.structs.replace(exported.manifest, versions=TENSORRT))


def test_a_program_without_coordinates_stays_as_it_is(tmp_path: Path) -> None:
    model, args, _ = models.mlp()
    program = md.lower(
        md.capture(
            model,
            args,
            mesh=md.Mesh(tp=2),
            parallel=md.TensorParallel("tp", plan={"up": "colwise", "down": "rowwise"}),
        )
    )
    assert with_constants(program) is program


def test_engines_of_tensorrt_rtx_are_refused_before_anything_is_built(tmp_path: Path) -> None:
    stages: list[str] = []
    with pytest.raises(BundleError, match="the engines are of TensorRT-RTX 1") as caught:
        export(tmp_path / "out", format="triton", progress=lambda stage, detail, seconds: stages.append(stage))
    assert "--format triton-python" in caught.value.fix
    with pytest.raises(BundleError, match="nothing of the program is in an engine"):
        export(tmp_path / "out", format="triton", compute="inductor")
    assert stages == []
    with pytest.raises(OptionError, match="'format' cannot be 'tritn'"):
        export(tmp_path / "out", format="tritn")
    assert list(tmp_path.iterdir()) == []


def test_the_commands(run: Run, tmp_path: Path) -> None:
    file, out = tmp_path / "mine.py", tmp_path / "models/mine"
    file.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "import torchtrt_md as md\nimport models\nmodel = models.mlp\n"
        'parallel = [md.TensorParallel("tp", plan={"up": "colwise", "down": "rowwise"})]\n'
    )
    report = tmp_path / "report.json"
    code, said, wrong = run(
        *("export", file, "--mesh", "tp=2", "--format", "triton-python", "-o", out),
        *("--no-verify", "--report", report),
    )
    assert code == 0, said + wrong
    assert f"tritonserver --model-repository={out.parent}" in said
    ranks = read_manifest(out / "1/bundle").ranks
    assert len(ranks) == 2
    assert parsed((out / "config.pbtxt").read_text()).backend == "python"
    sizes = sorted((out / "1/bundle" / file).stat().st_size for file in {segments[0].file for segments in ranks})
    assert sorted(msgspec.json.decode(report.read_bytes())["engine_bytes"]) == sizes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.py", "models", "report.json"]

    code, said, wrong = run("triton", out / "1/bundle", "-o", out.parent / "again", "--python", "/opt/python")
    assert code == 0, said + wrong
    assert "PYTHON = '/opt/python'" in (out.parent / "again/1/model.py").read_text()
    code, _, wrong = run("triton", out / "1/bundle", "-o", out.parent / "third", "--format", "triton")
    assert code == 1
    assert "the engines are of TensorRT-RTX" in wrong
    assert not (out.parent / "third").exists()
