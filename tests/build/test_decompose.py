"""The decomposed graph computes what the verified one does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from torch.fx import Interpreter

import torchtrt_md as md
from torchtrt_md.build.decompose import bind_weights, decompose
from torchtrt_md.build.part import unconvertible
from torchtrt_md.errors import BuildError, first_line
from torchtrt_md.program import Coordinate, ShardedProgram, Value, Weight, placeholders


def flux() -> tuple[models.Call, list[torch.Tensor]]:
    call = models.flux()
    return call, [x for x in call[2].values() if isinstance(x, torch.Tensor)]


def llama() -> tuple[models.Call, list[torch.Tensor]]:
    call = models.llama()
    return call, list(call[1])


def operands(program: ShardedProgram, inputs: list[torch.Tensor]) -> list[Any]:
    given = iter(inputs)
    found: list[Any] = []
    for node in placeholders(program.graphs[0]):
        source = program.sources[node.name]
        if isinstance(source, Weight):
            found.append(program.weights.local(source, program.mesh, 0))
        elif isinstance(source, Value):
            found.append(next(given))
        else:
            assert isinstance(source, Coordinate)
            found.append(torch.zeros(1, dtype=torch.int32))
    return found


@pytest.mark.parametrize("model", [flux, llama])
def test_numerics_and_names_are_those_of_the_lowered_graph(
    model: Callable[[], tuple[models.Call, list[torch.Tensor]]],
) -> None:
    (module, args, kwargs), inputs = model()
    program = md.lower(md.capture(module, args, kwargs, mesh=md.Mesh(tp=1)))
    (graph,) = program.graphs
    decomposed = decompose(graph)
    assert [n.name for n in placeholders(decomposed)] == [n.name for n in placeholders(graph)]
    flat = operands(program, inputs)
    with torch.no_grad():
        expected, found = Interpreter(graph).run(*flat), Interpreter(decomposed).run(*flat)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_bound_weights_are_the_same_memory() -> None:
    module, args, kwargs = models.mlp()
    program = md.lower(md.capture(module, args, kwargs, mesh=md.Mesh(tp=1)))
    decomposed = decompose(program.graphs[0])
    weights = {
        name: program.weights.local(s, program.mesh, 0) for name, s in program.sources.items() if isinstance(s, Weight)
    }
    bound = bind_weights(decomposed, weights)
    assert len(weights) == 4
    for name, weight in weights.items():
        assert bound.get_parameter(f"weight_{name}").data_ptr() == weight.data_ptr()
    assert not {n.name for n in placeholders(bound)} & set(weights)
    assert set(weights) < {n.name for n in placeholders(decomposed)}  # which is left as it was
    with torch.no_grad():
        (found,) = Interpreter(bound).run(*args)
        torch.testing.assert_close(found, module(*args))


@torch.library.custom_op("torchtrt_md_tests::refuses", mutates_args=())
def refuses(x: torch.Tensor, times: int) -> torch.Tensor:
    return x * times


@refuses.register_fake
def _(x: torch.Tensor, times: int) -> torch.Tensor:
    if times < 0:
        raise ValueError("negative times\nand a long tail of advice")
    return torch.empty_like(x)


def test_an_op_that_fails_names_the_users_line_and_not_torchs_advice() -> None:
    class Refused(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = torch.ops.torchtrt_md_tests.refuses(x, 2)
            return result

    program = md.lower(md.capture(Refused(), (torch.randn(3),), mesh=md.Mesh(tp=1)))
    (graph,) = program.graphs
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.torchtrt_md_tests.refuses.default):
        node.args = (node.args[0], -2)
    with pytest.raises(BuildError, match=r"decomposing .*refuses.*: negative times") as error:
        decompose(graph)
    assert "refuses(x, 2)" in error.value.at
    assert "advice" not in str(error.value)
    assert "executing" not in str(error.value)


def test_first_line() -> None:
    assert first_line(ValueError("\n  what is wrong\n\nWhile executing %x\nUse tlparse")) == "what is wrong"
    assert first_line(ValueError()) == "ValueError"


def test_what_looks_at_bits_as_another_dtype_stays_in_pytorch() -> None:
    """PyTorch detaches it, and of Torch-TensorRT's rules one says that this gives the tensor itself."""

    class Bits(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * 2).view(torch.int32) + 1

    x = torch.randn(4)
    (graph,) = md.lower(md.capture(Bits(), (x,), mesh=md.Mesh(tp=1))).graphs
    assert torch.equal(decompose(graph)(x)[0], Bits()(x))
    (reason,) = unconvertible(graph).values()
    assert "no converter for aten.view.dtype" in reason
