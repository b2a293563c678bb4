"""Every case of ``distributed_cases``: equal to eager PyTorch on all ranks, or refused by name on all of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from distributed_cases import CASES, PAGE, page
from in_pytorch import InPyTorch, compiled
from rank_processes import Ranks
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from torchtrt_md import MDError


def difference(ours: Any, theirs: Any, what: str) -> str:
    """How two results differ, in words; "" where they do not."""
    if isinstance(theirs, DTensor):
        if not isinstance(ours, DTensor) or ours.placements != theirs.placements or ours.shape != theirs.shape:
            return f"{what}: {ours} is not {theirs}"
        if ours.stride() != theirs.stride() or ours.device_mesh != theirs.device_mesh:
            return f"{what}: strides {ours.stride()}, {theirs.stride()}"
        return difference(ours.to_local(), theirs.to_local(), what)
    if isinstance(theirs, Tensor):
        if isinstance(ours, DTensor) or ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            return f"{what}: {ours} is not {theirs}"
        return "" if torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6) else f"{what}: {ours} is not {theirs}"
    return "" if ours == theirs else f"{what}: {ours} is not {theirs}"


def differences(ours: Any, theirs: Any, what: str) -> list[str]:
    ours, shape = pytree.tree_flatten(ours)
    theirs, expected = pytree.tree_flatten(theirs)
    if shape != expected:
        return [f"{what}: {shape} is not {expected}"]
    found = [difference(a, b, f"{what} {i}") for i, (a, b) in enumerate(zip(ours, theirs, strict=True))]
    return list(filter(None, found))


def run(rank: int, name: str) -> tuple[str, list[str], int]:
    """The error, how results and arguments differ from eager PyTorch's, and how many programs were compiled."""
    case = CASES[name]
    function, args = case.make(rank)
    build = InPyTorch()
    call = compiled(function, build, **case.options)
    found = []
    # PyTorch has no rule for the DTensors of its attention on CPUs; those of its parts it has.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        for number in range(2):
            eager, given = copy.deepcopy(args), copy.deepcopy(args)
            try:
                result = call(*given)
            except MDError as error:
                return f"{type(error).__name__}: {error}", [], 0
            expected = function(*eager)
            found += differences(result, expected, f"call {number}: result")
            found += differences(given, eager, f"call {number}: argument")
    return "", found, len(build.programs)


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(tmp_path_factory.mktemp("ranks") / "store", 4)
    yield started
    started.close()


def check(ranks: Ranks, name: str) -> None:
    case = CASES[name]
    for outcome in ranks(run, name):
        assert not outcome.error, f"{outcome.error}: {outcome.message}"
        message, found, programs = outcome.value
        if case.refused:
            assert case.refused in message, message
            assert case.way_out in message, message
        else:
            assert message == ""
            assert found == []
            assert programs > 0, "nothing was compiled"


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.world == 2])
def test_two_ranks(ranks: Ranks, name: str) -> None:
    check(ranks, name)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.world == 4])
def test_four_ranks(four_ranks: Ranks, name: str) -> None:
    check(four_ranks, name)


def test_the_page_has_every_case() -> None:
    assert PAGE.read_text() == page(), "run: PYTHONPATH=tests:. python tests/doors/distributed_cases.py"
