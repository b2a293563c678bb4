"""How a list of passes is run, and the list that ``lower`` runs."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import graphs
import models
import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from torchtrt_md import TensorParallel, capture, lowering
from torchtrt_md.lowering import PASSES, lower, merge_identical, single_rank
from torchtrt_md.lowering.ops import bound_args
from torchtrt_md.lowering.passes import PassContext, readable, run_passes
from torchtrt_md.mesh import Mesh
from torchtrt_md.options import Options
from torchtrt_md.program import Coordinate, ShardedProgram, Sharding, Value
from torchtrt_md.road import Road
from torchtrt_md.verification.simulate import simulate

MESH = Mesh(cp=2)
CONTEXT = PassContext(MESH, {}, {})
md = torch.ops.torchtrt_md


def gathered_twice(x: Tensor) -> Tensor:
    total: Tensor = md.all_gather(x, 0, "cp", 2) + md.all_gather(x, 0, "cp", 2)
    return total


def test_counts_come_in_order() -> None:
    graph = graphs.trace(gathered_twice, torch.ones(2))
    counts = run_passes(
        {"none": single_rank.run, "one": merge_identical.run, "again": merge_identical.run}, graph, CONTEXT
    )
    assert list(counts.items()) == [("none", 0), ("one", 1), ("again", 0)]


def test_stages_and_passes_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    model, args, _ = models.mlp()
    plan = {"up": "colwise", "down": "rowwise"}
    captured = capture(model, args, mesh=Mesh(tp=2), parallel=TensorParallel("tp", plan=plan))
    road = Road(captured, Options(compute="inductor"), ranks=[0])
    with caplog.at_level("DEBUG", logger="torchtrt_md"):
        road.build(road.lower(road.default()), road.default())
    said = [(record.name, record.levelname, record.getMessage()) for record in caplog.records]
    assert [text.split(":")[0] for name, level, text in said if name == "torchtrt_md.lowering.passes"] == list(PASSES)
    stages = [text for name, level, text in said if (name, level) == ("torchtrt_md.road", "INFO")]
    assert any(text.startswith("rank 0: lowering took ") for text in stages), stages
    assert any(text.startswith("rank 0: building took ") for text in stages)


def test_what_nothing_uses_any_more_goes_after_each_pass() -> None:
    def leave(graph: GraphModule, context: PassContext) -> int:
        (add,) = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
        add.replace_all_uses_with(add.args[0])
        return 1

    seen: list[list[str]] = []

    def look(graph: GraphModule, context: PassContext) -> int:
        seen.append(graphs.ops(graph))
        return 0

    graph = graphs.trace(gathered_twice, torch.ones(2))
    run_passes({"leave": leave, "look": look}, graph, CONTEXT)
    assert seen == [["torchtrt_md.all_gather"]]
    assert graph.code.count("ops.torchtrt_md.all_gather") == 1, "the code is that of the new graph"


def test_dump_has_the_graph_before_and_after_each_rewrite(tmp_path: Path) -> None:
    graph = graphs.trace(gathered_twice, torch.ones(2))
    before = readable(graph)
    run_passes({"none": single_rank.run, "one": merge_identical.run}, graph, CONTEXT, tmp_path / "new" / "dump")
    files = {f.name: f.read_text() for f in (tmp_path / "new" / "dump").iterdir()}
    assert files == {"01_one.before.txt": before, "01_one.after.txt": readable(graph)}
    assert before.count("torchtrt_md.all_gather") == 2
    assert files["01_one.after.txt"].count("torchtrt_md.all_gather") == 1


def test_a_line_says_name_op_arguments_dtype_and_shape() -> None:
    graph = graphs.trace(lambda x: torch.cat(md.all_gather(x, 0, "cp", 2).split(2)), torch.ones(2, 3))
    lines = readable(graph).splitlines()
    assert re.search(
        r"%all_gather .*torchtrt_md.all_gather.default\]\(args = \(%\w+, 0, cp, 2\).*float32 \[4, 3\]$", lines[1]
    )
    assert re.search(r"%split .*aten.split.Tensor", lines[2])


def test_the_docstring_is_the_index_of_the_passes() -> None:
    listed = re.findall(r"^    ([a-z_]+(?:, [a-z_]+)*)  +\S", lowering.__doc__ or "", re.MULTILINE)
    assert ", ".join(listed).split(", ") == list(PASSES)


def unlowered() -> tuple[ShardedProgram, Tensor]:
    """Each rank's part of x, twice; twice the whole; and attention over the parts."""

    def forward(x: Tensor) -> list[Tensor]:
        part = md.split_sequence(x, 1, "cp", 2)
        q = part.unflatten(2, (2, 4)).transpose(1, 2)
        attended = md.attention(q, q, q, None, True, None, False)
        return [part * 2, md.gather_sequence(part, 1, "cp", 2) * 2, md.gather_sequence(attended, 2, "cp", 2)]

    x = torch.randn(1, 6, 8, dtype=torch.float64)
    graph = graphs.trace(forward, x)
    program = graphs.program(graph, MESH, x)
    outputs = tuple(Value(f"output{i}", shape, x.dtype) for i, shape in enumerate([(1, 6, 8), (1, 6, 8), (1, 2, 6, 4)]))
    return replace(program, lowered=False, outputs=outputs, strategies={"cp": "ulysses"}), x


def test_lower(tmp_path: Path) -> None:
    program, x = unlowered()
    captured = graphs.ops(program.graphs[0])
    lowered = lower(program, dump=tmp_path)
    assert graphs.ops(program.graphs[0]) == captured, "the captured program is left as it was"
    assert (program.lowered, lowered.lowered) == (False, True)
    assert lower(lowered) is lowered
    rewrites = {name: count for name, count in lowered.counts.items() if count}
    assert rewrites == {"sequence": 1, "cancel_inverse": 1, "ulysses": 1, "leading_dim": 1, "rank_input": 1}
    assert {f.name.split(".")[0][3:] for f in tmp_path.iterdir()} == set(rewrites)
    assert list(lowered.sources.values())[1:] == [Coordinate("cp")]
    assert [(v.shape, v.sharding) for v in lowered.outputs] == [
        ((1, 6, 8), (Sharding(1, "cp"),)),
        ((1, 6, 8), ()),
        ((1, 2, 6, 4), ()),
    ]
    q = x.view(1, 6, 2, 4).transpose(1, 2)
    dense = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    expected = [((x * 2).chunk(2, 1)[rank].contiguous(), x * 2, dense) for rank in range(2)]
    graphs.assert_same(simulate(lowered, {}), expected, exact=False)


def test_each_different_graph_is_lowered_and_dumped_apart(tmp_path: Path) -> None:
    def forward(x: Tensor) -> Tensor:
        return gathered_twice(x) + 1

    def other(x: Tensor) -> Tensor:
        return gathered_twice(x) + 2

    mesh = Mesh(cp=2, tp=2)
    x = torch.ones(2)
    first, second = (graphs.trace(f, x) for f in (forward, other))
    program = replace(graphs.program([first, second, first, second], mesh, x), lowered=False)
    program = replace(program, outputs=(Value("output0", (4,), x.dtype),))
    lowered = lower(program, dump=tmp_path)
    assert [ranks for _, ranks in lowered.distinct()] == [(0, 2), (1, 3)]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["rank0", "rank1"]
    assert [r[0].tolist() for r in simulate(lowered, {})] == [[3.0] * 4, [4.0] * 4] * 2
    for graph, _ in lowered.distinct():
        (node,) = graph.graph.find_nodes(op="call_function", target=md.all_gather.default)
        assert bound_args(node)["axis"] == "cp"
