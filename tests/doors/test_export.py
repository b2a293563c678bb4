"""The whole road: a bundle from a model, from Python and from the command line."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import torchtrt_md as md
from torchtrt_md.bundle import read_manifest
from torchtrt_md.capture.torch_private import fake_ranks
from torchtrt_md.choices import Choices
from torchtrt_md.errors import BundleError, OptionError, PlanError, TargetError, VerificationError
from torchtrt_md.lowering import PASSES

ROOT = Path(__file__).resolve().parents[2]


def test_the_command_line_exports_flux_as_one_engine_for_all_ranks(tmp_path: Path) -> None:
    out, report = tmp_path / "flux.mdtrt", tmp_path / "report.json"
    command = ["export", "examples/flux.py", "--mesh", "cp=4", "--strategy", "ulysses"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torchtrt_md", *command),
            *("-o", str(out), "--report", str(report), "--dump", str(tmp_path / "dump")),
        ],
        cwd=ROOT,
        env={**os.environ, **models.SMALL_EXAMPLES},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for stage in ("capture", "lower", "verify", "build", "bundle", "all_to_all", "torchrun --nproc_per_node=4"):
        assert stage in done.stdout
    manifest = read_manifest(out)
    assert manifest.mesh == {"cp": 4}
    engines = {segment.file for segments in manifest.ranks for segment in segments}
    assert len(engines) == 1
    tests = [test.collectives[0].op for test in manifest.self_tests]
    assert tests == ["all_gather", "all_to_all"]
    assert len(manifest.files) == len(engines) + len(tests)
    assert [len(segments) for segments in manifest.ranks] == [1, 1, 1, 1]
    for path, digest in manifest.files.items():
        assert hashlib.sha256((out / path).read_bytes()).hexdigest() == digest
    measured = json.loads(report.read_text())
    assert measured["engine_bytes"] == [(out / path).stat().st_size for path in engines]
    assert measured["structure_error"] <= 1e-5
    assert measured["error"] <= 1.5 * measured["dense_error"]
    assert any((tmp_path / "dump").glob("*ulysses.after.txt"))


def test_tensor_parallel_bundle_and_its_manifest(tmp_path: Path) -> None:
    model, args, kwargs = models.llama(torch.bfloat16)
    stages: list[str] = []
    exported = md.export(
        model,
        args,
        kwargs,
        mesh=md.Mesh(tp=2),
        parallel=md.TensorParallel("tp"),
        out=tmp_path / "llama.mdtrt",
        target="sm80",
        progress=lambda stage, detail, seconds: stages.append(stage) if seconds is not None else None,
    )
    assert stages == ["capture", "lower", "verify", "build", "bundle"]
    manifest = read_manifest(tmp_path / "llama.mdtrt")
    assert manifest == exported.manifest
    assert manifest.target == "sm80"
    assert [t.name for t in manifest.inputs] == ["input_ids"]
    assert manifest.constants == {"use_cache": False}
    assert manifest.result == {"dict": {"logits": {"output": 0}}}
    assert len({segments[0].file for segments in manifest.ranks}) == 2
    assert {segment.axis for segments in manifest.ranks for segment in segments} == {"tp"}
    program = exported.program
    assert set(program.counts) == set(PASSES)


def test_nothing_is_written_when_a_stage_fails(tmp_path: Path) -> None:
    model, args, _ = models.mlp()
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    out = tmp_path / "out.mdtrt"

    def export(**changes: object) -> None:
        options = {"mesh": md.Mesh(tp=2), "parallel": md.TensorParallel("tp", plan=plan), "out": out, **changes}
        md.export(model, args, **options)  # type: ignore[arg-type]

    with pytest.raises(TargetError):
        export(target="sm70")
    with pytest.raises(PlanError):
        export(parallel=md.TensorParallel("tp", plan={"nothing": "colwise"}))
    with torch.no_grad():
        model.down.weight.fill_(float("nan"))  # type: ignore[union-attr, operator]
    with pytest.raises(VerificationError):
        export()
    assert list(tmp_path.iterdir()) == []
    out.write_text("not a bundle")
    with pytest.raises(BundleError, match="is a file"):
        export()


def test_a_place_that_cannot_be_written_is_told_before_the_work(tmp_path: Path) -> None:
    class Untraced(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError("the work has begun")

    (tmp_path / "file").write_text("no folder")
    for out in (tmp_path / "file" / "out.mdtrt", Path("/proc/out.mdtrt")):
        with pytest.raises(md.BundleError, match="cannot be written"):
            md.export(Untraced(), (torch.ones(2),), mesh=md.Mesh(d=1), out=out, placement="engine")


def test_a_dict_whose_keys_are_no_strings_is_refused(tmp_path: Path) -> None:
    """As text two keys may be one, and a result would be lost."""

    class Numbered(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> dict[object, torch.Tensor]:
            return {1: x * 2, "1": x * 3}

    with pytest.raises(BundleError, match="a dict with the key 1, and names in a bundle are strings"):
        md.export(Numbered(), (torch.ones(2),), mesh=md.Mesh(d=1), out=tmp_path / "out.mdtrt", placement="engine")


def test_a_sharded_output_stays_sharded(tmp_path: Path) -> None:
    model, args, _ = models.attention()
    exported = md.export(
        model,
        args,
        mesh=md.Mesh(cp=2),
        parallel=md.ContextParallel("cp", plan={"": {"x": md.Split(1)}}),
        out=tmp_path / "out.mdtrt",
    )
    (output,) = exported.manifest.outputs
    assert output.shape == (2, 16, 32)
    assert output.sharding == ((1, "cp"),)
    assert exported.manifest.ranks[0][0].outputs[0].shape == (2, 8, 32)


def test_a_model_that_was_parallelized_already_is_verified_against_the_dense_one(tmp_path: Path) -> None:
    dense, args, _ = models.mlp()
    sharded = models.MLP().eval()
    sharded.load_state_dict(dense.state_dict())
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    with fake_ranks(2):
        parallelize_module(sharded, init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), plan, src_data_rank=None)
        with pytest.raises(VerificationError, match="is a DTensor") as error:
            md.export(sharded, args, mesh=md.Mesh(tp=2), out=tmp_path / "out.mdtrt")
        assert "dense=" in error.value.fix
        exported = md.export(sharded, args, mesh=md.Mesh(tp=2), dense=dense, out=tmp_path / "out.mdtrt")
    assert exported.report is not None
    assert exported.report.error <= 1e-5
    assert len(exported.engines) == 2


def test_an_input_may_have_the_name_of_an_output(tmp_path: Path) -> None:
    class Named(torch.nn.Module):
        def forward(self, x: torch.Tensor, output0: torch.Tensor) -> torch.Tensor:
            return x + output0

    pair = (torch.randn(3), torch.randn(3))
    exported = md.export(Named(), pair, mesh=md.Mesh(tp=1), out=tmp_path / "out.mdtrt")
    assert [t.name for t in exported.manifest.inputs] == ["x", "output0"]
    assert [t.name for t in exported.manifest.outputs] == ["output0_"]


def test_a_bundle_says_what_does_its_exchanges(tmp_path: Path) -> None:
    model, args, kwargs = models.mlp()
    parallel = md.TensorParallel("tp", plan={"up": "colwise", "down": "rowwise"})
    how: dict[str, Any] = {"mesh": md.Mesh(tp=2), "parallel": parallel, "compute": "inductor", "check": False}
    ways: dict[str, dict[str, Any]] = {
        "default": {},
        "stores": {"transport": "store"},
        "chosen": {"transport": "store", "choices": Choices("split", compute="inductor")},
    }
    by = {}
    for name, more in ways.items():
        made = md.export(model, args, kwargs, out=tmp_path / name, **how, **more)
        by[name] = read_manifest(made.folder).transport
    assert by == {"default": "nccl", "stores": "store", "chosen": "nccl"}
    with pytest.raises(OptionError, match="transport") as caught:
        md.export(model, args, kwargs, out=tmp_path / "wrong", **how, transport="copy")  # type: ignore[arg-type]
    assert "'store'" in str(caught.value)
