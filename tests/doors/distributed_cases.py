"""What people write when they shard a model by hand, each as a small function over two ranks, for the test beside it.

The kinds are those of the tests of PyTorch (tensor parallel, DTensor under ``torch.compile``, functional collectives)
and of Torch-TensorRT's distributed tests.  A case gives a function and its arguments; eager PyTorch says what is right.
``python tests/doors/distributed_cases.py`` writes docs/sharded-models.md, which a test compares.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import models
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor import ones as dtensor_ones
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

PAGE = Path(__file__).resolve().parents[2] / "docs" / "sharded-models.md"
TENSOR_PARALLEL = "Tensor parallel"
DTENSORS = "DTensors under torch.compile"
COLLECTIVES = "Collectives"
GROUPS = "Groups of four ranks"
FSDP = "FSDP2"

INTRODUCTION = """# Sharded models as they are written by hand

What `torch.compile(backend="torchtrt_md")` does with a model that communicates by itself: it holds DTensors, or calls
collectives. Made by `PYTHONPATH=tests:. python tests/doors/distributed_cases.py` from the cases that
`tests/doors/test_distributed_cases.py` runs, on real ranks over gloo. *Equal* means that results, arguments that are
written to, and the placements of DTensors are those of eager PyTorch, in each of two calls, on every rank. What is
refused is refused on every rank, while it is compiled, and the error names the way out.

Behind a graph break PyTorch runs what stands between two graphs. So it is where Dynamo itself takes an op for one that
depends on values, as `argmax` of a split dim in torch 2.14.
"""

Made = tuple[Callable[..., Any], tuple[Any, ...]]


@dataclass(frozen=True)
class Case:
    """``make(rank)`` gives a function and its arguments.

    Attributes:
        kind: the heading in the page.
        what: the line in the page.
        refused: what the error says, in part; "" where the case must be equal to eager.
        way_out: what the error's fix says, in part.
        world: how many ranks it is for.
        options: of the backend.
    """

    make: Callable[[int], Made]
    kind: str
    what: str
    refused: str = ""
    way_out: str = ""
    world: int = 2
    options: Mapping[str, Any] = field(default_factory=dict)


CASES: dict[str, Case] = {}


def case(kind: str, what: str, **more: Any) -> Callable[[Callable[[int], Made]], Callable[[int], Made]]:
    def add(make: Callable[[int], Made]) -> Callable[[int], Made]:
        CASES[make.__name__] = Case(make, kind, what, **more)
        return make

    return add


@functools.cache
def mesh_of(name: str = "tp") -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=(name,))


def same(*shape: int, seed: int = 0) -> Tensor:
    """Equal on all ranks."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def own(rank: int, *shape: int) -> Tensor:
    """Another on each rank."""
    return same(*shape, seed=rank + 1)


# --- tensor parallel ---


def sharded_mlp(up: Any, down: Any) -> nn.Module:
    torch.manual_seed(0)
    return parallelize_module(models.MLP().eval(), mesh_of(), {"up": up, "down": down})


@case(TENSOR_PARALLEL, "`ColwiseParallel`, then `RowwiseParallel`")
def mlp(rank: int) -> Made:
    return sharded_mlp(ColwiseParallel(), RowwiseParallel()), (same(2, 8, 32),)


@case(TENSOR_PARALLEL, "inputs and outputs split on the sequence: `input_layouts=Shard(1)`, `output_layouts=Shard(1)`")
def mlp_by_sequence(rank: int) -> Made:
    model = sharded_mlp(ColwiseParallel(input_layouts=Shard(1)), RowwiseParallel(output_layouts=Shard(1)))
    return model, (own(rank, 2, 4, 32),)


@case(TENSOR_PARALLEL, "DTensors between the layers: `use_local_output=False`")
def mlp_of_dtensors(rank: int) -> Made:
    return sharded_mlp(
        ColwiseParallel(use_local_output=False), RowwiseParallel(use_local_output=False, output_layouts=Shard(1))
    ), (same(2, 8, 32),)


@case(TENSOR_PARALLEL, "a gathered `ColwiseParallel` and a `RowwiseParallel` of a whole input")
def mlp_gathered(rank: int) -> Made:
    model = sharded_mlp(ColwiseParallel(output_layouts=Replicate()), RowwiseParallel(input_layouts=Replicate()))
    return model, (same(2, 8, 32),)


class Prepared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = models.MLP()

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.mlp(x + y)


@case(TENSOR_PARALLEL, "`PrepareModuleInput` and `PrepareModuleOutput`")
def prepared(rank: int) -> Made:
    torch.manual_seed(0)
    plan: dict[str, Any] = {
        "": PrepareModuleInput(
            input_layouts=(Shard(0), None), desired_input_layouts=(Replicate(), None), use_local_output=True
        ),
        "mlp": PrepareModuleOutput(output_layouts=Replicate(), desired_output_layouts=Shard(1)),
        "mlp.up": ColwiseParallel(),
        "mlp.down": RowwiseParallel(),
    }
    model = Prepared().eval()
    mesh = mesh_of()
    parallelize_module(model, mesh, plan[""])
    parallelize_module(model, mesh, {name: style for name, style in plan.items() if name})
    return model, (own(rank, 1, 8, 32), same(2, 8, 32))


@case(TENSOR_PARALLEL, "`nn.Embedding`, split by `ColwiseParallel`")
def embedding_by_columns(rank: int) -> Made:
    torch.manual_seed(0)
    model = parallelize_module(nn.Embedding(16, 8), mesh_of(), ColwiseParallel(output_layouts=Replicate()))
    return model, (torch.arange(12).view(2, 6),)


@case(TENSOR_PARALLEL, "`nn.Embedding`, its vocabulary split by `RowwiseParallel`")
def embedding_by_rows(rank: int) -> Made:
    torch.manual_seed(0)
    model = parallelize_module(nn.Embedding(16, 8), mesh_of(), RowwiseParallel(input_layouts=Replicate()))
    return model, (torch.arange(12).view(2, 6),)


class Attention(nn.Module):
    """Attention as in the tutorials: heads counted by -1, so that it serves DTensors and their local parts."""

    def __init__(self, heads: int = 4, kv_heads: int = 4, causal: bool = False) -> None:
        super().__init__()
        self.head_dim, self.causal, self.grouped = 8, causal, heads != kv_heads
        self.norm = nn.LayerNorm(32)
        self.q, self.k, self.v = (nn.Linear(32, 8 * n, bias=False) for n in (heads, kv_heads, kv_heads))
        self.out = nn.Linear(8 * heads, 32)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        x = self.norm(x)
        q, k, v = (part(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal, enable_gqa=self.grouped)
        return self.out(y.transpose(1, 2).flatten(2))


def sharded_attention(heads: int = 4, kv_heads: int = 4, causal: bool = False, **colwise: Any) -> nn.Module:
    torch.manual_seed(0)
    style = {name: ColwiseParallel(**colwise) for name in ("q", "k", "v")}
    return parallelize_module(Attention(heads, kv_heads, causal).eval(), mesh_of(), {**style, "out": RowwiseParallel()})


@case(TENSOR_PARALLEL, "attention over local heads")
def attention_local(rank: int) -> Made:
    return sharded_attention(causal=True), (same(2, 8, 32),)


@case(TENSOR_PARALLEL, "DTensors into attention: `use_local_output=False`")
def attention_of_dtensors(rank: int) -> Made:
    return sharded_attention(use_local_output=False), (same(2, 8, 32),)


@case(TENSOR_PARALLEL, "DTensors into grouped-query attention")
def grouped_attention_of_dtensors(rank: int) -> Made:
    return sharded_attention(4, 2, use_local_output=False), (same(2, 8, 32),)


@case(TENSOR_PARALLEL, "DTensors into grouped-query attention, whose key/value heads do not divide by the ranks")
def uneven_grouped_attention_of_dtensors(rank: int) -> Made:
    return grouped_uneven, (distributed(same(2, 4, 6, 8), 0), distributed(same(2, 1, 6, 8, seed=1), None))


def grouped_uneven(q: Tensor, k: Tensor) -> Any:
    return F.scaled_dot_product_attention(q, k, k, enable_gqa=True) * 2


@case(TENSOR_PARALLEL, "DTensors into attention with a mask that is a DTensor")
def masked_attention_of_dtensors(rank: int) -> Made:
    mask = distribute_tensor(same(2, 4, 8, 8) > 0, mesh_of(), [Shard(1)])
    return sharded_attention(use_local_output=False), (same(2, 8, 32), mask)


class Block(nn.Module):
    """A block of a transformer, with norms that are sequence parallel."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm, self.mlp = Attention(), nn.LayerNorm(32), models.MLP()

    def forward(self, x: Tensor) -> Any:
        x = x + self.attention(x)
        return x + self.mlp(self.norm(x))


class Decoder(nn.Module):
    """Tokens to logits."""

    def __init__(self, pick: str = "logits") -> None:
        super().__init__()
        self.embed, self.pick = nn.Embedding(16, 32), pick
        self.blocks = nn.ModuleList([Block()])
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 16, bias=False)

    def forward(self, ids: Tensor) -> Any:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        if self.pick == "argmax":
            return logits.argmax(-1)
        if self.pick == "max":
            return logits.max(-1)
        return logits


def sequence_parallel(head: Any, pick: str = "logits") -> nn.Module:
    """The plan of the tutorial on tensor and sequence parallelism."""
    torch.manual_seed(0)
    mesh = mesh_of()
    model = Decoder(pick).eval()
    plan: dict[str, Any] = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "head": head,
    }
    block: dict[str, Any] = {
        "attention.norm": SequenceParallel(),
        **{
            f"attention.{name}": ColwiseParallel(input_layouts=Shard(1), use_local_output=False)
            for name in ("q", "k", "v")
        },
        "attention.out": RowwiseParallel(output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "mlp.up": ColwiseParallel(input_layouts=Shard(1)),
        "mlp.down": RowwiseParallel(output_layouts=Shard(1)),
    }
    parallelize_module(model, mesh, plan)
    for each in model.blocks:
        parallelize_module(each, mesh, block)
    return model


@case(TENSOR_PARALLEL, "a decoder, sequence parallel between its products, with gathered logits")
def decoder(rank: int) -> Made:
    model = sequence_parallel(ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()))
    return model, (torch.arange(16).view(2, 8),)


@case(TENSOR_PARALLEL, "the same, its logits a DTensor that is split on the vocabulary")
def decoder_of_dtensors(rank: int) -> Made:
    model = sequence_parallel(ColwiseParallel(input_layouts=Shard(1), use_local_output=False))
    return model, (torch.arange(16).view(2, 8),)


@case(TENSOR_PARALLEL, "`argmax` of logits that are split on the vocabulary")
def decoder_argmax(rank: int) -> Made:
    model = sequence_parallel(ColwiseParallel(input_layouts=Shard(1), use_local_output=False), "argmax")
    return model, (torch.arange(16).view(2, 8),)


@case(TENSOR_PARALLEL, "`max` of logits that are split on the vocabulary")
def decoder_max(rank: int) -> Made:
    model = sequence_parallel(ColwiseParallel(input_layouts=Shard(1), use_local_output=False), "max")
    return model, (torch.arange(16).view(2, 8),)


@case(TENSOR_PARALLEL, "the softmax and log-softmax of a split dim")
def split_softmax(rank: int) -> Made:
    head = parallelize_module(nn.Linear(8, 16).eval(), mesh_of(), ColwiseParallel(use_local_output=False))
    with torch.no_grad():
        for p in head.parameters():
            p.fill_(0.25)

    def function(x: Tensor) -> Any:
        logits = head(x)
        return logits.softmax(-1), logits.log_softmax(-1).full_tensor()

    return function, (same(4, 8),)


@case(TENSOR_PARALLEL, "an embedding and a head of one weight")
def tied(rank: int) -> Made:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)).eval()
    mesh = mesh_of()
    embed: Any = model[0]
    head: Any = model[1]
    weight = nn.Parameter(distribute_tensor(embed.weight.detach(), mesh, [Shard(0)]))
    embed.weight = head.weight = weight

    def function(ids: Tensor) -> Any:
        x = embed(DTensor.from_local(ids, mesh, run_check=False)).redistribute(placements=[Replicate()])
        return head(x).full_tensor()

    return function, (torch.arange(12).view(2, 6),)


@case(
    TENSOR_PARALLEL,
    "a weight whose split dim does not divide by the ranks",
    refused="parameter 'up.weight' of shape [63, 32] is placed as",
    way_out="a dim that divides by the axis",
)
def uneven_weight(rank: int) -> Made:
    torch.manual_seed(0)
    plan = {"up": ColwiseParallel(use_local_output=False), "down": RowwiseParallel()}
    return parallelize_module(models.MLP(32, 63).eval(), mesh_of(), plan), (same(2, 8, 32),)


# --- DTensors ---


def distributed(whole: Tensor, dim: int | None, mesh: DeviceMesh | None = None) -> DTensor:
    return distribute_tensor(whole, mesh or mesh_of(), [Replicate() if dim is None else Shard(dim)])


@case(DTENSORS, "a DTensor in, a DTensor out")
def in_and_out(rank: int) -> Made:
    return lambda x: x.sin() + 1, (distributed(same(4, 6), 0),)


@case(DTENSORS, "two DTensors of different placements, the result redistributed")
def two_in(rank: int) -> Made:
    mesh = mesh_of()

    def function(x: Any, y: Any) -> Any:
        return (x @ y).redistribute(mesh, [Shard(0)])

    return function, (distributed(same(4, 6), 1, mesh), distributed(same(6, 2), 0, mesh))


@case(DTENSORS, "a sum that stays `Partial` when it is returned")
def partial_out(rank: int) -> Made:
    return lambda x: x.sum(0), (distributed(same(4, 6), 0),)


@case(DTENSORS, "a `Partial` DTensor in")
def partial_in(rank: int) -> Made:
    return (
        lambda x: x.redistribute(placements=[Replicate()]) * 2,
        (DTensor.from_local(own(rank, 4, 6), mesh_of(), [Partial()], run_check=False),),
    )


@case(DTENSORS, "`from_local`, `redistribute`, `to_local`")
def from_local(rank: int) -> Made:
    mesh = mesh_of()

    def function(x: Tensor) -> Any:
        whole: Any = DTensor.from_local(x, mesh, [Shard(0)], run_check=False).redistribute(mesh, [Replicate()])
        return (whole * 2).to_local() + whole.full_tensor()

    return function, (own(rank, 2, 6),)


@case(DTENSORS, "from one split dim to another")
def other_dim(rank: int) -> Made:
    return lambda x: (x * 2).redistribute(placements=[Shard(1)]).to_local(), (distributed(same(4, 6), 0),)


@case(DTENSORS, "`from_local` of a sum that is not reduced yet")
def from_partial(rank: int) -> Made:
    mesh = mesh_of()

    def function(x: Tensor) -> Any:
        summed = DTensor.from_local(x, mesh, [Partial()], run_check=False)
        return summed.redistribute(mesh, [Shard(0)]).to_local(), summed.redistribute(mesh, [Replicate()]).to_local()

    return function, (own(rank, 4, 6),)


@case(DTENSORS, "`distribute_tensor` and `full_tensor` in the function")
def distribute_inside(rank: int) -> Made:
    mesh = mesh_of()

    def function(x: Tensor) -> Any:
        y: Any = distribute_tensor(x, mesh, [Shard(0)]) + 1
        return y.full_tensor()

    return function, (same(4, 6),)


@case(DTENSORS, "a DTensor made in the function by `torch.distributed.tensor.ones`")
def made_inside(rank: int) -> Made:
    mesh = mesh_of()
    return lambda x: x + dtensor_ones(4, 6, device_mesh=mesh, placements=[Shard(0)]), (
        distributed(same(4, 6), 0, mesh),
    )


@case(DTENSORS, "DTensors across a graph break")
def across_a_break(rank: int) -> Made:
    def function(x: Any) -> Any:
        y = x * 2
        torch._dynamo.graph_break()
        return y + 1

    return function, (distributed(same(4, 6), 0),)


@case(DTENSORS, "a sharded model that breaks between its layers, DTensors on both sides")
def model_across_a_break(rank: int) -> Made:
    model: Any = sharded_mlp(ColwiseParallel(use_local_output=False), RowwiseParallel())

    def function(x: Any) -> Any:
        hidden = model.up(x)
        torch._dynamo.graph_break()
        return model.down(F.gelu(hidden))

    return function, (same(2, 8, 32),)


@case(DTENSORS, "a transposed DTensor in, and one out")
def transposed(rank: int) -> Made:
    return lambda x: (x.t() * 2).t().transpose(0, 1), (distributed(same(4, 6), 0).t(),)


@case(DTENSORS, "DTensors in a dict and a list, beside plain tensors")
def nested(rank: int) -> Made:
    mesh = mesh_of()

    def function(given: dict[str, Any], plain: Tensor) -> Any:
        return {"a": given["x"] + 1, "b": [given["y"].to_local() * plain, plain + 1], "n": 3}

    return function, ({"x": distributed(same(4, 6), 0, mesh), "y": distributed(same(4, 6), None, mesh)}, same(4, 6))


@case(DTENSORS, "what a function does depends on placements and on the mesh")
def reads_placements(rank: int) -> Made:
    def function(x: Any) -> Any:
        scale = x.device_mesh.size() if x.placements[0].is_shard() else 1
        return x.to_local() * scale + x.shape[0]

    return function, (distributed(same(4, 6), 0),)


@case(DTENSORS, "a DTensor returned as it came, and twice")
def returned_twice(rank: int) -> Made:
    def function(x: Any) -> Any:
        y = x + 1
        return x, y, y

    return function, (distributed(same(4, 6), 0),)


@case(DTENSORS, "a DTensor that is an attribute of a module, no parameter of it")
def attribute(rank: int) -> Made:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.state = distributed(same(6, 6), None)

        def forward(self, x: Any) -> Any:
            return x @ self.state

    return Model(), (distributed(same(4, 6), 0),)


@case(DTENSORS, "a DTensor that is written to")
def written_dtensor(rank: int) -> Made:
    def function(x: Any) -> Any:
        x.add_(1)
        return x * 2

    return function, (distributed(same(4, 6), 0),)


@case(
    DTENSORS,
    "a DTensor whose parts are not of one size",
    refused="the input 'x' is a DTensor of [3, 6], placed as",
    way_out="a dim that divides",
)
def uneven_dtensor(rank: int) -> Made:
    return lambda x: x + 1, (distributed(same(3, 6), 0),)


@case(
    DTENSORS,
    "a DTensor of uneven parts across a graph break",
    refused="output 0 of the graph is a DTensor of [3, 6], placed as",
    way_out="it crosses a break of the graph",
)
def uneven_across_a_break(rank: int) -> Made:
    mesh = mesh_of()

    def function(x: Any) -> Any:
        y: Any = DTensor.from_local(x, mesh, [Shard(0)], run_check=False, shape=torch.Size([3, 6]), stride=(6, 1)) * 2
        torch._dynamo.graph_break()
        return y.full_tensor()

    return function, (same(2 - rank, 6),)


# --- collectives ---


def world() -> Any:
    return dist.group.WORLD


for _op in ("sum", "avg", "max", "min", "product"):

    def _reduced(rank: int, op: str = _op) -> Made:
        return lambda x: funcol.all_reduce(x * 2, op, world()) + 1, (own(rank, 4, 6),)

    _reduced.__name__ = f"all_reduce_{_op}"
    case(COLLECTIVES, f'`funcol.all_reduce(x, "{_op}", group)`')(_reduced)


@case(COLLECTIVES, "`all_reduce` of integers")
def all_reduce_int(rank: int) -> Made:
    return lambda x: funcol.all_reduce(x, "sum", world()), (torch.arange(6) + rank,)


@case(COLLECTIVES, "`all_gather_tensor` on dims 0 and 1")
def all_gather(rank: int) -> Made:
    return (
        lambda x: (funcol.all_gather_tensor(x, 0, world()) + 1, funcol.all_gather_tensor(x, 1, world()) * 2),
        (own(rank, 4, 6),),
    )


@case(COLLECTIVES, "`reduce_scatter_tensor` on dims 0 and 1")
def reduce_scatter(rank: int) -> Made:
    return (
        lambda x: (
            funcol.reduce_scatter_tensor(x, "sum", 0, world()) + 1,
            funcol.reduce_scatter_tensor(x, "avg", 1, world()) * 2,
        ),
        (own(rank, 4, 6),),
    )


@case(COLLECTIVES, "`all_to_all_single` of equal parts")
def all_to_all(rank: int) -> Made:
    return lambda x: funcol.all_to_all_single(x, None, None, world()) + 1, (own(rank, 4, 6),)


@case(COLLECTIVES, "`all_to_all_single` of equal parts that are given, of int64")
def all_to_all_int64(rank: int) -> Made:
    return lambda x: funcol.all_to_all_single(x, [2, 2], [2, 2], world()) + 1, (torch.arange(8).view(4, 2) << 40,)


@case(
    COLLECTIVES,
    "`all_to_all_single` of unequal parts",
    refused="_c10d_functional.all_to_all_single.default in node 'all_to_all_single' sends parts of",
    way_out="an equal part of the 4 rows",
)
def all_to_all_uneven(rank: int) -> Made:
    sent = [1, 3] if rank == 0 else [3, 1]
    return lambda x: funcol.all_to_all_single(x, sent, sent, world()), (own(rank, 4, 6),)


@case(COLLECTIVES, "`broadcast`")
def broadcast(rank: int) -> Made:
    return lambda x: funcol.broadcast(x, 1, world()) + 1, (own(rank, 4, 6),)


@case(COLLECTIVES, "coalesced forms")
def coalesced(rank: int) -> Made:
    def function(x: Tensor, y: Tensor) -> Any:
        reduced = funcol.all_reduce_coalesced([x, y], "sum", world())
        gathered = funcol.all_gather_into_tensor_coalesced([x, y], world())
        scattered = funcol.reduce_scatter_tensor_coalesced([x, y], "sum", [0, 0], world())
        return [t + 1 for t in (*reduced, *gathered, *scattered)]

    return function, (own(rank, 4, 6), own(rank, 2))


@case(COLLECTIVES, "a result that is returned while it may be under way")
def returned(rank: int) -> Made:
    return lambda x: funcol.all_reduce(x, "sum", world()), (own(rank, 4, 6),)


@case(COLLECTIVES, "groups as a `DeviceMesh`, as a mesh and its dim, and as a process group")
def forms_of_groups(rank: int) -> Made:
    mesh = mesh_of()
    groups: list[Any] = [mesh, (mesh, 0), mesh.get_group(0)]
    return lambda x: sum(funcol.all_reduce(x * i, "sum", g) for i, g in enumerate(groups, 1)), (own(rank, 4),)


@case(COLLECTIVES, "rank and size are asked in the function")
def rank_inside(rank: int) -> Made:
    def function(x: Tensor) -> Any:
        mine = x.chunk(dist.get_world_size())[dist.get_rank()]
        return funcol.all_gather_tensor(mine, 0, world()) * 2

    return function, (same(4, 6),)


@case(COLLECTIVES, "`dist.all_reduce` of a value of the function")
def in_place_value(rank: int) -> Made:
    def function(x: Tensor) -> Any:
        y = x * 2
        dist.all_reduce(y)
        return y + 1

    return function, (own(rank, 4, 6),)


@case(COLLECTIVES, "`dist.all_reduce` of an argument, which is used after")
def in_place_argument(rank: int) -> Made:
    def function(x: Tensor) -> Any:
        dist.all_reduce(x)
        return x + 1

    return function, (own(rank, 4, 6),)


@case(COLLECTIVES, "`dist.all_reduce` of an argument, which is all that the function does")
def in_place_only(rank: int) -> Made:
    def function(x: Tensor) -> None:
        dist.all_reduce(x, op=dist.ReduceOp.MAX)

    return function, (own(rank, 4, 6),)


@case(COLLECTIVES, "`dist.all_reduce` of a part of an argument")
def in_place_part(rank: int) -> Made:
    def function(x: Tensor) -> Any:
        dist.all_reduce(x[1:3])
        return x.sum()

    return function, (own(rank, 4, 6),)


@case(
    COLLECTIVES,
    "`dist.all_reduce` of an argument that shares its memory with another",
    refused="the graph writes to the input 'x', which shares memory with the input 'y'",
    way_out="clone",
)
def in_place_shared(rank: int) -> Made:
    def function(x: Tensor, y: Tensor) -> Any:
        dist.all_reduce(x)
        return x + y

    whole = own(rank, 4, 6)
    return function, (whole[:3], whole[1:])


@case(COLLECTIVES, "`dist.all_gather_into_tensor` and `dist.reduce_scatter_tensor` into tensors of the function")
def into_tensors(rank: int) -> Made:
    def function(x: Tensor) -> Any:
        whole, part = x.new_empty(8, 6), x.new_empty(2, 6)
        dist.all_gather_into_tensor(whole, x)
        dist.reduce_scatter_tensor(part, x)
        return whole + 1, part + 1

    return function, (own(rank, 4, 6),)


@case(COLLECTIVES, "`dist.all_gather_into_tensor` into an argument")
def into_argument(rank: int) -> Made:
    def function(x: Tensor, out: Tensor) -> Any:
        dist.all_gather_into_tensor(out, x)
        return out * 2

    return function, (own(rank, 4, 6), torch.zeros(8, 6))


@case(COLLECTIVES, "`dist.all_to_all_single` into a tensor of the function")
def exchanged_into(rank: int) -> Made:
    def function(x: Tensor) -> Any:
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x)
        return out + 1

    return function, (own(rank, 4, 6),)


@case(COLLECTIVES, "`dist.all_gather` into a list of tensors")
def all_gather_list(rank: int) -> Made:
    def function(x: Tensor) -> Any:
        parts = [torch.empty_like(x) for _ in range(2)]
        dist.all_gather(parts, x)
        return torch.cat(parts) + 1

    return function, (own(rank, 4, 6),)


class Cache(nn.Module):
    """Keys of all steps in a buffer, written at an index."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(1, 8, 4))

    keys: Tensor

    def forward(self, x: Tensor) -> Any:
        self.keys[:, 2:4] = x
        return self.keys.sum(1)


@case(
    COLLECTIVES,
    "a buffer, such as of keys and values, that is written at an index",
    refused="the model writes to an input or a buffer in its forward: 'keys'",
    way_out="pass the buffer in and return the new value",
)
def written_buffer(rank: int) -> Made:
    return Cache(), (same(1, 2, 4),)


@case(COLLECTIVES, "keys and values that are an argument, written at an index")
def written_cache(rank: int) -> Made:
    def function(x: Tensor, keys: Tensor) -> Any:
        keys[:, 2:4] = x
        return keys.sum(1)

    return function, (same(1, 2, 4), torch.ones(1, 8, 4))


# --- FSDP2 ---


@case(FSDP, "`fully_shard` of each block and of the model, the model compiled")
def fsdp_model(rank: int) -> Made:
    torch.manual_seed(0)
    model = nn.Sequential(models.MLP(), models.MLP()).eval().requires_grad_(False)
    mesh = mesh_of("fsdp")
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, (own(rank, 2, 8, 32),)


# --- four ranks ---


def pairs(rank: int, of: list[list[int]]) -> Any:
    groups = [dist.new_group(ranks) for ranks in of]
    return next(group for group, ranks in zip(groups, of, strict=True) if rank in ranks)


@case(GROUPS, "groups of neighbours, [0, 1] and [2, 3]", world=4)
def neighbours(rank: int) -> Made:
    group = pairs(rank, [[0, 1], [2, 3]])
    return lambda x: funcol.all_reduce(x, "sum", group) + 1, (own(rank, 4),)


@case(GROUPS, "groups of every second rank, [0, 2] and [1, 3]", world=4)
def every_second(rank: int) -> Made:
    group = pairs(rank, [[0, 2], [1, 3]])
    return lambda x: funcol.all_gather_tensor(x, 0, group) + 1, (own(rank, 4),)


@case(GROUPS, "both of these", world=4)
def both(rank: int) -> Made:
    near, far = pairs(rank, [[0, 1], [2, 3]]), pairs(rank, [[0, 2], [1, 3]])
    return lambda x: funcol.all_reduce(funcol.all_gather_tensor(x, 0, near), "max", far), (own(rank, 4),)


@case(GROUPS, "all ranks beside groups of neighbours", world=4)
def all_beside_neighbours(rank: int) -> Made:
    group: Any = pairs(rank, [[0, 1], [2, 3]])
    world: Any = dist.group.WORLD
    return lambda x: funcol.all_reduce(funcol.all_gather_tensor(x, 0, group), "avg", world), (own(rank, 4),)


def of_both_axes(do: Callable[[Tensor, Any], Any], name: str) -> Callable[[int], Made]:
    def make(rank: int) -> Made:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
        inner: Any = mesh["inner"].get_group()
        both: Any = dist.group.WORLD
        return lambda x: do(funcol.all_reduce(x, "max", inner) + x, both), (own(rank, 8, 4),)

    make.__name__ = f"{name} over both axes"
    return make


for _what, _do in {
    "`all_gather_tensor`": lambda x, group: funcol.all_gather_tensor(x, 0, group),
    "`all_gather_tensor` on another dim": lambda x, group: funcol.all_gather_tensor(x, 1, group),
    "`reduce_scatter_tensor`": lambda x, group: funcol.reduce_scatter_tensor(x, "sum", 0, group),
    "`all_to_all_single`": lambda x, group: funcol.all_to_all_single(x, None, None, group),
    "`broadcast` from rank 1": lambda x, group: funcol.broadcast(x, 1, group),
    "`broadcast` from rank 2": lambda x, group: funcol.broadcast(x, 2, group),
}.items():
    case(GROUPS, f"{_what} over both axes of a mesh", world=4)(of_both_axes(_do, _what))


@case(GROUPS, "a DTensor of a mesh of two axes, gathered over their flattened mesh", world=4)
def over_a_flattened_mesh(rank: int) -> Made:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    mesh._flatten()

    def gathered(x: Tensor) -> Tensor:
        split: Any = DTensor.from_local(x, mesh, [Shard(0), Shard(0)], run_check=False)
        whole: Tensor = (split * 2).full_tensor()
        return whole

    return gathered, (own(rank, 4, 3),)


@case(
    GROUPS,
    "a group of some ranks, beside ranks that do not communicate",
    world=4,
    refused="the ranks differ in the mesh that their groups make",
    way_out="every rank",
)
def some_ranks(rank: int) -> Made:
    group: Any = dist.new_group([0, 1])
    return (lambda x: funcol.all_reduce(x, "sum", group) + 1) if rank < 2 else (lambda x: x + 1), (own(rank, 4),)


def page() -> str:
    """docs/sharded-models.md."""
    lines = [INTRODUCTION]
    for kind in dict.fromkeys(case.kind for case in CASES.values()):
        lines += [f"## {kind}", "", "| case | result |", "|---|---|"]
        for each in CASES.values():
            if each.kind == kind:
                result = f"refused: `{each.refused}`; way out: {each.way_out}" if each.refused else "equal"
                lines.append(f"| {each.what} | {result} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page())
