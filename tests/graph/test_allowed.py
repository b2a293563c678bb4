"""What a graph of a bundle may call: all that lowering writes, and nothing that does harm."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import graphs
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from torchtrt_md.errors import BundleError
from torchtrt_md.graph.allowed import NAMESPACES, check_op, find_op
from torchtrt_md.graph.functional import functional
from torchtrt_md.graph.json import check_bindings, graph_from_json, graph_to_json
from torchtrt_md.lowering import ops
from torchtrt_md.lowering.sharding_rules import RULES
from torchtrt_md.program import placeholders, value_of
from torchtrt_md.segment import Binding, Collective, Segment, Wire

X = torch.randn(1, 4, 8, 8)
NORMS = (nn.BatchNorm2d(4).eval(), nn.InstanceNorm2d(4).eval(), nn.GroupNorm(2, 4), nn.RMSNorm(8))
GRU = nn.GRU(8, 8).eval()


def registered() -> Iterator[torch._ops.OpOverload[Any, Any]]:
    """All ops that a graph could name."""
    for schema in torch._C._jit_get_all_schemas():
        namespace, _, name = schema.name.partition("::")
        if namespace in NAMESPACES:
            op = find_op(f"{namespace}.{name}.{schema.overload_name or 'default'}")
            if op is not None:
                yield op


def allowed(op: torch._ops.OpOverload[Any, Any]) -> bool:
    try:
        check_op(op)
    except BundleError:
        return False
    return True


def test_no_op_of_any_version_that_does_harm_is_allowed() -> None:
    """By what schemas and tags say, of all ops of the installed PyTorch."""
    found = [op for op in registered() if allowed(op)]
    assert 500 < len(found) < 1000
    for op in found:
        schema = op._schema
        assert not schema.is_mutable, op
        assert torch.Tag.nondeterministic_seeded not in op.tags, op
        assert not any(word in str(a.type) for a in schema.arguments for word in ("Generator", "Storage", "Any")), op
        assert not any(word in a.name for a in schema.arguments for word in ("file", "path", "library")), op
        assert not op.overloadpacket.__name__.endswith("_") or op.overloadpacket.__name__.endswith("__"), op


HARM = {
    "aten.from_file.default": "neither PyTorch nor lowering",
    "aten.save.default": "returns what is no tensor",
    "aten.manual_seed.default": "returns what is no tensor",
    "aten.set_grad_enabled.default": "returns what is no tensor",
    "aten._print.default": "returns what is no tensor",
    "aten.copy_.default": "writes to its operands",
    "aten.add.out": "writes to its operands",
    "aten.set_.source_Tensor": "writes to its operands",
    "aten.set.source_Storage": "takes a Storage",
    "aten._no_grad_embedding_renorm_.default": "neither PyTorch nor lowering",
    "aten._nested_view_from_buffer.default": "neither PyTorch nor lowering",
    "aten.rand.default": "draws random numbers",
    "aten.bernoulli.p": "draws random numbers",
    "aten.nonzero.default": "whose size depends on values",
    "aten._local_scalar_dense.default": "returns a value that is no tensor",
    "aten.empty.memory_format": "returns memory as it was left",
    "aten._unsafe_index_put.default": "does not check its indices",
    "torchtrt_md.shard.default": "neither PyTorch nor lowering",
}


@pytest.mark.parametrize("name", HARM)
def test_ops_that_are_refused(name: str) -> None:
    op = find_op(name)
    assert op is not None
    with pytest.raises(BundleError, match=rf"calls {name}, which .*{HARM[name]}"):
        check_op(op)


def test_every_op_of_the_sharding_rules_is_allowed_unless_it_is_not_functional() -> None:
    """A new rule needs no entry here; what is left out is known."""
    packets = {packet for packet in RULES if str(packet).startswith("aten.")}
    left_out = {str(p) for p in packets if not any(allowed(getattr(p, name)) for name in p.overloads())}
    assert left_out == {
        "aten.native_dropout",
        "aten.dropout",
        "aten.empty_like",
        "aten.new_empty",
        "aten._unsafe_index",
    }
    assert all(map(allowed, ops.COLLECTIVES))


# What models use beyond the small ones of the other tests: all of it is written and read.
USES: dict[str, Callable[[Tensor], Any]] = {
    "resampling": lambda x: [
        F.interpolate(x, scale_factor=2, mode=mode)
        for mode in ("nearest", "bilinear", "bicubic", "nearest-exact", "area")
    ],
    "antialiased": lambda x: F.interpolate(x, size=(5, 5), mode="bicubic", antialias=True),
    "norms": lambda x: [norm(x) for norm in NORMS],
    "pooling": lambda x: (F.max_pool2d(x, 2), F.avg_pool2d(x, 2), F.adaptive_avg_pool2d(x, 2)),
    "padding": lambda x: [F.pad(x, (1, 1, 1, 1), mode=mode) for mode in ("reflect", "replicate", "constant")],
    "convolution": lambda x: (
        F.conv2d(x, torch.ones(4, 4, 3, 3), padding="same"),
        F.unfold(x, 2),
        F.pixel_shuffle(x, 2),
    ),
    "fourier": lambda x: (torch.fft.rfft2(x).abs(), torch.fft.irfft(torch.fft.rfft(x)), torch.fft.fft(x).real),
    "linear algebra": lambda x: (
        *(torch.linalg.inv(x), torch.linalg.det(x), torch.linalg.solve(x, x), torch.linalg.cholesky(x)),
        *(torch.linalg.svd(x), torch.linalg.eigh(x), torch.linalg.qr(x), torch.linalg.pinv(x), torch.matrix_exp(x)),
    ),
    "searching": lambda x: (
        *(torch.searchsorted(torch.arange(8.0), x), torch.bucketize(x, torch.arange(8.0)), torch.histc(x)),
        *(torch.sort(x), torch.topk(x, 2), x.median(), x.argmax(), torch.isin(x, torch.arange(3.0))),
    ),
    "indexing": lambda x: (
        *(
            x.index_fill(1, torch.tensor([0]), 1.0),
            x.index_add(1, torch.tensor([0]), x[:, :1]),
            x.flip(1),
            x.roll(1, 1),
        ),
        *(torch.take_along_dim(x, torch.zeros(1, 1, 8, 8, dtype=torch.long), 1), x.masked_fill(x > 0, 0.0)),
        *(x[:, torch.tensor([0, 2])], x[0, 0, torch.zeros(3, dtype=torch.int32), torch.ones(3, dtype=torch.long)]),
        *(torch.scatter(x, 1, torch.zeros(1, 4, 8, 8, dtype=torch.long), x), x.as_strided((2, 2), (1, 1))),
        *(F.embedding(torch.zeros(2, dtype=torch.long), x[0, 0]), F.grid_sample(x, torch.zeros(1, 3, 3, 2))),
    ),
    "factories": lambda x: (
        *(torch.linspace(0, 1, 5), torch.eye(3), torch.triu_indices(3, 3), torch.hann_window(4), torch.ones_like(x)),
        *(torch.meshgrid(torch.arange(3), torch.arange(2), indexing="ij"), torch.full((2,), 1.5), torch.tensor([1.0])),
    ),
    "pieces": lambda x: (
        *(x.chunk(3, 2), torch.split(x, 3, 2), torch.split(x, [1, 7], 2), x.unbind(1), torch.tensor_split(x, 3, 2)),
        *(torch.cartesian_prod(torch.arange(2), torch.arange(3)), torch.kron(x[0, 0], x[0, 1])),
    ),
    "words": lambda x: (
        *(F.gelu(x, approximate="tanh"), torch.div(x, 2, rounding_mode="floor"), torch.var_mean(x, 1)),
        x.scatter_reduce(1, torch.zeros(1, 4, 8, 8, dtype=torch.long), x, reduce="amax"),
    ),
    "complex": lambda x: (torch.view_as_complex(x.reshape(1, 4, 8, 4, 2)).conj().real, torch.complex(x, x).angle()),
    "special": lambda x: (torch.special.erfcx(x), torch.polygamma(1, x), torch.logcumsumexp(x, 1), torch.cdist(x, x)),
    "quantizers": lambda x: ops.fake_quantize(x, x.abs().amax(-1, keepdim=True), 8, 4, False),
    "recurrent": lambda x: GRU(x[0]),
}


@pytest.mark.parametrize("use", USES)
def test_what_models_use_is_written_and_read(use: str) -> None:
    with torch.no_grad():
        traced = graphs.trace(USES[use], X)
    graph = functional(traced, [value_of(node) for node in placeholders(traced)])
    read = graph_from_json(graph_to_json(graph))
    assert [n.target for n in read.graph.nodes] == [n.target for n in graph.graph.nodes]


# Writing


def test_a_random_op_is_not_written_and_the_users_line_is_told() -> None:
    graph = graphs.trace(lambda x: x + torch.rand(2), torch.ones(2))
    for node in graph.graph.nodes:
        node.meta["stack_trace"] = '  File "/home/me/model.py", line 7, in forward\n    return x + torch.rand(2)\n'
    with pytest.raises(BundleError, match=r"aten.rand.default, which draws random numbers(.|\n)*model.py:7 in forward"):
        graph_to_json(graph)


def test_batch_norm_in_training_is_not_written() -> None:
    """Its schema does not say that it writes to the running statistics."""
    graph = graphs.trace(
        lambda x, mean, var: torch.native_batch_norm(x, None, None, mean, var, True, 0.1, 1e-5)[0],
        *(X, torch.zeros(4), torch.ones(4)),
    )
    with pytest.raises(BundleError, match=r"native_batch_norm.default in training, where it changes its running"):
        graph_to_json(graph)


def test_a_graph_that_says_what_is_not_so_is_not_written() -> None:
    graph = graphs.trace(lambda x: torch.relu(x), torch.ones(2))
    (node,) = (n for n in graph.graph.nodes if n.op == "call_function")
    node.meta["val"] = torch.empty(3, device="meta")
    with pytest.raises(BundleError, match=r"has no place in a bundle: .* gives float32 \[2\], .* says float32 \[3\]"):
        graph_to_json(graph)


# Reading

VICTIM = "/tmp/victim"


def node(name: str) -> dict[str, str]:
    return {"kind": "node", "name": name}


def spec(*shape: int, dtype: str = "float32", strides: list[int] | None = None) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": shape,
        "strides": torch.empty(shape, device="meta").stride() if strides is None else strides,
    }


def call(name: str, target: str, *args: Any, value: Any = None, **kwargs: Any) -> dict[str, Any]:
    return {"op": "call_function", "name": name, "target": target, "args": args, "kwargs": kwargs, "value": value}


def read(*nodes: dict[str, Any], returns: Any = None, constants: dict[str, Any] | None = None) -> GraphModule:
    """A graph of x [2], these nodes, and an output: x where nothing else is said."""
    x = {"op": "placeholder", "name": "x", "target": "x", "value": spec(2)}
    result = {"kind": "tuple", "items": [node("x")] if returns is None else returns}
    output = {"op": "output", "name": "output", "target": "output", "args": [result]}
    return graph_from_json(
        json.dumps({"schema": 1, "nodes": [x, *nodes, output], "constants": constants or {}}).encode()
    )


def test_the_frame_of_these_tests_is_read() -> None:
    graph = read(call("y", "aten.relu.default", node("x"), value=spec(2)), returns=[node("y")])
    assert graph(torch.tensor([-1.0, 1.0]))[0].tolist() == [0, 1]


def test_a_graph_cannot_write_a_file(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious data\n")
    data = base64.b64encode(b"PWNED BY GRAPH").decode()
    uint8 = {"kind": "torch", "name": "uint8"}
    with pytest.raises(BundleError, match=r"calls aten.from_file.default"):
        read(
            {"op": "get_attr", "name": "c", "target": "c"},
            call("f", "aten.from_file.default", str(victim), True, 14, dtype=uint8),
            call("w", "aten.copy_.default", node("f"), node("c")),
            constants={"c": {"dtype": "uint8", "shape": [14], "data": data}},
        )
    assert victim.read_text() == "precious data\n"


BAD: dict[str, list[dict[str, Any]]] = {
    "node 'y': calls aten.relu_.default, which writes to its operands": [call("y", "aten.relu_.default", node("x"))],
    "approximate='/etc/passwd', and a graph of a bundle has no text": [
        call("y", "aten.gelu.default", node("x"), approximate="/etc/passwd")
    ],
    "dim='cuda', and a graph": [call("y", "aten.sum.dim_IntList", node("x"), "cuda")],
    "device=meta, and a bundle runs on cpu and cuda": [
        call("y", "aten.zeros.default", {"kind": "list", "items": [2]}, device={"kind": "device", "name": "meta"})
    ],
    "with arguments that it does not take": [call("y", "aten.relu.default", node("x"), inplace=True)],
    "gives float32 [2], and the file says float32 [3]": [call("y", "aten.relu.default", node("x"), value=spec(3))],
    "gives float32 [2], and the file says int8 [2]": [
        call("y", "aten.relu.default", node("x"), value=spec(2, dtype="int8"))
    ],
    "gives 2 tensors, and the file says float32 [2]": [
        call("y", "aten.topk.default", node("x"), 1, value=spec(2)),
    ],
    "cannot be read: node 'y' (aten.mm.default): RuntimeError": [call("y", "aten.mm.default", node("x"), node("x"))],
    "its result has shape [1099511627776]": [
        call("y", "aten.zeros.default", {"kind": "list", "items": [1 << 40]}),
    ],
    "its result has shape [1000000000000000]": [call("y", "aten.arange.default", 10**15)],
    "splits 1000000000 into 1000000000 parts, and the file says 1": [
        call("big", "aten.zeros.default", {"kind": "list", "items": [10**9]}),
        call("y", "aten.split.Tensor", node("big"), 1, value=[spec(1)]),
    ],
    "into 1000000000 parts, and the file says 0": [
        call("big", "aten.zeros.default", {"kind": "list", "items": [10**9]}),
        call("y", "aten.unbind.int", node("big")),
    ],
    "into 500000000 parts": [
        call("big", "aten.zeros.default", {"kind": "list", "items": [10**9]}),
        call("y", "aten.chunk.default", node("big"), 500_000_000),
    ],
    "it has shape [1099511627776] and strides [1]": [
        {"op": "placeholder", "name": "y", "target": "y", "value": spec(1 << 40)}
    ],
    "it has shape [2] and strides [1099511627776]": [
        {"op": "placeholder", "name": "y", "target": "y", "value": spec(2, strides=[1 << 40])}
    ],
    "it has shape [1099511627776] and strides [0]": [
        {"op": "placeholder", "name": "y", "target": "y", "value": spec(1 << 40, strides=[0])}
    ],
    "does not say what tensor it is": [{"op": "placeholder", "name": "y", "target": "y"}],
    "a placeholder has no arguments": [
        {"op": "placeholder", "name": "y", "target": "y", "args": [1], "value": spec(2)}
    ],
    "src=2, which is no rank of it": [call("y", "torchtrt_md.broadcast.default", node("x"), 2, "cp", 2)],
    "reduces by 'pigeon'": [call("y", "torchtrt_md.all_reduce.default", node("x"), "pigeon", "cp", 2)],
    "ZeroDivisionError": [call("y", "torchtrt_md.reduce_scatter.default", node("x"), "sum", 0, "cp", 0)],
    "two of its inputs have one name": [{"op": "placeholder", "name": "y", "target": "x", "value": spec(2)}],
    "or one is named 'self'": [{"op": "placeholder", "name": "y", "target": "self", "value": spec(2)}],
    "the name '__debug__' of a placeholder": [
        {"op": "placeholder", "name": "y", "target": "__debug__", "value": spec(2)}
    ],
    "takes item 2 of what has no such item": [
        call("t", "aten.topk.default", node("x"), 1, value=[spec(1), spec(1, dtype="int64")]),
        call("y", "operator.getitem", node("t"), 2),
    ],
    "takes item 0 of what has no such item": [call("y", "operator.getitem", node("x"), 0)],
    "has an integer that is beyond 64 bits": [call("y", "aten.add.Scalar", node("x"), 1 << 70)],
    "calls aten.index.Tensor with a mask, which returns a tensor whose size": [
        call("m", "aten.gt.Scalar", node("x"), 0),
        call("y", "aten.index.Tensor", node("x"), {"kind": "list", "items": [node("m")]}, value=spec(2)),
    ],
    "node 'z': calls aten.index.Tensor with a mask": [
        call("m", "aten._to_copy.default", node("x"), dtype={"kind": "torch", "name": "uint8"}),
        call("z", "aten.index.Tensor", node("x"), {"kind": "list", "items": [None, node("m")]}, value=spec(2)),
    ],
    "gives float32 [1000], which reads beyond its operand": [
        call("y", "aten.as_strided.default", node("x"), *({"kind": "list", "items": [n]} for n in (1000, 1)))
    ],
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.timeout(20)
def test_a_graph_that_no_writer_makes(message: str) -> None:
    with pytest.raises(BundleError) as raised:
        read(*BAD[message])
    assert message in str(raised.value)


def test_lists_in_lists_in_lists() -> None:
    """Python's own parser gives up on them, with an error of its own."""
    argument: Any = {"kind": "list", "items": []}
    for _ in range(150):
        argument = {"kind": "list", "items": [argument]}
    with pytest.raises(BundleError, match="has lists nested deeper than 8"):
        read(call("y", "aten.sum.dim_IntList", node("x"), argument))


@pytest.mark.parametrize(
    "returns", [[[node("x")]], [{"kind": "list", "items": [node("x")]}], [node("many")]], ids=["json", "list", "many"]
)
def test_an_output_is_a_list_of_tensors(returns: Any) -> None:
    with pytest.raises(BundleError, match=r"no tensor|is not a graph"):
        read(call("many", "aten.var_mean.correction", node("x"), value=[spec(), spec()]), returns=returns)


def test_an_output_of_nothing() -> None:
    text = json.dumps({"schema": 1, "nodes": [{"op": "output", "name": "o", "target": "output"}], "constants": {}})
    with pytest.raises(BundleError, match="it does not return a list of tensors"):
        graph_from_json(text.encode())


def test_bad_utf8() -> None:
    with pytest.raises(BundleError, match="is not a graph"):
        graph_from_json(b'{"schema": 1, "nodes": [{"op": "output", "name": "\xff"}]}')


def test_constants_have_a_limit_when_they_are_read() -> None:
    data = base64.b64encode(bytes((1 << 20) + 1)).decode()
    with pytest.raises(BundleError, match="it holds constants of 1048577 bytes, more than 1048576"):
        read(constants={"c": {"dtype": "uint8", "shape": [(1 << 20) + 1], "data": data}})


def test_the_statistics_of_an_op_are_those_of_its_device() -> None:
    """On a GPU a norm keeps them in float32, on the CPU as its operand is: a graph of either is read."""
    for dtype in ("float32", "bfloat16"):
        x = {"op": "placeholder", "name": "h", "target": "h", "value": spec(2, 4, dtype="bfloat16")}
        value = [spec(2, 4, dtype="bfloat16"), spec(2, 1, dtype=dtype), spec(2, 1, dtype=dtype)]
        four = {"kind": "list", "items": [4]}
        norm = call("n", "aten.native_layer_norm.default", node("h"), four, None, None, 1e-5, value=value)
        graph = read(x, norm, call("y", "operator.getitem", node("n"), 1, value=spec(2, 1, dtype=dtype)))
        assert str(value_of(list(graph.graph.nodes)[-2]).dtype) == f"torch.{dtype}"


def test_many_nodes_are_read_in_time_that_grows_with_them() -> None:
    nodes = [call("n0", "aten.relu.default", node("x"), value=spec(2))]
    nodes += [call(f"n{i}", "aten.relu.default", node(f"n{i - 1}"), value=spec(2)) for i in range(1, 5000)]
    start = time.process_time()
    read(*nodes)
    assert time.process_time() - start < 10


# Segments


def test_a_graph_communicates_what_its_segment_says() -> None:
    graph = graph_from_json(graph_to_json(graphs.trace(lambda x: ops.all_gather(x, 0, "cp", 2), torch.ones(2, 3))))
    x = Binding("x", Wire("input", "x"), torch.float32, (2, 3))
    y = Binding("y", Wire("output", "y"), torch.float32, (4, 3))
    right = Collective("all_gather", "cp", 2, torch.float32, 6, 24)

    def segment(*collectives: Collective) -> Segment:
        return Segment("eager", "graphs/abc.json", None, (x,), (y,), collectives)

    check_bindings(graph, segment(right))
    for wrong, message in (
        ((), "collective 0 of the graph is all_gather of 6 float32 over 2 ranks of axis 'cp', and .* missing"),
        ((right, right), "collective 1 of the graph is missing, and of its segment all_gather"),
        ((Collective("all_gather", "tp", 2, torch.float32, 6, 24),), "and of its segment .* of axis 'tp'"),
    ):
        with pytest.raises(BundleError, match=message):
            check_bindings(graph, segment(*wrong))


def test_an_empty_graph() -> None:
    graph = Graph()
    graph.output(())
    assert graph_from_json(graph_to_json(GraphModule({}, graph)))() == ()
