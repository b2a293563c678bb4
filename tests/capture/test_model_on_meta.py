"""Models on meta: where their weights come from, and what is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import torchtrt_md as md
from torchtrt_md.capture.torch_private import fake_ranks
from torchtrt_md.errors import CaptureError, MDError, WeightsError
from torchtrt_md.program import ShardedProgram

X = torch.randn(2, 8, 32)
MESH, PLAN = md.Mesh(tp=2), {"up": "colwise", "down": "rowwise"}


class Tied(models.MLP):
    """``again`` is ``up`` under another name; one buffer is in the checkpoint, the other is not."""

    mean: Tensor
    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.again = self.up
        self.register_buffer("mean", torch.zeros(32))
        self.register_buffer("table", torch.arange(32.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - self.mean) + self.table


def parameters_on_meta(model: nn.Module) -> nn.Module:
    """As accelerate's init_empty_weights() makes it: buffers keep their values."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
    model.again = model.up
    return model.eval()


def saved(model: nn.Module) -> dict[str, Tensor]:
    """As Hugging Face writes it: one name of each tied weight."""
    return {name: t for name, t in model.state_dict().items() if not name.startswith("again")}


def captured(model: nn.Module, weights: Any) -> ShardedProgram:
    return md.capture(model, (X,), mesh=MESH, parallel=md.TensorParallel("tp", plan=PLAN), weights=weights)


def real() -> Tied:
    torch.manual_seed(0)
    model = Tied()
    model.mean += torch.randn(32)
    return model


@pytest.mark.parametrize("files", [False, True])
def test_every_rank_gets_the_part_that_the_model_itself_would_give(files: bool, tmp_path: Path) -> None:
    given: Any = saved(real())
    if files:
        save_file(given, tmp_path / "model.safetensors")
        given = tmp_path
    program, expected = captured(parameters_on_meta(Tied()), given), captured(real(), None)
    program.weights.check_values(program.read())
    names = [weight.name for weight in program.read()]
    assert (
        names
        == [weight.name for weight in expected.read()]
        == ["up.weight", "up.bias", "down.weight", "down.bias", "mean", "table"]
    )
    for ours, theirs in zip(program.read(), expected.read(), strict=True):
        for rank in range(2):
            found, value = program.weights.local(ours, MESH, rank), expected.weights.local(theirs, MESH, rank)
            assert torch.equal(found, value), ours.name
    assert program.weights.given["again.weight"] == "up.weight"
    assert set(program.weights.whole) == {"table"}, "the mean is that of the checkpoint, the table the model's own"


def without(name: str) -> Callable[[dict[str, Tensor]], Mapping[str, Tensor]]:
    return lambda given: {key: t for key, t in given.items() if key != name}


REFUSED: dict[str, tuple[Callable[[], nn.Module], Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (
        lambda: parameters_on_meta(Tied()),
        without("up.weight"),
        "the weight 'up.weight' is not in the 4 tensors that were given",
    ),
    "several missing": (
        lambda: parameters_on_meta(Tied()),
        lambda given: {"mean": given["mean"]},
        "4 weights of the model are not in .*: 'up.weight', 'up.bias', 'down.weight', 'down.bias'",
    ),
    "unexpected": (
        lambda: parameters_on_meta(Tied()),
        lambda given: {**given, "up.scale": torch.ones(1), "lora": torch.ones(1)},
        "has 'lora', 'up.scale', and Tied has no weight of that name",
    ),
    "another dtype": (
        lambda: parameters_on_meta(Tied()),
        lambda given: {**given, "down.bias": given["down.bias"].half()},
        r"the weight 'down.bias' is float16 \[32\] in .*, and the model's is float32 \[32\]",
    ),
    "another shape": (
        lambda: parameters_on_meta(Tied()),
        lambda given: {**given, "up.weight": torch.zeros(32, 64)},
        r"the weight 'up.weight' is float32 \[32, 64\] in .*, and the model's is float32 \[64, 32\]",
    ),
    "another shape of a buffer": (
        lambda: parameters_on_meta(Tied()),
        lambda given: {**given, "mean": torch.zeros(1)},
        r"the weight 'mean' is float32 \[1\]",
    ),
    "tied weights that differ": (
        lambda: parameters_on_meta(Tied()),
        lambda given: {**given, "again.weight": given["up.weight"] + 1},
        "the weights 'up.weight' and 'again.weight' are tied in the model, and differ in",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_the_models_checkpoint_is_refused(kind: str) -> None:
    model, change, message = REFUSED[kind]
    with pytest.raises(WeightsError, match=message):
        captured(model(), change(saved(real())))


def test_a_parameter_has_one_source(tmp_path: Path) -> None:
    save_file(saved(real()), tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"the weight 'up\.weight' of Tied has a value, and .* has one too"):
        captured(real(), tmp_path)


def test_what_has_no_value_is_refused_where_it_is_wanted() -> None:
    with torch.device("meta"):
        model = Tied().eval()
    program = captured(model, saved(real()))
    message = "the weight 'table' of the model is on meta, and is not in the 5 tensors"
    with pytest.raises(CaptureError, match=message):
        program.weights.check_values(program.read())
    table = next(weight for weight in program.read() if weight.name == "table")
    with pytest.raises(CaptureError, match=message):
        program.weights.local(table, MESH, 0)
    program = captured(model, None)
    with pytest.raises(
        CaptureError, match=r"the weight 'up.weight' and 5 more of the model is on meta.*(?s:.)*weights="
    ):
        program.weights.check_values(program.read())


def test_what_no_call_reads_needs_no_value() -> None:
    model = parameters_on_meta(Tied())
    model.register_buffer("idle", torch.empty(3, device="meta"), persistent=False)
    program = captured(model, saved(real()))
    program.weights.check_values(program.read())


class HoldsATensor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 64)
        self.table = torch.arange(64.0)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.up(x), self.table


def test_arguments_and_tensors_on_meta_are_refused() -> None:
    with pytest.raises(CaptureError, match="argument 'x' is on meta and has no value"):
        md.capture(models.MLP(), (X.to("meta"),), mesh=md.Mesh(one=1))
    with torch.device("meta"):
        model = HoldsATensor()
    with pytest.raises(MDError, match=r"holds a tensor \[64\] on meta, which is no parameter and no buffer"):
        md.capture(model, (X,), mesh=md.Mesh(one=1))


def test_a_model_that_was_parallelized_on_meta() -> None:
    dense = models.MLP()
    with fake_ranks(2):
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        with torch.device("meta"):
            model = models.MLP().eval()
        sharded = parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        program = md.capture(sharded, (X,), mesh=MESH, weights=dense.state_dict())
        program.weights.check_values(program.read())
        bare = md.capture(sharded, (X,), mesh=MESH)
        with pytest.raises(CaptureError, match=r"'up\.weight' and 3 more of the model is on meta"):
            bare.weights.check_values(bare.read())
    up = next(weight for weight in program.read() if weight.name == "up.weight")
    for rank in range(2):
        assert torch.equal(program.weights.local(up, MESH, rank), dense.up.weight[32 * rank : 32 * rank + 32])
