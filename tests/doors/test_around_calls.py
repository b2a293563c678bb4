"""What is around a call and is none of the program: autocast, inference mode, threads, what other ranks hold."""

from __future__ import annotations

import threading
from typing import Any

import models
import pytest
import quantized
import torch
from in_pytorch import error, message_of
from rank_processes import Ranks
from torch import Tensor, nn
from torch.distributed import _functional_collectives as funcol
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import torchtrt_md as md

PLAN = {"": {"x": md.Split(1)}, "out": md.Gather(1)}
OPTIONS: dict[str, Any] = {"compute": "inductor", "report": False, "timeout": 60.0}
MESH = {"mesh": md.Mesh(cp=2)}


def options(strategy: Any = "ulysses") -> dict[str, Any]:
    return {**OPTIONS, **MESH, "parallel": md.ContextParallel("cp", strategy, PLAN)}


def called_under_autocast(rank: int, strategy: str) -> list[float]:
    model, (x,), _ = models.attention()
    with torch.no_grad(), md.compile(model, (x,), **options(strategy)) as runner:
        dense = model(x)
        found = [error(runner(x), dense)]
        with torch.autocast("cpu", torch.bfloat16):
            found += [error(runner(x), dense) for _ in range(3)]
        return found


@pytest.mark.parametrize("strategy", ["ulysses", "allgather_kv", "ring"])
def test_a_call_under_autocast_computes_what_was_compiled(strategy: str, ranks: Ranks) -> None:
    for outcome in ranks(called_under_autocast, strategy):
        assert not outcome.error, outcome.message
        assert max(outcome.value) < 1e-5


def compiled_in_inference_mode(rank: int) -> tuple[bool, str]:
    model, (x,), _ = models.attention()
    with torch.inference_mode():
        runner = md.compile(model, (x,), **options())
    made = any(p.is_inference() for p in model.parameters())
    model(x).sum().backward()
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    with runner, pytest.raises(md.InputError) as raised, torch.no_grad():
        runner(x)
    return made, raised.value.problem


def test_what_is_compiled_in_inference_mode_leaves_the_parameters_as_they_were(ranks: Ranks) -> None:
    for outcome in ranks(compiled_in_inference_mode):
        assert not outcome.error, outcome.message
        made, problem = outcome.value
        assert not made
        assert "was changed after the model was compiled" in problem


def called_from_two_threads(rank: int) -> list[str]:
    """The second thread calls while the first is held up within a call."""
    model, (x,), _ = models.attention()
    with torch.no_grad(), md.compile(model, (x,), **options()) as runner:
        there, said = threading.Event(), []

        def bind() -> dict[str, Tensor]:
            other = threading.Thread(target=second)
            other.start()
            other.join(30)
            return runner.signature.bind((x,), {}, torch.device("cpu"))

        def second() -> None:
            there.set()
            try:
                runner(x)
            except md.MDError as raised:
                said.append(raised.problem)

        runner.call(bind)
        assert there.is_set()
        runner(x)
        return said


def test_two_threads_at_once_are_refused(ranks: Ranks) -> None:
    for outcome in ranks(called_from_two_threads):
        assert not outcome.error, outcome.message
        (said,) = outcome.value
        assert "was called from two threads at once" in said


class Fourier(models.SelfAttention):
    def __init__(self, seed: int, scale: float = 1.0) -> None:
        super().__init__()
        self.freqs, self.scale = torch.randn(32, generator=torch.Generator().manual_seed(seed)), scale

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.freqs * self.scale)


def with_code_of_its_own(rank: int, what: str, check: bool) -> str:
    torch.manual_seed(0)
    model = Fourier(rank) if what == "tensor" else Fourier(0, scale=1.0 + rank)
    return message_of(lambda: md.compile(model.eval(), (torch.randn(2, 16, 32),), **options(), check=check))


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(("what", "named"), [("tensor", "freqs: rank 0 has"), ("number", "the graph: rank 0 has")])
def test_ranks_whose_code_holds_other_values_are_refused(what: str, named: str, check: bool, ranks: Ranks) -> None:
    first, second = ranks(with_code_of_its_own, what, check)
    assert not first.error, first.message
    assert first.value == second.value
    assert first.value.startswith("RankMismatchError: ")
    assert "the ranks differ in what the model's code holds beside weights and inputs" in first.value
    assert named in first.value


class Kept(models.SelfAttention):
    """Keeps a tensor, which is no result."""

    last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = x * 3
        return super().forward(x)


def keeps_unchecked(rank: int) -> str:
    torch.manual_seed(0)
    torch.compiler.reset()
    model = Kept().eval()
    compiled = torch.compile(model, backend="torchtrt_md", options={**options(), "check": False})
    with torch.no_grad():
        return message_of(lambda: compiled(torch.randn(2, 16, 32)))


def test_what_a_model_keeps_is_not_taken_for_a_result(ranks: Ranks) -> None:
    for outcome in ranks(keeps_unchecked):
        assert not outcome.error, outcome.message
        assert "is none of the model's under the plan" in outcome.value


class Scaled(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.out, self.scale = nn.Linear(32, 32), torch.full((32,), scale)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(x * self.scale)
        return y


def two_of(rank: int, kind: str) -> tuple[str, list[float]]:
    """Two modules of a class, each compiled by itself; what was said of the second, and how far off they are."""
    torch.manual_seed(0)
    torch.compiler.reset()
    how = options()
    if kind == "tensor parallel":
        modules: list[nn.Module] = [models.mlp()[0] for _ in range(2)]
        for p in modules[1].parameters():
            p.data.mul_(0.5)
        x = models.mlp()[1][0]
        parallel = md.TensorParallel("tp", {"up": "colwise", "down": "rowwise"})
        how = {**OPTIONS, "mesh": md.Mesh(tp=2), "parallel": parallel}
    elif kind == "joined products":
        modules, x = [models.SelfAttention().eval() for _ in range(2)], torch.randn(2, 16, 32)
    else:
        modules, x = [Scaled(float(kind == "other tensors") * n + 1) for n in range(2)], torch.randn(2, 16, 32)
    said, errors = "", []
    with torch.no_grad():
        for module in modules:
            compiled = torch.compile(module, backend="torchtrt_md", options=how)
            try:
                errors.append(error(compiled(x), module(x)))
            except md.MDError as raised:
                said = str(raised)
    return said, errors


@pytest.mark.parametrize("kind", ["joined products", "tensor parallel", "equal tensors"])
def test_equal_modules_have_weights_of_their_own(kind: str, ranks: Ranks) -> None:
    for outcome in ranks(two_of, kind):
        assert not outcome.error, outcome.message
        said, errors = outcome.value
        assert not said
        assert len(errors) == 2
        assert max(errors) < 1e-5


def test_equal_modules_with_other_plain_tensors_are_refused(ranks: Ranks) -> None:
    for outcome in ranks(two_of, "other tensors"):
        assert not outcome.error, outcome.message
        said, errors = outcome.value
        assert len(errors) == 1
        assert "'self.scale' is a tensor, no parameter and no buffer, with other values" in said
        assert "register it as a buffer" in said


class Halves(nn.Module):
    """Communicates by itself, and returns views."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor, cache: Tensor) -> tuple[Tensor, ...]:
        y = funcol.all_reduce(self.q(x), "avg", [0, 1])
        return y, y[:2], y.t(), cache[0], cache, cache[:, 1:3].transpose(0, 1), cache + 1


def views_of(rank: int) -> tuple[list[list[float]], list[list[float]], bool]:
    """What all results are behind writes to some of them, by the compiled model and by the model itself."""
    torch.manual_seed(0)
    torch.compiler.reset()
    model = Halves().eval()
    x, cache = torch.randn(4, 8), torch.randn(2, 4, 8)
    compiled = torch.compile(model, backend="torchtrt_md", options=OPTIONS)
    found = []
    with torch.no_grad():
        for call in (compiled, model):
            # in front of it, where its own memory begins elsewhere
            mine = torch.cat([torch.zeros_like(cache), cache])[2:]
            y, first, turned, part, whole, middle, other = call(x, mine)
            first.zero_()
            turned[5] = 3
            part[3] = 5
            middle[0, 1] = 7
            other.zero_()
            found.append([t.flatten().tolist() for t in (y, first, turned, part, whole, middle, other, mine)])
        again = compiled(x, cache)[0]
        return found[0], found[1], bool((again - model(x, cache)[0]).abs().max() < 1e-5)


class Broken(Halves):
    def forward(self, x: Tensor, cache: Tensor) -> tuple[Tensor, ...]:
        part, y = cache[0], funcol.all_reduce(self.q(x), "avg", [0, 1])
        torch._dynamo.graph_break()
        part[:] = y
        return (cache + 1,)


def broken_in_two(rank: int) -> str:
    """The second graph writes to a view that the first made, and reads what it is a view of."""
    torch.manual_seed(0)
    torch.compiler.reset()
    compiled = torch.compile(Broken().eval(), backend="torchtrt_md", options=OPTIONS)
    with torch.no_grad():
        return message_of(lambda: compiled(torch.randn(4, 8), torch.randn(2, 4, 8)))


def test_a_view_that_is_written_behind_a_break_is_refused_beside_what_it_is_of(ranks: Ranks) -> None:
    for outcome in ranks(broken_in_two):
        assert not outcome.error, outcome.message
        assert "which shares memory with the input" in outcome.value


def test_results_that_are_views_are_views_of_the_same(ranks: Ranks) -> None:
    for outcome in ranks(views_of):
        assert not outcome.error, outcome.message
        ours, theirs, right = outcome.value
        for one, other in zip(ours, theirs, strict=True):
            assert one == pytest.approx(other, abs=1e-5)
        assert right


class Tabled(nn.Module):
    """Returns a tensor that it holds beside what it computes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.table = models.attention()[0], torch.arange(4.0)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.attention(x) + self.table.sum(), self.table


def written_results(rank: int) -> list[list[float]]:
    x, found = models.attention()[1][0], []
    parallel = md.ContextParallel("cp", plan={"attention": {"x": md.Split(1)}, "attention.out": md.Gather(1)})
    with torch.no_grad(), md.compile(Tabled().eval(), (x,), **{**OPTIONS, **MESH}, parallel=parallel) as runner:
        for _ in range(2):
            _, table = runner(x)
            found.append(table.tolist())
            table.mul_(5)
    return found


def test_a_constant_that_is_returned_is_the_users_to_write_to(ranks: Ranks) -> None:
    for outcome in ranks(written_results):
        assert not outcome.error, outcome.message
        assert outcome.value == [[0.0, 1.0, 2.0, 3.0]] * 2


def seeded_mlp() -> models.MLP:
    torch.manual_seed(0)
    return models.MLP().eval()


def written_weights(rank: int, how: str) -> str:
    """Writes that go through a tensor subclass, which PyTorch counts there and not of what it holds."""
    x, parallel = torch.randn(4, 32), None
    if how == "quantized":
        model, other = (quantized.mlp("int8 weights")[0] for _ in range(2))
        x, parallel = quantized.mlp("int8 weights")[1][0], md.TensorParallel("tp", {"up": "colwise", "down": "rowwise"})
    else:
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        model = parallelize_module(seeded_mlp(), mesh, plan)
    more: dict[str, Any] = {"mesh": md.Mesh(tp=2), "parallel": parallel} if parallel else {}
    with torch.no_grad(), md.compile(model, (x,), **OPTIONS, **more) as runner:
        runner(x)
        if how == "quantized":
            model.up.weight.copy_(other.up.weight)
        elif how == "loaded":
            model.load_state_dict({name: 2 * t for name, t in model.state_dict().items()})
        else:
            model.up.weight.mul_(2)
        return message_of(lambda: runner(x))


@pytest.mark.parametrize("how", ["quantized", "loaded", "in place"])
def test_a_write_through_a_tensor_subclass_is_noticed(how: str, ranks: Ranks) -> None:
    for outcome in ranks(written_weights, how):
        assert not outcome.error, outcome.message
        assert "was changed after the model was compiled" in outcome.value, outcome.value


def given_weights(rank: int, how: str) -> str:
    """``weights=`` beside a model that has values."""
    model, x = seeded_mlp(), torch.randn(4, 32)
    sharded: nn.Module = model
    state = {name: 2 * t for name, t in model.state_dict().items()}
    options: dict[str, Any] = {**OPTIONS, "mesh": md.Mesh(tp=2)}
    if how == "dense":
        options["parallel"] = md.TensorParallel("tp", {"up": "colwise", "down": "rowwise"})
    else:
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        own = dict(model.state_dict())
        sharded = parallelize_module(seeded_mlp(), mesh, plan)
        del options["mesh"]
        if how == "same":
            state = own
        elif how == "unknown":
            state = {**own, "other.weight": torch.ones(3)}
        elif how == "missing":
            state = {name: t for name, t in own.items() if not name.startswith("down")}
    with torch.no_grad():
        return message_of(lambda: md.compile(sharded, (x,), weights=state, **options).close())


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("dense", "has a value, and the 4 tensors that were given has one too"),
        ("others", "has other values than the sharded model's"),
        ("unknown", "'other.weight' is no weight of the sharded model"),
        ("missing", "'down.weight' is not among the dense weights"),
        ("same", ""),
    ],
)
def test_weights_that_are_given_to_a_model_with_values(how: str, message: str, ranks: Ranks) -> None:
    """They were ignored, or mixed with the model's own."""
    for outcome in ranks(given_weights, how):
        assert not outcome.error, outcome.message
        assert message in outcome.value if message else not outcome.value, outcome.value
