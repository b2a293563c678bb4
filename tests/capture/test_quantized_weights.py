"""Quantized weights in a captured program: plain tensors by reference, and what tensor parallelism makes of them."""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import models
import pytest
import quantized
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

import torchtrt_md as md
from torchtrt_md.capture.torch_private import fake_ranks
from torchtrt_md.capture.trace import recorded
from torchtrt_md.errors import CaptureError, InputError, PlanError, WeightsError
from torchtrt_md.program import ShardedProgram, Sharding, UnevenSharding, Weight
from torchtrt_md.runtime.weights import WeightGuard
from torchtrt_md.wrappers import held_by, holders, is_wrapper, named_weights, plain, wrapped

aten, ir = torch.ops.aten, torch.ops.torchtrt_md
PLAN = {"": {"x": md.Split(1)}, "out": md.Gather(1)}
COLWISE_ROWWISE = {"up": "colwise", "down": "rowwise"}
PRODUCTS = {
    "float8 by row": aten._scaled_mm.default,
    "float8 by tensor": aten._scaled_mm.default,
    "float8 weights": aten.mm.default,
    "int8 by row": aten._int_mm.default,
    "int8 weights": aten.mm.default,
}


def targets(program: ShardedProgram) -> Counter[Any]:
    return Counter(node.target for node in program.graphs[0].graph.nodes if node.op == "call_function")


def weights_of(program: ShardedProgram) -> dict[str, Weight]:
    return {source.name: source for source in program.sources.values() if isinstance(source, Weight)}


@pytest.mark.parametrize("config", quantized.CONFIGS)
def test_a_program_has_the_plain_tensors_and_the_model_stays(config: str) -> None:
    model, args, kwargs = quantized.attention(config)
    before = {name: (id(p), type(p)) for name, p in model.named_parameters()}
    with torch.no_grad():
        want = model(*args)
    program = md.capture(model, args, kwargs, mesh=md.Mesh(cp=2), parallel=md.ContextParallel("cp", "ulysses", PLAN))
    found = weights_of(program)
    narrow = torch.float8_e4m3fn if "float8" in config else torch.int8
    assert (found["q.weight.qdata"].dtype, found["q.weight.scale"].dtype) == (narrow, torch.float32)
    assert not {"q.weight", "kv.weight", "out.weight"} & found.keys()
    for name, weight in found.items():
        held = operator.attrgetter(name)(model)
        assert program.weights.local(weight, program.mesh, 1).data_ptr() == held.data_ptr(), name
    assert targets(program)[PRODUCTS[config]] == 3
    ops = [target for target in targets(program) if target is not operator.getitem]
    assert {op.namespace for op in ops} == {"aten", "torchtrt_md"}
    assert {name: (id(p), type(p)) for name, p in model.named_parameters()} == before
    with torch.no_grad():
        assert torch.equal(model(*args), want)


def test_a_weight_that_two_modules_share_is_one() -> None:
    model, args, _ = quantized.attention("int8 weights")
    model.out.weight = model.q.weight
    program = md.capture(model, args, mesh=md.Mesh(cp=2), parallel=md.ContextParallel("cp", "ulysses", PLAN))
    assert {"q.weight.qdata", "q.weight.scale"} <= weights_of(program).keys()
    assert not any(name.startswith("out.weight") for name in weights_of(program))
    assert {"q.weight.qdata", "out.weight.qdata"} <= program.weights.whole.keys()


def test_a_model_on_meta_takes_the_tensors_of_a_state_dict() -> None:
    model, args, _ = quantized.attention("float8 by row")
    empty, _, _ = quantized.attention("float8 by row")
    state = model.state_dict()
    for module in (empty.q, empty.kv, empty.out):
        for name, parameter in list(module.named_parameters()):
            module.register_parameter(name, nn.Parameter(parameter.detach().to("meta"), requires_grad=False))
    how: dict[str, Any] = {"mesh": md.Mesh(cp=2), "parallel": md.ContextParallel("cp", "ulysses", PLAN)}
    program = md.capture(empty, args, **how, weights=state)
    weight = weights_of(program)["kv.weight.scale"]
    assert torch.equal(program.weights.local(weight, program.mesh, 0), model.kv.weight.scale)
    assert md.verify(md.lower(program), empty, args).structure_error < 1e-8
    with pytest.raises(WeightsError, match=r"the weight 'q\.weight\.qdata' is bfloat16 .* and the model's is float8"):
        md.capture(empty, args, **how, weights={**state, "q.weight.qdata": torch.zeros(32, 32).bfloat16()})
    without = {name: t for name, t in state.items() if name != "q.weight"}
    with pytest.raises(WeightsError, match=r"2 weights .* are not in .*: 'q\.weight\.qdata', 'q\.weight\.scale'"):
        md.capture(empty, args, **how, weights=without)


def test_wrappers_of_wrappers_are_made_again() -> None:
    class Pair(Tensor):
        """Two tensors, of which the first may be such a pair."""

        first: Tensor
        second: Tensor

        @staticmethod
        def __new__(cls, first: Tensor, second: Tensor) -> Pair:
            made: Pair = Tensor._make_wrapper_subclass(cls, first.shape, dtype=first.dtype)
            made.first, made.second = first, second
            return made

        def __tensor_flatten__(self) -> tuple[list[str], None]:
            return ["first", "second"], None

        @classmethod
        def __tensor_unflatten__(cls, inner: dict[str, Tensor], _: None, size: object, stride: object) -> Pair:
            return cls(inner["first"], inner["second"])

        __torch_dispatch__ = None  # type: ignore[assignment]

    a, b, c = torch.zeros(3), torch.ones(3), torch.full((3,), 2.0)
    pair = Pair(Pair(a, b), c)
    held = held_by("w", pair)
    assert held == {"w.first.first": a, "w.first.second": b, "w.second": c}
    again = wrapped("w", pair, {**held, "w.second": a})
    assert isinstance(again, Pair)
    assert isinstance(again.first, Pair)
    assert again.first.second is b
    assert again.second is a
    assert wrapped("x", c, {"x": a}) is a


def test_a_product_of_int8_on_a_gpu_is_an_op_of_aten() -> None:
    """There torchao calls an op that takes an op, which no pass would know of."""
    model, (x,), _ = quantized.attention("int8 by row")
    layer, mode = model.kv, FakeTensorMode(allow_non_fake_inputs=True)
    named = plain(layer.named_parameters())
    with mode:
        fakes = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda") for t in (*named.values(), x)]

    def call(*flat: Tensor) -> tuple[Tensor]:
        held = dict(zip(named, flat, strict=False))
        weights = {name: wrapped(name, t, held) for name, t in layer.named_parameters()}
        with torch.no_grad():
            return (torch.func.functional_call(layer, weights, (flat[-1],)),)

    graph = recorded(call, fakes, "layer").graph
    assert len(graph.find_nodes(op="call_function", target=aten._int_mm.default)) == 1
    assert {getattr(n.target, "namespace", "") for n in graph.nodes if n.op == "call_function"} == {"aten"}


# --- refusals ---


def test_a_dtensor_of_quantized_tensors_is_refused() -> None:
    model, args, _ = quantized.mlp("float8 weights")
    with fake_ranks(2):
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        placed = DTensor.from_local(model.up.weight.detach(), mesh, [Replicate()], run_check=False)
        assert not is_wrapper(placed)
        model.up.weight = nn.Parameter(placed, requires_grad=False)
        with pytest.raises(CaptureError, match=r"the weight 'up\.weight' is a DTensor of Float8Tensor") as error:
            md.capture(model, args, mesh=md.Mesh(tp=2))
    assert "named styles" in error.value.fix


def test_a_quantized_argument_is_refused() -> None:
    class Called(nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            return nn.functional.linear(x, w)

    model, args, _ = quantized.mlp("int8 weights")
    with pytest.raises(CaptureError, match="argument 'w' is a Int8Tensor, and an engine takes plain tensors"):
        md.capture(Called(), (*args, model.up.weight), mesh=md.Mesh(tp=1))


# --- tensor parallel ---


@pytest.mark.parametrize("config", quantized.CONFIGS)
def test_a_weight_is_cut_with_its_scales(config: str) -> None:
    model, args, _ = quantized.mlp(config)
    program = md.capture(model, args, mesh=md.Mesh(tp=2), parallel=md.TensorParallel("tp", COLWISE_ROWWISE))
    assert len(program.distinct()) == 1
    found = weights_of(program)
    rows = (Sharding(0, "tp"),)
    assert found["up.weight.qdata"].shardings == rows
    assert found["up.weight.scale"].shardings == (() if config == "float8 by tensor" else rows)
    assert found["down.weight.qdata"].shardings == (Sharding(1, "tp"),)
    assert found["down.weight.scale"].shardings == ()
    report = md.verify(md.lower(program), model, args)
    assert report.structure_error < 1e-8
    assert report.precision == torch.float64
    # A rank has some of the features that a layer scales its argument by; the largest of all is asked for.
    assert len(program.graphs[0].graph.find_nodes(op="call_function", target=ir.all_reduce.default)) == 1  # the sum
    gathers = len(program.graphs[0].graph.find_nodes(op="call_function", target=ir.all_gather.default))
    assert gathers == {"float8": 1, "int8": 2}[config.split()[0]] * (config in quantized.DYNAMIC)


@pytest.mark.parametrize("config", ["float8 by row", "int8 weights"])
def test_widths_that_do_not_divide_and_results_that_are_gathered(config: str) -> None:
    torch.manual_seed(0)
    model = models.MLP(32, 48).to(torch.bfloat16).eval()
    quantized.quantized((model, (), {}), config)
    args = (torch.randn(2, 8, 32, dtype=torch.bfloat16),)
    plan = {"up": "colwise_gather_output", "down": "rowwise_split_input"}
    program = md.capture(model, args, mesh=md.Mesh(tp=5), parallel=md.TensorParallel("tp", plan))
    assert weights_of(program)["up.weight.scale"].shardings == (UnevenSharding(0, "tp"),)
    assert md.verify(md.lower(program), model, args).structure_error < 1e-8


def test_scales_of_blocks_are_cut_with_them_or_refused() -> None:
    from torchao.quantization import Int8WeightOnlyConfig, PerGroup, quantize_

    model, args, _ = models.mlp(torch.bfloat16)  # 64 features between, scaled by 16 of them
    quantize_(model, Int8WeightOnlyConfig(granularity=PerGroup(16), set_inductor_config=False))
    program = md.capture(model, args, mesh=md.Mesh(tp=2), parallel=md.TensorParallel("tp", COLWISE_ROWWISE))
    assert weights_of(program)["down.weight.scale"].shardings == (Sharding(1, "tp"),)
    assert md.verify(md.lower(program), model, args).structure_error < 1e-8
    with pytest.raises(PlanError, match=r"a Int8Tensor .* parts of 8, and 'down\.weight\.scale'") as error:
        md.capture(model, args, mesh=md.Mesh(tp=8), parallel=md.TensorParallel("tp", COLWISE_ROWWISE))
    assert "a scale for each row or for all of it" in error.value.fix


def test_named_weights_have_all_names() -> None:
    model, _, _ = quantized.mlp("float8 weights")
    names = ["up.weight.qdata", "up.weight.scale", "up.bias", "down.weight.qdata", "down.weight.scale", "down.bias"]
    assert list(named_weights(model)) == names


def test_features_that_are_filled_up_are_not_compared() -> None:
    """exp(0) is 1, and may be the largest number where all others are small."""
    torch.manual_seed(0)
    model = models.MLP(32, 48).to(torch.bfloat16).eval()
    quantized.quantized((model, (), {}), "int8 by row")
    args = (torch.randn(2, 8, 32, dtype=torch.bfloat16),)
    with pytest.raises(PlanError, match="its features do not divide by the 5 ranks") as error:
        md.capture(model, args, mesh=md.Mesh(tp=5), parallel=md.TensorParallel("tp", COLWISE_ROWWISE))
    assert "quantize the weight alone" in error.value.fix


class ScalesItself(torch.Tensor):
    """A quantized weight of the user's own, whose class runs below PyTorch's functions."""

    data_: torch.Tensor
    how: str

    @staticmethod
    def __new__(cls, data: torch.Tensor, how: str) -> ScalesItself:
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype, device=data.device)

    def __init__(self, data: torch.Tensor, how: str) -> None:
        self.data_, self.how = data, how

    def __tensor_flatten__(self) -> tuple[list[str], str]:
        return ["data_"], self.how

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], how: str, *_: Any) -> ScalesItself:
        return ScalesItself(inner["data_"], how)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        aten = torch.ops.aten
        own = next(a for a in args if isinstance(a, ScalesItself))
        views = (aten.detach.default, aten.alias.default, aten.narrow.default, aten.t.default, aten.slice.Tensor)
        if func in (*views, aten._to_copy.default, aten.clone.default):
            return ScalesItself(func(own.data_, *args[1:], **(kwargs or {})), own.how)
        plain = [a.data_ if isinstance(a, ScalesItself) else a for a in args]
        assert func in (aten.mm.default, aten.addmm.default), str(func)
        x = plain[0] if func is aten.mm.default else plain[1]
        largest = {
            "by row": lambda: x.abs().amax(-1, keepdim=True),
            "with places": lambda: x.abs().max(-1, keepdim=True).values,
        }[own.how]()
        scaled = (x / largest).mul(127).round().div(127) * largest
        plain[0 if func is aten.mm.default else 1] = scaled
        return func(*plain, **(kwargs or {}))


@pytest.mark.parametrize("how", ["by row", "with places"])
def test_a_class_of_the_users_scales_by_the_largest_of_all_ranks_or_is_refused(how: str) -> None:
    model: Any
    model, args, _ = models.mlp(torch.float32)
    model.down.weight = torch.nn.Parameter(ScalesItself(model.down.weight.detach(), how), requires_grad=False)
    parallel = md.TensorParallel("tp", COLWISE_ROWWISE)
    if how == "by row":
        program = md.capture(model, args, mesh=md.Mesh(tp=2), parallel=parallel)
        assert md.verify(md.lower(program), model, args).structure_error < 1e-8
        return
    with pytest.raises(PlanError, match="not known to be that of its rows or of all of it"):
        md.capture(model, args, mesh=md.Mesh(tp=2), parallel=parallel)


@pytest.mark.parametrize("config", ["float8 by row", "int8 weights"])
def test_what_a_weight_holds_is_the_tensor_that_was_compiled(config: str) -> None:
    """``model.to()`` gives a tensor subclass other tensors, and writes to those count, too."""
    model, _, _ = quantized.mlp(config)
    guard = WeightGuard(named_weights(model), holders(model))
    guard.check()
    before = model.down.weight.scale
    model.cpu()  # where it is already
    assert model.down.weight.scale is not before
    guard.check()
    model.down.weight.scale.mul_(2)
    with pytest.raises(InputError, match=r"'down\.weight\.scale' was changed"):
        guard.check()
    guard = WeightGuard(named_weights(model), holders(model))
    model.down.weight.scale = 2 * model.down.weight.scale
    with pytest.raises(InputError, match=r"'down\.weight\.scale' was changed"):
        guard.check()


def test_tensors_that_count_no_writes_take_the_place_of_those_that_do() -> None:
    model, _, _ = quantized.mlp("int8 weights")
    guard = WeightGuard(named_weights(model), holders(model))
    with torch.inference_mode():
        model.down.weight.scale = model.down.weight.scale.clone()
    guard.check()
    model.up.weight.scale.mul_(2)
    with pytest.raises(InputError, match=r"'up\.weight\.scale' was changed"):
        guard.check()
