"""Options: what is known, what is refused, and how."""

from __future__ import annotations

from typing import Any

import pytest

from torchtrt_md import ContextParallel, Gather, Mesh, Split, TensorParallel
from torchtrt_md.errors import MDError, OptionError
from torchtrt_md.lowering.passes import Exchange
from torchtrt_md.options import CHOICES, Options


def test_defaults_are_among_the_choices_and_come_first() -> None:
    options = Options.of({})
    assert options == Options()
    assert {name: getattr(options, name) for name in CHOICES} == {name: values[0] for name, values in CHOICES.items()}
    assert (options.parallels, options.max_graphs, options.target, options.timeout) == ((), 8, "portable", 300.0)


def test_one_parallel_or_several_are_a_tuple() -> None:
    one, other = ContextParallel("cp"), TensorParallel("tp")
    assert Options(parallel=one).parallels == (one,)
    assert Options(parallel=[one, other]).parallels == (one, other)
    assert Options.of({"parallel": [one]}) == Options(parallel=one)


def test_every_option_can_be_given() -> None:
    given: dict[str, Any] = {
        "mesh": Mesh(cp=2),
        "placement": "split",
        "compute": "inductor",
        "tune": True,
        "cuda_graph": True,
        "max_graphs": 2,
        "target": "sm90",
        "cache": "/tmp/engines",
        "timeout": 20,
        "exchange": Exchange("ulysses", head_groups=2),
    }
    options = Options.of(given)
    assert {name: getattr(options, name) for name in given} == given


def test_an_unknown_option_lists_the_known_and_the_nearest() -> None:
    with pytest.raises(OptionError) as raised:
        Options.of({"placment": "split"})
    assert "no option 'placment'; the options are mesh, parallel, placement, compute, tune" in str(raised.value)
    assert "did you mean 'placement'?" in str(raised.value)
    assert isinstance(raised.value, MDError)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("placement", "engines", "'auto' or 'engine' or 'split'"),
        ("tune", "tensorrt", "'auto' or True or False"),
        ("tune", 1, "'auto' or True or False"),
        ("compute", "trt", "'auto' or 'tensorrt' or 'inductor'"),
        ("transport", "copy", "'auto' or 'nccl' or 'store'"),
        ("cuda_graph", "yes", "False or True"),
        ("mesh", {"cp": 2}, "a Mesh or a DeviceMesh"),
        ("parallel", "cp", "a ContextParallel, a TensorParallel"),
        ("max_graphs", 0, "at least 1"),
        ("timeout", -1.0, "seconds, more than 0"),
        ("target", 90, '"portable"'),
        ("cache", 3, "a folder"),
        ("exchange", "ulysses", "Exchange"),
    ],
)
def test_a_wrong_value_names_the_allowed(name: str, value: object, allowed: str) -> None:
    with pytest.raises(OptionError) as raised:
        Options.of({name: value})
    assert f"{name!r} cannot be" in str(raised.value)
    assert allowed in str(raised.value)


def test_what_ranks_compare_tells_a_plan_entry_by_entry() -> None:
    plan = {"": {"x": Split(1)}, "out": [None, Gather(1)]}
    told = Options(mesh=Mesh(cp=2), parallel=ContextParallel("cp", "ring", plan), cache="/mine").told()
    assert told["mesh"] == "cp=2"
    assert told["parallel"] == "ContextParallel('cp')"
    assert told["parallel.strategy"] == "'ring'"
    assert told["parallel.plan['']['x']"] == repr(Split(1))
    assert told["parallel.plan['out'][0]"] == "None"
    assert told["parallel.plan['out'][1]"] == repr(Gather(1))
    assert told["placement"] == "'auto'"
    assert not {"cache", "report"} & told.keys(), "each rank has its own"
    several = Options(parallel=[ContextParallel("cp"), TensorParallel("tp")]).told()
    assert several["parallel[1]"] == "TensorParallel('tp')"
    assert several["parallel[1].plan"] == "None"
