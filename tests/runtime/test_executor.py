"""An executor over real steps: functions and PyTorch ops on two gloo ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from rank_processes import Ranks
from torch import Tensor

import torchtrt_md as md
from torchtrt_md.lowering.ops import use_device_mesh
from torchtrt_md.place import place
from torchtrt_md.program import Weight
from torchtrt_md.runtime.executor import Executor
from torchtrt_md.runtime.steps import Key, Step, Values, call_step, eager_steps
from torchtrt_md.segment import Binding, Segment, Wire
from torchtrt_md.verification.compare import relative_error

CPU = torch.device("cpu")
X, W, Y = Wire("input", "x"), Wire("weight", "w"), Wire("output", "y")
A, B, C = (Wire("value", name) for name in "abc")


def segment(inputs: Sequence[Wire], outputs: Sequence[Wire], name: str) -> Segment:
    def bindings(sources: Sequence[Wire]) -> tuple[Binding, ...]:
        return tuple(Binding(f"t{i}", source, torch.float32, (4,)) for i, source in enumerate(sources))

    return Segment("inductor", "", None, bindings(inputs), bindings(outputs), (), name)


def test_calls_one_after_another() -> None:
    steps = [
        call_step(segment([X, W], [A, B], "first"), lambda x, w: (x * w, x + w)),
        call_step(segment([B, A], [Y], "second"), lambda b, a: (b - a,)),
    ]
    w = torch.tensor([1.0, 2.0, 3.0, 4.0])
    executor = Executor(steps, fixed={W: w}, outputs=[Y, A], device=CPU)
    for x in (torch.ones(4), torch.arange(4.0)):
        found = executor.run({X: x})
        assert list(found) == [Y, A]
        torch.testing.assert_close(found[Y], x + w - x * w)
        torch.testing.assert_close(found[A], x * w)


def test_what_passes_between_steps_is_contiguous() -> None:
    def second(a: Tensor) -> list[Tensor]:
        assert a.is_contiguous()
        return [a]

    steps = [
        call_step(segment([X], [A], "first"), lambda x: (x.t(),)),
        call_step(segment([A], [Y], "second"), second),
    ]
    executor = Executor(steps, fixed={}, outputs=[Y], device=CPU)
    x = torch.arange(6.0).view(2, 3)
    torch.testing.assert_close(executor.run({X: x})[Y], x.t())


def test_values_are_let_go_of_after_their_last_reader() -> None:
    seen: list[set[Key]] = []

    def step(name: str, *reads: str) -> Step:
        def run(values: Values) -> None:
            seen.append(values.keys() - {"x"})
            values[name] = sum(values[r] for r in reads)

        return Step(name, reads, run, (name,))

    steps = [step("v0", "x"), step("v1", "v0"), step("v2", "v1"), step("v3", "v2", "v1")]
    executor = Executor(steps, fixed={}, outputs=["v3"], device=CPU)
    assert executor.run({"x": torch.ones(())})["v3"] == 2
    assert seen == [set(), {"v0"}, {"v1"}, {"v1", "v2"}]


def test_a_closed_executor_holds_nothing() -> None:
    executor = Executor([], fixed={W: torch.ones(3)}, outputs=[W], device=CPU)
    assert executor.run({})[W].sum() == 3
    executor.close()
    with pytest.raises(KeyError):
        executor.run({})


def honest(step: Step) -> Step:
    """The step, which fails where its result is the memory of what it reads and it does not say so."""

    def run(values: Values) -> None:
        step.run(values)
        for name in step.writes:
            shares = [r for r in step.reads if same_memory(values[r], values[name])]
            assert step.aliases or not shares, f"{step.name} looks at {shares}, which the plan is not told"
            assert not step.looks or not step.reads or shares, f"{step.name} is no look at anything"

    return replace(step, run=run)


def same_memory(a: Tensor | Sequence[Tensor], b: Tensor | Sequence[Tensor]) -> bool:
    """An op that splits has several results."""
    ours, others = (
        {t.untyped_storage().data_ptr() for t in ([x] if isinstance(x, Tensor) else x) if t.numel()} for x in (a, b)
    )
    return bool(ours & others)


def run_program(rank: int, name: str) -> tuple[bool, bool, bool, int, int]:
    """A program of which everything runs in PyTorch, twice; its collectives are gloo's.

    Whether it is right, and a second call with other inputs; whether the second call left the first's results alone;
    the bytes that it keeps, and how many collectives it has.
    """
    model, args, kwargs = models.llama() if name == "llama" else models.flux()
    parallel = md.TensorParallel("p") if name == "llama" else md.ContextParallel("p", name)  # type: ignore[arg-type]
    captured = md.capture(model, args, kwargs, mesh=md.Mesh(p=2), parallel=parallel)
    program = md.lower(captured, placement="split")
    parts = place(program, "split", compute="eager", ranks=[rank]).parts[rank]
    steps: list[Step] = []
    for index, part in enumerate(parts):
        assert part.graph is not None
        steps += eager_steps(
            part.segment,
            part.graph,
            groups={"p": dist.group.WORLD},  # type: ignore[dict-item]
            coordinates={"p": rank},
            device=CPU,
            index=index,
        )
    fixed: dict[Key, Tensor] = {
        Wire("weight", s.name): program.weights.local(s, program.mesh, rank)
        for s in program.sources.values()
        if isinstance(s, Weight)
    }
    fixed[Wire("coordinate", "p")] = torch.tensor([rank], dtype=torch.int32)
    (output,) = (Wire("output", value.name) for value in program.outputs)
    executor = Executor([honest(step) for step in steps], fixed=fixed, outputs=[output], device=CPU)

    def check(flip: bool) -> tuple[Tensor, bool]:
        named = {"input_ids": args[0], **kwargs} if name == "llama" else kwargs
        tensors = {k: v.flip(-1).contiguous() if flip else v for k, v in named.items() if isinstance(v, Tensor)}
        with torch.no_grad():
            dense = model(**{**named, **tensors})
            found = executor.run({Wire("input", k): v for k, v in tensors.items()})[output]
        want = dense.logits if name == "llama" else dense[0]
        return found, relative_error(found, want) < 1e-5

    first, right = check(flip=False)
    copy = first.clone()
    second, right_again = check(flip=True)
    assert not torch.equal(copy, second)
    return right, right_again, torch.equal(first, copy), executor.memory, sum(s.communicates for s in steps)


@pytest.mark.parametrize("name", ["ulysses", "allgather_kv", "ring", "llama"])
def test_programs_with_collectives_on_two_ranks(name: str, ranks: Ranks) -> None:
    for outcome in ranks(run_program, name):
        assert not outcome.error, outcome.message
        right, right_again, kept, memory, collectives = outcome.value
        assert right
        assert right_again
        assert kept, "a call wrote over what another returned"
        assert memory > 0
        assert collectives > 2


def test_results_that_share_memory_get_memory_of_their_own() -> None:
    def first(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x + 1
        return y, y[:]

    step = call_step(segment([A], [B, C], "alike"), first)
    values: Values = {A: torch.arange(4.0)}
    step.run(values)
    values[B].zero_()  # a sum may be written over one of them
    assert values[C].tolist() == [1.0, 2.0, 3.0, 4.0]


def sum_over_operand(rank: int) -> tuple[list[float], list[float], bool]:
    """A sum whose operand nothing else reads, and one whose operand is read again."""
    outcome = []
    for again in (False, True):
        graph = torch.fx.Graph()
        x = graph.placeholder("x")
        x.meta["val"] = torch.empty(4)
        total = graph.call_function(torch.ops.torchtrt_md.all_reduce.default, (x, "sum", "p", 2))
        total.meta["val"] = torch.empty(4)
        graph.output((total,))
        module = torch.fx.GraphModule(torch.nn.Module(), graph)
        places: list[int] = []

        def last(b: Tensor, a: Tensor | None = None, places: list[int] = places) -> tuple[Tensor]:
            places.append(b.data_ptr())
            return (b - (0 if a is None else a),)

        def make(x: Tensor, places: list[int] = places) -> tuple[Tensor]:
            made = x * 2
            places.append(made.data_ptr())
            return (made,)

        steps = [call_step(segment([X], [A], "make"), make)]
        parts = segment([A], [B], "sum")
        groups: dict[str, dist.ProcessGroup] = {"p": dist.group.WORLD}  # type: ignore[dict-item]
        steps += eager_steps(parts, module, groups=groups, coordinates={"p": rank}, device=CPU)
        steps.append(call_step(segment([B, A] if again else [B], [Y], "last"), last))
        found = Executor(steps, fixed={}, outputs=[Y], device=CPU).run({X: torch.arange(4.0) + rank})[Y]
        outcome.append((found.tolist(), places[0] == places[1]))
    (alone, over), (read, apart) = outcome
    return alone, read, over and not apart


def test_a_sum_is_written_over_what_nothing_else_reads(ranks: Ranks) -> None:
    for rank, outcome in enumerate(ranks(sum_over_operand)):
        assert not outcome.error, outcome.message
        alone, read, right = outcome.value
        assert alone == [2.0, 6.0, 10.0, 14.0]
        assert read == [2.0 - 2 * rank + 2 * x for x in range(4)]
        assert right


class Summed(torch.nn.Module):
    """A sum over ranks of a constant, or of a part of what is computed, as it lies."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.kind, self.table = torch.nn.Linear(4, 4), kind, torch.arange(4.0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        over: dict[str, Tensor] = {
            "table": self.table,
            "table, seen": self.table.view(2, 2),
            "slice": h[:, 1:3],
            "transposed": h.t(),
            "expanded": h[:, None].expand(-1, 3, -1),
            "reshaped": h.reshape(2, 6),
        }
        total: Tensor = torch.ops.torchtrt_md.all_reduce(over[self.kind], "sum", "p", 2)
        result: Tensor = total.sin() + h.sum()
        return result


def call_thrice(rank: int, kind: str) -> tuple[list[Tensor], Tensor]:
    model, x = Summed(kind).eval(), torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"mesh": md.Mesh(p=2), "compute": "inductor", "placement": "split", "report": False}
    with torch.no_grad(), md.compile(model, (x,), check=False, **options) as runner:
        found = [runner(x).clone() for _ in range(3)]
        with use_device_mesh(md.Mesh(p=2).to_device_mesh("cpu")):
            return found, model(x)


@pytest.mark.parametrize("kind", ["table", "table, seen", "slice", "transposed", "expanded", "reshaped"])
def test_a_sum_of_what_lies_otherwise_or_is_the_graphs_own(kind: str, ranks: Ranks) -> None:
    for outcome in ranks(call_thrice, kind):
        assert not outcome.error, outcome.message
        found, expected = outcome.value
        for each in found:
            torch.testing.assert_close(each, expected)


def test_a_function_that_returns_an_operand_gets_memory_of_its_own() -> None:
    step = call_step(segment([A], [B, C], "passes"), lambda a: (a, a[:2]))
    values: Values = {A: torch.arange(4.0)}
    step.run(values)
    values[A].zero_()  # its memory is used again, as far as the plan knows
    assert values[B].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert values[C].tolist() == [0.0, 1.0]
