"""Real engines, built by the installed TensorRT on a machine with no GPU."""

from __future__ import annotations

from pathlib import Path

import models
import pytest
import torch
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

import torchtrt_md as md
from torchtrt_md.build import builder, converters, layers, probes
from torchtrt_md.build.decompose import bind_weights, decompose
from torchtrt_md.build.flavour import flavour
from torchtrt_md.errors import BuildError, TargetError
from torchtrt_md.program import Weight

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
    assert engine.axis == "cp"
    assert [b.name for b in engine.inputs] == [*(n for n in kwargs if n != "return_dict"), "coordinate_cp"]
    assert [(b.name, b.shape) for b in engine.outputs] == [("output0", (1, 32, 16))]
    expected = {"ulysses": ["all_to_all"] * 6, "allgather_kv": ["all_gather"] * 3}[strategy]
    assert [c.op for c in engine.collectives] == [*expected, "all_gather"]
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert engine.file.stat().st_size > weights


def test_tensor_parallel_is_an_engine_for_each_rank_with_its_part_of_the_weights(tmp_path: Path) -> None:
    model, args, kwargs = models.llama(torch.bfloat16)
    program = md.capture(model, args, kwargs, mesh=md.Mesh(tp=4), parallel=md.TensorParallel("tp"))
    engines = md.build(program, tmp_path, target="sm80")
    assert [e.ranks for e in engines] == [(0,), (1,), (2,), (3,)]
    assert len({e.file.read_bytes() for e in engines}) == 4
    operations = [c.op for c in engines[0].collectives]
    vocabulary = "model.embed_tokens" in vars(model).get("_tp_plan", {})  # not in every version's plan
    assert operations == ["all_reduce"] * (4 + vocabulary) + ["all_gather"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    model, args, kwargs = models.mlp(dtype)
    program = md.capture(model, args, kwargs, mesh=md.Mesh(tp=2), parallel=md.TensorParallel("tp", plan=MLP_PLAN))
    (engine,) = md.build(program, tmp_path, ranks=[1])
    assert engine.ranks == (1,)
    assert engine.inputs[0].dtype == engine.outputs[0].dtype == dtype


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
    assert engine.axis is None
    assert [b.dtype for b in engine.outputs] == [torch.float32, torch.float32, torch.int64, torch.bool]


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


def test_doubles_at_the_boundary_are_refused(tmp_path: Path) -> None:
    program = md.capture(nn.Identity(), (torch.randn(3, dtype=torch.float64),), mesh=md.Mesh(tp=1))
    with pytest.raises(BuildError, match=r"torch.float64, which TensorRT does not have"):
        md.build(program, tmp_path)


def test_two_axes_in_one_engine_are_refused(tmp_path: Path) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.mlp = models.SelfAttention(), models.MLP()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.mlp(self.attention(x))
            return result

    program = md.capture(
        Both().eval(),
        (torch.randn(2, 16, 32),),
        mesh=md.Mesh(cp=2, tp=2),
        parallel=[
            md.ContextParallel("cp", plan={"": {"x": md.Split(1)}, "mlp": md.Gather(1)}),
            md.TensorParallel("tp", plan={"mlp.up": ColwiseParallel(), "mlp.down": RowwiseParallel()}),
        ],
    )
    with pytest.raises(BuildError, match="axes cp and tp, and an engine has one communicator"):
        md.build(program, tmp_path)


def test_every_collective_is_a_layer_that_builds() -> None:
    f = flavour()
    for op in layers.OPERATIONS:
        for dtype in ("BF16", "HALF", "FLOAT"):
            b = f.trt.Builder(f.trt.Logger(f.trt.Logger.ERROR))
            net = b.create_network(probes.network_flags(f))
            x = net.add_input("x", getattr(f.trt.DataType, dtype), (8, 16))
            reduce_op = "sum" if "reduce" in op else None
            root = 0 if op in ("broadcast", "reduce", "gather", "scatter") else -1
            out = layers.add_collective(f, net, x, op, 4, reduce_op=reduce_op, root=root)
            rows = {"all_gather": 32, "gather": 32, "reduce_scatter": 2, "scatter": 2}.get(op, 8)
            assert tuple(out.shape) == (rows, 16), op
            net.mark_output(out)
            assert b.build_serialized_network(net, probes.builder_config(f, b)) is not None, (op, dtype)


def test_the_stand_in_for_all_gather_is_used_where_the_probe_says_so(tmp_path: Path) -> None:
    """Beside attention ALL_GATHER is the ALL_TO_ALL of copies wherever the installed TensorRT needs that."""
    model, args, kwargs = models.flux(torch.bfloat16)
    parallel = md.ContextParallel("cp", strategy="allgather_kv")
    program = md.lower(md.capture(model, args, kwargs, mesh=md.Mesh(cp=2), parallel=parallel))
    converters.register()
    decomposed = decompose(program.graphs[0])
    inputs, outputs = builder._bindings(program, program.graphs[0])
    weights = {
        name: program.weights.local(s, program.mesh, 0) for name, s in program.sources.items() if isinstance(s, Weight)
    }
    net = builder._convert(bind_weights(decomposed, weights), inputs, outputs).ctx.net
    grows = [
        layer.get_output(0).shape[0] > layer.get_input(0).shape[0]
        for layer in (net.get_layer(i) for i in range(net.num_layers))
        if layer.type.name == "DIST_COLLECTIVE"
    ]
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
