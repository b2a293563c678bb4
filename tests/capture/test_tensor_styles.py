"""The named styles of tensor-parallel plans: what each rank holds, that one graph serves all, and what is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from diffusers.hooks.tensor_parallel import PackedColwiseParallel, PackedRowwiseParallel
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

import torchtrt_md as md
from torchtrt_md.capture import model as capture_model
from torchtrt_md.capture.trace import trace
from torchtrt_md.capture.transformers_private import Reading
from torchtrt_md.errors import CaptureError, PlanError, PlanWarning
from torchtrt_md.program import Coordinate, ShardedProgram, Sharding, UnevenSharding, Weight

SIZES = (2, 4)


def programmed(model: nn.Module, args: tuple[Tensor, ...], size: int, plan: Mapping[str, Any]) -> ShardedProgram:
    """The program of a model, verified; all ranks have one graph."""
    program = md.capture(model, args, mesh=md.Mesh(tp=size), parallel=md.TensorParallel("tp", plan=plan))
    assert len(program.distinct()) == 1
    assert md.verify(program, model, args).error <= 1e-5
    return program


def sharding_of(program: ShardedProgram, name: str) -> tuple[Any, ...]:
    (source,) = (s for s in program.sources.values() if isinstance(s, Weight) and s.name == name)
    return source.shardings


PLAN = {"up": "colwise", "down": "rowwise"}


class MLP(nn.Module):
    def __init__(self, hidden: int, act: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(16, hidden), nn.Linear(hidden, 16), act

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.act(self.up(x)))
        return y


@pytest.mark.parametrize("hidden", [64, 66, 33, 3])
@pytest.mark.parametrize("size", SIZES)
def test_widths_that_do_and_do_not_divide(hidden: int, size: int) -> None:
    """What fills up a width is a copy of its last, and must not reach the result."""
    model, x = MLP(hidden, torch.exp).eval(), torch.randn(5, 16)
    program = programmed(model, (x,), size, {"up": "colwise", "down": "rowwise"})
    even = hidden % size == 0
    assert sharding_of(program, "up.bias") == (Sharding(0, "tp") if even else UnevenSharding(0, "tp"),)
    assert sharding_of(program, "down.bias") == ()
    source = next(s for s in program.sources.values() if isinstance(s, Weight) and s.name == "up.weight")
    parts = [program.weights.local(source, program.mesh, rank) for rank in range(size)]
    assert len({p.shape for p in parts}) == 1
    assert torch.equal(torch.cat(parts)[:hidden], model.up.weight)
    for copy in torch.cat(parts)[hidden:]:
        assert torch.equal(copy, model.up.weight[-1])
    source = next(s for s in program.sources.values() if isinstance(s, Weight) and s.name == "down.weight")
    parts = [program.weights.local(source, program.mesh, rank) for rank in range(size)]
    assert torch.equal(torch.cat(parts, 1)[:, :hidden], model.down.weight)
    assert not torch.cat(parts, 1)[:, hidden:].any()


ACTS: list[Callable[[Tensor], Tensor]] = [
    lambda t: 1 / t,
    lambda t: t.square().log(),
    lambda t: t.abs().rsqrt(),
    lambda t: t / t.norm(dim=0),
]


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("hidden", [33, 5])
def test_a_width_that_does_not_divide_and_ops_that_take_no_zero(hidden: int, act: Callable[[Tensor], Tensor]) -> None:
    """Filled up with zeros, it would have infinities, of which zero times is NaN."""
    programmed(MLP(hidden, act).eval(), (torch.randn(5, 16),), 4, PLAN)


def test_what_reads_across_a_part_of_a_width_has_a_way_out_of_its_own() -> None:
    with pytest.raises(md.VerificationError, match="does not compute what MLP computes") as raised:
        programmed(MLP(32, lambda t: t - t.mean(-1, True)).eval(), (torch.randn(5, 16),), 2, PLAN)
    assert "colwise_gather_output" in raised.value.fix
    assert "sequence" not in raised.value.fix
    gathered = {"up": "colwise_gather_output", "down": "rowwise_split_input"}
    programmed(MLP(32, lambda t: t - t.mean(-1, True)).eval(), (torch.randn(5, 16),), 2, gathered)


@pytest.mark.parametrize("size", SIZES)
def test_results_that_are_gathered_and_arguments_that_are_split(size: int) -> None:
    class Model(MLP):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.down(torch.softmax(self.up(x), -1))  # needs the whole
            return y

    programmed(Model(33).eval(), (torch.randn(5, 16),), size, {"up": "colwise_rep", "down": "rowwise_split_input"})
    with pytest.raises(PlanError, match=rf"a Linear of 33 to 16 features .* this rank's {-(-33 // size)} of them, and"):
        programmed(Model(33).eval(), (torch.randn(5, 16),), size, {"up": "colwise_rep", "down": "rowwise"})


class Packed(nn.Module):
    """Parts of 1 : 1 : 2 joined in one product, all but the first of which are joined again in front of the last."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.up, self.down = width, nn.Linear(16, 4 * width), nn.Linear(3 * width, 16)
        self.up._tp_packed_col_blocks, self.down._tp_packed_row_blocks = [1, 1, 2], [1, 2]  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        unit = y.shape[-1] // 4
        gate, up, more = y.split([unit, unit, y.shape[-1] - 2 * unit], -1)
        out: Tensor = self.down(torch.cat([F.silu(gate) * up, more], -1))
        return out


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("blocks", [None, [1, 1, 2]])
def test_packed_weights_of_diffusers(size: int, blocks: list[int] | None) -> None:
    plan = {"up": PackedColwiseParallel(blocks), "down": PackedRowwiseParallel()}
    program = programmed(Packed(8).eval(), (torch.randn(3, 16),), size, plan)
    assert sharding_of(program, "up.weight") == (UnevenSharding(0, "tp", (1, 1, 2)),)
    assert sharding_of(program, "down.weight") == (UnevenSharding(1, "tp", (1, 2), zeros=True),)


def test_packed_weights_of_diffusers_that_do_not_say_how() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(PlanError, match="PackedColwiseParallel says no blocks, and its module has no _tp_packed_col"):
        programmed(model, (torch.randn(2, 8),), 2, {"0": PackedColwiseParallel()})
    with pytest.raises(PlanError, match=r"'0.weight' of shape \[8, 8\] is to be cut on dim 0, in blocks of 1:2"):
        programmed(model, (torch.randn(2, 8),), 2, {"0": PackedColwiseParallel([1, 2])})


@pytest.mark.parametrize("size", SIZES)
def test_flux_by_its_own_tensor_parallel_plan(size: int) -> None:
    model, args, kwargs = models.flux()
    program = md.capture(model, args, kwargs, mesh=md.Mesh(tp=size), parallel=md.TensorParallel("tp"))
    assert len(program.distinct()) == 1
    assert md.verify(program, model, args, kwargs).error <= 1e-5


class Tied(nn.Module):
    """Token ids -> logits, with one weight for both."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 16, padding_idx=vocabulary - 1)
        self.head = nn.Linear(16, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.embed(ids)))
        return logits


@pytest.mark.parametrize("vocabulary", [64, 101, 5])
@pytest.mark.parametrize("size", SIZES)
def test_vocabularies(vocabulary: int, size: int) -> None:
    """Where a rank's rows begin is an input, so that ranks share a graph; a tied weight is held once."""
    ids = torch.arange(vocabulary).unsqueeze(0)
    plan = {"embed": "embedding_rowwise", "head": "colwise_gather_output"}
    program = programmed(Tied(vocabulary).eval(), (ids,), size, plan)
    assert [s.name for s in program.sources.values() if isinstance(s, Weight)] == ["embed.weight"]
    assert Coordinate("tp") in md.lower(program).sources.values()


class WithAPlaceholder(nn.Embedding):
    """One id has a row of its own, beside the table; T5Gemma2 embeds the end of an image so."""

    def __init__(self, reads: Callable[[Tensor], object] = lambda weight: weight.dtype) -> None:
        super().__init__(34, 16, padding_idx=0)
        self.placeholder, self.row, self.reads = 31, nn.Parameter(torch.randn(16)), reads

    def forward(self, ids: Tensor) -> Tensor:
        self.reads(self.weight)
        rows = 3.0 * super().forward(ids)
        rows[ids == self.placeholder] = self.row
        return rows


@pytest.mark.parametrize("size", SIZES)
def test_an_embedding_whose_own_code_asks_for_ids(size: int) -> None:
    """They are those of the whole vocabulary: no rank's rows are that many, and rank 0 has none of the last."""
    model, ids = nn.Sequential(WithAPlaceholder(), nn.Linear(16, 8)).eval(), torch.arange(34).unsqueeze(0)
    program = programmed(model, (ids,), size, {"0": "embedding_rowwise", "1": "colwise_gather_output"})
    assert sharding_of(program, "0.row") == ()
    assert sharding_of(program, "0.weight") == ((Sharding if size == 2 else UnevenSharding)(0, "tp"),)


def test_an_embedding_that_was_given_code_of_its_own() -> None:
    def own(embedding: Any, ids: Tensor) -> Tensor:
        return torch.where((ids == 31).unsqueeze(-1), 0.5, nn.Embedding.forward(embedding, ids))

    model = nn.Sequential(nn.Embedding(34, 16), nn.Linear(16, 8)).eval()
    model[0].forward = MethodType(own, model[0])
    programmed(model, (torch.arange(34).unsqueeze(0),), 4, {"0": "embedding_rowwise", "1": "colwise_gather_output"})


def test_an_embedding_that_reads_its_weight_otherwise() -> None:
    """A rank has some of the rows, so what is made of them is another thing on each."""
    for reads, name in (
        (lambda weight: weight.mean(), "mean"),
        (lambda weight: weight.mT, "mT"),
        (lambda weight: weight.shape[0], "shape"),  # of which the ids of the example may say nothing
        (lambda weight: weight.size(0), "size"),
        (lambda weight: weight.numel(), "numel"),
        (len, "__len__"),
    ):
        with pytest.raises(PlanError, match=f"reads its weight by {name}, and not by a lookup of ids"):
            programmed(WithAPlaceholder(reads).eval(), (torch.arange(9),), 2, {"": "embedding_rowwise"})


def test_an_embedding_may_ask_what_is_the_same_of_every_part() -> None:
    model = WithAPlaceholder(lambda weight: int(weight.dtype.itemsize + weight.ndim)).eval()
    programmed(model, (torch.arange(9),), 2, {"": "embedding_rowwise"})


def test_a_tied_weight_that_is_cut_in_two_ways() -> None:
    plan = {"embed": "embedding_colwise", "head": "colwise_gather_output"}
    program = programmed(Tied(64).eval(), (torch.arange(9).unsqueeze(0),), 2, plan)
    assert sharding_of(program, "embed.weight") == (Sharding(1, "tp"),)
    assert sharding_of(program, "head.weight") == (Sharding(0, "tp"),)


def test_one_trace_serves_any_number_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[object] = []

    def counted(*args: Any) -> Any:
        traced.append(args)
        return trace(*args)

    monkeypatch.setattr(capture_model, "trace", counted)
    model, args, kwargs = models.llama(heads=8, kv_heads=4)
    for mesh in (md.Mesh(tp=8), md.Mesh(tp=64)):
        plan = {name: style for name, style in dict(model.tp_plan).items() if "self_attn" not in name}  # type: ignore[arg-type]
        program = md.capture(model, args, kwargs, mesh=mesh, parallel=md.TensorParallel("tp", plan=plan))
        assert len(program.distinct()) == 1
        assert md.lower(program).distinct()[0][1] == tuple(range(mesh.size))
    assert len(traced) == 2


EXPERTS = 4


class Experts(nn.Module):
    """Gate and up projections joined in one parameter, a form of expert code, a bias for each expert."""

    def __init__(self, form: str, transposed: bool) -> None:
        super().__init__()
        self.form, self.transposed, self.num_experts = form, transposed, EXPERTS
        up, down = (EXPERTS, 24, 16), (EXPERTS, 16, 12)
        self.gate_up = nn.Parameter(torch.randn(*up).transpose(1, 2).contiguous() if transposed else torch.randn(*up))
        self.down = nn.Parameter(torch.randn(*down).transpose(1, 2).contiguous() if transposed else torch.randn(*down))

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        gate_up, down = (p if self.transposed else p.transpose(1, 2) for p in (self.gate_up, self.down))
        flat, rows = chosen.reshape(-1), x.repeat_interleave(chosen.shape[1], 0)
        if self.form == "loop":
            out = torch.zeros_like(x)
            for expert in range(self.num_experts):
                token, place = torch.where(chosen == expert)
                gate, up = (x[token] @ gate_up[expert]).chunk(2, -1)
                out = out.index_add(0, token, (F.silu(gate) * up) @ down[expert] * weights[token, place, None])
            return out
        if self.form == "batched":
            flat = flat.clamp(max=self.num_experts - 1)  # what is elsewhere has the weight 0
            gate, up = torch.bmm(rows[:, None], gate_up[flat])[:, 0].chunk(2, -1)
            done = torch.bmm((F.silu(gate) * up)[:, None], down[flat])[:, 0]
        else:
            order = flat.argsort()
            ends = (flat[None] <= torch.arange(self.num_experts)[:, None]).sum(1).to(torch.int32)
            gate, up = F.grouped_mm(rows[order], gate_up, offs=ends).chunk(2, -1)
            done = F.grouped_mm(F.silu(gate) * up, down, offs=ends)[order.argsort()]
        mixed: Tensor = (done.view(*chosen.shape, -1) * weights.unsqueeze(-1)).sum(1)
        return mixed


class MoE(nn.Module):
    def __init__(self, form: str = "batched", transposed: bool = False) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(16, EXPERTS), Experts(form, transposed)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2)
        y: Tensor = x + self.experts(x, chosen, weights)
        return y


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", ["batched", "grouped"])
@pytest.mark.parametrize("transposed", [False, True])
def test_experts_of_which_a_rank_has_a_part_each(form: str, transposed: bool, size: int) -> None:
    torch.manual_seed(0)
    plan = {
        "experts.gate_up": "packed_rowwise" if transposed else "packed_colwise",
        "experts.down": "colwise" if transposed else "rowwise",
        "experts": "moe_tp_experts",
    }
    program = programmed(MoE(form, transposed).eval(), (torch.randn(7, 16),), size, plan)
    assert sharding_of(program, "experts.gate_up") == (
        UnevenSharding(2 if transposed else 1, "tp", (1, 1), zeros=True),
    )
    assert sharding_of(program, "experts.down") == (Sharding(1 if transposed else 2, "tp"),)


@pytest.mark.parametrize("size", SIZES)
def test_experts_of_which_a_rank_has_some(size: int) -> None:
    torch.manual_seed(0)
    plan = {"experts.*": "grouped_gemm", "experts": "ep_dispatch_experts"}
    model = MoE().eval()
    program = programmed(model, (torch.randn(7, 16),), size, plan)
    assert sharding_of(program, "experts.down") == (Sharding(0, "tp"),)
    assert model.experts.num_experts == EXPERTS  # the user's model is as it was


def test_experts_that_do_not_divide() -> None:
    with pytest.raises(PlanError, match="'experts', a Experts, does not fit: 4 experts do not divide by the 3 ranks"):
        programmed(MoE().eval(), (torch.randn(7, 16),), 3, {"experts": "ep_dispatch_experts"})


def test_a_loop_over_the_experts_that_were_chosen_is_refused_with_the_way_out() -> None:
    plan = {"experts.gate_up": "packed_colwise", "experts.down": "rowwise", "experts": "moe_tp_experts"}
    with pytest.raises(CaptureError, match=r"MoE calls aten.nonzero.default, whose result's size") as error:
        programmed(MoE("loop").eval(), (torch.randn(7, 16),), 2, plan)
    assert "set_experts_implementation('grouped_mm')" in error.value.fix
    assert "where the model's experts do not take it, give them a forward without a loop" in error.value.fix
    assert "torch.where(chosen == expert)" in error.value.at


@pytest.mark.parametrize("size", SIZES)
def test_weights_that_transformers_reads_from_several_tensors(size: int) -> None:
    """A rank has its part of each, whatever the plan calls it; a weight that is read as it is, is cut in one piece."""
    torch.manual_seed(0)
    mixtral = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=12,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=4,
            num_local_experts=4,
        )
    ).eval()
    experts = "model.layers.0.mlp.experts"
    plan = {f"{experts}.gate_up_proj": "colwise", f"{experts}.down_proj": "rowwise", experts: "moe_tp_experts"}
    tokens, kwargs = torch.arange(7)[None], {"use_cache": False}
    program = md.capture(mixtral, (tokens,), kwargs, mesh=md.Mesh(tp=size), parallel=md.TensorParallel("tp", plan=plan))
    assert sharding_of(program, f"{experts}.gate_up_proj") == (UnevenSharding(1, "tp", (1, 1), zeros=True),)
    assert sharding_of(program, f"{experts}.down_proj") == (Sharding(2, "tp"),)
    assert md.verify(program, mixtral, (tokens,), kwargs).error <= 1e-5
    reading = Reading(mixtral)
    assert reading.parts(f"{experts}.gate_up_proj", 1) == 2
    assert reading.parts(f"{experts}.gate_up_proj", 2) == reading.parts(f"{experts}.down_proj", 2) == 1
    assert Reading(MoE()).parts("experts.gate_up", 1) == 1


@pytest.mark.parametrize("style", ["all_reduce", "gather", "moe_tp_experts"])
def test_a_module_whose_results_are_terms_of_a_sum(style: str) -> None:
    """One expert does nothing, and is summed with the rest."""

    class Terms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.same = nn.Identity()

        def forward(self, x: Tensor) -> tuple[Tensor, str]:
            # No weight, for which verify would draw others: whole on every rank, it adds nothing as zeros only.
            return x @ x.new_zeros(8, 8) + self.same(x), "as it is"

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.terms = nn.Linear(8, 8), Terms()

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.relu(self.up(x))
            y: Tensor = self.terms(hidden)[0]
            return y

    plan = {"terms": style, "terms.same": "moe_identity_expert", "up": "replicate"}
    programmed(Model().eval(), (torch.randn(3, 8),), 2, plan)


class Attention(nn.Module):
    """Grouped-query attention with a sink for each head of queries, whose keys are repeated by hand."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int = 8) -> None:
        super().__init__()
        self.head_dim, self.num_key_value_groups = head_dim, heads // kv_heads
        self.q_proj = nn.Linear(16, heads * head_dim)
        self.k_proj, self.v_proj = nn.Linear(16, kv_heads * head_dim), nn.Linear(16, kv_heads * head_dim)
        self.o_proj, self.sinks = nn.Linear(heads * head_dim, 16), nn.Parameter(torch.randn(heads))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        k, v = (t.repeat_interleave(self.num_key_value_groups, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v) * self.sinks.sigmoid()[:, None, None]
        out: Tensor = self.o_proj(y.transpose(1, 2).flatten(2))
        return out


ATTENTION = {
    "attn.q_proj": "colwise",
    "attn.k_proj": "colwise",
    "attn.v_proj": "colwise",
    "attn.o_proj": "rowwise",
    "attn.sinks": "colwise",
    "attn": "local_params",
}


@pytest.mark.parametrize(("kv_heads", "size"), [(4, 2), (1, 2), (1, 4), (2, 4)])
def test_key_value_heads_fewer_than_the_ranks(kv_heads: int, size: int) -> None:
    """Each is held by the ranks that have the queries to it."""
    model = nn.ModuleDict({"attn": Attention(8, kv_heads)}).eval()
    model.forward = lambda x: model["attn"](x)
    program = programmed(model, (torch.randn(1, 6, 16),), size, ATTENTION)
    copies = max(1, size // kv_heads)
    expected = Sharding(0, "tp") if copies == 1 else UnevenSharding(0, "tp", copies=copies)
    assert sharding_of(program, "attn.k_proj.weight") == sharding_of(program, "attn.v_proj.bias") == (expected,)
    assert sharding_of(program, "attn.sinks") == (Sharding(0, "tp"),)
    assert model["attn"].num_key_value_groups == 8 // kv_heads


def test_heads_that_do_not_divide() -> None:
    model = nn.ModuleDict({"attn": Attention(6, 3)}).eval()
    model.forward = lambda x: model["attn"](x)
    with pytest.raises(
        PlanError, match=r"'attn.q_proj' has 6 heads, which do not divide by the 4 ranks.*: 2 left over"
    ):
        programmed(model, (torch.randn(1, 6, 16),), 4, ATTENTION)
    with pytest.raises(PlanError, match=r"'attn.k_proj' has 3 key/value heads, which do not divide by the 2 ranks"):
        programmed(model, (torch.randn(1, 6, 16),), 2, ATTENTION)


def test_entries_that_name_nothing() -> None:
    """A plan serves several configurations: what this one lacks is a warning, whatever its style."""
    model, x = MLP(32).eval(), torch.randn(2, 16)
    with pytest.warns(PlanWarning, match=r"module 'gate' that MLP does not have; use a name .*'"):
        programmed(model, (x,), 2, {"up": "colwise", "gate": "a style of the future", "down": "rowwise"})
    model.tp_plan = {"up": "colwise", "gate": "colwise", "down": "rowwise"}  # type: ignore[assignment]
    with warnings.catch_warnings():  # its own plan serves other configurations, too
        warnings.simplefilter("error", PlanWarning)
        md.capture(model, (x,), mesh=md.Mesh(tp=2), parallel=md.TensorParallel("tp"))
    with pytest.raises(PlanError, match="'up' the style 'a style of the future', which is not known"):
        programmed(model, (x,), 2, {"up": "a style of the future"})


def test_styles_that_do_not_fit() -> None:
    model, x = nn.Sequential(nn.LayerNorm(8), nn.Embedding(8, 8, max_norm=1.0)), torch.randn(2, 8)
    for style in ("colwise", "rowwise"):
        with pytest.raises(PlanError, match="the style of module '0', a LayerNorm, does not fit"):
            programmed(model, (x,), 2, {"0": style})
    with pytest.raises(PlanError, match="has a max_norm"):
        programmed(model, (x,), 2, {"1": "embedding_rowwise"})


@pytest.mark.parametrize(
    ("sharding", "parts"),
    [
        (UnevenSharding(0, "tp"), [[0, 1, 2, 3], [4, 5, 6, 6]]),
        (UnevenSharding(0, "tp", zeros=True), [[0, 1, 2, 3], [4, 5, 6, 0]]),
        (UnevenSharding(0, "tp", (3, 4)), [[0, 1, 3, 4], [2, 2, 5, 6]]),
        (UnevenSharding(0, "tp", (3, 4), zeros=True), [[0, 1, 3, 4], [2, 0, 5, 6]]),
        (UnevenSharding(0, "tp", copies=2), [[0, 1, 2, 3, 4, 5, 6]] * 2),
    ],
)
def test_parts_of_weights_that_are_uneven(sharding: UnevenSharding, parts: list[list[int]]) -> None:
    weight = Weight("w", (7,), torch.int64, (sharding,))
    found = [weight.local(torch.arange(7), md.Mesh(tp=2), rank).tolist() for rank in range(2)]
    assert found == parts
    assert [sum(sharding.extents(7, 2))] * 2 == [len(part) for part in parts]


def test_with_a_sequence_split_along_another_axis() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.attn, self.head = nn.Embedding(33, 16), Attention(4, 2), nn.Linear(16, 33)

        def forward(self, ids: Tensor) -> Tensor:
            logits: Tensor = self.head(self.attn(self.embed(ids)))
            return logits

    model, ids = Model().eval(), torch.arange(8).unsqueeze(0)
    plan = {**ATTENTION, "embed": "embedding_rowwise", "head": "colwise_gather_output"}
    split = md.ContextParallel("cp", plan={"": {"ids": md.Split(1)}, "head": md.Gather(1)}, strategy="allgather_kv")
    both = (md.TensorParallel("tp", plan=plan), split)
    program = md.capture(model, (ids,), mesh=md.Mesh(tp=2, cp=2), parallel=both)
    assert len(program.distinct()) == 1
    assert md.verify(program, model, (ids,)).error <= 1e-5


class Table(nn.Module):
    """Has what an embedding has, and is none."""

    def __init__(self, name: str, weight: Tensor) -> None:
        super().__init__()
        setattr(self, name, 4)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, i: Tensor) -> Tensor:
        return self.weight[i % self.weight.shape[0]]


@pytest.mark.parametrize("style", ["colwise", "colwise_gather_output", "embedding_colwise"])
@pytest.mark.parametrize(
    ("table", "message"),
    [
        (Table("embedding_dim", torch.randn(10, 4)), "a Table has no out_features"),
        (Table("out_features", torch.randn(10, 4)), r"a 'weight' of shape \[10, 4\], which is not that of a linear"),
        (Table("out_features", torch.randn(2, 4, 4)), r"a 'weight' of shape \[2, 4, 4\], which is not that of a lin"),
        (nn.EmbeddingBag(10, 4), "a EmbeddingBag has no out_features"),
    ],
)
def test_a_module_whose_weight_is_no_linear_layers_is_refused(table: nn.Module, message: str, style: str) -> None:
    """Another dim of it would be cut."""
    model = nn.Sequential(table, nn.Linear(4, 4)).eval()
    with pytest.raises(PlanError, match=message):
        md.capture(
            model, (torch.tensor([[0, 1, 2]]),), mesh=md.Mesh(tp=2), parallel=md.TensorParallel("tp", {"0": style})
        )


def test_a_rowwise_module_with_a_transposed_weight_is_refused() -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.weight = 6, nn.Parameter(torch.randn(6, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    model = nn.Sequential(nn.Linear(4, 6), Transposed()).eval()
    with pytest.raises(PlanError, match=r"in_features = 6 and a 'weight' of shape \[6, 4\]"):
        md.capture(
            model,
            (torch.randn(2, 4),),
            mesh=md.Mesh(tp=2),
            parallel=md.TensorParallel("tp", {"0": "colwise", "1": "rowwise"}),
        )


class Chosen(nn.Module):
    """Experts that look their weights up."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 4
        self.w1, self.w2 = nn.Parameter(torch.randn(4, 4, 8)), nn.Parameter(torch.randn(4, 8, 4))
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        at = chosen.clamp(max=self.num_experts - 1)
        h = F.silu(torch.einsum("nd,nkdf->nkf", x, self.w1[at]))
        y: Tensor = (
            torch.einsum("nkf,nkfd->nkd", h, self.w2[at]) * self.scale[at][..., None] * weights[..., None]
        ).sum(1)
        return y


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(4, 4, bias=False), Chosen()

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(1, -1)
        y: Tensor = x + self.experts(x, chosen, weights)
        return y


@pytest.mark.parametrize("left_out", ["w1", "w2", "scale"])
def test_a_parameter_of_experts_that_the_plan_leaves_out_is_refused(left_out: str) -> None:
    """Of the experts that the example chooses, those of the first rank may be all."""
    plan = {"experts": "ep_dispatch_experts", **{f"experts.{n}": "grouped_gemm" for n in ("w1", "w2", "scale")}}
    model, x = Routed().eval(), torch.randn(6, 4)
    programmed(model, (x,), 2, plan)
    del plan[f"experts.{left_out}"]
    with pytest.raises(PlanError, match=rf"all of their parameter '{left_out}', .* which the plan does not name"):
        programmed(model, (x,), 2, plan)


class Grouped(nn.Module):
    """A linear layer for each group of tokens."""

    def __init__(self, groups: int, n: int, m: int) -> None:
        super().__init__()
        self.in_features, self.out_features = n, m
        self.weight = nn.Parameter(torch.randn(groups, m, n) / 5, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("gti,goi->gto", x, self.weight)


@pytest.mark.parametrize("up", ["colwise", "colwise_gather_output"])
def test_a_linear_layer_of_groups_is_cut_as_one(up: str) -> None:
    model = nn.Sequential(Grouped(2, 16, 32), nn.ReLU(), Grouped(2, 32, 16))
    x = torch.randn(2, 8, 16)
    plan = {"0": up, "2": "rowwise" if up == "colwise" else "rowwise_split_input"}
    program = md.capture(model, (x,), mesh=md.Mesh(tp=2), parallel=md.TensorParallel("tp", plan))
    assert md.verify(md.lower(program), model, (x,)).structure_error < 1e-8
