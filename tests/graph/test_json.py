"""Graphs as JSON: what is read computes what was written, and nothing in the file is trusted."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable
from typing import Any

import graphs
import models
import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

import torchtrt_md as md
from torchtrt_md.errors import BundleError
from torchtrt_md.graph.json import _argument, check_bindings, graph_from_json, graph_to_json
from torchtrt_md.graph.reader import _value
from torchtrt_md.graph.schema import Argument, TensorSpec
from torchtrt_md.graph.source import source_line
from torchtrt_md.lowering import ops
from torchtrt_md.parallel import Parallel
from torchtrt_md.program import placeholders, value_of
from torchtrt_md.segment import Binding, Segment, Wire
from torchtrt_md.verification.simulate import EXACT, simulate

aten = torch.ops.aten
PROGRAMS: dict[str, tuple[Callable[..., models.Call], md.Mesh, list[Parallel]]] = {
    "flux ulysses": (models.flux, md.Mesh(cp=2), [md.ContextParallel("cp", "ulysses")]),
    "flux allgather": (models.flux, md.Mesh(cp=2), [md.ContextParallel("cp", "allgather_kv")]),
    "wan ulysses": (models.wan, md.Mesh(cp=2), [md.ContextParallel("cp", "ulysses")]),
    "llama": (models.llama, md.Mesh(tp=2), [md.TensorParallel("tp")]),
    "qwen3": (models.qwen3, md.Mesh(tp=2), [md.TensorParallel("tp")]),
}


def again(graph: GraphModule) -> GraphModule:
    return graph_from_json(graph_to_json(graph))


def assert_same_nodes(graph: GraphModule, expected: GraphModule) -> None:
    """Names, order, targets, arguments with their types, the user's lines, shapes, dtypes and strides."""
    for a, b in zip(graph.graph.nodes, expected.graph.nodes, strict=True):
        assert (a.op, a.name, a.target) == (b.op, b.name, b.target)
        assert plain((a.args, a.kwargs)) == plain((b.args, b.kwargs))
        assert a.meta["source_line"] == source_line(b)
        if "val" in b.meta:
            found, value = a.meta["val"], b.meta["val"]
            many = isinstance(value, (list, tuple))
            for x, y in zip(found if many else [found], value if many else [value], strict=True):
                assert (x.dtype, x.shape, x.stride(), x.device.type) == (y.dtype, y.shape, y.stride(), "meta")


def plain(value: Any) -> Any:
    """With all types told apart: 1 and 1.0 and True, 0.0 and -0.0, lists and tuples."""
    if isinstance(value, Node):
        return ("node", value.name)
    if isinstance(value, (list, tuple)):
        return ("list" if isinstance(value, list) else "tuple", [plain(v) for v in value])
    if isinstance(value, dict):
        return {name: plain(v) for name, v in value.items()}
    return (type(value).__name__, repr(value))


@pytest.mark.parametrize("case", PROGRAMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lowered_programs_compute_the_same_bits_on_all_ranks(case: str, dtype: torch.dtype) -> None:
    call, mesh, parallel = PROGRAMS[case]
    model, args, kwargs = call(dtype)
    program = md.lower(md.capture(model, args, kwargs, mesh=mesh, parallel=parallel))
    read = {id(graph): again(graph) for graph, _ in program.distinct()}
    for graph, _ in program.distinct():
        assert_same_nodes(read[id(graph)], graph)
        assert graph_to_json(read[id(graph)]) == graph_to_json(graph)

    torch.manual_seed(1)
    inputs = {v.name: random(v.shape, v.dtype) for v in program.inputs}
    expected = simulate(program, inputs, precision=EXACT)
    graphs.assert_same(simulate(program.with_graphs(read), inputs, precision=EXACT), expected)
    assert any(t.float().norm() > 0 for t in expected[0])


def random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.rand(shape).to(dtype) if dtype.is_floating_point else torch.randint(0, 100, shape, dtype=dtype)


STACK = '  File "/home/me/model.py", line 7, in forward\n    return torch.relu(x)\n'


def test_each_node_has_the_users_line() -> None:
    graph = graphs.trace(lambda x: torch.relu(x), torch.ones(2))
    for node in graph.graph.nodes:
        node.meta["stack_trace"] = STACK
    read = again(graph)
    assert {n.meta["source_line"] for n in read.graph.nodes} == {"/home/me/model.py:7 in forward: return torch.relu(x)"}
    assert graph_to_json(read) == graph_to_json(graph)


def test_several_results_and_what_is_known_of_them() -> None:
    graph = graphs.trace(lambda x: torch.var_mean(x, dim=1), torch.randn(3, 4))
    read = again(graph)
    many = next(n for n in read.graph.nodes if n.op == "call_function" and isinstance(n.meta["spec"], tuple))
    assert many.meta["spec"] == (TensorSpec("float32", [3], [1]),) * 2
    assert many.meta["val"][1].shape == (3,)
    x = torch.randn(3, 4)
    assert all(torch.equal(a, b) for a, b in zip(read(x), graph(x), strict=True))


def test_strides_are_kept() -> None:
    read = again(graphs.trace(lambda x: x.t(), torch.randn(3, 4)))
    (node,) = (n for n in read.graph.nodes if n.op == "call_function")
    assert node.meta["spec"] == TensorSpec("float32", [4, 3], [1, 4])
    assert value_of(node).stride() == (1, 4)


def test_the_ir_is_known_by_axis_and_size() -> None:
    graph = graphs.trace(lambda x: ops.all_gather(ops.all_reduce(x, "sum", "cp", 2), 1, "cp", 2), torch.ones(2, 3))
    assert graphs.collectives(again(graph)) == [("all_reduce", "sum", "cp", 2), ("all_gather", 1, "cp", 2)]


# Constants

CONSTANTS = [
    torch.randn(3, 4).t(),
    torch.randn(5).to(torch.bfloat16),
    torch.tensor(7),
    torch.tensor([True, False]),
    torch.empty(0, 3),
    torch.tensor([float("nan"), -0.0, float("inf")], dtype=torch.float16),
    torch.randn(2, 2, dtype=torch.complex64).conj(),
    torch.randn(4).to(torch.float8_e4m3fn),
    torch.nn.Parameter(torch.randn(3)),
]


def holding(**constants: Tensor) -> GraphModule:
    """A graph that returns what it holds."""
    graph = Graph()
    found = tuple(graph.get_attr(name.replace("__", ".")) for name in constants)
    graph.output(found)
    return GraphModule({name.replace("__", "."): tensor for name, tensor in constants.items()}, graph)


@pytest.mark.parametrize("constant", CONSTANTS, ids=lambda t: f"{t.dtype}{list(t.shape)}")
def test_constants_are_kept_bit_by_bit(constant: Tensor) -> None:
    (read,) = again(holding(c=constant))()
    assert (read.dtype, read.shape, read.is_contiguous()) == (constant.dtype, constant.shape, True)
    raw = [t.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8) for t in (read, constant)]
    assert torch.equal(*raw)


def test_constants_move_with_the_module() -> None:
    read = again(holding(c=torch.ones(2), part__c=torch.zeros(3)))
    assert dict(read.named_buffers()).keys() == {"c", "part.c"}
    assert all(t.is_meta for t in read.to("meta")())


def test_constants_have_a_limit_in_all() -> None:
    half = torch.zeros(1 << 17)
    graph_to_json(holding(a=half, b=half))
    with pytest.raises(BundleError) as raised:
        graph_to_json(holding(a=half, b=torch.zeros((1 << 17) + 1)))
    for part in ("1048580 bytes", "'b' [131073] with 524292", "at most 1048576", "pass them as weights"):
        assert part in str(raised.value)


def test_a_held_module_or_a_tensor_without_values_is_refused() -> None:
    with pytest.raises(BundleError, match="reads 'c' of the graph, which is no tensor with values"):
        graph_to_json(holding(c=torch.empty(2, device="meta")))
    graph = Graph()
    graph.output((graph.get_attr("inner"),))
    module = GraphModule({"inner": torch.nn.Identity()}, graph)
    with pytest.raises(BundleError, match="no tensor with values but a Identity"):
        graph_to_json(module)


# Arguments

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.text()
    | st.sampled_from(
        [
            *(torch.float32, torch.bfloat16, torch.float8_e5m2, torch.bool, torch.complex64),
            *(torch.strided, torch.sparse_coo, torch.channels_last, torch.preserve_format),
            *(torch.device("cpu"), torch.device("cuda", 3), torch.device("cuda")),
        ]
    )
)
ARGUMENTS = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple),
    max_leaves=12,
)


def calling(*args: Any) -> GraphModule:
    """A graph with one call, which need not be possible."""
    graph = Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(aten.view.default, (x, *args)),))
    return GraphModule({}, graph)


@given(ARGUMENTS)
@settings(max_examples=300, deadline=None)
def test_any_argument_comes_back_with_its_types(value: Any) -> None:
    text = msgspec.json.encode(_argument(value))
    assert plain(_value(msgspec.json.decode(text, type=Argument), {})) == plain(value)


@given(st.floats(allow_nan=False, allow_infinity=False))
@settings(deadline=None)
def test_floats_are_floats_in_any_json_reader(value: float) -> None:
    argument = json.loads(msgspec.json.encode(_argument(value)))
    assert isinstance(argument, float)
    assert (argument, math.copysign(1, argument)) == (value, math.copysign(1, value))


def test_nodes_within_lists_are_references() -> None:
    graph = graphs.trace(lambda x, y: torch.cat([x, y]), torch.ones(2), torch.ones(3))
    read = again(graph)
    (node,) = (n for n in read.graph.nodes if n.op == "call_function")
    assert list(node.args[0]) == placeholders(read)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (slice(0, 2), r"node 'view_default': has the argument slice\(0, 2, None\), a slice, which has no place"),
        (1j, "a complex, which has no place"),
        ({"a": 1}, "a immutable_dict, which has no place"),
        (1 << 64, "which is beyond 64 bits"),
        ([(1, [1j])], "argument 1j, a complex, which has no place"),
    ],
)
def test_other_arguments_are_refused(argument: object, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        graph_to_json(calling(argument))


def test_ops_of_other_namespaces_are_refused_by_name() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(torch.ops._c10d_functional.wait_tensor.default, (x,)),))
    with pytest.raises(BundleError, match=r"calls _c10d_functional\.wait_tensor\.default, which is no op of aten"):
        graph_to_json(GraphModule({}, graph))
    graph = Graph()
    graph.output((graph.call_function(operator.add, (graph.placeholder("x"), 1)),))
    with pytest.raises(BundleError, match="calls <built-in function add>"):
        graph_to_json(GraphModule({}, graph))


def test_a_refusal_has_the_users_line() -> None:
    graph = graphs.trace(lambda x: torch.relu(x), torch.ones(2))
    (node,) = (n for n in graph.graph.nodes if n.op == "call_function")
    node.kwargs, node.meta["stack_trace"] = {"inplace": slice(0)}, STACK
    with pytest.raises(BundleError, match=r"\n  at /home/me/model.py:7 in forward"):
        graph_to_json(graph)


@pytest.mark.parametrize("op", ["call_module", "call_method"])
def test_other_nodes_are_refused(op: str) -> None:
    graph = Graph()
    graph.output((graph.create_node(op, "relu", (graph.placeholder("x"),)),))
    with pytest.raises(BundleError, match=f"node 'relu': a {op} node has no place in a bundle"):
        graph_to_json(GraphModule({"relu": torch.nn.ReLU()}, graph))


def test_placeholders_have_no_defaults() -> None:
    graph = Graph()
    graph.output((graph.placeholder("x", default_value=1),))
    with pytest.raises(BundleError, match="a placeholder with a default"):
        graph_to_json(GraphModule({}, graph))


# Reading


def written() -> Any:
    """A graph of two calls and a constant, as JSON."""
    graph = Graph()
    x, c = graph.placeholder("x"), graph.get_attr("c")
    x.meta["val"] = torch.empty(2, 3, device="meta")
    total = graph.call_function(aten.add.Tensor, (x, c))
    graph.output((graph.call_function(aten.sum.dim_IntList, (total, [1]), {"dtype": torch.float64}),))
    return json.loads(graph_to_json(GraphModule({"c": torch.ones(3)}, graph)))


def test_the_sample_is_read() -> None:
    (result,) = graph_from_json(json.dumps(written()).encode())(torch.ones(2, 3))
    assert result.tolist() == [6.0, 6.0]


BAD: dict[str, Callable[[Any], object]] = {
    "has schema 2 and this version of torchtrt_md reads graphs of schema 1": lambda g: g.update(schema=2, nodes=1),
    "is not a graph: Object contains unknown field `extra`": lambda g: g.update(extra=1),
    "is not a graph: Invalid enum value 'call_module'": lambda g: g["nodes"][2].update(op="call_module"),
    "contains unknown field `more`": lambda g: g["nodes"][2].update(more=1),
    "calls aten.no_such_op.default, which PyTorch": lambda g: g["nodes"][2].update(target="aten.no_such_op.default"),
    "calls aten.add.NoSuch, which PyTorch": lambda g: g["nodes"][2].update(target="aten.add.NoSuch"),
    "calls aten.add, which PyTorch": lambda g: g["nodes"][2].update(target="aten.add"),
    "calls aten.__class__.__init__, which": lambda g: g["nodes"][2].update(target="aten.__class__.__init__"),
    "calls os.system.default, which": lambda g: g["nodes"][2].update(target="os.system.default"),
    "reads 'later', which no node before it makes": lambda g: g["nodes"][2]["args"][0].update(name="later"),
    "node 'add_tensor': reads 'sum_dim_int_list'": lambda g: g["nodes"][2]["args"][0].update(name="sum_dim_int_list"),
    "two nodes are named 'x'": lambda g: g["nodes"][1].update(name="x"),
    "reads the constant 'd', which is missing": lambda g: g["nodes"][1].update(target="d"),
    "the name 'x; import os' of a node": lambda g: g["nodes"][0].update(name="x; import os"),
    "the name 'x=print(1)' of a placeholder": lambda g: g["nodes"][0].update(target="x=print(1)"),
    "the name '*x' of a placeholder": lambda g: g["nodes"][0].update(target="*x"),
    "the name 'dtype=print(), dtype' of a argument": lambda g: g["nodes"][3].update(kwargs={"dtype=print(), dtype": 1}),
    "the name 'class' of a argument": lambda g: g["nodes"][3].update(kwargs={"class": 1}),
    "node 'inf': its name is not one that a node can have": lambda g: g["nodes"][0].update(name="inf"),
    "has torch.nn, which PyTorch": lambda g: g["nodes"][3]["kwargs"]["dtype"].update(name="nn"),
    "has torch.float3, which PyTorch": lambda g: g["nodes"][0]["value"].update(dtype="float3"),
    "has shape [2, 3] and strides [3]": lambda g: g["nodes"][0]["value"].update(strides=[3]),
    "has shape [-2, 3] and strides": lambda g: g["nodes"][0]["value"].update(shape=[-2, 3]),
    "has the device 'gpu:9', which PyTorch does not know": lambda g: g["nodes"][3]["kwargs"].update(
        dtype={"kind": "device", "name": "gpu:9"}
    ),
    "a constant of float32 [4] has 12 bytes": lambda g: g["constants"]["c"].update(shape=[4]),
    "its last node, and no other, must be the output": lambda g: g["nodes"].pop(),
    "last node, and no other": lambda g: g["nodes"].insert(0, {"op": "output", "name": "o", "target": "output"}),
    "cannot be read: KeyError: \"attribute 'forward' already exists\"": lambda g: (
        g["nodes"][1].update(target="forward"),
        g["constants"].update(forward=g["constants"]["c"]),
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_a_file_that_is_no_graph(message: str) -> None:
    content = written()
    BAD[message](content)
    with pytest.raises(BundleError) as raised:
        graph_from_json(json.dumps(content).encode(), "graphs/abc.json")
    assert message in str(raised.value)
    assert "graphs/abc.json" in str(raised.value)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\x80\x04N.", b"[" * 100_000])
def test_no_json(data: bytes) -> None:
    with pytest.raises(BundleError, match="is not a graph"):
        graph_from_json(data)


def test_equal_graphs_give_equal_bytes() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        return torch.chunk(torch.nn.functional.layer_norm(x, (4,)), 2)

    first, second, other = (graphs.trace(function, torch.ones(extent, 4)) for extent in (4, 4, 6))
    assert graph_to_json(first) == graph_to_json(second) != graph_to_json(other)


# Bindings


def segment(inputs: list[Binding], outputs: list[Binding]) -> Segment:
    return Segment("eager", "graphs/abc.json", None, tuple(inputs), tuple(outputs), ())


def test_a_graph_must_be_what_its_segment_binds() -> None:
    graph = again(graphs.trace(lambda x, w: x @ w.t(), torch.ones(2, 3), torch.ones(5, 3)))
    x, w = (
        Binding("a", Wire("input", "x"), torch.float32, (2, 3)),
        Binding("b", Wire("weight", "w"), torch.float32, (5, 3)),
    )
    y = Binding("y", Wire("output", "y"), torch.float32, (2, 5))
    check_bindings(graph, segment([x, w], [y]))
    for inputs, outputs, message in (
        ([x], [y], r"takes 2 tensors, and its segment has 1: \['a'\]"),
        ([x, w], [], "returns 1 tensors, and its segment has 0"),
        (
            [w, x],
            [y],
            r"takes 'arg0_1' as float32 \[2, 3\], and its segment binds 'b' \(weight:w\) as float32 \[5, 3\]",
        ),
        ([x, w], [msgspec.structs.replace(y, dtype=torch.float16)], "returns .* as float32 .* 'y' .* as float16"),
    ):
        with pytest.raises(BundleError, match=message):
            check_bindings(graph, segment(inputs, outputs))
