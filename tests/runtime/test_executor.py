"""An executor over real steps: functions and PyTorch ops on two gloo ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import torchtrt_md as md
from runtime.rank_processes import Ranks
from torchtrt_md.build.parts import build_parts
from torchtrt_md.bundle.from_program import part_segment
from torchtrt_md.bundle.manifest import Binding, Segment
from torchtrt_md.place import place
from torchtrt_md.program import Weight
from torchtrt_md.runtime.executor import Executor
from torchtrt_md.runtime.steps import Step, call_step, eager_steps
from torchtrt_md.verification.compare import relative_error

CPU = torch.device("cpu")


def segment(inputs: Sequence[str], outputs: Sequence[str], name: str) -> Segment:
    def bindings(sources: Sequence[str]) -> list[Binding]:
        return [Binding(f"t{i}", source, "float32", [4]) for i, source in enumerate(sources)]

    return Segment("inductor", "", None, bindings(inputs), bindings(outputs), [], name)


def test_calls_one_after_another() -> None:
    steps = [
        call_step(segment(["input:x", "weight:w"], ["value:a", "value:b"], "first"), lambda x, w: (x * w, x + w)),
        call_step(segment(["value:b", "value:a"], ["output:y"], "second"), lambda b, a: (b - a,)),
    ]
    w = torch.tensor([1.0, 2.0, 3.0, 4.0])
    executor = Executor(steps, fixed={"weight:w": w}, outputs=["output:y", "value:a"], device=CPU)
    for x in (torch.ones(4), torch.arange(4.0)):
        found = executor.run({"input:x": x})
        assert list(found) == ["output:y", "value:a"]
        torch.testing.assert_close(found["output:y"], x + w - x * w)
        torch.testing.assert_close(found["value:a"], x * w)


def test_what_passes_between_steps_is_contiguous() -> None:
    def second(a: Tensor) -> list[Tensor]:
        assert a.is_contiguous()
        return [a]

    steps = [
        call_step(segment(["input:x"], ["value:a"], "first"), lambda x: (x.t(),)),
        call_step(segment(["value:a"], ["output:y"], "second"), second),
    ]
    executor = Executor(steps, fixed={}, outputs=["output:y"], device=CPU)
    x = torch.arange(6.0).view(2, 3)
    torch.testing.assert_close(executor.run({"input:x": x})["output:y"], x.t())


def test_values_are_let_go_of_after_their_last_reader() -> None:
    seen: list[set[str]] = []

    def step(name: str, *reads: str) -> Step:
        def run(values: dict[str, Any]) -> None:
            seen.append({value for value in values if value.startswith("v")})
            values[name] = sum(values[r] for r in reads)

        return Step(name, reads, run, (name,))

    steps = [step("v0", "x"), step("v1", "v0"), step("v2", "v1"), step("v3", "v2", "v1")]
    executor = Executor(steps, fixed={}, outputs=["v3"], device=CPU)
    assert executor.run({"x": torch.ones(())})["v3"] == 2
    assert seen == [set(), {"v0"}, {"v1"}, {"v1", "v2"}]


def test_a_closed_executor_holds_nothing() -> None:
    executor = Executor([], fixed={"weight:w": torch.ones(3)}, outputs=["weight:w"], device=CPU)
    assert executor.run({})["weight:w"].sum() == 3
    executor.close()
    with pytest.raises(KeyError):
        executor.run({})


def honest(step: Step) -> Step:
    """The step, which fails where its result is the memory of what it reads and it does not say so."""

    def run(values: dict[str, Any]) -> None:
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
    parts = place(program, "split", compute="eager", rank=rank).parts[rank]
    steps: list[Step] = []
    for index, part in enumerate(build_parts(parts, Path("unused"), "portable")):
        assert part.graph is not None
        steps += eager_steps(
            part_segment(part, ""),
            part.graph,
            groups={"p": dist.group.WORLD},  # type: ignore[dict-item]
            coordinates={"p": rank},
            device=CPU,
            index=index,
        )
    weights = {
        f"weight:{s.name}": program.weights.local(s, program.mesh, rank)
        for s in program.sources.values()
        if isinstance(s, Weight)
    }
    fixed = {**weights, "coordinate:p": torch.tensor([rank], dtype=torch.int32)}
    (output,) = (f"output:{value.name}" for value in program.outputs)
    executor = Executor([honest(step) for step in steps], fixed=fixed, outputs=[output], device=CPU)

    def check(flip: bool) -> tuple[Tensor, bool]:
        named = {"input_ids": args[0], **kwargs} if name == "llama" else kwargs
        tensors = {k: v.flip(-1).contiguous() if flip else v for k, v in named.items() if isinstance(v, Tensor)}
        with torch.no_grad():
            dense = model(**{**named, **tensors})
            found = executor.run({f"input:{k}": v for k, v in tensors.items()})[output]
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


def test_a_function_that_returns_an_operand_gets_memory_of_its_own() -> None:
    step = call_step(segment(["value:a"], ["value:b", "value:c"], "passes"), lambda a: (a, a[:2]))
    values: dict[str, Any] = {"value:a": torch.arange(4.0)}
    step.run(values)
    values["value:a"].zero_()  # its memory is used again, as far as the plan knows
    assert values["value:b"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert values["value:c"].tolist() == [0.0, 1.0]
