"""The proof: whole models, every strategy, all ranks against the dense model; and that it catches wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel

import torchtrt_md as md
from torchtrt_md.errors import VerificationError
from torchtrt_md.graph.rewrite import emit, substitute
from torchtrt_md.lowering.schedule import schedule
from torchtrt_md.parallel import Parallel
from torchtrt_md.program import ShardedProgram

PLAN = {"": {"x": md.Split(1)}, "out": md.Gather(1)}
MLP_PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}
CASES: dict[str, tuple[Callable[..., models.Call], md.Mesh, list[Parallel]]] = {
    "flux ulysses 2": (models.flux, md.Mesh(cp=2), [md.ContextParallel("cp", "ulysses")]),
    "flux ulysses 4": (models.flux, md.Mesh(cp=4), [md.ContextParallel("cp", "ulysses")]),
    "flux allgather 4": (models.flux, md.Mesh(cp=4), [md.ContextParallel("cp", "allgather_kv")]),
    "flux allgather 8": (models.flux, md.Mesh(cp=8), [md.ContextParallel("cp", "allgather_kv")]),
    "llama tp 2": (models.llama, md.Mesh(tp=2), [md.TensorParallel("tp")]),
    "llama tp 4": (models.llama, md.Mesh(tp=4), [md.TensorParallel("tp")]),
    "llama batch 2": (lambda dtype: models.llama(dtype, batch=2), md.Mesh(tp=2), [md.TensorParallel("tp")]),
    "qwen3 tp 2": (models.qwen3, md.Mesh(tp=2), [md.TensorParallel("tp")]),
    "wan ulysses 2": (models.wan, md.Mesh(cp=2), [md.ContextParallel("cp", "ulysses")]),
    "wan allgather 4": (models.wan, md.Mesh(cp=4), [md.ContextParallel("cp", "allgather_kv")]),
    "mlp tp 4": (models.mlp, md.Mesh(tp=4), [md.TensorParallel("tp", plan=MLP_PLAN)]),
    "attention causal gqa": (
        lambda dtype: models.attention(dtype, kv_heads=2, causal=True),
        md.Mesh(cp=2),
        [md.ContextParallel("cp", "ulysses", plan=PLAN)],
    ),
    "attention causal allgather": (
        lambda dtype: models.attention(dtype, kv_heads=1, causal=True),
        md.Mesh(cp=4),
        [md.ContextParallel("cp", "allgather_kv", plan=PLAN)],
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_program_computes_what_the_dense_model_computes(case: str, dtype: torch.dtype) -> None:
    call, mesh, parallel = CASES[case]
    model, args, kwargs = call(dtype)
    program = md.lower(md.capture(model, args, kwargs, mesh=mesh, parallel=parallel))
    report = md.verify(program, model, args, kwargs)
    assert len(report.per_rank) == mesh.size
    assert report.structure_error <= 1e-5
    if dtype == torch.float32:
        assert report.error <= 1e-5
    else:
        assert 0 < report.error <= 1.5 * report.dense_error


class TwoAxes(nn.Module):
    """Attention over a split sequence, then an MLP with split weights."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = models.SelfAttention()
        self.mlp = models.MLP()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.mlp(self.attention(x))
        return result


@pytest.mark.parametrize("mesh", [md.Mesh(cp=2, tp=2), md.Mesh(tp=2, cp=2), md.Mesh(cp=2, tp=1)])
def test_context_and_tensor_parallel_in_one_model(mesh: md.Mesh) -> None:
    torch.manual_seed(0)
    model, x = TwoAxes().eval(), torch.randn(2, 16, 32)
    parallel: list[Parallel] = [
        md.ContextParallel("cp", plan={"": {"x": md.Split(1)}, "mlp": md.Gather(1)}),
        md.TensorParallel("tp", plan={"mlp.up": ColwiseParallel(), "mlp.down": RowwiseParallel()}),
    ]
    program = md.capture(model, (x,), mesh=mesh, parallel=parallel)
    assert md.verify(program, model, (x,)).error <= 1e-5


def test_sequence_parallel_norms() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(models.MLP(), nn.LayerNorm(32), models.MLP()).eval()
    plan = {
        "0.up": ColwiseParallel(),
        "0.down": RowwiseParallel(output_layouts=Shard(1)),
        "1": SequenceParallel(use_local_output=True),
        "2.up": ColwiseParallel(input_layouts=Shard(1)),
        "2.down": RowwiseParallel(),
    }
    for batch in (1, 2):
        x = torch.randn(batch, 8, 32)
        program = md.capture(model, (x,), mesh=md.Mesh(tp=2), parallel=md.TensorParallel("tp", plan=plan))
        assert [c.op for c in schedule(md.lower(program).graphs[0])] == ["reduce_scatter", "all_gather", "all_reduce"]
        assert md.verify(program, model, (x,)).error <= 1e-5


def _wrong(program: ShardedProgram, change: Callable[[Any], None]) -> ShardedProgram:
    lowered = md.lower(program)
    for graph, _ in lowered.distinct():
        change(graph)
        graph.recompile()
    return lowered


def test_a_wrong_program_is_caught_even_below_bf16_rounding() -> None:
    model, args, kwargs = models.mlp(torch.bfloat16)
    program = md.capture(model, args, kwargs, mesh=md.Mesh(tp=2), parallel=md.TensorParallel("tp", plan=MLP_PLAN))

    def scale(graph: torch.fx.GraphModule) -> None:
        (node,) = graph.graph.find_nodes(op="call_function", target=torch.ops.torchtrt_md.all_reduce.default)
        scaled = emit(next(iter(node.users)), torch.ops.aten.mul.Tensor, node, 1.001)
        node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)

    with pytest.raises(VerificationError, match="does not compute what MLP computes"):
        md.verify(_wrong(program, scale), model, args, kwargs)


def test_a_missing_collective_is_caught() -> None:
    model, args, kwargs = models.mlp()
    program = md.capture(model, args, kwargs, mesh=md.Mesh(tp=2), parallel=md.TensorParallel("tp", plan=MLP_PLAN))

    def drop(graph: torch.fx.GraphModule) -> None:
        (node,) = graph.graph.find_nodes(op="call_function", target=torch.ops.torchtrt_md.all_reduce.default)
        substitute(node, node.args[0])

    with pytest.raises(VerificationError, match=r"rank 0 differ|rank 1 differ"):
        md.verify(_wrong(program, drop), model, args, kwargs)


def test_references_that_prove_nothing_are_refused() -> None:
    model, args, kwargs = models.mlp()
    program = md.capture(model, args, kwargs, mesh=md.Mesh(tp=2), parallel=md.TensorParallel("tp", plan=MLP_PLAN))
    with torch.no_grad():
        model.down.weight.zero_()  # type: ignore[union-attr, operator]
        model.down.bias.zero_()  # type: ignore[union-attr, operator]
    with pytest.raises(VerificationError, match="all zeros"):
        md.verify(program, model, args, kwargs)
    with pytest.raises(VerificationError, match="was given"):
        md.verify(program, model, (torch.randn(1, 8, 32),), kwargs)


def test_more_rounding_than_the_model_is_caught() -> None:
    model, args, kwargs = models.mlp(torch.bfloat16)
    program = md.capture(model, args, kwargs, mesh=md.Mesh(tp=2), parallel=md.TensorParallel("tp", plan=MLP_PLAN))

    def coarse(graph: torch.fx.GraphModule) -> None:
        (node,) = graph.graph.find_nodes(op="call_function", target=torch.ops.torchtrt_md.all_reduce.default)
        user = next(iter(node.users))
        for dtype in (torch.float8_e5m2, torch.bfloat16):
            cast = emit(user, torch.ops.aten._to_copy.default, node, dtype=dtype)
            node.replace_all_uses_with(cast, delete_user_cb=lambda user, cast=cast: user is not cast)
            node = cast

    with pytest.raises(VerificationError, match=r"does not compute|rounds more"):
        md.verify(_wrong(program, coarse), model, args, kwargs)


def test_other_weights_than_the_dense_models_are_caught() -> None:
    model, args, kwargs = models.mlp()
    program = md.capture(model, args, kwargs, mesh=md.Mesh(tp=2), parallel=md.TensorParallel("tp", plan=MLP_PLAN))
    other = models.MLP().eval()
    with pytest.raises(VerificationError, match=r"weight 'up.weight' of the program is not that of the dense MLP"):
        md.verify(program, other, args, kwargs)


class Length(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.offset = nn.Linear(8, 8), 0

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        return self.linear(x), x.shape[1] + self.offset


def test_a_number_among_the_results_is_of_the_whole_and_another_is_caught() -> None:
    x = torch.randn(2, 4, 8)
    parallel = md.ContextParallel("cp", plan={"": {"x": md.Split(1)}, "linear": md.Gather(1)})
    model = Length()
    program = md.capture(model, (x,), mesh=md.Mesh(cp=2), parallel=parallel)
    md.verify(program, model, (x,))
    model.offset = 1
    with pytest.raises(VerificationError, match=r"Length returns \[None, 5\]"):
        md.verify(program, model, (x,))


class Casts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = models.MLP()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = (self.mlp(x).float() * 1.5).to(torch.bfloat16)
        return result


def test_a_model_that_names_its_dtype_is_not_refused() -> None:
    torch.manual_seed(0)
    model, x = Casts().bfloat16().eval(), torch.randn(2, 8, 32, dtype=torch.bfloat16)
    plan = {"mlp.up": ColwiseParallel(), "mlp.down": RowwiseParallel()}
    program = md.capture(model, (x,), mesh=md.Mesh(tp=2), parallel=md.TensorParallel("tp", plan=plan))
    assert md.verify(program, model, (x,)).structure_error <= 1e-5


def test_pytorchs_own_attention_modules() -> None:
    torch.manual_seed(0)
    layer, x = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval(), torch.randn(2, 8, 32)
    program = md.capture(layer, (x,), mesh=md.Mesh(tp=1))
    assert list(program.graphs[0].graph.find_nodes(op="call_function", target=torch.ops.torchtrt_md.attention.default))
    assert md.verify(program, layer, (x,)).error <= 1e-5
