"""Ring attention inside an engine: its network, built and inspected on a machine with no GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import models
import pytest
import torch
from networks import layers_of, network
from torch import Tensor, nn

import torchtrt_md as md
from torchtrt_md.build import converters, layers, probes
from torchtrt_md.build.flavour import flavour
from torchtrt_md.errors import BuildError, TargetError
from torchtrt_md.lowering.schedule import schedule
from torchtrt_md.program import ShardedProgram
from torchtrt_md.selftest import RING

RTX = pytest.mark.skipif(flavour().name != "TensorRT-RTX", reason="TensorRT builds for the GPU that is there only")
PLAN = {"": {"x": md.Split(1)}, "blocks.1.out": md.Gather(1)}


class Two(nn.Module):
    """Two attentions, the second of which has grouped queries."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(models.SelfAttention(), models.SelfAttention(kv_heads=2))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.blocks(x)
        return result


def two(ranks: int, dtype: torch.dtype = torch.bfloat16) -> ShardedProgram:
    program = md.capture(
        Two().to(dtype).eval(),
        (torch.randn(2, 16, 32, dtype=dtype),),
        mesh=md.Mesh(cp=ranks),
        parallel=md.ContextParallel("cp", strategy="ring", plan=PLAN),
    )
    return md.lower(program)


@RTX
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ranks", [2, 4])
def test_each_attention_is_one_layer_over_the_ranks(ranks: int, dtype: torch.dtype) -> None:
    program, f = two(ranks, dtype), flavour()
    with converters.converting_for("sm120"):
        net, _, _ = network(program)
    attentions = [layers.attention_of(f, layer) for layer in layers_of(net, "ATTENTION_OUTPUT")]
    assert [a.num_ranks for a in attentions] == [ranks, ranks]
    assert not any(a.decomposable or a.causal for a in attentions)
    own = 16 // ranks  # queries, keys and values are of this rank's tokens alone: nothing is gathered for them
    shapes = [[tuple(a.get_input(i).shape) for i in range(a.num_inputs)] for a in attentions]
    assert shapes == [[(2, 4, own, 8)] * 3, [(2, 4, own, 8), (2, 2, own, 8), (2, 2, own, 8)]]
    assert [layer.metadata for layer in layers_of(net, "DIST_COLLECTIVE")] == ["all_gather"]  # of the result


@RTX
def test_the_network_communicates_what_the_schedule_says() -> None:
    program = two(4)
    with converters.converting_for("sm120"):
        net, _, _ = network(program)
    found = layers.communications(flavour(), net)
    expected = [(c.op, c.ranks, "BF16", c.elements) for c in schedule(program.graphs[0])]
    assert [c[:4] for c in found] == expected
    assert [c.op for c in found] == [RING, RING, "all_gather"]
    assert [c.elements_out // c.elements_in for c in found] == [1, 1, 4]


@RTX
@pytest.mark.parametrize("target", ["sm120", "sm121"])
def test_it_builds_without_a_gpu(target: str) -> None:
    f = flavour()
    with converters.converting_for(target):  # heads of 8, as in the model above, have no kernel of their own
        net, _, interpreter = network(ring((1, 4, 8, 64), (1, 2, 8, 64), (1, 2, 8, 64)))
    config = probes.builder_config(f, interpreter.builder)
    f.set_target(config, target)
    assert interpreter.builder.build_serialized_network(net, config) is not None


@pytest.mark.parametrize("target", ["portable", "sm80"])
def test_other_targets_are_refused_at_the_users_line(target: str) -> None:
    with pytest.raises(BuildError, match="ring attention inside an engine cannot be built") as error:
        convert(two(2), target)
    assert 'placement="split"' in error.value.fix
    assert "scaled_dot_product_attention(" in error.value.at
    assert "context_attention" in error.value.problem


def test_a_target_must_be_given() -> None:
    with pytest.raises(BuildError, match="'portable' does not say"):
        network(two(2))


class Ring(nn.Module):
    """An attention as lowering leaves it."""

    def __init__(self, is_causal: bool = False) -> None:
        super().__init__()
        self.is_causal = is_causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result: Tensor = torch.ops.torchtrt_md.context_attention(q, k, v, self.is_causal, None, True, "ring", "cp", 2)
        return result


def ring(*shapes: tuple[int, ...], is_causal: bool = False, dtype: torch.dtype = torch.float16) -> ShardedProgram:
    args = tuple(torch.randn(shape).to(dtype) for shape in shapes)
    captured = md.capture(Ring(is_causal), args, mesh=md.Mesh(cp=2))
    return replace(captured, lowered=True)  # lowering refuses some of these, too


HEADS = (1, 4, 8, 16)


@RTX
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": torch.float32}, "for float16 and bfloat16, not FLOAT"),
        ({"is_causal": True}, "cannot be causal"),
        ({"v": (1, 4, 8, 32)}, r"not q \(1, 4, 8, 16\), k \(1, 4, 8, 16\) and v \(1, 4, 8, 32\)"),
        ({"k": (3, 4, 8, 16), "v": (3, 4, 8, 16)}, r"k \(3, 4, 8, 16\)"),
    ],
)
def test_what_a_ring_in_an_engine_has_not(arguments: dict[str, Any], message: str) -> None:
    shapes = [arguments.pop(name, HEADS) for name in ("q", "k", "v")]
    with pytest.raises(BuildError, match=message) as error:
        convert(ring(*shapes, **arguments), "sm120")
    assert 'placement="split"' in error.value.fix
    assert "context_attention(" in error.value.at


@RTX
def test_a_gather_for_a_ring_is_a_gather_beside_attention() -> None:
    """What leads to a ring is fused like what leads to any attention."""

    class Gathered(nn.Module):
        def forward(self, q: Tensor, kv: Tensor) -> Tensor:
            part = torch.ops.torchtrt_md.all_gather(kv, 0, "cp", 2)[1:]
            result: Tensor = torch.ops.torchtrt_md.context_attention(q, part, part, False, 1.0, False, "ring", "cp", 2)
            return result

    heads = torch.randn(HEADS, dtype=torch.float16)
    net = convert(md.lower(md.capture(Gathered(), (heads, heads.clone()), mesh=md.Mesh(cp=2))), "sm120")
    expected = "all_gather" if probes.gathers_beside_attention("HALF") else "all_to_all"
    assert [c.op for c in layers.communications(flavour(), net)] == [expected, RING]


def test_an_attention_on_one_rank_does_not_communicate() -> None:
    model, args, _ = models.attention(torch.float16)
    net, _, _ = network(md.capture(model, args, mesh=md.Mesh(cp=1)))
    (output,) = layers_of(net, "ATTENTION_OUTPUT")
    attention = layers.attention_of(flavour(), output)
    assert (attention.num_ranks, attention.decomposable) == (1, True)
    assert layers.communications(flavour(), net) == []


def test_the_refusal_is_a_target_error_before_anything_is_converted() -> None:
    with pytest.raises(TargetError, match="'portable'"):
        flavour().check_ring("portable")


def convert(program: ShardedProgram, target: str) -> Any:
    with converters.converting_for(target):
        return network(program)[0]
