"""Real engines, built by the installed TensorRT on a machine with no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
import torch
from msgspec.structs import replace
from networks import layers_of, network
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

import torchtrt_md as md
from torchtrt_md.build import builder, layers, probes
from torchtrt_md.build.decompose import decompose
from torchtrt_md.build.flavour import flavour
from torchtrt_md.errors import BuildError, TargetError
from torchtrt_md.lowering.schedule import schedule

pytestmark = pytest.mark.usefixtures("own_cache")  # each test builds what it needs

MLP_PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}


@pytest.mark.parametrize("strategy", ["ulysses", "allgather_kv"])
def test_context_parallel_is_one_engine_for_all_ranks(strategy: str, tmp_path: Path) -> None:
    model, args, kwargs = models.flux(torch.bfloat16)
    program = md.capture(
        model,
        args,
        kwargs,
        mesh=md.Mesh(cp=4),
        parallel=md.ContextParallel("cp", strategy=strategy),  # type: ignore[arg-type]
    )
    (engine,) = md.build(program, tmp_path)
    assert engine.ranks == (0, 1, 2, 3)
    assert engine.segment.axis == "cp"
    assert [b.name for b in engine.segment.inputs] == [*(n for n in kwargs if n != "return_dict"), "coordinate_cp"]
    assert [(b.name, b.shape) for b in engine.segment.outputs] == [("output0", (1, 32, 16))]
    expected = {"ulysses": ["all_to_all"] * 6, "allgather_kv": ["all_gather"] * 3}[strategy]
    assert [c.op for c in engine.segment.collectives] == [*expected, "all_gather"]
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert engine.file.stat().st_size > weights


def test_tensor_parallel_is_an_engine_for_each_rank_with_its_part_of_the_weights(tmp_path: Path) -> None:
    model, args, kwargs = models.llama(torch.bfloat16)
    program = md.capture(model, args, kwargs, mesh=md.Mesh(tp=4), parallel=md.TensorParallel("tp"))
    engines = md.build(program, tmp_path, target="sm80")
    assert [e.ranks for e in engines] == [(0,), (1,), (2,), (3,)]
    assert len({e.file.read_bytes() for e in engines}) == 4
    operations = [c.op for c in engines[0].segment.collectives]
    vocabulary = "model.embed_tokens" in vars(model).get("_tp_plan", {})  # not in every version's plan
    assert operations == ["all_reduce"] * (4 + vocabulary) + ["all_gather"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    model, args, kwargs = models.mlp(dtype)
    program = md.capture(model, args, kwargs, mesh=md.Mesh(tp=2), parallel=md.TensorParallel("tp", plan=MLP_PLAN))
    (engine,) = md.build(program, tmp_path, ranks=[1])
    assert engine.ranks == (1,)
    assert engine.segment.inputs[0].dtype == engine.segment.outputs[0].dtype == dtype


def test_attention_forms_build(tmp_path: Path) -> None:
    plan = {"": {"x": md.Split(1)}, "out": md.Gather(1)}
    for causal in (False, True):
        for strategy in ("ulysses", "allgather_kv"):
            model, args, kwargs = models.attention(torch.bfloat16, kv_heads=2, causal=causal)
            parallel = md.ContextParallel("cp", strategy, plan)
            program = md.capture(model, args, kwargs, mesh=md.Mesh(cp=2), parallel=parallel)
            assert len(md.build(program, tmp_path)) == 1


class Many(nn.Module):
    """One output twice, an output that is an input's dtype in another, and a bool."""

    def forward(self, x: torch.Tensor, n: torch.Tensor) -> dict[str, torch.Tensor]:
        y = x * 2
        return {"a": y, "b": y, "c": n + 1, "d": y > 0}


def test_outputs_of_every_kind(tmp_path: Path) -> None:
    program = md.capture(Many(), (torch.randn(2, 3), torch.arange(4)), mesh=md.Mesh(tp=1))
    (engine,) = md.build(program, tmp_path)
    assert engine.segment.axis is None
    assert [b.dtype for b in engine.segment.outputs] == [torch.float32, torch.float32, torch.int64, torch.bool]


@pytest.mark.parametrize("target", ["sm80", "sm86", "sm89", "sm120", "portable"])
def test_targets(target: str, tmp_path: Path) -> None:
    model, args, kwargs = models.mlp()
    program = md.capture(model, args, kwargs, mesh=md.Mesh(tp=2), parallel=md.TensorParallel("tp", plan=MLP_PLAN))
    (engine,) = md.build(program, tmp_path, target=target, ranks=[0])
    assert engine.target == target


def test_targets_that_the_flavour_lacks() -> None:
    model, args, kwargs = models.mlp()
    program = md.capture(model, args, kwargs, mesh=md.Mesh(tp=2), parallel=md.TensorParallel("tp", plan=MLP_PLAN))
    with pytest.raises(TargetError, match=rf"{flavour().name} .* cannot build for target 'sm70'") as error:
        md.build(program, "nowhere", target="sm70")
    assert "sm80" in error.value.fix
    assert not Path("nowhere").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU to build for")
def test_the_current_gpu_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="there is none"):
        flavour().check_target("current")


def test_an_op_without_a_converter_names_the_users_line(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = torch.special.i1(x)
            return result

    program = md.capture(Odd(), (torch.randn(3),), mesh=md.Mesh(tp=1))
    with pytest.raises(BuildError, match=r"no converter for aten.special_i1") as error:
        md.build(program, tmp_path)
    assert "torch.special.i1(x)" in error.value.at


@pytest.mark.parametrize("dtype", [torch.float64, torch.int16, torch.complex64])
def test_dtypes_that_tensorrt_lacks_are_refused_at_the_boundary(dtype: torch.dtype, tmp_path: Path) -> None:
    program = md.capture(nn.Identity(), (torch.ones(3, dtype=dtype),), mesh=md.Mesh(tp=1))
    with pytest.raises(BuildError, match=rf"{dtype}, which TensorRT does not have") as error:
        md.build(program, tmp_path)
    assert "torch.float32, torch.float16, torch.bfloat16, torch.int64" in error.value.fix


def test_an_input_and_a_weight_can_be_outputs(tmp_path: Path) -> None:
    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = models.MLP()

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return self.mlp(x), x, self.mlp.down.weight, x

    parallel = md.TensorParallel("tp", plan={f"mlp.{name}": style for name, style in MLP_PLAN.items()})
    program = md.capture(Kept().eval(), (torch.randn(2, 8, 32),), mesh=md.Mesh(tp=2), parallel=parallel)
    (engine,) = md.build(program, tmp_path, ranks=[0])
    assert [b.shape for b in engine.segment.outputs] == [(2, 8, 32), (2, 8, 32), (32, 64), (2, 8, 32)]
    assert [c.op for c in engine.segment.collectives].count("all_gather") == 1  # of the split weight


def test_any_name_of_an_argument_is_a_name_in_an_engine(tmp_path: Path) -> None:
    """Also that of the rank's coordinate, and those that TensorRT does not take."""

    class Named(nn.Module):
        def forward(self, x: torch.Tensor, **others: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return x + sum(others.values()), x * 2

    names = [
        "coordinate_cp",
        "coordinate_cp_",
        "in1",
        "output0",
        "a b",
        "1/2",
        "tab\t",
        "nul\0",
        "nul\0 too",
        "n" * 5000,
    ]
    kwargs = {name: torch.ones(8) for name in names}
    parallel = md.ContextParallel("cp", plan={"": {"x": md.Split(1)}})
    program = md.capture(Named(), (torch.randn(1, 4, 8),), kwargs, mesh=md.Mesh(cp=2), parallel=parallel)
    (engine,) = md.build(program, tmp_path)
    bindings = [*engine.segment.inputs, *engine.segment.outputs]
    assert len({b.name for b in bindings}) == len(bindings) == len(names) + 4
    assert [b.source.name for b in engine.segment.inputs] == ["x", *names, "cp"]
    kept = [name for name in names if name.isprintable() and len(name) < 5000]
    assert [b.name for b in bindings if b.source.name in names and b.name == b.source.name] == kept
    assert engine.segment.inputs[-1].name == "coordinate_cp__"


def test_a_network_with_other_bindings_is_refused() -> None:
    model, args, kwargs = models.mlp()
    net, segment, _ = network(md.capture(model, args, kwargs, mesh=md.Mesh(tp=1)))
    builder._check_bindings(net, segment)
    (x,), (y,) = segment.inputs, segment.outputs
    with pytest.raises(BuildError, match=r"1 inputs and the program 1; .*'x' FLOAT .* for 'z' FLOAT"):
        builder._check_bindings(net, replace(segment, inputs=(replace(x, name="z"),)))
    with pytest.raises(BuildError, match=r"'x' FLOAT \(2, 8, 32\) for 'x' HALF \(2, 8, 32\)"):
        builder._check_bindings(net, replace(segment, inputs=(replace(x, dtype=torch.float16),)))
    with pytest.raises(BuildError, match=r"\(2, 8, 32\) for 'output0' FLOAT \(2, 8\)"):
        builder._check_bindings(net, replace(segment, outputs=(replace(y, shape=(2, 8)),)))
    with pytest.raises(BuildError, match=r"1 outputs and the program 2; they first differ in none"):
        builder._check_bindings(net, replace(segment, outputs=(y, replace(y, name="output1"))))


def test_a_network_with_other_collectives_is_refused() -> None:
    model, args, kwargs = models.llama()
    program = md.lower(md.capture(model, args, kwargs, mesh=md.Mesh(tp=2), parallel=md.TensorParallel("tp")))
    net, _, _ = network(program)
    expected = schedule(program.graphs[0])
    builder._check_collectives(net, expected)
    first, *rest = expected
    assert first.op == "all_reduce"
    for change in ({"ranks": 4}, {"dtype": torch.float16}, {"elements": 8}, {"op": "all_gather"}):
        with pytest.raises(BuildError, match="collective 0 of the network"):
            builder._check_collectives(net, [replace(first, **change), *rest])
    with pytest.raises(BuildError, match="collective 0 of the network"):
        builder._check_collectives(net, expected[::-1])
    with pytest.raises(BuildError, match=f"{len(expected)} collectives and the verified program {len(rest)}"):
        builder._check_collectives(net, rest)


def test_two_axes_are_the_engines_that_an_export_has(tmp_path: Path) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.mlp = models.SelfAttention(), models.MLP()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.mlp(self.attention(x))
            return result

    model, inputs, mesh = Both().eval(), (torch.randn(2, 16, 32),), md.Mesh(cp=2, tp=2)
    parallel: list[Any] = [
        md.ContextParallel("cp", plan={"": {"x": md.Split(1)}, "mlp": md.Gather(1)}),
        md.TensorParallel("tp", plan={"mlp.up": ColwiseParallel(), "mlp.down": RowwiseParallel()}),
    ]
    engines = md.build(md.capture(model, inputs, mesh=mesh, parallel=parallel), tmp_path)
    exported = md.export(model, inputs, mesh=mesh, parallel=parallel, out=tmp_path / "bundle")
    for rank, segments in enumerate(exported.manifest.ranks):
        mine = [e.segment for e in engines if rank in e.ranks]
        assert [s.axis for s in mine] == ["cp", "tp", "cp"]
        assert [(s.runs, s.axis, s.collectives) for s in mine] == [(s.runs, s.axis, s.collectives) for s in segments]
        assert [[b.source for b in s.outputs] for s in mine] == [[b.source for b in s.outputs] for s in segments]
    assert not any(b.weight for e in engines for b in e.segment.inputs)
    assert len({e.file for e in engines}) == len(engines)


def test_every_collective_is_a_layer_that_builds() -> None:
    f = flavour()
    for op in layers.OPERATIONS:
        for dtype in ("BF16", "HALF", "FLOAT"):
            b = f.trt.Builder(f.trt.Logger(f.trt.Logger.ERROR))
            net = b.create_network(probes.network_flags(f))
            x = net.add_input("x", getattr(f.trt.DataType, dtype), (8, 16))
            reduce_op = "sum" if "reduce" in op else None
            root = 0 if op == "broadcast" else -1
            out = layers.add_collective(f, net, x, op, 4, reduce_op=reduce_op, root=root)
            rows = {"all_gather": 32, "reduce_scatter": 2}.get(op, 8)
            assert tuple(out.shape) == (rows, 16), op
            net.mark_output(out)
            assert b.build_serialized_network(net, probes.builder_config(f, b)) is not None, (op, dtype)


def test_the_stand_in_for_all_gather_is_used_where_the_probe_says_so(tmp_path: Path) -> None:
    """Beside attention ALL_GATHER is the ALL_TO_ALL of copies wherever the installed TensorRT needs that."""
    model, args, kwargs = models.flux(torch.bfloat16)
    parallel = md.ContextParallel("cp", strategy="allgather_kv")
    program = md.capture(model, args, kwargs, mesh=md.Mesh(cp=2), parallel=parallel)
    net, _, _ = network(program)
    grows = [layer.get_output(0).shape[0] > layer.get_input(0).shape[0] for layer in layers_of(net, "DIST_COLLECTIVE")]
    assert grows == [probes.gathers_beside_attention("BF16")] * 3 + [True]  # the last gathers the result


def test_decompositions_that_work_in_place_are_made_functional(tmp_path: Path) -> None:
    """PyTorch keeps rms_norm one op on a GPU, and its decomposition writes to a temporary."""

    class Fused(nn.Module):
        def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = torch.ops.aten._fused_rms_norm(x, [16], weight, 1e-6)[0]
            return result

    with torch.no_grad():
        x, weight = torch.randn(2, 16, dtype=torch.bfloat16), torch.randn(16, dtype=torch.bfloat16)
    program = md.lower(md.capture(Fused(), (x, weight), mesh=md.Mesh(tp=1)))
    decomposed = decompose(program.graphs[0])
    (out,) = torch.fx.Interpreter(decomposed).run(x, weight)
    assert (out.float() - torch.rms_norm(x.float(), [16], weight.float(), 1e-6)).abs().max() < 2e-2
    assert len(md.build(program, tmp_path)) == 1
