"""The engine cache: what makes another key and what does not, and what becomes of its files."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import graphs
import pytest
import torch
from rank_processes import warm
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

import torchtrt_md as md
from torchtrt_md.build import cache as module
from torchtrt_md.build.cache import FOLDER, EngineCache, engine_key
from torchtrt_md.build.flavour import flavour
from torchtrt_md.build.torch_trt import load
from torchtrt_md.errors import BuildError
from torchtrt_md.graph.text import fingerprint, graph_digest, graph_text

X, W = torch.zeros(2, 8), torch.zeros(8, 4)


def linear(x: Tensor, w: Tensor) -> Tensor:
    result: Tensor = torch.ops.aten.relu(torch.ops.aten.mm(x, w) * 2.0)
    return result


def key_of(graph: GraphModule | None = None, **changes: Any) -> str:
    arguments: dict[str, Any] = {"axis": "cp", "size": 2, "target": "portable", "flavour": flavour()}
    return engine_key(graph_digest(graph or graphs.trace(linear, X, W)), **(arguments | changes))


def changed(f: Callable[..., Any], *examples: Tensor) -> str:
    return key_of(graphs.trace(f, *examples))


def test_the_key_is_that_of_the_graph_not_of_its_names() -> None:
    graph = graphs.trace(linear, X, W)
    for number, node in enumerate(graph.graph.nodes):
        if node.op != "output":
            node.name = f"other{number}"
    assert key_of(graph) == key_of()
    assert len(key_of()) == 64


@pytest.mark.parametrize(
    "other",
    [
        lambda: changed(linear, torch.zeros(4, 8), W),
        lambda: changed(linear, X.half(), W.half()),
        lambda: changed(linear, X, torch.zeros(4, 8).t()),  # strides
        lambda: changed(lambda x, w: torch.ops.aten.relu(torch.ops.aten.mm(x, w) * 3.0), X, W),
        lambda: changed(lambda x, w: torch.ops.aten.relu(torch.ops.aten.mm(x, w) * 2), X, W),  # int is not float
        lambda: changed(lambda x, w: torch.ops.aten.sigmoid(torch.ops.aten.mm(x, w) * 2.0), X, W),
        lambda: changed(lambda x, w: torch.ops.aten.mm(x, w) * 2.0, X, W),
        lambda: changed(lambda x, w: [linear(x, w), x], X, W),
        lambda: key_of(axis="tp"),
        lambda: key_of(axis=None),
        lambda: key_of(size=4),
        lambda: key_of(target="sm80"),
        lambda: key_of(flavour=replace(flavour(), version="0.0.1")),
        lambda: key_of(flavour=replace(flavour(), name="another")),
    ],
)
def test_each_difference_alone_is_another_key(other: Callable[[], str]) -> None:
    assert other() != key_of()


def test_operands_in_another_order_are_another_key() -> None:
    examples = torch.zeros(4, 4), torch.zeros(4, 4)
    assert changed(torch.mm, *examples) != changed(lambda a, b: torch.mm(b, a), *examples)


@pytest.mark.parametrize("name", ["torchtrt_md.__version__", "torch.__version__"])
def test_another_version_is_another_key(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key_of()
    monkeypatch.setattr(name, "0.0.1")
    assert key_of() != before


def test_other_converters_are_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key_of()
    monkeypatch.setattr(module, "_sources", lambda: "other")
    assert key_of() != before


def test_collectives_differ_by_axis_and_size() -> None:
    def gather(axis: str, size: int) -> str:
        return graph_text(graphs.trace(lambda x: torch.ops.torchtrt_md.all_gather(x, 0, axis, size), X))

    assert len({gather("cp", 2), gather("tp", 2), gather("cp", 4)}) == 3
    assert gather("cp", 2) == gather("cp", 2)


def made_on(device: str) -> GraphModule:
    graph = Graph()
    x = graph.placeholder("x")
    where = graph.call_function(torch.ops.aten.arange.default, (8,), {"device": torch.device(device)})
    graph.output((graph.call_function(torch.ops.aten.add.Tensor, (x, where)),))
    return GraphModule({}, graph)


def test_ranks_share_engines_whatever_device_a_graph_was_traced_on() -> None:
    assert key_of(made_on("cuda:0")) == key_of(made_on("cuda:1")) == key_of(made_on("cpu"))


def test_another_torch_tensorrt_is_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key_of()
    monkeypatch.setattr(module, "torch_tensorrt_version", lambda: "9.9")
    assert key_of() != before


def test_a_converter_that_the_user_registers_is_another_key() -> None:
    def convert(ctx: Any, target: Any, args: Any, kwargs: Any, name: str) -> Any:
        raise NotImplementedError(name)

    names, before = load(), key_of()  # of an op that no other test has: nothing takes a converter away
    names.converter(torch.ops.aten.special_i1e.default, priority=names.ConverterPriority.HIGH)(convert)
    assert key_of() != before
    assert key_of() == key_of()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex64])
def test_fingerprints_are_of_bytes_dtype_and_shape(dtype: torch.dtype) -> None:
    base = torch.arange(6).reshape(2, 3).to(dtype)
    assert fingerprint(base) == fingerprint(base.t().clone().t())  # strides are no part of it
    assert len({fingerprint(t) for t in (base, base.reshape(3, 2), base.reshape(6), base.to(torch.complex128))}) == 4
    if dtype is not torch.bool:
        assert fingerprint(base) != fingerprint(torch.arange(1, 7).reshape(2, 3).to(dtype))


def test_the_values_of_weights_that_are_inputs_do_not_matter() -> None:
    assert changed(linear, X, torch.randn(8, 4)) == changed(linear, X, torch.randn(8, 4))


def test_the_values_of_constants_in_the_graph_do() -> None:
    def scaled(table: Tensor) -> str:
        return changed(lambda x: x * table, X)

    table = torch.arange(8.0)
    assert scaled(table) == scaled(table.clone())
    assert scaled(table) != scaled(table + 1)


def test_what_has_no_canonical_form_is_refused_by_node() -> None:
    graph = graphs.trace(linear, X, W)
    (node,) = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
    node.args = (node.args[0], object())
    with pytest.raises(BuildError, match="node 'mm' has an argument of object"):
        graph_text(graph)


class Modulated(nn.Module):
    """As in a DiT: what comes of the timestep knows nothing of the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up = nn.Linear(8, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        gate = torch.nn.functional.silu(self.embed(t))
        result: Tensor = torch.nn.functional.gelu(self.up(x)) * gate[:, None]
        return result


def gate_and_whole(tokens: int) -> tuple[str, str]:
    """The keys of the part that makes the gate, and of all."""
    args = (torch.randn(2, tokens, 16), torch.randn(2, 8))
    parallel = md.ContextParallel("cp", plan={"": {"x": md.Split(1)}})
    lowered = md.lower(md.capture(Modulated().eval(), args, mesh=md.Mesh(cp=2), parallel=parallel)).graphs[0]
    (silu,) = (n for n in lowered.graph.nodes if str(n.target).startswith(("aten.silu", "aten.sigmoid")))
    return key_of(part(lowered, silu), axis=None, size=1), key_of(lowered)


def part(graph: GraphModule, last: Node) -> GraphModule:
    """All that this node needs, and nothing else."""
    needed, pending = {last}, [last]
    while pending:
        new = [n for n in pending.pop().all_input_nodes if n not in needed]
        needed.update(new)
        pending.extend(new)
    copied: dict[Node, Node] = {}
    result = Graph()
    for node in graph.graph.nodes:
        if node in needed:
            copied[node] = result.node_copy(node, copied.__getitem__)
    result.output((copied[last],))
    return GraphModule(graph, result)


def test_a_new_sequence_length_keeps_the_keys_of_what_does_not_depend_on_it() -> None:
    short, long = gate_and_whole(16), gate_and_whole(32)
    assert short[0] == long[0]
    assert short[1] != long[1]
    assert gate_and_whole(16) == short


KEY = "0" * 64


def engine(folder: Path, content: bytes = b"plan") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "built.engine"
    file.write_bytes(content)
    return file


def test_what_was_stored_is_found_by_another(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path / "cache")
    assert cache.find(KEY) is None
    file = engine(tmp_path)
    stored = cache.store(KEY, file)
    assert not file.exists()
    assert stored.read_bytes() == b"plan"
    assert cache.find("1" * 64) is None
    other = EngineCache(tmp_path / "cache")
    assert cache.find(KEY) == other.find(KEY) == stored
    assert (cache.hits, cache.misses, other.hits, other.misses) == (1, 2, 1, 0)


@pytest.mark.parametrize("damage", [b"", b"pla", b"plan ", b"plam"])
def test_a_damaged_engine_is_forgotten(damage: bytes, tmp_path: Path) -> None:
    cache = EngineCache(tmp_path / "cache")
    stored = cache.store(KEY, engine(tmp_path))
    stored.write_bytes(damage)
    assert cache.find(KEY) is None
    assert not stored.exists()
    assert (cache.hits, cache.misses) == (0, 1)
    assert cache.find(KEY) is None
    assert cache.store(KEY, engine(tmp_path)) == cache.find(KEY)


def store_often(folder: Path, number: int, barrier: Barrier) -> None:
    cache = EngineCache(folder / "cache")
    barrier.wait()
    for turn in range(40):
        file = engine(folder / f"process{number}", f"process {number}, turn {turn % 2}".encode() * 1000)
        cache.store(KEY, file)
        found = cache.find(KEY)
        assert found is not None
        assert found.read_bytes().startswith(b"process ")


def test_two_processes_store_the_same_key(tmp_path: Path) -> None:
    context = warm()
    barrier = context.Barrier(2)
    processes = [context.Process(target=store_often, args=(tmp_path, number, barrier)) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    cache = EngineCache(tmp_path / "cache")
    assert cache.find(KEY) is not None
    assert not list(cache.folder.glob("*.unfinished"))


def test_across_file_systems_the_file_is_copied_and_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, renamed, replace_file = engine(tmp_path), [], Path.replace

    def another_file_system(self: Path, target: Path) -> Path:
        if self == file:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        renamed.append(self.suffix)
        return replace_file(self, target)

    monkeypatch.setattr(Path, "replace", another_file_system)
    cache = EngineCache(tmp_path / "cache")
    stored = cache.store(KEY, file)
    assert stored.read_bytes() == b"plan"
    assert renamed == [".unfinished"]
    assert list(cache.folder.iterdir()) == [stored]
    assert not file.exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match=f"the engine cache {tmp_path}/file cannot be written") as error:
        EngineCache(tmp_path / "file").store(KEY, engine(tmp_path))
    assert FOLDER in error.value.fix
    assert EngineCache(tmp_path / "file").find(KEY) is None


def aged(path: Path, seconds: float) -> Path:
    then = time.time() - seconds
    os.utime(path, (then, then))
    return path


def test_trim_deletes_the_least_recently_used_first(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path / "cache")
    hour, day, week = (
        aged(cache.store(digit * 64, engine(tmp_path, digit.encode() * 100)), seconds)
        for digit, seconds in (("1", 3600), ("2", 86400), ("3", 7 * 86400))
    )
    cache.trim(300)
    assert all(path.exists() for path in (hour, day, week))
    assert cache.find("3" * 64) == week  # and so it is the last used
    cache.trim(250)
    assert [path.exists() for path in (hour, day, week)] == [True, False, True]
    cache.trim(0)
    assert [path.exists() for path in (hour, day, week)] == [False, False, True]  # used just now


def test_store_keeps_to_the_bound(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path / "cache", max_bytes=250)
    first = aged(cache.store("1" * 64, engine(tmp_path, b"1" * 100)), 3600)
    cache.store("2" * 64, engine(tmp_path, b"2" * 100))
    assert first.exists()
    cache.store("3" * 64, engine(tmp_path, b"3" * 100))
    assert not first.exists()
    assert cache.find("2" * 64) is not None


def test_trim_deletes_what_a_killed_process_left(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path)
    left, growing = tmp_path / "a.unfinished", tmp_path / "b.unfinished"
    left.write_bytes(b"half")
    growing.write_bytes(b"half")
    aged(left, 3600)
    cache.trim(10**9)
    assert [left.exists(), growing.exists()] == [False, True]


def test_the_folder_is_the_users_unless_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path / "here"))
    assert EngineCache().folder == tmp_path / "here" / "engines"
    assert EngineCache(tmp_path).folder == tmp_path
    monkeypatch.delenv(FOLDER)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert EngineCache().folder == tmp_path / ".cache" / "torchtrt_md" / "engines"
