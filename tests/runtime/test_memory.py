"""When steps run and where their results lie: by hand, and by brute force over random programs and real ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_processes import Ranks
from torch import Tensor

import torchtrt_md as md
from torchtrt_md.errors import LaunchError
from torchtrt_md.lowering import attention_keys
from torchtrt_md.lowering.passes import Exchange
from torchtrt_md.place import place
from torchtrt_md.runtime.memory import MemoryLayout, check_room, lay_out
from torchtrt_md.runtime.push import Push
from torchtrt_md.runtime.steps import Key, Slot, Step, Values, eager_steps
from torchtrt_md.segment import Part, Wire


def nothing(values: Values) -> None:
    """These steps are laid out, and not run."""


def engine(name: str, *reads: str, slots: Sequence[str] = (), size: int = 64) -> Step:
    made = tuple(Slot(slot, (size,), torch.uint8) for slot in slots or (name,))
    return Step(name, reads, nothing, slots=made)


def no_copies(x: Tensor, results: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """These exchanges are laid out, and not done."""
    return []


def collective(
    name: str, read: str, size: int = 64, in_place: bool = False, axis: str = "cp", sums: int | None = 0
) -> Step:
    """Without NCCL, what arrives is the result, or it is the sum of some; None is left to NCCL."""
    slot = Slot(name, (size,), torch.uint8)
    push = None if sums is None else Push(no_copies, sums)
    return Step(name, (read,), nothing, slots=(slot,), communicates=True, in_place=in_place, push=push, axis=axis)


def op(name: str, *reads: str) -> Step:
    return Step(name, reads, nothing, (name,))


def view(name: str, read: str) -> Step:
    return Step(name, (read,), nothing, (name,), looks=True, aliases=True)


def constant(name: str) -> Step:
    return Step(name, (), nothing, (name,), looks=True, aliases=True)


def reshape(name: str, read: str) -> Step:
    """A copy, or not."""
    return Step(name, (read,), nothing, (name,), aliases=True)


class Checker:
    """What happens before what on two streams, and so what a step may read and write."""

    def __init__(self, steps: Sequence[Step], keep: Sequence[Key], push: bool = False) -> None:
        self.steps, self.keep, self.layout = steps, set(keep), lay_out(steps, keep, push=push)
        self.before = self._before()
        self.makers = {v: i for i, s in enumerate(steps) for v in (*s.writes, *(x.name for x in s.slots))}
        self.memory_of = {value: self._memory(value) for value in self.makers}
        self.accesses: dict[Key, set[int]] = {}
        for value, maker in self.makers.items():
            readers = {
                i
                for i, s in enumerate(steps)
                if not s.looks and any(value in self.memory_of.get(r, ()) for r in s.reads)
            }
            self.accesses[value] = readers | {maker}

    def _before(self) -> list[set[int]]:
        """For each step the steps that are done when it begins."""
        before: list[set[int]] = []
        main: set[int] = set()
        side: set[int] = set()
        reached: dict[int, set[int]] = {-1: set()}
        for index, (step, moment) in enumerate(zip(self.steps, self.layout.moments, strict=True)):
            if step.communicates:
                assert moment.joins is None
                assert moment.after == -1 or moment.after in self.layout.marks, "no event is recorded there"
                side |= reached[moment.after]
                before.append(set(side))
                side.add(index)
            else:
                if moment.joins is not None:
                    assert self.steps[moment.joins].communicates
                    main |= before[moment.joins] | {moment.joins}
                before.append(set(main))
                main.add(index)
                reached[index] = set(main)
        return before

    def _memory(self, value: Key) -> set[Key]:
        """The values whose memory this one may be looking at, itself among them."""
        maker = self.steps[self.makers[value]]
        looks = maker.aliases or value in self.layout.over
        looked_at = [r for r in maker.reads if r in self.makers] if looks else []
        return {value}.union(*(self._memory(r) for r in looked_at))

    def check(self) -> None:
        self._values_are_there()
        self._blocks_are_free()
        self._memory_of_pytorch_is_free()
        self._what_is_written_over_is_nobody_elses()
        self._shared_memory_is_free()
        self._released_once_and_late_enough()

    def _values_are_there(self) -> None:
        for index, step in enumerate(self.steps):
            for value in step.reads:
                for made in self.memory_of.get(value, ()):
                    maker = self.makers[made]
                    if not step.looks and not self.steps[maker].looks:
                        assert maker in self.before[index], f"{step.name} reads {made} before it is there"

    def _blocks_are_free(self) -> None:
        placed = self.layout.block_of
        slots = {slot.name: slot for step in self.steps for slot in step.slots}
        for value, block in placed.items():
            slot = slots[value]
            assert slot.shape[0] * slot.dtype.itemsize <= self.layout.blocks[block]
            for earlier in placed:
                if placed[earlier] == block and self.makers[earlier] < self.makers[value]:
                    self._is_over(earlier, self.makers[value])
            others = [v for v in placed if v != value and self.makers[v] == self.makers[value]]
            assert all(placed[v] != block for v in others), "two results of one step in one block"
        for value in self.keep & self.makers.keys():
            assert not self.memory_of[value] & placed.keys(), "a result lies in memory that is used again"
        assert set(placed.values()) == set(range(len(self.layout.blocks))), "a block that nothing lies in"

    def _memory_of_pytorch_is_free(self) -> None:
        """PyTorch may give what is let go of to whatever asks next; it asks on the main stream."""
        released = {v: i for i, m in enumerate(self.layout.moments) for v in m.releases}
        memory = self.layout.block_of.keys() | self.layout.shared_of.keys() | self.layout.over
        views = {value for step in self.steps if step.looks for value in step.writes}
        for value in self.makers.keys() - memory - views:
            lookers = [v for v in self.makers if value in self.memory_of[v]]  # each holds on to it
            if all(v in released for v in lookers):
                end = max(released[v] for v in lookers)
                for index in range(end + 1, len(self.steps)):
                    step = self.steps[index]
                    provided = any(slot.name not in memory for slot in step.slots)
                    if not step.looks and (provided or not step.communicates):
                        self._is_over(value, index)

    def _what_is_written_over_is_nobody_elses(self) -> None:
        for value in self.layout.over:
            step = self.steps[self.makers[value]]
            assert step.in_place
            assert value not in self.layout.block_of.keys() | self.layout.shared_of.keys() | self.keep
            for base in self.memory_of[value] - {value}:
                assert base not in self.keep, "what is returned is written over"
                assert not self.steps[self.makers[base]].slots, "the executor gave it its memory, and gives it again"
                # What reads it through the result reads what it is to read.
                readers = [s for s in self.steps if not s.looks and base in self._seen_before(s, value)]
                assert readers == [step], f"{base} is written over by {value}, and read by others"
            makers = {b: self.steps[self.makers[b]] for b in self.memory_of[value] - {value}}
            assert not any(maker.aliases and not maker.reads for maker in makers.values()), "a constant's"
            assert not all(maker.aliases for maker in makers.values()), (
                "what is written over is an input's, or a weight's"
            )
            aliased = {b for b, maker in makers.items() if maker.aliases}
            sources = {r for b in aliased for r in self.steps[self.makers[b]].reads}
            assert sources <= self.makers.keys(), f"{sources - self.makers.keys()} is written over"

    def _seen_before(self, step: Step, result: Key) -> set[Key]:
        """The memory that a step reads, but for what it reads of this result."""
        reads = [r for r in step.reads if r in self.makers and result not in self.memory_of[r]]
        return set().union(*(self.memory_of[r] for r in reads))

    def _shared_memory_is_free(self) -> None:
        """Another rank writes a result of ours as soon as we are in the barrier of the exchange before it."""
        shared = self.layout.shared_of
        assert not shared.keys() & (self.layout.block_of.keys() | self.keep)
        for axis, total in self.layout.shared.items():
            lands = {step.landing.name: i for i, step in enumerate(self.steps) if step.landing is not None}
            pushed = sorted(((lands[v], v) for v in shared if shared[v][0] == axis), key=lambda made: made[0])
            for number, (index, value) in enumerate(pushed):
                begin, end = self._extent(value)
                assert end <= total
                barrier = self.before[pushed[number - 1][0]]  # before the first one: that of the call before
                for maker, earlier in pushed:
                    start, stop = self._extent(earlier)
                    if begin < stop and start < end and (maker < index or number == 0):
                        late = self.accesses.get(earlier, set()) - {maker} - barrier  # a sum is read by its maker
                        assert not late, f"others write {value} where {earlier} lies, which is still read"
                        assert maker in barrier, f"{value} and {earlier} are written at once"

    def _extent(self, value: Key) -> tuple[int, int]:
        (slot,) = (s.landing for s in self.steps if s.landing is not None and s.landing.name == value)
        offset = self.layout.shared_of[value][1]
        return offset, offset + math.prod(slot.shape) * slot.dtype.itemsize

    def _is_over(self, value: Key, index: int) -> None:
        """Can nothing be reading or writing this value when this step writes where it lay?"""
        late = self.accesses[value] - self.before[index]
        if late and self.steps[index].in_place and value in self.steps[index].reads:
            late -= {index}
        names = [self.steps[i].name for i in late]
        assert not late, f"{self.steps[index].name} writes where {value} lies, which {names} may still use"

    def _released_once_and_late_enough(self) -> None:
        released = [(v, i) for i, m in enumerate(self.layout.moments) for v in m.releases]
        assert len({v for v, _ in released}) == len(released)
        for value, at in released:
            assert value not in self.keep
            assert all(i <= at for i, step in enumerate(self.steps) if value in step.reads)


def laid_out(steps: Sequence[Step], keep: Sequence[Key], push: bool = False) -> MemoryLayout:
    checker = Checker(steps, keep, push)
    checker.check()
    return checker.layout


class TestByHand:
    def test_a_collective_waits_for_what_made_its_operand(self) -> None:
        found = laid_out([engine("a", "input:x"), engine("b", "a"), collective("c", "a"), engine("d", "c", "b")], ["d"])
        assert found.moments[2].after == 0
        assert found.marks == {0}

    def test_a_collective_of_an_input_waits_for_the_start(self) -> None:
        found = laid_out([engine("a", "input:x"), collective("c", "input:x"), engine("d", "a", "c")], ["d"])
        assert found.moments[1].after == -1

    def test_a_collective_of_a_collective_waits_for_nothing_more(self) -> None:
        found = laid_out([engine("a", "input:x"), collective("c", "a"), collective("d", "c"), op("e", "d")], ["e"])
        assert found.moments[2].after == -1
        assert found.moments[3].joins == 2

    def test_a_collective_of_a_view_waits_for_what_made_what_it_looks_at(self) -> None:
        found = laid_out([engine("a", "input:x"), op("b"), view("v", "a"), collective("c", "v"), op("d", "c")], ["d"])
        assert found.moments[3].after in (0, 2)  # nothing is enqueued for the view itself

    def test_what_lies_between_runs_beside_and_the_reader_joins(self) -> None:
        steps = [
            engine("a", "input:x"),
            collective("c", "a"),
            engine("b", "a"),
            engine("d", "b"),
            engine("e", "c", "d"),
        ]
        found = laid_out(steps, ["e"])
        assert [m.joins for m in found.moments] == [None, None, None, None, 1]

    def test_it_is_joined_once_and_with_it_all_before_it(self) -> None:
        steps = [
            collective("c", "input:x"),
            collective("d", "input:y"),
            op("e", "d"),
            op("f", "c", "e"),
            op("g", "d", "f"),
        ]
        assert [m.joins for m in laid_out(steps, ["g"]).moments] == [None, None, 1, None, None]

    def test_a_view_of_what_is_under_way_joins_nothing_and_its_reader_does(self) -> None:
        found = laid_out([collective("c", "input:x"), view("v", "c"), op("a"), op("b", "v", "a")], ["b"])
        assert [m.joins for m in found.moments] == [None, None, None, 0]

    def test_memory_is_used_again(self) -> None:
        steps = [engine("a", "input:x"), engine("b", "a"), engine("c", "b"), engine("d", "c"), engine("e", "d")]
        found = laid_out(steps, ["e"])
        assert found.block_of == {"a": 0, "b": 1, "c": 0, "d": 1}
        assert found.blocks == [64, 64]

    def test_a_block_must_be_large_enough_and_the_smallest_is_taken(self) -> None:
        steps = [
            engine("a", "input:x", size=100),
            engine("b", "input:x", size=20),
            op("used", "a", "b"),
            engine("c", "used", size=10),
            op("end", "c"),
            engine("d", "end", size=200),
            op("last", "d"),
        ]
        found = laid_out(steps, ["last"])
        assert found.block_of["c"] == found.block_of["b"]
        assert found.blocks == [100, 20, 200]

    def test_what_a_collective_reads_is_free_when_it_is_joined(self) -> None:
        steps = [
            engine("a", "input:x"),
            collective("c", "a"),
            engine("b", "input:x"),
            engine("d", "c"),
            engine("e", "d", "b"),
        ]
        found = laid_out(steps, ["e"])
        assert found.block_of["b"] != found.block_of["a"]  # which is being sent
        assert "a" in found.moments[3].releases

    def test_a_collective_waits_for_the_last_user_of_its_memory(self) -> None:
        steps = [engine("a", "input:x"), engine("b", "a"), op("u", "b"), collective("c", "input:x"), op("d", "u", "c")]
        found = laid_out(steps, ["d"])
        assert found.block_of["c"] == found.block_of["a"]
        assert found.moments[3].after >= 1

    def test_results_get_memory_of_their_own(self) -> None:
        steps = [engine("a", "input:x"), engine("output:y", "a"), view("output:z", "a"), collective("output:w", "a")]
        found = laid_out(steps, ["output:y", "output:z", "output:w"])
        assert found.block_of == {}  # "a" is what an output looks at

    def test_an_all_reduce_takes_its_operands_place_where_nothing_else_reads_it(self) -> None:
        steps = [engine("a", "input:x"), collective("c", "a", in_place=True, sums=None), op("d", "c")]
        found = laid_out(steps, ["d"])
        assert found.block_of["c"] == found.block_of["a"]
        shared = [engine("a", "input:x"), collective("c", "a", in_place=True, sums=None), op("d", "c", "a")]
        found = laid_out(shared, ["d"])
        assert found.block_of["c"] != found.block_of["a"]

    def test_others_write_where_nobody_reads_any_more(self) -> None:
        steps: list[Step] = [op("v0", "input:x")]
        for i in range(4):
            steps += [collective(f"c{i}", f"v{i}", size=512), op(f"v{i + 1}", f"c{i}")]
        found = laid_out(steps, ["v4"], push=True)
        # the first's memory is its own; when another rank may write "c2" this one may still be reading "c1"
        assert found.shared_of == {"c0": ("cp", 0), "c1": ("cp", 512), "c2": ("cp", 1024), "c3": ("cp", 512)}
        assert found.shared == {"cp": 1536}
        assert not found.block_of

    def test_one_exchange_of_a_call_has_no_barrier_before_it(self) -> None:
        found = laid_out([op("a", "input:x"), collective("c", "a"), op("b", "c")], ["b"], push=True)
        assert found.shared_of == {}
        assert found.block_of == {"c": 0}

    def test_a_result_lies_in_no_memory_that_others_write(self) -> None:
        steps = [collective("c", "input:x"), op("a", "c"), collective("d", "a"), op("b", "d"), collective("e", "b")]
        found = laid_out([*steps, op("f", "d")], ["e", "f"], push=True)
        assert "e" not in found.shared_of

    def test_a_result_of_a_collective_is_not_written_while_its_memory_is_read(self) -> None:
        """It is made by PyTorch, which may give it memory that an op of the main stream has just let go of."""
        laid_out([op("a", "input:x"), op("b", "a"), collective("c", "input:x"), op("d", "b")], ["c", "d"])

    def test_a_value_is_held_until_what_looks_at_it_is_read(self) -> None:
        steps = [engine("a", "input:x"), view("v", "a"), engine("b", "input:x"), engine("c", "v", "b")]
        found = laid_out(steps, ["c"])
        assert found.block_of["b"] != found.block_of["a"]
        assert set(found.moments[3].releases) >= {"a", "v", "b"}

    def test_the_checker_sees_a_plan_that_is_wrong(self) -> None:
        steps = [engine("a", "input:x"), collective("c", "a"), engine("b", "input:x"), engine("d", "c", "b")]
        for spoil in (
            lambda p: p.block_of.update(b=p.block_of["a"]),
            lambda p: setattr(p.moments[1], "after", -1),
            lambda p: setattr(p.moments[3], "joins", None),
            lambda p: p.moments[1].releases.append("a"),
        ):
            checker = Checker(steps, ["d"])
            checker.check()
            spoil(checker.layout)
            checker.before = checker._before()
            with pytest.raises(AssertionError):
                checker.check()


class TestASumOverItsOperand:
    def steps(self, *more: Step) -> list[Step]:
        return [op("a", "input:x"), view("seen", "a"), collective("b", "seen", in_place=True, sums=None), *more]

    def test_what_pytorch_made_for_it_alone(self) -> None:
        steps = self.steps(op("c", "b"))
        plan = laid_out(steps, ["c"])
        assert plan.over == {"b"}
        assert not plan.blocks
        assert laid_out(steps, ["c"], push=True).over == {"b"}

    @pytest.mark.parametrize(
        "more",
        [
            (op("c", "b", "a"),),
            (op("c", "b", "seen"),),
            (view("again", "a"), op("c", "b", "again")),
            (reshape("again", "seen"), op("c", "b", "again")),
        ],
    )
    def test_what_another_step_reads(self, more: tuple[Step, ...]) -> None:
        assert not laid_out(self.steps(*more), ["c"]).over

    def test_what_is_returned(self) -> None:
        assert not laid_out(self.steps(op("c", "b")), ["c", "seen"]).over
        assert not laid_out(self.steps(op("c", "b")), ["c", "a"]).over
        assert not laid_out(self.steps(op("c", "b")), ["c", "b"]).over

    def test_an_input_or_a_weight(self) -> None:
        for source in ("input:x", "weight:w"):
            seen = [view("seen", source), collective("b", "seen", in_place=True, sums=None), op("c", "b")]
            assert not laid_out(seen, ["c"]).over
            assert not laid_out([reshape("seen", source), *seen[1:]], ["c"]).over

    def test_a_constant_of_the_graph(self) -> None:
        for more in ((), (view("seen", "a"),), (reshape("seen", "a"),)):
            read = "seen" if more else "a"
            steps = [constant("a"), *more, collective("b", read, in_place=True, sums=None), op("c", "b")]
            assert not laid_out(steps, ["c"]).over

    def test_what_an_engine_made_lies_in_a_block(self) -> None:
        steps = [engine("a", "input:x"), collective("b", "a", in_place=True, sums=None), op("c", "b")]
        plan = laid_out(steps, ["c"])
        assert not plan.over
        assert plan.block_of["a"] == plan.block_of["b"]


@st.composite
def programs(draw: st.DrawFn) -> tuple[list[Step], list[str]]:
    """Steps that read what is there, of all kinds, and what of it is kept."""
    steps: list[Step] = []
    values = ["input:x", "weight:w"]
    sizes = {"input:x": 8, "weight:w": 8}
    for index in range(draw(st.integers(1, 14))):
        kinds = ["engine", "collective", "collective", "all_reduce", "op", "view", "reshape", "constant"]
        kind = draw(st.sampled_from(kinds))
        recent = values[-5:] if draw(st.booleans()) else values
        reads = draw(st.lists(st.sampled_from(recent), min_size=1, max_size=3, unique=True))
        name, size = f"v{index}", draw(st.sampled_from([8, 16, 32]))
        match kind:
            case "engine":
                names = [f"{name}.{i}" for i in range(draw(st.integers(1, 2)))]
                steps.append(engine(name, *reads, slots=names, size=size))
            case "collective":
                names = [name]
                axis, sums = draw(st.sampled_from(["cp", "tp"])), draw(st.sampled_from([None, 0, 0, 2]))
                steps.append(collective(name, reads[0], size, axis=axis, sums=sums))
            case "all_reduce":
                names, size = [name], sizes[reads[0]]
                steps.append(collective(name, reads[0], size, in_place=True, sums=draw(st.sampled_from([None, 2]))))
            case "op":
                names = [name]
                steps.append(op(name, *reads))
            case "constant":
                names = [name]
                steps.append(constant(name))
            case _:
                names, size = [name], sizes[reads[0]]
                steps.append(view(name, reads[0]) if kind == "view" else reshape(name, reads[0]))
        values += names
        sizes |= dict.fromkeys(names, size)
    keep = draw(st.lists(st.sampled_from(values[2:]), max_size=3, unique=True))
    return steps, keep


@settings(max_examples=300, deadline=None)
@given(programs(), st.booleans())
def test_no_plan_of_a_random_program_has_a_race(program: tuple[list[Step], list[str]], push: bool) -> None:
    Checker(*program, push).check()


def steps_of(parts: Sequence[Part], coordinates: dict[str, int]) -> list[Step]:
    """The steps of placed parts as an executor has them, but for engines, which are planned and not made."""
    groups = dict.fromkeys(coordinates, dist.group.WORLD)
    steps: list[Step] = []
    for index, part in enumerate(parts):
        if part.runs == "eager":
            assert part.graph is not None
            steps += eager_steps(
                part.segment,
                part.graph,
                groups=groups,  # type: ignore[arg-type]
                coordinates=coordinates,
                device=torch.device("cpu"),
                index=index,
            )
        else:
            slots = tuple(Slot(b.source, b.shape, b.dtype) for b in part.segment.outputs)
            steps.append(Step(part.segment.name, tuple(b.source for b in part.segment.inputs), nothing, slots=slots))
    return steps


def call_of(name: str) -> tuple[models.Call, md.ContextParallel | md.TensorParallel]:
    if name == "llama":
        return models.llama(), md.TensorParallel("cp")
    call = models.ltx() if name.startswith("masked ") else models.flux()
    strategy: Any = "ulysses" if name == "exchange" else name.removeprefix("masked ")
    return call, md.ContextParallel("cp", strategy)


def check_real_program(rank: int, name: str) -> list[tuple[int, int, int, int]]:
    """With NCCL and without: collectives, joins, bytes of all slots, and of the memory kept for them."""
    if rank:  # the same on all ranks
        return []
    (model, args, kwargs), parallel = call_of(name)
    captured = md.capture(model, args, kwargs, mesh=md.Mesh(cp=2), parallel=parallel)
    exchange = Exchange("ulysses", head_groups=2, values_first=True)
    exchanges = dict.fromkeys(attention_keys(captured), exchange) if name == "exchange" else {}
    program = md.lower(captured, placement="split", exchanges=exchanges)
    steps = steps_of(place(program, "split", ranks=[rank]).parts[rank], {"cp": rank})
    found = []
    for push in (False, True):
        checker = Checker(steps, [Wire("output", value.name) for value in program.outputs], push)
        checker.check()
        slots = [slot for step in steps for slot in step.slots]
        found.append(
            (
                sum(step.communicates for step in steps),
                sum(moment.joins is not None for moment in checker.layout.moments),
                sum(math.prod(slot.shape) * slot.dtype.itemsize for slot in slots),
                sum(checker.layout.blocks) + sum(checker.layout.shared.values()),
            )
        )
    return found


@pytest.mark.parametrize(
    "name",
    ["ulysses", "exchange", "allgather_kv", "ring", "llama", "masked ulysses", "masked allgather_kv", "masked ring"],
)
def test_no_plan_of_a_real_program_has_a_race(name: str, ranks: Ranks) -> None:
    done, _ = ranks(check_real_program, name)
    assert not done.error, done.message
    for collectives, joins, written, kept in done.value:
        assert 0 < joins <= collectives
        assert kept < 0.9 * written, "memory is not used again"


@pytest.mark.parametrize(
    ("free", "cached", "shared", "fits"),
    [(1000, 0, 300, True), (400, 600, 300, True), (200, 2000, 300, False), (500, 0, 300, False)],
)
def test_room_is_asked_for_before_ranks_meet(
    free: int, cached: int, shared: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ranks share does not come from what PyTorch holds."""
    layout = MemoryLayout([], {}, [400], frozenset(), {}, {"tp": shared}, frozenset())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**6))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: cached)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    check_room(layout, torch.device("cpu"))
    if fits:
        check_room(layout, torch.device("cuda"))
    else:
        with pytest.raises(LaunchError, match="of the GPU's memory are free"):
            check_room(layout, torch.device("cuda"))
