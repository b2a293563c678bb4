"""Arguments by name: captured, written to a manifest, and called again as they were."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import torchtrt_md as md
from torchtrt_md.bundle import manifest as m
from torchtrt_md.bundle import read_manifest
from torchtrt_md.capture.arguments import Arguments, named_leaves
from torchtrt_md.errors import CaptureError, InputError
from torchtrt_md.program import ShardedProgram
from torchtrt_md.runtime.signature import Signature

CPU = torch.device("cpu")
ONE = md.Mesh(cp=1)
X, Y, Z = (torch.randn(2, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3))


class Variadic(nn.Module):
    def forward(self, *a: Tensor) -> Tensor:
        return a[0] - 2 * a[1]


class Flagged(nn.Module):
    def forward(self, x: Tensor, flag: bool, y: Tensor) -> Tensor:
        return x - 2 * y if flag else x + y


class Two(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x - 2 * y


class Attending(nn.Module):
    """Asks whether its inputs are one tensor, as attention modules do to project them at once."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        result: Tensor = self.attention(query, memory, memory, need_weights=False)[0]
        return result


class Nested(nn.Module):
    def forward(
        self, x: Tensor, pair: list[Tensor | None], *, joint: dict[str, Any], scale: float | None = None
    ) -> Tensor:
        assert pair[0] is not None
        result: Tensor = x - pair[0] * joint["scale"] + joint["rest"][1]
        return result


class Open(nn.Module):
    """``**kwargs`` may have a key that is the name of another parameter."""

    def forward(self, first: Tensor, /, *args: Any, mode: str = "add", **kwargs: Any) -> Tensor:
        result: Tensor = first + args[0] * args[1] - kwargs["args"]["deep"] + kwargs["kwargs"]
        return result


class Typed(nn.Module):
    def forward(self, x: Tensor, dtype: torch.dtype, fill: float, y: Tensor) -> Tensor:
        return (x - y).to(dtype).clamp(max=fill)


class Optional(nn.Module):
    def forward(self, x: Tensor, flag: bool = True, y: Tensor | None = None) -> Tensor:
        return x if y is None else x - y


def signature_of(program: ShardedProgram) -> Signature:
    """What a runner gets: the program's part of the manifest, written and read again."""

    written = m.Manifest(
        schema=m.SCHEMA,
        mesh=dict(program.mesh.axes),
        inputs=list(program.inputs),
        outputs=list(program.outputs),
        constants=dict(program.constants),  # type: ignore[arg-type]
        positional=list(program.positional),
        result={"output": 0},
        placement="engine",
        ranks=[],
        weights=[],
        target="portable",
        versions=m.Versions("", "", "", ""),
        files={},
    )
    read = m.decode(m.encode(written))
    assert read == written
    return Signature(read)


class Case(NamedTuple):
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tensors: dict[str, Tensor]
    constants: dict[str, Any]
    positional: list[str]


CASES = {
    "variadic": Case(Variadic(), (X, Y), {}, {"a.0": X, "a.1": Y}, {}, ["a.0", "a.1"]),
    "constant between": Case(Flagged(), (X, True, Y), {}, {"x": X, "y": Y}, {"flag": True}, ["x", "flag", "y"]),
    "by name": Case(
        Flagged(), (), {"y": Y, "x": X, "flag": False}, {"x": X, "y": Y}, {"flag": False}, ["x", "flag", "y"]
    ),
    "one tensor twice": Case(Two(), (X, X), {}, {"x": X, "y": X}, {}, ["x", "y"]),
    "default between": Case(Optional(), (X,), {"y": Y}, {"x": X, "y": Y}, {}, ["x"]),
    "nested": Case(
        Nested(),
        (X, [Y, None]),
        {"joint": {"scale": 0.5, "rest": (True, Y)}, "scale": None},
        {"x": X, "pair.0": Y, "joint.rest.1": Y},
        {"pair.1": None, "joint.scale": 0.5, "joint.rest.0": True, "scale": None},
        ["x", "pair"],
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_names_and_the_call_again(case: Case) -> None:
    arguments = Arguments.of(case.model, case.args, case.kwargs)
    assert arguments.tensors.keys() == case.tensors.keys()
    assert all(arguments.tensors[name] is t for name, t in case.tensors.items())
    assert arguments.constants == case.constants
    assert list(arguments.positional) == case.positional
    others = {name: torch.full_like(t, float(i)) for i, (name, t) in enumerate(arguments.tensors.items())}
    args, kwargs = arguments.call_with(others)
    again = Arguments.of(case.model, args, kwargs)
    assert (again.names, again.spec, again.constants) == (arguments.names, arguments.spec, arguments.constants)
    assert all(again.tensors[name] is t for name, t in others.items())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_program_is_called_as_it_was_captured(case: Case) -> None:
    program = md.capture(case.model, case.args, case.kwargs, mesh=ONE)
    md.verify(program, case.model, case.args, case.kwargs)
    signature = signature_of(program)
    bound = signature.bind(case.args, case.kwargs, CPU)
    assert bound.keys() == case.tensors.keys()
    assert all(bound[name] is t for name, t in case.tensors.items())
    # ... and flat, as torchtrt_md.run does.
    flat = signature.bind((), {**case.tensors, **case.constants}, CPU)
    assert all(flat[name] is t for name, t in case.tensors.items())
    # By position where the model could have been called so.
    given = {**dict(zip(case.positional, case.args, strict=False)), **case.kwargs}
    args = tuple(given.pop(name) for name in case.positional)
    assert all(signature.bind(args, given, CPU)[name] is t for name, t in case.tensors.items())


@pytest.mark.parametrize("model", [Two(), Attending().eval()])
def test_one_tensor_as_two_arguments_is_two_inputs(model: nn.Module) -> None:
    same, x, y = (torch.randn(1, 3, 4) for _ in range(3))
    program = md.capture(model, (same, same), mesh=ONE)
    assert len(program.inputs) == 2
    report = md.verify(program, model, (x, y))
    assert report.structure_error <= 1e-5
    signature = signature_of(program)
    assert list(signature.bind((same, same), {}, CPU).values()) == [same, same]
    a, b = signature.bind((x, y), {}, CPU).values()
    assert a is x
    assert b is y


def test_one_tensor_as_two_arguments_along_an_axis() -> None:
    program = md.capture(
        Two(),
        (X, X),
        mesh=md.Mesh(cp=2),
        parallel=md.ContextParallel("cp", plan={"": {"x": md.Split(1), "y": md.Split(1)}}),
    )
    assert [v.name for v in program.inputs] == ["x", "y"]
    md.verify(program, Two(), (Y, Z))


def test_two_values_of_one_name() -> None:
    with pytest.raises(CaptureError, match="two values among the example arguments have the name 'first'"):
        Arguments.of(Open(), (X, 2, Y), {"first": Z})
    with pytest.raises(CaptureError, match=r"have the name 'pair.0'"):
        Arguments.of(Nested(), (X, {"0": X, 0: Y}), {"joint": {}})


def test_keyword_arguments_have_their_own_keys() -> None:
    args, kwargs = (X, 2, Y), {"args": {"deep": Z}, "kwargs": Z, "mode": "add"}
    program = md.capture(Open(), args, kwargs, mesh=ONE)
    assert [v.name for v in program.inputs] == ["first", "args.1", "args.deep", "kwargs"]
    assert program.constants == {"args.0": 2, "mode": "add"}
    assert program.positional == ("first", "args.0", "args.1")
    signature = signature_of(program)
    assert [id(t) for t in signature.bind(args, kwargs, CPU).values()] == [id(t) for t in (X, Y, Z, Z)]
    with pytest.raises(InputError, match=r"args.0 is 3, and the program was built with args.0=2"):
        signature.bind((X, 3, Y), kwargs, CPU)


def test_what_cannot_be_compared_is_built_in_and_refused() -> None:
    example = (X, torch.float64, float("inf"), Y)
    program = md.capture(Typed(), example, mesh=ONE)
    assert program.constants == {}
    assert program.positional == ("x", "dtype", "fill", "y")
    md.verify(program, Typed(), example)
    signature = signature_of(program)
    with pytest.raises(InputError, match="dtype is a dtype, which cannot be compared") as raised:
        signature.bind(example, {}, CPU)
    assert raised.value.fix == "leave dtype out, and pass the arguments after it by name"
    with pytest.raises(InputError, match="fill is inf, which cannot be compared"):
        signature.bind((X,), {"fill": float("inf"), "y": Y}, CPU)
    assert list(signature.bind((X,), {"y": Y}, CPU)) == ["x", "y"]


def test_the_order_of_a_dict_is_the_programs() -> None:
    class Joined(nn.Module):
        def forward(self, x: Tensor, parts: dict[str, Any]) -> Tensor:
            return x + torch.cat([part for part in parts.values() if isinstance(part, Tensor)], -1)

    parts = {"a": X[..., :2], "scale": 2.0, "b": X[..., 2:], "shift": 1.0}
    signature = signature_of(md.capture(Joined(), (X, parts), mesh=ONE))
    assert len(signature.bind((X, parts), {}, CPU)) == 3
    assert len(signature.bind((), {"parts": parts, "x": X}, CPU)) == 3
    for other in (("b", "scale", "a", "shift"), ("a", "shift", "b", "scale")):
        with pytest.raises(InputError, match="in this order, and the program was built with parts"):
            signature.bind((X, {key: parts[key] for key in other}), {}, CPU)


def test_a_number_of_numpy_is_built_in_as_pythons() -> None:
    program = md.capture(Open(), (X, np.float64(7.5), Y), {"args": {"deep": Z}, "kwargs": Z, "mode": "add"}, mesh=ONE)
    assert type(program.constants["args.0"]) is float
    named = md.capture(Open(), (X, 2, Y), {"args": {"deep": Z}, "kwargs": Z, "mode": np.str_("add")}, mesh=ONE)
    assert type(named.constants["mode"]) is str
    signature_of(named)
    signature = signature_of(program)
    signature.bind((X, np.float64(7.5), Y), {"args": {"deep": Z}, "kwargs": Z, "mode": "add"}, CPU)


def test_a_default_that_was_not_passed_has_no_position() -> None:
    signature = signature_of(md.capture(Optional(), (X,), {"y": Y}, mesh=ONE))
    with pytest.raises(InputError, match="2 positional arguments, and the program takes 1: x"):
        signature.bind((X, Y), {}, CPU)


def test_what_no_call_can_be_compared_with_is_named_unless_it_is_the_default() -> None:
    class Given(nn.Module):
        def forward(
            self, x: Tensor, dtype: torch.dtype = torch.float64, fill: float = math.inf, nest: Any = None
        ) -> Tensor:
            return x.to(dtype).clamp(max=fill)

    default = inspect.signature(Given.forward).parameters["fill"].default
    for kwargs, opaque in (
        ({}, ()),
        ({"dtype": torch.float64, "fill": default}, ()),
        ({"dtype": torch.float32, "fill": -math.inf}, ("dtype", "fill")),
        ({"dtype": torch.float64, "nest": {"a": [torch.int8, 1]}}, ("nest.a.0",)),
    ):
        assert md.capture(Given(), (X,), kwargs, mesh=ONE).opaque == opaque


def test_an_argument_without_a_name_is_refused() -> None:
    class Any_(nn.Module):
        def forward(self, x: Tensor, **kwargs: Tensor) -> Tensor:
            return x + sum(kwargs.values())

    with pytest.raises(CaptureError, match="has no name"):
        md.capture(Any_(), (X,), {"": Y}, mesh=ONE)


def test_empty_containers_keep_their_position() -> None:
    class Cached(nn.Module):
        def forward(self, x: Tensor, cache: list[Tensor], y: Tensor) -> Tensor:
            return x - y

    signature = signature_of(md.capture(Cached(), (X, [], Y), mesh=ONE))
    assert list(signature.bind((X, [], Y), {}, CPU)) == ["x", "y"]
    with pytest.raises(InputError, match=r"no input 'cache.0'"):
        signature.bind((X, [Z], Y), {}, CPU)


class Pair:
    def __init__(self, a: Any, b: Any) -> None:
        self.a, self.b = a, b


def test_a_class_that_is_registered_without_keys_is_counted() -> None:
    if Pair not in pytree.SUPPORTED_NODES:
        pytree.register_pytree_node(Pair, lambda p: ([p.a, p.b], None), lambda values, _: Pair(*values))
    assert list(named_leaves("pair", Pair([1], 2))) == [("pair.0", 1), ("pair.1", 2)]


def test_through_a_bundle(tmp_path: Path) -> None:
    exported = md.export(Flagged(), (X, True, X), mesh=ONE, out=tmp_path / "out.mdtrt")
    manifest = read_manifest(tmp_path / "out.mdtrt")
    assert manifest == exported.manifest
    assert manifest.positional == ["x", "flag", "y"]
    bound = Signature(manifest).bind((X, True, Y), {}, CPU)
    assert bound["x"] is X
    assert bound["y"] is Y
    with pytest.raises(InputError, match="flag is False, and the program was built with flag=True"):
        Signature(manifest).bind((X, False, Y), {}, CPU)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda x: x.to_sparse(), "'x' is a sparse_coo tensor"),
        (lambda x: torch.nested.nested_tensor([x, x[:1]]), "'x' is a nested tensor"),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "'x' is a quantized tensor"),
    ],
)
def test_tensors_that_are_not_one_block_of_numbers(make: Any, problem: str) -> None:
    with pytest.raises(CaptureError, match=problem):
        md.capture(Optional(), (make(X),), mesh=ONE)
