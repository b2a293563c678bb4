"""Equal blocks are traced twice, what is not provably equal each time; the graph is that of the whole trace."""

from __future__ import annotations

import contextvars
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from whole_traces import MODULE, captured, is_that_of_the_whole_trace

import torchtrt_md as md
from torchtrt_md.errors import CaptureError
from torchtrt_md.graph.text import graph_text
from torchtrt_md.verification import verify

WIDTH = 8
COUNT = 5  # blocks


class Block(nn.Module):
    """A layer with enough parts to be looked at."""

    def __init__(self, **held: Any) -> None:
        super().__init__()
        self.norm, self.up, self.act = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU()
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        for name, value in held.items():
            setattr(self, name, value)

    def forward(self, x: Tensor, *others: Any) -> Any:
        return x + self.down(self.act(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        torch.manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


_KNOWN = MODULE["KNOWN"]


@pytest.fixture(autouse=True)
def takes_this_file_for_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODULE, "KNOWN", _KNOWN | {__name__.partition(".")[0]})


X = torch.randn(1, 4, WIDTH)


def test_equal_blocks_are_traced_twice(again: list[object]) -> None:
    model = Model(*(Block() for _ in range(COUNT))).eval()
    program = is_that_of_the_whole_trace(model, X)
    assert len(again) == COUNT - 2
    assert verify(md.lower(program), model, (X,)).error < 1e-6, "each has its own weights"


def test_no_block_is_left_with_another_forward() -> None:
    own = Block.forward
    captured(Model(*(Block() for _ in range(COUNT))), X)
    assert Block.forward is own


def test_blocks_of_two_classes_in_turn(again: list[object]) -> None:
    class Other(Block):
        def forward(self, x: Tensor, *others: Any) -> Any:
            return super().forward(x).relu()

    is_that_of_the_whole_trace(Model(*(kind() for _ in range(4) for kind in (Block, Other))), X)
    assert len(again) == 4


@pytest.mark.parametrize(
    "held",
    [
        [{"scale": i} for i in range(COUNT)],
        [{"scale": [1.0, {"deep": i}]} for i in range(COUNT)],
        [{"scale": (lambda x, i=i: x * i)} for i in range(COUNT)],
        [{"scale": iter(range(9))}] * COUNT,
        [{"scale": itertools.count()}] * COUNT,
        [{"scale": nn.Dropout(i / 10)} for i in range(COUNT)],
        [{"scale": torch.tensor(float(i))} for i in range(COUNT)],
    ],
    ids=["number", "deep", "function", "iterator", "counter", "module", "tensor"],
)
def test_blocks_that_hold_something_else_are_traced(held: list[dict[str, Any]], again: list[object]) -> None:
    is_that_of_the_whole_trace(Model(*(Block(**h) for h in held)), X)
    assert not again


def test_what_differs_in_one_block_only(again: list[object]) -> None:
    blocks = [Block(slope=0.1) for _ in range(COUNT)]
    blocks[3].slope = 0.2  # type: ignore[assignment]
    is_that_of_the_whole_trace(Model(*blocks), X)
    assert blocks[3] not in again
    assert len(again) == COUNT - 3


def test_hooks_inside_of_blocks_run(again: list[object]) -> None:
    model = Model(*(Block() for _ in range(COUNT)))
    for index, block in enumerate(model.blocks):
        hook = lambda module, args, result, index=index: result * index  # noqa: E731
        block.get_submodule("up").register_forward_hook(hook)
    is_that_of_the_whole_trace(model, X)
    assert not again


def test_hooks_of_blocks_run_around_what_is_written_again(again: list[object]) -> None:
    model = Model(*(Block() for _ in range(COUNT)))
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(lambda module, args, result, index=index: result * index)
    is_that_of_the_whole_trace(model, X)
    assert len(again) == COUNT - 2


CALLS = {"count": 0}
SCALES = [1.0, 1.0, 1.0, 2.0, 1.0]
now: contextvars.ContextVar[float] = contextvars.ContextVar("now", default=1.0)


class Counting(Block):
    """Its fourth call is another, by what its file holds."""

    def forward(self, x: Tensor, *others: Any) -> Any:
        CALLS["count"] += 1
        return super().forward(x) * SCALES[CALLS["count"] - 1]


class OfItsClass(Block):
    calls = 0

    def forward(self, x: Tensor, *others: Any) -> Any:
        OfItsClass.calls += 1
        return super().forward(x) * SCALES[OfItsClass.calls - 1]


class Reading(Block):
    def forward(self, x: Tensor, *others: Any) -> Any:
        return super().forward(x) * SCALES[CALLS["count"]]


class OfTheContext(Block):
    def forward(self, x: Tensor, *others: Any) -> Any:
        return super().forward(x) * now.get()


class Telling(Model):
    """Its forward says which block is next, in all the ways there are."""

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            CALLS["count"] = index
            token = now.set(SCALES[index])
            x = block(x)
            now.reset(token)
        return x


@pytest.mark.parametrize(
    "model", [Model(*(Counting() for _ in range(COUNT))), Model(*(OfItsClass() for _ in range(5)))]
)
def test_blocks_that_count_their_calls_are_traced(model: nn.Module, again: list[object]) -> None:
    CALLS["count"] = OfItsClass.calls = 0
    program = captured(model, X)
    assert not again
    assert sum("mul.Tensor" in line and ", 2.0)" in line for line in graph_text(program.graphs[0]).split("\n")) == 1
    CALLS["count"] = OfItsClass.calls = 0


@pytest.mark.parametrize("block", [Reading, OfTheContext])
def test_blocks_around_which_something_changes_are_traced(block: type[Block], again: list[object]) -> None:
    is_that_of_the_whole_trace(Telling(*(block() for _ in range(COUNT))), X)
    assert not again


def test_autocast_around_one_block(again: list[object]) -> None:
    class Cast(Model):
        def forward(self, x: Tensor) -> Tensor:
            for index, block in enumerate(self.blocks):
                with torch.autocast("cpu", torch.bfloat16, enabled=index == 3):
                    x = block(x)
            return x

    model = Cast(*(Block() for _ in range(COUNT)))
    is_that_of_the_whole_trace(model, X)
    assert len(again) == COUNT - 3


def test_arguments_that_differ(again: list[object]) -> None:
    class Scaled(Block):
        def forward(self, x: Tensor, *others: Any) -> Any:
            return super().forward(x) * others[0]

    class Passing(Model):
        def forward(self, x: Tensor) -> Tensor:
            for block, scale in zip(self.blocks, (1, 1, 1, True, 1.0), strict=True):  # equal, and of other dtypes
                x = block(x, scale)
            return x

    is_that_of_the_whole_trace(Passing(*(Scaled() for _ in range(COUNT))), X)
    assert len(again) == 1


def test_results_of_every_kind(again: list[object]) -> None:
    class Split(Block):
        def forward(self, x: Tensor, *others: Any) -> Any:
            y = super().forward(x)
            return y[:, :3], y[:, 3:], x, None, y, y

    class Joined(Model):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                first, second, same, none, y, twice = block(x)
                assert none is None
                assert y is twice
                assert same is x
                x = torch.cat([first, second], 1) + y + same
            return x

    is_that_of_the_whole_trace(Joined(*(Split() for _ in range(COUNT))), X)
    assert len(again) == COUNT - 2


class Dict(Block):
    def forward(self, x: Tensor, *others: Any) -> Any:
        return {"y": super().forward(x)}


class GivenBack(Block):
    def forward(self, x: Tensor, *others: Any) -> Any:
        return super().forward(x) + others[0]["bias"], others[0]


class Renaming(Block):
    def forward(self, x: Tensor, *others: Any) -> Any:
        others[0]["kept"] = others[0].pop("bias")
        return super().forward(x)


class Flagged(Block):
    def forward(self, x: Tensor, *others: Any) -> Any:
        return super().forward(x), 2


@pytest.mark.parametrize("block", [Dict, GivenBack, Renaming, Flagged])
def test_results_and_arguments_that_could_be_told_apart(block: type[Block], again: list[object]) -> None:
    class Passing(Model):
        def forward(self, x: Tensor) -> Tensor:
            info = {"bias": x.mean()}
            for block in self.blocks:
                if isinstance(block, Dict):
                    x = block(x)["y"]
                elif isinstance(block, GivenBack):
                    x, out = block(x, info)
                    out["bias"] = out["bias"] * 2
                elif isinstance(block, Renaming):
                    told = {"bias": x}
                    x = block(x, told) + told.get("kept", 0)
                else:
                    x, number = block(x, info)
                    x = x * number
            return x

    is_that_of_the_whole_trace(Passing(*(block() for _ in range(COUNT))), X)
    assert not again


def test_known_values_may_be_written_to(again: list[object]) -> None:
    class Late(Block):
        def forward(self, x: Tensor, *others: Any) -> Any:
            y = super().forward(x)
            return y * 2 if others[0] >= 3 else y

    class Stepping(Model):
        def forward(self, x: Tensor) -> Tensor:
            step = torch.zeros((), dtype=torch.long)
            for block in self.blocks:
                x = block(x, step)
                step += 1
            return x

    is_that_of_the_whole_trace(Stepping(*(Late() for _ in range(COUNT))), X)
    assert not again


def test_the_forward_of_another_class(again: list[object]) -> None:
    class Other(Block):
        def forward(self, x: Tensor, *others: Any) -> Any:
            return super().forward(x).relu()

    class Turns(Model):
        def forward(self, x: Tensor) -> Tensor:
            for index, block in enumerate(self.blocks):
                x = Block.forward(block, x) if index in (3, 4) else block(x)  # type: ignore[arg-type]
            return x

    blocks = [*(Block() for _ in range(3)), *(Other() for _ in range(5))]
    is_that_of_the_whole_trace(Turns(*blocks), X)


def test_code_of_the_users_is_always_traced(monkeypatch: pytest.MonkeyPatch, again: list[object]) -> None:
    monkeypatch.setitem(MODULE, "KNOWN", _KNOWN)
    is_that_of_the_whole_trace(Model(*(Block() for _ in range(COUNT))), X)
    assert not again


def test_one_weight_in_all_blocks(again: list[object]) -> None:
    blocks = [Block() for _ in range(COUNT)]
    for block in blocks:
        block.up = blocks[0].up
    program = is_that_of_the_whole_trace(Model(*blocks), X)
    assert len(again) == COUNT - 2
    assert sum(name.endswith("up.weight") for name in program.sources) <= 1


def test_quantized_weights(again: list[object]) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = Model(*(Block() for _ in range(COUNT))).eval()
    quantize_(model, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    is_that_of_the_whole_trace(model, X)
    assert len(again) == COUNT - 2


def test_weights_of_several_kinds(again: list[object]) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    model = Model(*(Block() for _ in range(COUNT + 2))).eval()
    for index, block in enumerate(model.blocks):
        config = Int8WeightOnlyConfig if index % 2 else Int8DynamicActivationInt8WeightConfig
        quantize_(block, config(set_inductor_config=False))
    is_that_of_the_whole_trace(model, X)
    assert len(again) == COUNT + 2 - 4


class Constant(Block):
    def forward(self, x: Tensor, *others: Any) -> Any:
        return super().forward(x) + torch.tensor([0.5])


class Writing(Block):
    """Writes to what it is given."""

    def forward(self, x: Tensor, *others: Any) -> Any:
        x.mul_(2)
        return super().forward(x)


class WritingView(Block):
    def forward(self, x: Tensor, *others: Any) -> Any:
        x[:, :1].add_(1)
        return super().forward(x)


class WritingOwn(Block):
    """Writes to what it made, by way of views."""

    def forward(self, x: Tensor, *others: Any) -> Any:
        y = super().forward(x)
        y[:, :2].mul_(3)
        y += x
        return y


class Shuffled(Model):
    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.parametrize("block", [Constant, Writing, WritingView, WritingOwn])
@pytest.mark.parametrize("model", [Model, Shuffled])
def test_blocks_of_which_a_record_does_not_say_all(model: type[Model], block: type[Block]) -> None:
    made = model(*(block() for _ in range(COUNT))).eval()
    x = X.clone() + 1
    program = is_that_of_the_whole_trace(made, x) if model is Shuffled else None
    if program is not None:
        assert verify(md.lower(program), made, (x,)).error < 1e-6


class Kept(Model):
    """Hands tensors to its blocks behind their arguments."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            self.given = x.sin()
            x = block(x)
        return x


def test_values_from_outside() -> None:
    kept: list[Kept] = []

    class Taking(Block):
        def forward(self, x: Tensor, *others: Any) -> Any:
            return super().forward(x) + kept[0].given

    model = Kept(*(Taking() for _ in range(COUNT)))
    kept.append(model)
    with pytest.raises(CaptureError):  # it is the copy that is traced, so what the blocks read was never set
        captured(model, X)


def test_a_closure_over_a_value_of_the_forward(again: list[object]) -> None:
    class Closing(Model):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                block.up.bonus = x.mean()  # type: ignore[union-attr]
                x = block(x)
            return x

    class Taking(Block):
        def forward(self, x: Tensor, *others: Any) -> Any:
            return super().forward(x) + self.up.bonus

    is_that_of_the_whole_trace(Closing(*(Taking() for _ in range(COUNT))), X)
    assert not again


def test_a_list_that_blocks_add_to(again: list[object]) -> None:
    class Adding(Block):
        def forward(self, x: Tensor, *others: Any) -> Any:
            y = super().forward(x)
            others[0].append(y.mean())
            return y

    class Collecting(Model):
        def forward(self, x: Tensor) -> Tensor:
            found = [x.mean()]
            for block in self.blocks:
                x = block(x, found)
            return x + sum(found)

    is_that_of_the_whole_trace(Collecting(*(Adding() for _ in range(COUNT))), X)
    assert not again


def test_a_table_that_the_first_block_makes() -> None:
    class Table(Block):
        tables: dict[int, Tensor] = {}  # noqa: RUF012

        def forward(self, x: Tensor, *others: Any) -> Any:
            if x.shape[1] not in self.tables:
                self.tables[x.shape[1]] = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
            return super().forward(x) + self.tables[x.shape[1]]

    is_that_of_the_whole_trace(Model(*(Table() for _ in range(COUNT))), X)
    assert not Table.tables


def test_an_error_in_a_late_block_cites_its_line() -> None:
    class Failing(Model):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x @ x  # not square

    with pytest.raises(CaptureError) as raised:
        captured(Failing(*(Block() for _ in range(COUNT))), X)
    assert "return x @ x" in str(raised.value)
