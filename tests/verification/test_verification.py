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

    with pytest.raises(VerificationError, match=r"'output0' of rank 0: at \[\d, \d, \d+\] it is .* and should be"):
        md.verify(_wrong(program, drop), model, args, kwargs)


def test_references_that_prove_nothing_are_refused() -> None:
    model, args, kwargs = models.mlp()
    program = md.capture(model, args, kwargs, mesh=md.Mesh(tp=2), parallel=md.TensorParallel("tp", plan=MLP_PLAN))
    with pytest.raises(VerificationError, match="was given"):
        md.verify(program, model, (torch.randn(1, 8, 32),), kwargs)
    with pytest.raises(VerificationError, match="'output0' of the dense model is not finite"):
        md.verify(program, model, (torch.full_like(args[0], float("nan")),), kwargs)


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


def test_a_small_token_that_is_rounded_more_is_caught() -> None:
    """In fp64, where all dtypes are widened, it is right."""
    model, (x,), kwargs = models.mlp(torch.bfloat16)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.zero_()
    x = x.clone()
    x[:, 3] *= 1e-8  # which float16 takes for zeros
    program = md.capture(model, (x,), kwargs, mesh=md.Mesh(tp=2), parallel=md.TensorParallel("tp", plan=MLP_PLAN))
    md.verify(program, model, (x,), kwargs)

    def coarse(graph: torch.fx.GraphModule) -> None:
        (output,) = graph.graph.find_nodes(op="output")
        (node,) = output.args[0]
        parts = [emit(output, torch.ops.aten.slice.Tensor, node, 1, a, b) for a, b in ((0, 3), (3, 4), (4, 8))]
        for dtype in (torch.float16, torch.bfloat16):
            parts[1] = emit(output, torch.ops.aten._to_copy.default, parts[1], dtype=dtype)
        output.replace_input_with(node, emit(output, torch.ops.aten.cat.default, parts, 1))

    with pytest.raises(VerificationError, match="rounds more"):
        md.verify(_wrong(program, coarse), model, (x,), kwargs)


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


# --- right programs that are hard to compare, and wrong ones like them ---


class Norm(nn.Module):
    """The default eps is that of the dtype, and the input is small enough for it to count."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.RMSNorm(16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.out(self.norm(x * 1e-3))
        return result


class Banned(nn.Module):
    """Logits of which some are out of reach."""

    def __init__(self, value: float | None) -> None:
        super().__init__()
        self.out, self.value = nn.Linear(16, 32), value
        self.register_buffer("banned", torch.arange(32) < 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value = torch.finfo(x.dtype).min if self.value is None else self.value
        return self.out(x).masked_fill(self.banned, value)  # type: ignore[no-any-return]


class Mixed(nn.Module):
    """Promotion beside casts, and layers of two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16, dtype=torch.bfloat16)
        self.scale = nn.Parameter(torch.rand(16) + 1)
        self.out = nn.Linear(16, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x.bfloat16())
        result: torch.Tensor = self.out(x + (y.float().unsqueeze(-2) @ (y * self.scale).unsqueeze(-1)).squeeze(-1))
        return result


class Parts(nn.Module):
    """A rank's part of zeros, an empty output, integers, and complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.out(x)
        kept = y[..., :1] * 0 + (x[..., :1] > 100)
        return y * kept, y[..., :0], y.argmax(-1), torch.view_as_complex(y.unflatten(-1, (8, 2)))


@torch.library.custom_op("torchtrt_md_tests::halved", mutates_args=())
def halved(x: torch.Tensor) -> torch.Tensor:
    if x.dtype == torch.float64:
        raise NotImplementedError("not implemented for 'Double'")
    return x / 2


@halved.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class NoDouble(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down(halved(self.up(x)))
        return result


SPLIT = {"": {"x": md.Split(1)}}
HARD: dict[str, Callable[[], nn.Module]] = {
    "eps of the dtype": Norm,
    "finfo": lambda: Banned(None),
    "-1e9": lambda: Banned(-1e9),
    "-inf": lambda: Banned(-torch.inf),
    "mixed": Mixed,
    "parts": Parts,
}


def _hard(case: str, dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor, ShardedProgram]:
    torch.manual_seed(0)
    model = HARD[case]().eval()
    model = model if case == "mixed" else model.to(dtype)
    x = torch.randn(2, 8, 16).to(torch.float32 if case == "mixed" else dtype)
    plan = SPLIT if case == "parts" else {**SPLIT, "out": md.Gather(1)}
    return model, x, md.capture(model, (x,), mesh=md.Mesh(cp=2), parallel=md.ContextParallel("cp", plan=plan))


@pytest.mark.parametrize("case", HARD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_right_programs_are_not_refused(case: str, dtype: torch.dtype) -> None:
    if case == "parts" and dtype == torch.bfloat16:
        pytest.skip("there are no complex numbers of bfloat16")
    model, x, program = _hard(case, dtype)
    report = md.verify(program, model, (x,))
    assert report.precision == torch.float64
    assert report.notes == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", HARD)
def test_wrong_programs_like_them_are(case: str, dtype: torch.dtype) -> None:
    """The last layer is off by a part in a million."""
    if case == "parts" and dtype == torch.bfloat16:
        pytest.skip("there are no complex numbers of bfloat16")
    model, x, program = _hard(case, dtype)

    def change(graph: torch.fx.GraphModule) -> None:
        node = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.addmm.default)[-1]
        scaled = emit(node.next, torch.ops.aten.mul.Tensor, node, 1 + 1e-6)
        node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)

    with pytest.raises(VerificationError, match=r"does not compute what .* computes: in float64, 'output\d' of rank"):
        md.verify(_wrong(program, change), model, (x,))


def test_an_op_without_a_kernel_in_fp64() -> None:
    torch.manual_seed(0)
    model, x = NoDouble().eval(), torch.randn(4, 16)
    program = md.capture(model, (x,), mesh=md.Mesh(tp=2), parallel=md.TensorParallel("tp", plan=MLP_PLAN))
    report = md.verify(program, model, (x,))
    assert report.precision == torch.float32
    assert "compared in float32: " in report.notes[0]
    assert "halved.default could not be run on cpu in float64: NotImplementedError" in report.notes[0]

    def drop(graph: torch.fx.GraphModule) -> None:
        (node,) = graph.graph.find_nodes(op="call_function", target=torch.ops.torchtrt_md.all_reduce.default)
        substitute(node, node.args[0])

    with pytest.raises(VerificationError, match="does not compute what NoDouble computes: in float32"):
        md.verify(_wrong(program, drop), model, (x,))


class Flipped(nn.Module):
    """Tokens in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(50, 16), nn.Linear(16, 16)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.embedding(tokens).flip(1)
        result: torch.Tensor = self.out(x)
        return result


@pytest.mark.parametrize("token", [0, 7])
def test_inputs_that_cannot_tell_programs_apart_are_drawn(token: int) -> None:
    """A program that does not turn the tokens round is right where they are all equal."""
    torch.manual_seed(0)
    model, tokens = Flipped().eval(), torch.full((1, 8), token)
    program = md.capture(model, (tokens,), mesh=md.Mesh(tp=1))
    assert md.verify(program, model, (tokens,)).notes == (
        "'tokens' cannot tell programs apart, so others were drawn too",
    )

    def drop(graph: torch.fx.GraphModule) -> None:
        (node,) = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.flip.default)
        substitute(node, node.args[0])

    with pytest.raises(VerificationError, match="does not compute"):
        md.verify(_wrong(program, drop), model, (tokens,))


def test_an_op_that_raises_is_named() -> None:
    model, args, kwargs = models.mlp()
    program = md.capture(model, args, kwargs, mesh=md.Mesh(tp=2), parallel=md.TensorParallel("tp", plan=MLP_PLAN))

    def change(graph: torch.fx.GraphModule) -> None:
        node = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default)[-1]
        node.update_arg(1, [7])

    with pytest.raises(VerificationError, match=r"view.default could not be run on cpu in .*: RuntimeError: "):
        md.verify(_wrong(program, change), model, args, kwargs)
