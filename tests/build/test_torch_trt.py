"""What is used of Torch-TensorRT that it does not document, and what breaks without each."""

from __future__ import annotations

import logging

import pytest
import torch
from networks import layers_of, network
from torch import Tensor, nn

import torchtrt_md as md
from torchtrt_md.build.torch_trt import load, without_gpu


def test_interpreter_constructs_a_network_without_a_gpu() -> None:
    """TRTInterpreter: without it there is no way from FX to a network that does not also load the engine."""
    names = load()
    assert {"_construct_trt_network_def", "output", "run_node"} <= set(dir(names.TRTInterpreter))
    net, segment, interpreter = network(md.capture(nn.Linear(3, 2), (torch.randn(1, 3),), mesh=md.Mesh(tp=1)))
    assert net.num_inputs == len(segment.inputs) == 1
    assert interpreter.converting.op == "output"  # the node that an error would name


def test_constants_become_tensors_of_the_network() -> None:
    """get_trt_tensor: without it an operand that was folded to a constant is no tensor for a layer."""
    _, _, interpreter = network(md.capture(nn.Identity(), (torch.randn(3),), mesh=md.Mesh(tp=1)))
    tensor = load().get_trt_tensor(interpreter.ctx, torch.ones(2, 3), "ones")
    assert tuple(tensor.shape) == (2, 3)
    assert load().get_trt_tensor(interpreter.ctx, tensor, "again") is tensor


class Positions(nn.Module):
    """Looks up constants, so the operand of the collective is a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Embedding(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.e(torch.arange(4))
        return result


def test_collectives_over_constants_stay() -> None:
    """_TorchTensorRTConstantFolder: without ours in its place the collective is run while the graph is lowered."""
    parallel = md.TensorParallel("tp", plan={"e": "embedding_rowwise"})
    program = md.capture(Positions().eval(), (torch.randn(4, 4),), mesh=md.Mesh(tp=2), parallel=parallel)
    net, _, _ = network(program)
    (collective,) = layers_of(net, "DIST_COLLECTIVE")
    assert collective.num_ranks == 2


class SameTensors(nn.Module):
    """Returns each of its tensors in all the ways that converters make one tensor of."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor, flag: Tensor) -> tuple[Tensor, ...]:
        y = x @ self.w
        return y, x, x.clone(), self.w, self.w, flag, flag, y, y.clone(), y.to(torch.float32), torch.arange(3)


def test_every_output_is_a_tensor_of_its_own() -> None:
    """TRTInterpreter.output: without ours it drops outputs that are one tensor, and TensorRT refuses inputs."""
    args = (torch.randn(3, 3), torch.tensor([True, False]))
    net, segment, _ = network(md.capture(SameTensors(), args, mesh=md.Mesh(tp=1)))
    assert [net.get_output(i).name for i in range(net.num_outputs)] == [b.name for b in segment.outputs]
    assert [net.get_input(i).name for i in range(net.num_inputs)] == [b.name for b in segment.inputs]
    assert len(segment.outputs) == 11


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to ask")
def test_the_answers_for_a_gpu_are_taken_back() -> None:
    before = torch.cuda.current_device
    with without_gpu():
        assert torch.cuda.current_device() == 0
        assert torch.cuda.get_device_capability() == (8, 0)
    assert torch.cuda.current_device is before


def test_loading_leaves_logging_as_it_was() -> None:
    disabled = logging.root.manager.disable
    load.cache_clear()
    load()
    assert logging.root.manager.disable == disabled
