"""Quantizers of NVIDIA's Model Optimizer in a captured program, and what tensor parallelism makes of them."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import model_optimizer as mo
import modelopt.torch.quantization as mtq
import models
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

import torchtrt_md as md
from torchtrt_md.capture.torch_private import fake_ranks
from torchtrt_md.errors import CaptureError, PlanError, VerificationError
from torchtrt_md.lowering.ops import fake_quantize
from torchtrt_md.program import ShardedProgram, Sharding, UnevenSharding, Weight

ir = torch.ops.torchtrt_md
COLWISE_ROWWISE = {"up": "colwise", "down": "rowwise"}


def captured(call: Any, ranks: int = 2, plan: Any = COLWISE_ROWWISE) -> ShardedProgram:
    return md.capture(*call, mesh=md.Mesh(tp=ranks), parallel=md.TensorParallel("tp", plan))


def weights_of(program: ShardedProgram) -> dict[str, Weight]:
    return {source.name: source for source in program.sources.values() if isinstance(source, Weight)}


def quantizers(program: ShardedProgram) -> list[tuple[Any, ...]]:
    """The last arguments of each: bits, bits of the exponent, narrow."""
    nodes = program.graphs[0].graph.find_nodes(op="call_function", target=ir.fake_quantize.default)
    return [node.args[2:] for node in nodes]


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize(("how", "count"), [("float8", 4), ("int8", 4), ("int8 weights", 2), ("by token", 4)])
def test_a_program_has_one_op_for_each_and_the_model_stays(how: str, count: int, exported: bool) -> None:
    from modelopt.torch.quantization import tensor_quant
    from modelopt.torch.quantization.utils import export_torch_mode

    call = mo.quantized(models.mlp(), how)
    before, functions = call[0].state_dict(), Counter(map(id, vars(tensor_quant).values()))
    want = call[0](*call[1])
    with export_torch_mode() if exported else torch.no_grad():
        program = captured(call)
    assert quantizers(program) == [(8, 4, False) if how in ("float8", "by token") else (8, 0, False)] * count
    targets = [n.target for n in program.graphs[0].graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    assert {op.namespace for op in targets} == {"aten", "torchtrt_md"}
    assert md.verify(md.lower(program), *call).structure_error < 1e-8
    assert Counter(map(id, vars(tensor_quant).values())) == functions
    assert all(
        value is call[0].state_dict()[name] or torch.equal(value, before[name]) for name, value in before.items()
    )
    assert torch.equal(call[0](*call[1]), want)


@pytest.mark.parametrize("bits", [8, 4, (4, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("axis", [None, 0])
def test_the_op_gives_the_bits_that_model_optimizer_gives(axis: int | None, dtype: torch.dtype, bits: Any) -> None:
    """One that rounds its scale otherwise puts a number in a thousand on another step."""
    from modelopt.torch.quantization.tensor_quant import fake_tensor_quant, scaled_e4m3

    torch.manual_seed(0)
    x = torch.randn(64, 4096).to(dtype)
    x[5] = 0
    amax = x.abs().amax() if axis is None else x.abs().amax(1, keepdim=True)
    for narrow in (False, True):
        if isinstance(bits, tuple):
            want = scaled_e4m3(x, amax, None, *bits)
            found = fake_quantize(x, amax, 8, 4, False)
        else:
            want = fake_tensor_quant(x, amax, None, bits, False, narrow)
            found = fake_quantize(x, amax, bits, 0, narrow)
        assert torch.equal(found, want)


@pytest.mark.parametrize("ranks", [2, 5])
@pytest.mark.parametrize("how", mo.CONFIGS)
def test_a_weight_is_cut_with_its_scales(how: str, ranks: int) -> None:
    """5 ranks do not divide the features between, 64."""
    call = mo.quantized(models.mlp(torch.bfloat16), how)
    if ranks == 5 and how in ("by token", "of all tokens"):
        with pytest.raises(PlanError, match="its features do not divide by the 5 ranks"):
            captured(call, ranks)
        return
    program = captured(call, ranks)
    found = weights_of(program)
    cut: Any = Sharding if ranks == 2 else UnevenSharding
    rows = how != "float8"
    names = {name: weight.shardings for name, weight in found.items() if "quantizer" in name}
    expected = {
        "up.weight_quantizer._amax": (cut(0, "tp"),) if rows else (),
        "down.weight_quantizer._amax": (),
        "up.input_quantizer._amax": (),
        "down.input_quantizer._amax": (),
        "up.input_quantizer._pre_quant_scale": (),
        "down.input_quantizer._pre_quant_scale": (cut(0, "tp"),),
    }
    assert names == {name: expected[name] for name in names}
    assert ("down.input_quantizer._pre_quant_scale" in names) == (how == "smoothquant")
    report = md.verify(md.lower(program), *call)
    assert report.structure_error < 1e-8
    assert report.precision == torch.float64


def test_a_scale_of_each_feature_of_an_argument_is_cut_with_them() -> None:
    by_feature = mo.config(mo.ROWS, input={"num_bits": 8, "axis": -1})
    call = mo.quantized(models.mlp(), by_feature)
    found = weights_of(program := captured(call))
    assert found["down.input_quantizer._amax"].shardings == (Sharding(2, "tp"),)
    assert found["up.input_quantizer._amax"].shardings == ()
    assert md.verify(md.lower(program), *call).structure_error < 1e-8


def test_a_result_that_is_in_parts_is_quantized_by_its_scale() -> None:
    call = mo.quantized(models.mlp(), mo.config(output=mo.WHOLE))
    call[0].down.output_quantizer.disable()
    assert md.verify(md.lower(captured(call)), *call).structure_error < 1e-8


def test_a_scale_that_is_not_cut_is_found() -> None:
    """What a scale of another rank's rows would make of the result, verify sees."""
    call = mo.quantized(models.mlp(), "int8")
    call[0].up.weight_quantizer._amax[:32] *= 3
    program = md.lower(captured(call))
    md.verify(program, *call)
    for node, source in [(n, program.sources[n.name]) for n in program.graphs[0].graph.find_nodes(op="placeholder")]:
        if isinstance(source, Weight) and source.name == "up.weight_quantizer._amax":
            for user in list(node.users):
                with program.graphs[0].graph.inserting_before(user):
                    user.replace_input_with(
                        node, program.graphs[0].graph.call_function(torch.ops.aten.flip.default, (node, [0]))
                    )
    with pytest.raises(VerificationError, match="the program does not compute what MLP computes"):
        md.verify(program, *call)


def test_a_llama_and_a_flux_are_as_dense() -> None:
    llama = mo.quantized(models.llama(), "int8")  # in float32, where the scale of a number that is a step off shows
    program = md.capture(*llama, mesh=md.Mesh(tp=2), parallel=md.TensorParallel("tp"))
    assert len(quantizers(program)) == 28
    assert md.verify(md.lower(program), *llama).structure_error < 1e-8
    flux = mo.quantized(models.flux(torch.bfloat16), "float8")
    program = md.capture(*flux, mesh=md.Mesh(cp=2), parallel=md.ContextParallel("cp", "ulysses"))
    assert len(quantizers(program)) == 69
    assert md.verify(md.lower(program), *flux).structure_error < 1e-8


def test_keys_and_values_are_quantized_by_scales_that_are_given() -> None:
    """Inside attention, of which a rank has some of the heads."""
    everywhere = mo.config(mo.FLOAT8, **dict.fromkeys(("input", "q_bmm", "k_bmm", "v_bmm"), mo.FLOAT8))
    llama = mo.quantized(models.llama(torch.bfloat16), everywhere)
    of_attention = [m for n, m in llama[0].named_modules() if n.endswith("k_bmm_quantizer") and m.is_enabled]
    assert len(of_attention) == 2
    program = md.capture(*llama, mesh=md.Mesh(tp=2), parallel=md.TensorParallel("tp"))
    assert md.verify(md.lower(program), *llama).structure_error < 1e-8
    of_attention[1].reset_amax()
    with pytest.raises(PlanError, match=r"k_bmm_quantizer' finds its scale in each call"):
        md.capture(*llama, mesh=md.Mesh(tp=2), parallel=md.TensorParallel("tp"))


@pytest.mark.parametrize("ranks", [2, 3])  # of which 3 divide neither 50 words nor 16 features
@pytest.mark.parametrize("style", ["colwise_gather_output", "rowwise"])
@pytest.mark.parametrize("weight", [mo.ROWS, mo.FLOAT8, {"num_bits": 8, "axis": 1}])
def test_an_embedding_is_cut_with_its_scales(weight: dict[str, Any], style: str, ranks: int) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.up, self.down = nn.Embedding(50, 16), nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.down(self.up(self.words(ids)).relu())
            return result

    torch.manual_seed(0)
    call = mo.quantized((Words().eval(), (torch.arange(50)[None],), {}), mo.config(weight))
    assert call[0].words.weight_quantizer.is_enabled
    program = captured(call, ranks, {"words": style, **COLWISE_ROWWISE})
    assert md.verify(md.lower(program), *call).structure_error < 1e-8


@pytest.mark.parametrize("strategy", ["ulysses", "allgather_kv", "ring"])
@pytest.mark.parametrize("how", mo.CONFIGS)
def test_attention_along_a_split_sequence(how: str, strategy: Any) -> None:
    model, (x,), kwargs = mo.quantized(models.attention(torch.bfloat16), how)
    x = x[:, :15].clone()  # of which a rank has a copy
    plan = {"": {"x": md.Split(1)}, "out": md.Gather(1)}
    program = md.capture(model, (x,), kwargs, mesh=md.Mesh(cp=2), parallel=md.ContextParallel("cp", strategy, plan))
    lowered = md.lower(program, placement="split")
    report = md.verify(lowered, model, (x,), kwargs)
    assert report.structure_error < 1e-8
    assert report.dense_error > 1e-4


# --- refusals ---


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG, r"'up\.weight_quantizer' has scales of blocks"),
        (mo.config(output=mo.WHOLE), r"'down\.output_quantizer' quantizes a term of the sum over the ranks"),
        (mo.config(output={**mo.WHOLE, "type": "dynamic"}), r"'up\.output_quantizer' finds its scale in each call"),
    ],
)
def test_what_would_be_another_number_on_a_part_is_refused(how: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message) as error:
        captured(mo.quantized(models.mlp(), how))
    assert "mtq.disable_quantizer(model" in error.value.fix


def test_a_weight_whose_scale_was_not_found_is_refused() -> None:
    call = mo.quantized(models.mlp(), "float8")
    del call[0].up.weight_quantizer._amax
    with pytest.raises(PlanError, match=r"'up\.weight_quantizer' finds the scale of the weight in each call"):
        captured(call)


def test_results_of_layers_that_the_plan_does_not_name_are_refused() -> None:
    call = mo.quantized(models.mlp(), mo.config(output=mo.WHOLE))
    call[0].down.output_quantizer.disable()
    with pytest.raises(PlanError, match=r"'up\.output_quantizer' quantizes a result that may be a term"):
        captured(call, plan={"down": "rowwise_split_input"})


def test_pytorchs_own_styles_are_refused() -> None:
    call = mo.quantized(models.mlp(), "int8")
    with pytest.raises(PlanError, match="module 'up' has quantizers of Model Optimizer") as error:
        captured(call, plan={"up": ColwiseParallel(), "down": RowwiseParallel()})
    assert "'colwise', 'rowwise'" in error.value.fix
    with fake_ranks(2):
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        call[0].up._parameters["weight"] = nn.Parameter(DTensor.from_local(call[0].up.weight, mesh, [Replicate()]))
        with pytest.raises(PlanError, match="the model has quantizers of Model Optimizer"):
            md.capture(*call, mesh=md.Mesh(tp=2))


@pytest.mark.parametrize("how", [mtq.MXFP8_DEFAULT_CFG, mtq.NVFP4_DEFAULT_CFG])
def test_scales_of_blocks_that_are_found_in_each_call_are_refused(how: Any) -> None:
    """On a CPU, Model Optimizer's own op for them returns memory as it was."""
    call: Any = (*models.attention()[:2], {})
    model = mtq.replace_quant_module(call[0]) or call[0]
    mtq.set_quantizer_by_cfg(model, how["quant_cfg"])
    plan = {"": {"x": md.Split(1)}, "out": md.Gather(1)}
    with pytest.raises(CaptureError, match=r"dynamic_block_quantize_op.*scales are of blocks"):
        md.capture(model, call[1], mesh=md.Mesh(cp=2), parallel=md.ContextParallel("cp", "ulysses", plan))


def test_folded_weights_are_weights() -> None:
    call = mo.quantized(models.mlp(torch.bfloat16), "int8")
    mtq.fold_weight(call[0])
    program = captured(call)
    assert len(quantizers(program)) == 2
    assert md.verify(md.lower(program), *call).structure_error < 1e-8


@pytest.mark.parametrize("how", ["float8", "int8", "int8 weights", "by token"])
def test_compressed_weights_are_held_in_8_bits_and_cut_with_their_scales(how: str) -> None:
    call = mo.compressed(models.mlp(torch.bfloat16), how)
    before, want = dict(call[0].named_parameters()), call[0](*call[1])
    program = captured(call)
    held = torch.int8 if "int8" in how else torch.float8_e4m3fn
    weights = weights_of(program)
    assert {weights[name].dtype for name in ("up.weight", "down.weight")} == {held}
    assert weights["up.weight"].shardings == (Sharding(0, "tp"),)
    rows = call[0].up.weight_quantizer._scale.numel() > 1
    assert bool(weights["up.weight_quantizer._scale"].shardings) == rows
    assert not weights["down.weight_quantizer._scale"].shardings
    assert len(quantizers(program)) == (0 if how == "int8 weights" else 2), "of the arguments"
    assert md.verify(md.lower(program), *call).structure_error < 1e-8
    assert all(now is before[name] for name, now in call[0].named_parameters()), "the model is as it was"
    assert torch.equal(call[0](*call[1]), want)


@pytest.mark.parametrize("how", [mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG, mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG])
def test_compressed_weights_with_scales_of_blocks_are_not_cut(how: Any) -> None:
    call = mo.compressed(models.attention(), how)
    plan = {"": {"x": md.Split(1)}, "out": md.Gather(1)}
    program = md.capture(*call, mesh=md.Mesh(cp=2), parallel=md.ContextParallel("cp", "ulysses", plan))
    assert md.verify(md.lower(program), *call).structure_error < 1e-8
    with pytest.raises(PlanError, match=r"the quantizer 'up\.weight_quantizer' has scales of blocks"):
        captured(mo.compressed(models.mlp(), how))


def test_a_part_of_a_compressed_weight_that_is_wrong_is_found() -> None:
    """The scales of another rank's rows."""
    call = mo.compressed(models.mlp(torch.bfloat16), "int8")
    program = md.lower(captured(call))
    name = "up.weight_quantizer._scale"
    whole = {**program.weights.whole, name: program.weights.whole[name].roll(16, 0)}
    wrong = replace(program, weights=replace(program.weights, whole=whole))
    with pytest.raises(VerificationError):
        md.verify(wrong, *call)


def test_a_weight_that_was_not_compressed_when_it_was_loaded_is_refused() -> None:
    """As diffusers leaves a model with Model Optimizer 0.47, which cannot be called."""
    model, args, _ = mo.quantized(models.mlp(torch.bfloat16), "int8")
    model.up.weight_quantizer._fake_quant = False
    with pytest.raises(CaptureError, match=r"'up\.weight_quantizer' is to hold a weight in few bits") as error:
        captured((model, args, {}))
    assert "mtq.compress(model)" in error.value.fix


def test_unsigned_integers_are_refused() -> None:
    call = mo.quantized(models.mlp(), "int8")
    call[0].down.input_quantizer.unsigned = True
    with pytest.raises(CaptureError, match="a quantizer of Model Optimizer is unsigned"):
        captured(call)


def test_it_is_loaded_where_the_model_has_loaded_it_only() -> None:
    from fresh_python import fresh_python

    assert "modelopt" in sys.modules
    fresh_python("import sys, torchtrt_md.capture.quantizers; assert 'modelopt' not in sys.modules")
    assert isinstance(models.mlp()[0], nn.Module)
