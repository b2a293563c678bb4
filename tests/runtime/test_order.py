"""Which steps run beside which exchange."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import models
from hypothesis import given, settings
from rank_processes import Ranks

import torchtrt_md as md
from runtime.test_memory import Checker, collective, engine, op, programs, steps_of, view
from torchtrt_md.place import place
from torchtrt_md.runtime.order import overlapped
from torchtrt_md.runtime.steps import Key, Step
from torchtrt_md.segment import Wire


def names(steps: list[Step]) -> str:
    return " ".join(step.name for step in overlapped(steps))


def block(there: int, back: int) -> list[Step]:
    """Exchange there, attention, exchange back; a product that needs neither; and one of all."""
    return [
        engine("qkv", "input:x"),
        collective("there", "qkv", size=there),
        op("attention", "there"),
        collective("back", "attention", size=back),
        engine("mlp", "qkv"),
        engine("out", "mlp", "back"),
    ]


def test_what_needs_no_attention_runs_beside_the_larger_exchange() -> None:
    assert names(block(3, 1)) == "qkv there mlp attention back out"
    assert names(block(1, 3)) == "qkv there attention back mlp out"


def test_of_two_that_need_no_attention_each_exchange_has_one() -> None:
    steps = [*block(3, 1)[:-1], op("silu", "input:t"), engine("time", "silu"), engine("out", "mlp", "time", "back")]
    assert names(steps) == "qkv there mlp silu attention back time out"
    steps = [*block(3, 1)[:-1], engine("time", "mlp"), engine("out", "time", "back")]
    assert names(steps) == "qkv there mlp attention back time out"
    steps = [*block(1, 3)[:-1], engine("time", "input:t"), engine("out", "mlp", "time", "back")]
    assert names(steps) == "qkv there attention back mlp time out"


def test_blocks_in_a_row_are_each_for_themselves() -> None:
    steps = block(3, 1)
    second = [op("qkv2", "out"), collective("there2", "qkv2", size=3), op("attention2", "there2")]
    second += [collective("back2", "attention2", size=1), op("mlp2", "qkv2"), op("out2", "mlp2", "back2")]
    assert names([*steps, *second]) == "qkv there mlp attention back out qkv2 there2 mlp2 attention2 back2 out2"


def test_what_something_runs_beside_already_is_left() -> None:
    """Two groups of heads: the first one's attention runs beside the exchange of the second."""
    steps = [op("qkv", "input:x"), collective("a", "qkv", size=9), collective("b", "qkv", size=9)]
    steps += [op("attention a", "a"), collective("back a", "attention a", size=1)]
    steps += [op("attention b", "b"), collective("back b", "attention b", size=1)]
    steps += [op("mlp", "qkv"), op("out", "back a", "back b", "mlp")]
    assert names(steps) == "qkv a b attention a back a attention b back b mlp out"


def test_a_view_goes_with_what_reads_it() -> None:
    steps = [op("qkv", "input:x"), collective("there", "qkv", size=9), view("seen", "there"), op("attention", "seen")]
    steps += [collective("back", "attention", size=1), view("half", "qkv"), op("mlp", "half"), op("out", "mlp", "back")]
    assert names(steps) == "qkv there seen half mlp attention back out"


def test_what_waits_for_something_itself_stays() -> None:
    steps = [op("a", "input:x"), collective("b", "a", size=9), op("c", "b"), collective("d", "c", size=1)]
    assert names([*steps, op("e", "b"), op("f", "d", "e")]) == "a b c d e f"


def test_an_engine_that_communicates_stays_behind_what_it_was_behind() -> None:
    """Its collectives are in the order of all ranks, too."""
    steps = block(3, 1)
    engine: Any = SimpleNamespace(segment=SimpleNamespace(axis="tp"))
    alone: Any = SimpleNamespace(segment=SimpleNamespace(axis=None))
    steps[4] = replace(steps[4], engine=engine)
    assert names(steps) == "qkv there attention back mlp out"
    steps[4] = replace(steps[4], engine=alone)
    assert names(steps) == "qkv there mlp attention back out"


@settings(max_examples=300, deadline=None)
@given(programs())
def test_the_data_stay_what_they_are(program: tuple[list[Step], list[str]]) -> None:
    steps, keep = program
    ordered = overlapped(steps)
    assert sorted(map(id, ordered)) == sorted(map(id, steps))
    assert [s for s in ordered if s.communicates] == [s for s in steps if s.communicates]
    made: set[Key] = {"input:x", "weight:w"}
    for step in ordered:
        assert made.issuperset(step.reads)
        made |= {*step.writes, *(slot.name for slot in step.slots)}
    for push in (False, True):
        Checker(ordered, keep, push).check()


def beside_exchanges(rank: int, strategy: Any) -> list[tuple[int, int]]:
    """For FLUX, as its steps come and as they are ordered: bytes beside which something runs, and all bytes."""
    if rank:
        return []
    model, args, kwargs = models.flux()
    parallel = md.ContextParallel("cp", strategy)
    program = md.lower(md.capture(model, args, kwargs, mesh=md.Mesh(cp=2), parallel=parallel), placement="split")
    steps = steps_of(place(program, "split", ranks=[0]).parts[0], {"cp": 0})
    keep = [Wire("output", value.name) for value in program.outputs]
    found = []
    for ordered in (steps, overlapped(steps)):
        Checker(ordered, keep, True).check()
        sent = {i: step.slots[0].bytes for i, step in enumerate(ordered) if step.communicates}
        found.append((sum(size for i, size in sent.items() if computes_next(ordered, i)), sum(sent.values())))
    return found


def computes_next(steps: list[Step], index: int) -> bool:
    """Does the next step that computes not wait for this collective?"""
    waited = {slot.name for slot in steps[index].slots}
    for step in steps[index + 1 :]:
        if step.looks and waited & set(step.reads):
            waited |= set(step.writes)
        if not step.looks and not step.communicates:
            return not waited & set(step.reads)
    return False


def test_more_of_flux_is_hidden(ranks: Ranks) -> None:
    done, _ = ranks(beside_exchanges, "ulysses")
    assert not done.error, done.message
    (before, whole), (after, same) = done.value
    assert whole == same
    assert before < after < whole
