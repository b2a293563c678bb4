"""Weights as segments read them: laid out once, held once, and guarded against changes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import models
import pytest
import quantized
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import torchtrt_md as md
from torchtrt_md.build.part import with_transposed_weights
from torchtrt_md.errors import InputError
from torchtrt_md.place import place
from torchtrt_md.program import Constant, ShardedProgram, Sharding, Weight, Weights
from torchtrt_md.runtime.private import body_of
from torchtrt_md.runtime.steps import Key, source_key
from torchtrt_md.runtime.weights import ModelWeights, WeightGuard, laid_out
from torchtrt_md.segment import Binding, Segment, Wire
from torchtrt_md.wrappers import holders, named_weights, outer

CPU = torch.device("cpu")
V, W = Wire("weight", "v"), Wire("weight", "w")
X = Binding("x", Wire("input", "x"), torch.float32, (2, 8))
AS_IS, TURNED = (Binding("w", W, torch.float32, shape, shape == (8, 16)) for shape in ((16, 8), (8, 16)))


def segment(*inputs: Binding) -> Segment:
    return Segment("engine", "", None, inputs, (), ())


class TestLaidOut:
    def test_a_weight_is_asked_for_once_and_transposed_once(self) -> None:
        weights, asked = {"w": torch.randn(16, 8)}, []

        def weight_of(name: str) -> Tensor:
            asked.append(name)
            return weights[name]

        found = laid_out([segment(X, TURNED), segment(TURNED, AS_IS), segment(AS_IS)], weight_of, CPU)
        assert asked == ["w"]
        assert found.keys() == {source_key(TURNED), W}
        assert torch.equal(found[source_key(TURNED)], weights["w"].t())
        assert torch.equal(found[W], weights["w"])
        assert all(block.is_contiguous() for block in found.values())

    def test_what_lies_as_it_is_taken_is_not_copied(self) -> None:
        aligned = torch.empty(1024)
        start = (-aligned.data_ptr() % 256) // 4
        w = aligned[start : start + 128].view(16, 8)
        assert laid_out([segment(AS_IS)], lambda name: w, CPU)[W].data_ptr() == w.data_ptr()

    def test_who_stores_is_told_of_weights_in_one_layout_as_the_model_sees_them(self) -> None:
        weights = {"v": torch.randn(16, 8), "w": torch.randn(16, 8)}
        told: dict[str, Tensor] = {}
        v = Binding("v", V, torch.float32, (8, 16), transposed=True)
        segments = [segment(v, AS_IS), segment(v, TURNED)]  # "w" is needed both ways
        found = laid_out(segments, weights.__getitem__, CPU, told.__setitem__)
        assert told.keys() == {"v"}
        assert torch.equal(told["v"], weights["v"])
        assert told["v"].data_ptr() == found[source_key(v)].data_ptr()


def program_of(whole: Mapping[str, Tensor], *weights: Weight, mesh: md.Mesh) -> ShardedProgram:
    """A program with these weights, of which nothing else is looked at."""
    return ShardedProgram(
        mesh=mesh,
        graphs=(),
        sources={weight.name: weight for weight in weights},
        outputs=(),
        weights=Weights(whole),
        constants={},
        strategies={},
        groups={},
        out_spec=pytree.tree_structure(()),
        out_leaves=(),
    )


def stored(owner: Tensor, weight: Weight, seen: Tensor, mesh: md.Mesh) -> bool:
    """Is the parameter a view of what was laid out, once that is stored?"""
    ModelWeights(program_of({weight.name: owner}, weight, mesh=mesh), 0).store(weight.name, seen)
    return owner.untyped_storage().data_ptr() == seen.untyped_storage().data_ptr()


class TwoProducts(nn.Module):
    """Two products of one operand, which lowering joins into one, whose weight is a copy of both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 32), nn.Linear(16, 8), nn.Linear(40, 16)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.c(torch.cat([self.a(x), self.b(x)], -1))
        return result


def lay_out(model: nn.Module, x: Tensor) -> tuple[ShardedProgram, Segment, dict[Key, Tensor]]:
    """The model's weights as one engine takes them, and the model's own made views of them."""
    program = md.lower(md.capture(model, (x,), mesh=md.Mesh(cp=1)), placement="split")
    (part,) = place(program, "split").parts[0]
    taken, weights = with_transposed_weights(part).segment, ModelWeights(program, 0)
    return program, taken, laid_out([taken], weights.local, CPU, weights.store)


def held_bytes(tensors: list[Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class TestModelWeights:
    @pytest.mark.parametrize("joined", [False, True])
    def test_the_models_parameters_and_the_blocks_are_one_memory(self, joined: bool) -> None:
        torch.manual_seed(0)
        model, x = (TwoProducts().eval(), torch.randn(3, 16)) if joined else (models.mlp()[0], torch.randn(2, 8, 32))
        parameters = dict(model.named_parameters())
        before = {name: (p.detach().clone(), p.dtype, p.requires_grad) for name, p in parameters.items()}
        with torch.no_grad():
            expected = model(x)
        program, taken, blocks = lay_out(model, x)
        assert any(isinstance(s, Weight) and s.parts for s in program.sources.values()) == joined
        assert any(b.transposed for b in taken.inputs)
        assert all(dict(model.named_parameters())[name] is p for name, p in parameters.items())
        for name, (value, dtype, requires_grad) in before.items():
            assert (parameters[name].dtype, parameters[name].requires_grad) == (dtype, requires_grad)
            assert torch.equal(parameters[name], value)  # and so of the same shape
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected)
        assert held_bytes([*parameters.values(), *blocks.values()]) == sum(p.nbytes for p in parameters.values())

    def test_another_program_of_the_model_finds_what_is_joined(self) -> None:
        """As for another shape: the parameters lie in a row already, and nothing is copied."""
        torch.manual_seed(0)
        model = TwoProducts().eval()
        lay_out(model, torch.randn(3, 16))
        program = md.lower(md.capture(model, (torch.randn(5, 16),), mesh=md.Mesh(cp=1)), placement="split")
        weights = ModelWeights(program, 0)
        joined = [s for s in weights.sources.values() if s.parts]
        assert len(joined) == 2
        for source in joined:
            found = weights.local(source.name)
            owners: list[Tensor] = [model.get_parameter(part.name) for part in source.parts]
            assert found.untyped_storage().data_ptr() == owners[0].untyped_storage().data_ptr()
            assert torch.equal(found, torch.cat(owners))

    def test_parts_that_do_not_lie_in_a_row_are_copied(self) -> None:
        whole = torch.arange(96.0).view(12, 8)
        a, b, c = (Weight(name, (4, 8), torch.float32) for name in "abc")
        held = {"a": whole[:4], "b": whole[4:8], "c": whole[8:]}

        def local(parts: tuple[Weight, ...], of: dict[str, Tensor]) -> Tensor:
            joined = Weight("joined", (4 * len(parts), 8), torch.float32, parts=parts)
            found = ModelWeights(program_of(of, joined, mesh=md.Mesh(cp=1)), 0).local("joined")
            assert torch.equal(found, torch.cat([of[part.name] for part in parts]))
            return found

        def is_view(found: Tensor) -> bool:
            return found.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()

        assert is_view(local((a, b, c), held))
        assert is_view(local((b, c), held))
        assert not is_view(local((b, a), held))
        assert not is_view(local((a, c), held))
        assert not is_view(local((a, a), held))
        assert not is_view(local((a, b), {**held, "b": whole[4:8].clone()}))
        turned = torch.arange(96.0).view(8, 12).t()
        assert torch.equal(local((a, b, c), {"a": turned[:4], "b": turned[4:8], "c": turned[8:]}), turned)
        assert not is_view(local((a, b), {**held, "a": whole[:8:2], "b": whole[8:]}))
        assert not is_view(local((a, b), {**held, "b": torch._neg_view(whole[4:8])}))
        shared = torch.arange(64, dtype=torch.float32).numpy()
        parts = {"a": torch.from_numpy(shared[:32]).view(4, 8), "b": torch.from_numpy(shared).view(8, 8)[4:]}
        assert len(local((a, b), parts)) == 8  # of two storages at one address

    @pytest.mark.parametrize("turned", [False, True])
    def test_a_whole_parameter_is_stored(self, turned: bool) -> None:
        seen = torch.randn(8, 16).t() if turned else torch.randn(16, 8)
        assert stored(nn.Parameter(torch.zeros(16, 8)), Weight("w", (16, 8), torch.float32), seen, md.Mesh(tp=1))

    def test_what_is_no_second_copy_or_not_the_parameters_alone_is_left_alone(self) -> None:
        whole, one, two = Weight("w", (16, 8), torch.float32), md.Mesh(tp=1), md.Mesh(tp=2)
        seen = torch.randn(16, 8)
        assert not stored(torch.zeros(32, 8)[:16], whole, seen, one), "a part of another tensor"
        assert not stored(nn.Parameter(torch.zeros(32, 8)[:16]), whole, seen, one), "a part of other memory"
        assert not stored(torch.zeros(8, 16).t(), whole, seen, one), "a view"
        split = Weight("w", (16, 8), torch.float32, (Sharding(0, "tp"),))
        assert not stored(nn.Parameter(torch.zeros(16, 8)), split, seen[:8], two), "a rank's part"
        assert not stored(nn.Parameter(torch.zeros(16, 8)), split, seen, two), "a rank's part, whatever its shape"
        assert not stored(nn.Parameter(torch.zeros(16, 8)), whole, seen.half(), one), "another dtype"
        assert not stored(nn.Parameter(torch.zeros(16, 8)), whole, seen.to("meta"), one), "another device"
        with torch.inference_mode():
            inference = torch.zeros(16, 8)
        assert not stored(inference, whole, seen, one)

    def test_of_a_joined_weight_the_parts_of_which_are_split_nothing_is_stored(self) -> None:
        shardings = (Sharding(0, "tp"),)
        parts = tuple(Weight(name, (16, 8), torch.float32, shardings) for name in "ab")
        joined = Weight("a+b", (32, 8), torch.float32, parts=parts)
        owners = {name: nn.Parameter(torch.randn(16, 8)) for name in "ab"}
        addresses = {name: owner.data_ptr() for name, owner in owners.items()}
        weights = ModelWeights(program_of(owners, joined, mesh=md.Mesh(tp=2)), 1)
        local = weights.local("a+b")
        assert torch.equal(local, torch.cat([owners["a"][8:], owners["b"][8:]]))
        weights.store("a+b", local)
        assert {name: owner.data_ptr() for name, owner in owners.items()} == addresses


class TestWeightGuard:
    def test_a_weight_that_another_is_swapped_for_is_noticed(self) -> None:
        """No write is counted for it, and the counts of both are equal."""
        model, other = nn.Linear(8, 8), nn.Linear(8, 8)
        guard = WeightGuard(dict(model.named_parameters()))
        guard.check()
        torch.utils.swap_tensors(model.weight, other.weight)  # type: ignore[no-untyped-call]
        with pytest.raises(InputError, match="the weight 'weight' was changed"):
            guard.check()

    @pytest.mark.parametrize("written", ["", "before", "after"])
    def test_a_subclass_that_is_moved_is_followed_by_its_values(self, written: str) -> None:
        """``model.to()`` swaps it for another, with the count of what was written through it."""
        model, _, _ = quantized.mlp("int8 weights")
        guard = WeightGuard(named_weights(model), holders(model), outer=outer(model))
        weight = next(t for t in outer(model).values())

        def write() -> None:
            other: Any = next(t for t in outer(quantized.mlp("int8 weights")[0]).values())
            with torch.no_grad():
                other.qdata.neg_()
                weight.copy_(other)

        if written == "before":
            write()
        body = body_of(weight)
        moves: list[Callable[[], object]] = [lambda: model.to("cpu"), model.float]
        for move in moves:
            move()
            if not written:
                guard.check()
        assert body_of(weight) != body, "nothing was swapped, so this shows nothing"
        if written == "after":
            guard.check()
            write()
        if written:
            with pytest.raises(InputError, match="was changed after the model was compiled"):
                guard.check()

    def test_a_write_in_place_is_told_by_its_name(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        guard = WeightGuard(dict(model.named_parameters()))
        model(torch.randn(2, 4)).sum().backward()
        guard.check()  # reading is no change, nor is a gradient
        with torch.no_grad():
            model.get_parameter("1.weight").mul_(2)
        with pytest.raises(InputError, match=r"the weight '1\.weight' was changed after the model was compiled"):
            guard.check()

    def test_so_is_one_by_an_optimizer_or_by_loading_a_state(self) -> None:
        for change in (step, load_its_own_state):
            model = nn.Linear(4, 4)
            guard = WeightGuard(dict(model.named_parameters()))
            guard.check()
            change(model)
            with pytest.raises(InputError, match="the weight 'weight' was changed"):
                guard.check()

    def test_being_stored_is_no_change(self) -> None:
        model = models.mlp()[0]
        guard = WeightGuard(dict(model.named_parameters()))
        before = {name: p.data_ptr() for name, p in model.named_parameters()}
        lay_out(model, torch.randn(2, 8, 32))
        assert {name: p.data_ptr() for name, p in model.named_parameters()} != before
        guard.check()

    def test_what_was_replaced_by_its_equal_is_not_watched_any_more(self) -> None:
        held = {"table": torch.ones(4)}
        first = held["table"]
        guard = WeightGuard({}, constants=[Constant("table", first, lambda: held["table"])])
        for _ in range(10):
            held["table"] = torch.ones(4)
            guard.check()
        assert len(guard._counted) == 1
        first.zero_()
        guard.check()
        held["table"].zero_()
        with pytest.raises(InputError, match="the tensor 'table'"):
            guard.check()

    def test_a_check_takes_what_reading_the_counts_takes(self) -> None:
        """Of each weight in each call: little beside it may be done for one."""
        weights = {str(i): nn.Parameter(torch.zeros(1)) for i in range(1000)}
        guard, held = WeightGuard(weights), list(weights.values())
        checks, reads = [], []
        for _ in range(50):
            checks.append(seconds_of(guard.check))
            reads.append(seconds_of(lambda: [(weight._version, weight._cdata) for weight in held]))
        assert min(checks) < 2 * min(reads)


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def step(model: nn.Module) -> None:
    model(torch.ones(2, 4)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def load_its_own_state(model: nn.Module) -> None:
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
