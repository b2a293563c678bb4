"""The private names of PyTorch that capture uses.  Each failure says which feature is gone."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.fx.experimental.proxy_tensor import PythonKeyTracer, make_fx

from torchtrt_md.capture.torch_private import (
    FakeTensor,
    FakeTensorMode,
    coordinates,
    fake_ranks,
    has_global_hooks,
    is_fake,
    told_stacks,
    untraced,
)


def test_fake_ranks_without_which_tensor_parallel_capture_needs_a_launch() -> None:
    with fake_ranks(8):
        assert dist.get_world_size() == 8
    assert not dist.is_initialized()


def test_coordinates_without_which_only_one_rank_can_be_captured() -> None:
    with fake_ranks(4):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
        own = mesh.get_coordinate()
        with coordinates({"cp": 1, "tp": 0}):
            assert tuple(mesh.get_coordinate() or ()) == (1, 0)
            assert tuple(mesh["tp"].get_coordinate() or ()) == (0,)
            whole = DTensor.from_local(torch.arange(4), mesh["cp"], [Replicate()], run_check=False)
            assert whole.redistribute(mesh["cp"], [Shard(0)]).to_local().tolist() == [2, 3]
        assert mesh.get_coordinate() == own
        assert "_coordinate_on_dim" not in vars(DeviceMesh)


def test_fake_tensors_without_which_nothing_can_be_traced() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert torch.empty(3).sum().shape == ()


def test_is_fake_without_which_models_would_keep_fake_tensors() -> None:
    with FakeTensorMode():
        assert is_fake(torch.empty(3))
    assert not is_fake(torch.empty(3))
    assert not is_fake("text")


def test_told_stacks_without_which_errors_cite_functions_named_forward_only() -> None:
    def other(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    before = PythonKeyTracer.create_node
    with told_stacks():
        graph = make_fx(other)(torch.ones(2))
    (add,) = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
    assert "in other" in (add.stack_trace or "")
    assert PythonKeyTracer.create_node is before


def test_untraced_without_which_nothing_is_known_while_a_model_is_traced() -> None:
    found = []

    def call(x: torch.Tensor) -> torch.Tensor:
        assert isinstance(torch.empty(2), FakeTensor)
        with untraced():
            found.append(torch.ones(2).cumsum(0))
        return x + 1

    graph = make_fx(call, tracing_mode="fake")(torch.ones(2))
    assert found[0].tolist() == [1, 2]
    assert not graph.graph.find_nodes(op="call_function", target=torch.ops.aten.cumsum.default)


def test_has_global_hooks_without_which_blocks_with_such_hooks_would_be_written_down_again() -> None:
    assert not has_global_hooks()
    of_modules = torch.nn.modules.module
    for one in (of_modules.register_module_forward_pre_hook, of_modules.register_module_forward_hook):
        hook = one(lambda *_: None)
        assert has_global_hooks()
        hook.remove()
    assert not has_global_hooks()
