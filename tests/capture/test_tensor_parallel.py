"""Tensor-parallel plans by DTensor: which part of a weight each rank has, and what is refused."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

import torchtrt_md as md
from torchtrt_md.capture.torch_private import fake_ranks
from torchtrt_md.errors import CaptureError, MeshError, PlanError
from torchtrt_md.program import Sharding, Weight, placeholders

TP2, TP4 = md.Mesh(tp=2), md.Mesh(tp=4)
PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}


def test_llama_by_its_own_plan() -> None:
    model, args, kwargs = models.llama()
    program = md.capture(model, args, kwargs, mesh=TP4, parallel=md.TensorParallel("tp"))
    weights = {s.name: s for s in program.sources.values() if isinstance(s, Weight)}
    assert weights["model.layers.0.self_attn.q_proj.weight"].shardings == (Sharding(0, "tp"),)
    assert weights["model.layers.1.mlp.down_proj.weight"].shardings == (Sharding(1, "tp"),)
    assert weights["model.norm.weight"].shardings == ()
    assert weights["lm_head.weight"].shardings == (Sharding(0, "tp"),)


def test_parts_of_weights_are_views_of_the_dense_ones() -> None:
    model, args, kwargs = models.llama()
    program = md.capture(model, args, kwargs, mesh=TP4, parallel=md.TensorParallel("tp"))
    for source in program.sources.values():
        if isinstance(source, Weight):
            whole = program.weights.whole[source.name]
            parts = [program.weights.local(source, TP4, rank) for rank in range(4)]
            assert all(p.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() for p in parts)
            for s in source.shardings:
                assert torch.equal(torch.cat(parts, s.dim), whole)


def test_capturing_twice_gives_the_same_graphs() -> None:
    """DTensor caches decisions with the mesh of an earlier capture in them."""
    model, args, kwargs = models.llama()
    styles = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
    own = {name: styles[style]() for name, style in dict(model.tp_plan).items() if style in styles}  # type: ignore[arg-type]
    embedding = RowwiseParallel(input_layouts=Replicate())
    parallel = md.TensorParallel("tp", plan={**own, "model.embed_tokens": embedding})
    first, second = (md.capture(model, args, kwargs, mesh=TP4, parallel=parallel) for _ in range(2))
    assert len(first.distinct()) == len(second.distinct()) == 4
    for a, b in zip(first.graphs, second.graphs, strict=True):
        assert a.code == b.code


def test_a_model_that_the_user_parallelized() -> None:
    dense, args, _ = models.mlp()
    sharded = models.MLP().eval()
    sharded.load_state_dict(dense.state_dict())
    with fake_ranks(2):
        parallelize_module(sharded, init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), PLAN, src_data_rank=None)
        program = md.capture(sharded, args, mesh=TP2, weights=dense.state_dict())
        alone = md.capture(sharded, args, mesh=TP2)
        with pytest.raises(MeshError, match="parallelized over 2 ranks on axis 'tp'"):
            md.capture(sharded, args, mesh=TP4)
    assert md.verify(program, dense, args).error <= 1e-5
    # Without the dense weights this process can serve its own rank, and says so for the others.
    weight = next(s for s in alone.sources.values() if isinstance(s, Weight) and s.name == "up.weight")
    assert torch.equal(alone.weights.local(weight, TP2, 0), dense.up.weight[:32])  # type: ignore[union-attr, index]
    with pytest.raises(CaptureError, match=r"holds rank 0's shard only, and rank 1's is needed") as error:
        alone.weights.local(weight, TP2, 1)
    assert "weights=" in error.value.fix


@pytest.mark.parametrize(
    ("plan", "what"),
    [
        ({"up": "colwise", "down": "rowwise"}, "module 'up', which is sharded already"),
        ({"down": RowwiseParallel()}, "module 'down', which is sharded already"),
        ({"up.weight": "colwise"}, "parameter 'up.weight', which is sharded already"),
    ],
)
def test_a_plan_for_what_the_user_has_parallelized(plan: dict[str, Any], what: str) -> None:
    sharded, args, _ = models.mlp()
    with fake_ranks(2):
        parallelize_module(sharded, init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), PLAN, src_data_rank=None)
        with pytest.raises(PlanError, match=what) as error:
            md.capture(sharded, args, mesh=TP2, parallel=md.TensorParallel("tp", plan=plan))
    assert "leave out parallel" in error.value.fix


@pytest.mark.parametrize("names", [("tp",), None])
def test_a_plan_beside_what_the_user_has_parallelized(names: tuple[str, ...] | None) -> None:
    dense, args, _ = models.mlp()
    sharded = models.MLP().eval()
    sharded.load_state_dict(dense.state_dict())
    axis = names[0] if names else "dim0"
    own: dict[str, ParallelStyle] = {"up": ColwiseParallel(output_layouts=Replicate())}
    parallel = md.TensorParallel(axis, plan={"down": RowwiseParallel(input_layouts=Replicate())})
    with fake_ranks(2):
        parallelize_module(sharded, init_device_mesh("cpu", (2,), mesh_dim_names=names), own, src_data_rank=None)
        mesh = md.Mesh({axis: 2})
        program = md.capture(sharded, args, mesh=mesh, parallel=parallel, weights=dense.state_dict())
    assert md.verify(program, dense, args).error <= 1e-5


def test_heads_that_do_not_divide() -> None:
    model, args, kwargs = models.llama(heads=6, kv_heads=6)
    with pytest.raises(PlanError, match="6 heads, which do not divide by the 4 ranks of axis 'tp': 2 left"):
        md.capture(model, args, kwargs, mesh=TP4, parallel=md.TensorParallel("tp"))


def test_llama_with_fewer_key_value_heads_than_ranks() -> None:
    model, args, kwargs = models.llama(heads=8, kv_heads=2)
    program = md.capture(model, args, kwargs, mesh=TP4, parallel=md.TensorParallel("tp"))
    assert md.verify(program, model, args, kwargs).error <= 1e-5


def test_weights_that_do_not_divide() -> None:
    with pytest.raises(PlanError, match=r"module 'up' has 66 on dim 0.*4 ranks of axis 'tp': 2 left over"):
        md.capture(models.MLP(hidden=66), (torch.randn(2, 32),), mesh=TP4, parallel=md.TensorParallel("tp", plan=PLAN))


def test_plans_that_do_not_fit() -> None:
    model, args, _ = models.mlp()
    with pytest.raises(PlanError, match="MLP has no tensor-parallel plan"):
        md.capture(model, args, mesh=TP2, parallel=md.TensorParallel("tp"))
    with pytest.raises(PlanError, match="module 'upp'") as error:
        md.capture(model, args, mesh=TP2, parallel=md.TensorParallel("tp", plan={"upp": ColwiseParallel()}))
    assert "'up'" in error.value.fix
    with pytest.raises(PlanError, match="style 'diagonal'"):
        md.capture(model, args, mesh=TP2, parallel=md.TensorParallel("tp", plan={"up": "diagonal"}))
    with pytest.raises(PlanError, match="module 'up' twice: by 'up' and by '\\*'"):
        md.capture(model, args, mesh=TP2, parallel=md.TensorParallel("tp", plan={"up": "colwise", "*": "rowwise"}))
    with pytest.raises(PlanError, match="axis 'tp' is given twice"):
        md.capture(
            model, args, mesh=TP2, parallel=[md.TensorParallel("tp", plan=PLAN), md.ContextParallel("tp", plan={})]
        )


def test_a_style_that_does_not_fit_its_module() -> None:
    """PyTorch's own exceptions, of several classes, name neither the module nor the plan."""
    model, x = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)), torch.randn(2, 8)
    with pytest.raises(PlanError, match="style ColwiseParallel does not fit module '0', a LayerNorm") as caught:
        md.capture(model, (x,), mesh=TP2, parallel=md.TensorParallel("tp", plan={"0": ColwiseParallel()}))
    assert isinstance(caught.value.__cause__, NotImplementedError)


class OwnCopies(nn.Module):
    """Copies of it have parameters of their own, tied as its are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16))
        self.tied = self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + x @ self.tied

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnCopies:
        made = OwnCopies()
        made.tied = made.weight
        return made


class Between(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.up, self.module, self.down = nn.Linear(16, 16), module, nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(self.module(self.up(x)))
        return y


WHOLE_BETWEEN = md.TensorParallel("tp", {"up": "colwise_gather_output", "down": "rowwise_split_input"})


def test_a_module_that_copies_its_parameters() -> None:
    model, x = Between(OwnCopies()).eval(), torch.randn(2, 16)
    program = md.capture(model, (x,), mesh=TP2, parallel=WHOLE_BETWEEN)
    assert "module.weight" in {weight.name for weight in md.lower(program).read()}
    md.verify(program, model, (x,))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
def test_a_scripted_module_is_refused_where_weights_are_cut() -> None:
    model, x = Between(torch.jit.script(nn.Linear(16, 16))).eval(), torch.randn(2, 16)
    with pytest.raises(CaptureError, match="a module that TorchScript compiled"):
        md.capture(model, (x,), mesh=TP2, parallel=WHOLE_BETWEEN)
    model = Between(torch.jit.script(nn.SiLU())).eval()  # there is nothing to cut
    md.verify(md.capture(model, (x,), mesh=TP2, parallel=WHOLE_BETWEEN), model, (x,))


def test_tied_weights_are_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(16, 16, bias=False)
            self.b = nn.Linear(16, 16, bias=False)
            self.b.weight = self.a.weight
            self.c = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.c(self.b(torch.relu(self.a(x))))
            return result

    torch.manual_seed(0)
    model, x = Tied().eval(), torch.randn(3, 16)
    for plan in (
        {"a": ColwiseParallel(), "b": RowwiseParallel()},
        {"a": "replicate", "c": "colwise_gather_output"},
    ):
        program = md.capture(model, (x,), mesh=TP2, parallel=md.TensorParallel("tp", plan=plan))
        assert md.verify(program, model, (x,)).error <= 1e-5


class CountsItsHeads(nn.Module):
    """Attention that counts its heads itself, as most of diffusers does, with a norm over all of them, as in Wan."""

    def __init__(self, heads: int = 4, width: int = 32) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.over_all, self.over_one = nn.RMSNorm(width), nn.RMSNorm(width // heads, eps=1e-6)

    def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (t.view(batch, tokens, self.heads, -1) for t in (self.over_all(self.q(x)), self.k(x), self.v(x)))
        q, k = self.over_one(q) * table, torch.cat([self.over_one(k)[..., 4:], k[..., :4] * table[..., :4]], dim=-1)
        mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        result: torch.Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return result


COUNTING = {
    **dict.fromkeys("qkv", ColwiseParallel(use_local_output=False)),
    "out": RowwiseParallel(),
}


def counting(dtype: torch.dtype = torch.float32) -> models.Call:
    torch.manual_seed(0)
    model = CountsItsHeads().to(dtype).eval()
    for parameter in model.parameters():  # norms whose weights are ones would hide faults
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model, (torch.randn(1, 6, 32, dtype=dtype), torch.randn(6, 1, 8, dtype=dtype)), {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mesh", [TP4, md.Mesh(tp=2, cp=2)], ids=str)
def test_a_model_that_counts_its_heads_runs_on_dtensors(mesh: md.Mesh, dtype: torch.dtype) -> None:
    """Plain tensors beside them, as the table and the norms' weights, are whole."""
    model, args, _ = counting(dtype)
    sequence = {"": {"x": md.Split(1), "table": md.Split(0)}, "out": md.Gather(1)}
    along: dict[str, Any] = {
        "tp": md.TensorParallel("tp", COUNTING),
        "cp": md.ContextParallel("cp", plan=sequence),
    }
    program = md.lower(md.capture(model, args, mesh=mesh, parallel=[along[axis] for axis in mesh.names]))
    assert all(("k.weight", (8, 32)) in shapes(program, rank) for rank in range(4)) == (mesh == TP4)
    assert md.verify(program, model, args).error <= (1e-5 if dtype == torch.float32 else 1e-2)


def shapes(program: md.ShardedProgram, rank: int) -> set[tuple[str, tuple[int, ...]]]:
    """The weights of a rank's graph, and what it holds of each."""
    nodes = placeholders(program.graphs[rank])
    found = [(program.sources[n.name], n.meta["val"]) for n in nodes]
    return {(source.name, tuple(value.shape)) for source, value in found if isinstance(source, Weight)}


def test_what_counts_heads_on_local_tensors_is_told_what_to_use() -> None:
    model, args, _ = counting()
    model.over_all = nn.Identity()  # else its weight is the first that does not fit
    plan = {**dict.fromkeys("qkv", "colwise"), "out": "rowwise"}
    with pytest.raises(CaptureError, match="shape") as caught:
        md.capture(model, args, mesh=TP4, parallel=md.TensorParallel("tp", plan))
    assert "ColwiseParallel(use_local_output=False)" in (caught.value.fix or "")


def test_dtensor_is_strict_again_behind_a_capture() -> None:
    """A model that the user sharded is traced as PyTorch runs it, which takes no plain tensor beside a DTensor."""
    model, args, _ = counting()
    md.capture(model, args, mesh=TP2, parallel=md.TensorParallel("tp", COUNTING))
    model.over_all = nn.Identity()
    with fake_ranks(2):
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        parallelize_module(model, mesh, COUNTING, src_data_rank=None)
        with pytest.raises(CaptureError, match=r"mixed torch\.Tensor and DTensor"):
            md.capture(model, args, mesh=TP2, parallel=[])
