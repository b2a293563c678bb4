"""``md.export`` with weights that may be streamed or are left out, and self-tests in the bundle."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from rank_processes import Ranks
from safetensors.torch import save_file
from torch import Tensor, nn

import torchtrt_md as md
from torchtrt_md.build import probes
from torchtrt_md.build.flavour import flavour
from torchtrt_md.bundle import check_files, rank_files, read_manifest
from torchtrt_md.bundle.given import given_checkpoint, given_weights
from torchtrt_md.bundle.weights import rank_weights
from torchtrt_md.errors import BuildError, BundleError

RTX = pytest.mark.skipif(flavour().name != "TensorRT-RTX", reason="TensorRT builds for the GPU that is there only")


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch, own_cache: None) -> list[Any]:
    """TensorRT's own configs, as the builder was given them."""
    made: list[Any] = []
    real = probes.builder_config

    def noted(f: Any, of: Any) -> Any:
        made.append((of, real(f, of)))  # a config must not outlive its builder
        return made[-1][1]

    monkeypatch.setattr(probes, "builder_config", noted)
    return made


@RTX
@pytest.mark.parametrize("streaming", [False, True])
def test_weights_may_be_streamed_where_that_was_asked_for(streaming: bool, configs: list[Any], tmp_path: Path) -> None:
    model, args, _ = models.mlp()
    exported = md.export(
        model, args, mesh=md.Mesh(tp=1), out=tmp_path / "out.mdtrt", weight_streaming=streaming, check=False
    )
    assert len(exported.engines) == 1
    flag = flavour().trt.BuilderFlag.WEIGHT_STREAMING
    assert [config.get_flag(flag) for _, config in configs] == [streaming]


@RTX
def test_weights_that_are_inputs_are_not_streamed(tmp_path: Path) -> None:
    model, args, _ = models.attention()
    plan = {"": {"x": md.Split(1)}, "out": md.Gather(1)}
    options: dict[str, Any] = {
        "mesh": md.Mesh(cp=2),
        "parallel": md.ContextParallel("cp", plan=plan),
        "placement": "split",
        "out": tmp_path / "out.mdtrt",
        "check": False,
        "weight_streaming": True,
    }
    with pytest.raises(BuildError, match="placement 'split' makes several parts, whose weights are inputs"):
        md.export(model, args, **options)
    with pytest.raises(BuildError, match="weight_streaming is TensorRT's, and compute is 'inductor'"):
        md.export(model, args, **options, compute="inductor")
    assert not (tmp_path / "out.mdtrt").exists()


class Bessel(nn.Module):
    """A part of it stays in PyTorch, which is seen when it is placed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.b(torch.special.bessel_j0(self.a(x)))
        return result


@RTX
def test_parts_that_nobody_asked_for_are_not_streamed(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"this one is \d+ parts, whose weights are inputs"):
        md.export(
            Bessel().eval(),
            (torch.randn(2, 8),),
            mesh=md.Mesh(tp=1),
            out=tmp_path / "out.mdtrt",
            weight_streaming=True,
            check=False,
        )
    assert not (tmp_path / "out.mdtrt").exists()


@RTX
def test_the_bundle_has_its_self_tests(tmp_path: Path) -> None:
    model, args, _ = models.mlp()
    out = tmp_path / "out.mdtrt"
    plan = md.TensorParallel("tp", {"up": "colwise", "down": "rowwise"})
    exported = md.export(model, args, mesh=md.Mesh(tp=2), parallel=plan, out=out, check=False)
    manifest = read_manifest(out)
    assert [test.name for test in manifest.self_tests] == ["the self-test of all_reduce in float32 on axis 'tp'"]
    (test,) = manifest.self_tests
    assert test.file in manifest.files
    assert (test.axis, test.collectives[0].ranks) == ("tp", 2)
    assert all(test.file in rank_files(manifest, rank) for rank in range(2))
    check_files(out, manifest)
    assert exported.manifest == manifest


# --- weights that are given at load ---


class Product(nn.Module):
    """Two products, which Inductor has no C++ to compile for on the CPU, and a table that no checkpoint has."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64, bias=False), nn.Linear(64, 32, bias=False)
        self.register_buffer("table", torch.randn(32, 32), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(self.up(x @ self.table))
        return result


def product(seed: int) -> tuple[Product, Tensor]:
    torch.manual_seed(0)
    model, x = Product().eval(), torch.randn(4, 32)
    torch.manual_seed(seed)
    for weight in model.parameters():
        nn.init.normal_(weight)
    return model, x


def load_and_run(rank: int, folder: str, weights: list[str | None], x: Tensor) -> Tensor:
    with md.load(folder, timeout=60.0, weights=weights[rank]) as runner:
        result: Tensor = runner(x)
        return result


def write_to_what_was_given(rank: int, folder: str, x: Tensor) -> str:
    model, _ = product(1)
    with md.load(folder, timeout=60.0, weights=model.state_dict()) as runner:
        runner(x)
        with torch.no_grad():
            model.up.weight.mul_(2)
        return message_of(lambda: runner(x))


def message_of(call: Callable[[], object]) -> str:
    try:
        call()
    except md.InputError as error:
        return str(error)
    return ""


def test_a_bundle_without_weights_runs_with_those_that_it_is_given(ranks: Ranks, tmp_path: Path) -> None:
    out, files = tmp_path / "out.mdtrt", []
    for seed in (1, 2):
        model, x = product(seed)
        files.append(str(tmp_path / f"{seed}.safetensors"))
        save_file(model.state_dict(), files[-1])
    plan = md.TensorParallel("tp", {"up": "colwise", "down": "rowwise"})
    model, x = product(1)
    md.export(model, (x,), mesh=md.Mesh(tp=2), parallel=plan, compute="inductor", out=out, strip_weights=True)
    manifest = read_manifest(out)
    assert {value.name for value in manifest.given} == {"up.weight", "down.weight"}
    held = (out / str(manifest.weights[0])).stat().st_size
    assert 32 * 32 * 4 < held < 32 * 32 * 4 + 500, "the table alone"

    for seed, file in zip((1, 2), files, strict=True):
        model, x = product(seed)
        with torch.no_grad():
            expected = model(x)
        for outcome in ranks(load_and_run, str(out), [file, file], x):
            assert not outcome.error, outcome.message
            torch.testing.assert_close(outcome.value, expected, rtol=1e-4, atol=1e-4)

    for outcome in ranks(write_to_what_was_given, str(out), x):
        assert not outcome.error, outcome.message
        assert "the weight 'up.weight' was changed after the model was compiled" in outcome.value

    for given, kind, message in (
        ([None, None], "BundleError", "the bundle was exported without its 2 weights"),
        ([files[0], None], "BundleError", "rank 1: the bundle was exported without its 2 weights"),
    ):
        for outcome in ranks(load_and_run, str(out), given, x):
            assert outcome.error == kind
            assert message in outcome.message


def test_ranks_that_are_given_other_weights_are_refused(ranks: Ranks, tmp_path: Path) -> None:
    out, files = tmp_path / "out.mdtrt", []
    for seed in (1, 2):
        model, x = product(seed)
        files.append(str(tmp_path / f"{seed}.safetensors"))
        save_file(model.state_dict(), files[-1])
    # one axis along which the data is split: both ranks hold all weights
    md.export(
        model, (x,), mesh=md.Mesh(dp=2), parallel=md.DataParallel("dp"), compute="inductor", out=out, strip_weights=True
    )
    for outcome in ranks(load_and_run, str(out), files, x):
        assert outcome.error == "RankMismatchError"
        assert "the weight 'down.weight' is not the same on ranks that hold the same part of it" in outcome.message


@RTX
@pytest.mark.parametrize("placement", ["engine", "split"])
def test_what_is_given_is_what_the_bundle_would_have_had(placement: Any, tmp_path: Path) -> None:
    model, args, _ = models.attention(torch.float16)
    plan = {"": {"x": md.Split(1)}, "out": md.Gather(1)}
    options: dict[str, Any] = {
        "mesh": md.Mesh(cp=2),
        "parallel": md.ContextParallel("cp", plan=plan),
        "target": "sm80",
        "check": False,
        "placement": placement,
    }
    stripped = md.export(model, args, out=tmp_path / "stripped", strip_weights=True, **options)
    whole = md.export(model, args, out=tmp_path / "whole", **options)
    manifest = read_manifest(tmp_path / "stripped")
    assert manifest == stripped.manifest
    assert not any(path.startswith("weights/") for path in manifest.files)
    assert {value.name for value in manifest.given} == set(model.state_dict())
    for rank in range(2):
        given = given_weights(manifest, rank, given_checkpoint(manifest, model.state_dict()), "cpu")
        assert set(given) == {w for s in manifest.ranks[rank] for w in s.weights}
        if placement == "split":
            own = rank_weights(tmp_path / "whole", whole.manifest, rank, "cpu")
            assert given.keys() == own.keys()
            assert all(torch.equal(given[name], own[name]) for name in own)
    if placement == "engine":
        assert [s.runs for s in manifest.ranks[0]] == ["engine"]
        assert whole.manifest.ranks[0][0].weights == ()


@pytest.mark.parametrize(("width", "style"), [(45, "colwise"), (48, "packed_colwise")])
def test_weights_that_are_cut_unevenly_are_not_left_out(width: int, style: str, tmp_path: Path) -> None:
    """No manifest can say how a rank cuts them; in the bundle they are each rank's part."""
    up = nn.Linear(32, width)
    model = nn.Sequential(OrderedDict(up=up, down=nn.Linear(width, 32))).eval()
    rowwise = "packed_rowwise" if style == "packed_colwise" else "rowwise"
    options: dict[str, Any] = {
        "mesh": md.Mesh(tp=2),
        "parallel": md.TensorParallel("tp", {"up": style, "down": rowwise}),
        "compute": "inductor",
        "out": tmp_path / "out.mdtrt",
    }
    x = torch.randn(4, 32)
    built: list[str] = []
    with pytest.raises(BundleError, match=r"the weight 'up\.(weight|bias)' of shape") as refused:
        md.export(model, (x,), strip_weights=True, progress=lambda stage, *_: built.append(stage), **options)
    assert "Instead: export with strip_weights=False" in str(refused.value)
    assert "build" not in built, "refused before anything is built"
    assert not (tmp_path / "out.mdtrt").exists()

    manifest = md.export(model, (x,), **options).manifest
    parts = [rank_weights(tmp_path / "out.mdtrt", manifest, rank, "cpu") for rank in range(2)]
    extent = -(-width // 2)
    assert [part["up.bias"].numel() for part in parts] == [extent, extent]
    if style == "colwise":
        bias = torch.cat([part["up.bias"] for part in parts])
        assert torch.equal(bias, torch.cat([up.bias.detach(), up.bias.detach()[-1:].expand(2 * extent - width)]))


def test_weights_that_are_left_out_are_not_streamed(tmp_path: Path) -> None:
    model, args, _ = models.mlp()
    with pytest.raises(BuildError, match="cannot be streamed"):
        md.export(
            model, args, mesh=md.Mesh(tp=1), out=tmp_path / "out.mdtrt", weight_streaming=True, strip_weights=True
        )
