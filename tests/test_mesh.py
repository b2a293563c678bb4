"""Meshes: how they are written, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import torchtrt_md as md
from torchtrt_md.capture.torch_private import fake_ranks
from torchtrt_md.errors import MeshError
from torchtrt_md.mesh import axis_names


def test_a_mesh_by_keywords_by_a_mapping_and_by_text() -> None:
    assert md.Mesh(cp=2, tp=3) == md.Mesh({"cp": 2, "tp": 3}) == md.Mesh({"cp": 2}, tp=3) == md.Mesh.parse("cp=2, tp=3")


@pytest.mark.parametrize("name", ["self", "class", "axes", "axis", "size", "_x1"])
def test_names_that_are_words_of_python_or_ours(name: str) -> None:
    mesh = md.Mesh.parse(f"{name}=2")
    assert mesh == md.Mesh({name: 2}) == md.Mesh(**{name: 2})
    assert (mesh.names, mesh.size, mesh.axis_size(name)) == ((name,), 2, 2)


@pytest.mark.parametrize(
    "text",
    ["cp=²", "cp=٣", "cp=", "=2", "cp", "cp=2,cp=2", "c p=2", "cp²=2", "cp=-1", "cp=2.0", "cp=" + "9" * 5000, ""],
)
def test_texts_that_are_no_mesh(text: str) -> None:
    with pytest.raises(MeshError, match="is not a mesh"):
        md.Mesh.parse(text)


def test_a_size_of_zero_by_text() -> None:
    with pytest.raises(MeshError, match="axis 'cp' of the mesh has size 0"):
        md.Mesh.parse("cp=0")


@pytest.mark.parametrize(
    ("axes", "problem"),
    [
        ({}, "at least one axis"),
        ({"a-b": 2}, "the name 'a-b'"),
        ({"": 2}, "the name ''"),
        ({3: 2}, "the name 3"),
        ({"é": 2}, "the name 'é'"),
        ({"cp": True}, "size True"),
        ({"cp": 2.0}, r"size 2\.0"),
        ("cp=4", r"'cp=4' is not a mapping"),
        (4, "4 is not a mapping"),
    ],
)
def test_meshes_that_cannot_be(axes: Any, problem: str) -> None:
    with pytest.raises(MeshError, match=problem):
        md.Mesh(axes)


def test_an_axis_given_in_both_ways() -> None:
    with pytest.raises(MeshError, match="'cp' of the mesh is given twice"):
        md.Mesh({"cp": 2}, cp=2)


def test_a_device_mesh_without_names_has_dim0_and_so_on() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8)
    dense, sharded = (torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)) for _ in range(2))
    sharded.load_state_dict(dense.state_dict())
    with fake_ranks(4):
        named, unnamed = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b")), init_device_mesh("cpu", (4,))
        assert axis_names(named) == ("a", "b")
        assert axis_names(init_device_mesh("cpu", (2, 2))) == ("dim0", "dim1")
        mesh = md.Mesh.from_device_mesh(unnamed)
        assert mesh == md.Mesh(dim0=4)
        parallelize_module(sharded, unnamed, {"0": ColwiseParallel(), "1": RowwiseParallel()}, src_data_rank=None)
        program = md.capture(sharded, (x,), mesh=mesh, weights=dense.state_dict())
    assert md.verify(program, dense, (x,)).error <= 1e-5
