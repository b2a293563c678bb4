"""The dense model as a reference, on the CPU: the same code that runs it on a GPU."""

import pytest
import torch
from torch import Tensor, nn

from torchtrt_md.errors import VerificationError
from torchtrt_md.verification.compare import FP32_TOLERANCE, check_useful, dense_reference, limit, relative_error

CPU = torch.device("cpu")


def first(returned: Tensor) -> dict[str, Tensor]:
    return {"y": returned}


class Model(nn.Module):
    """A linear layer that may hold on to a dtype, as models do that cast inside."""

    def __init__(self, dtype: torch.dtype, inner: torch.dtype | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(64, 64, dtype=dtype)
        self.inner = inner

    def forward(self, x: Tensor, *, scale: float) -> Tensor:
        result: Tensor = self.linear(x if self.inner is None else x.to(self.inner)) * scale
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_reference_is_finer_than_the_model(dtype: torch.dtype) -> None:
    model, x = Model(dtype), torch.randn(8, 64, dtype=dtype)
    exact = nn.functional.linear(x.double(), model.linear.weight.double(), model.linear.bias.double()) * 2
    reference = dense_reference(model, (x,), {"scale": 2}, first, CPU)
    assert reference.precision == reference.outputs["y"].dtype == torch.float64
    assert relative_error(reference.outputs["y"], exact.detach()) < 1e-12
    eps = torch.finfo(dtype).eps
    assert eps / 20 < reference.dense_errors["y"] < 2 * eps


def test_a_model_that_cannot_run_in_fp64_runs_in_fp32() -> None:
    reference = dense_reference(
        Model(torch.bfloat16, torch.float32).to(torch.float32), (torch.randn(8, 64),), {"scale": 2}, first, CPU
    )
    assert reference.precision == reference.outputs["y"].dtype == torch.float32
    assert reference.dense_errors["y"] == 0.0


def test_a_model_that_runs_in_neither() -> None:
    model = Model(torch.bfloat16, torch.bfloat16)
    with pytest.raises(VerificationError, match=r"Model gives no reference: in torch.float64: .*; in torch.float32: "):
        dense_reference(model, (torch.randn(8, 64),), {"scale": 2}, first, CPU)


def test_integer_outputs_are_those_of_the_model_s_own_dtype() -> None:
    class Pick(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.argmax(-1)

    x = torch.randn(8, 64)
    reference = dense_reference(Pick(), (x,), {}, first, CPU)
    assert torch.equal(reference.outputs["y"], x.argmax(-1))
    assert reference.dense_errors["y"] == 0.0


def test_errors() -> None:
    x = torch.randn(64, dtype=torch.float64)
    assert relative_error(x.float(), x) < 1e-7
    assert relative_error(x * 1.01, x) == pytest.approx(0.01)
    assert relative_error(x[:3], x) == float("inf")
    assert relative_error(torch.full_like(x, float("nan")), x) == float("inf")
    assert relative_error(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 5])) == 0.25


def test_limits() -> None:
    assert limit(torch.bfloat16, 4e-3) == pytest.approx(6e-3)
    assert limit(torch.float32, 1e-7) == FP32_TOLERANCE
    assert limit(torch.float32, 4e-3) == pytest.approx(6e-3), "computed in 16 bits and returned in 32"
    assert limit(torch.int64, 0.0) == 0.0


@pytest.mark.parametrize(("value", "message"), [(0.0, "is all zeros"), (float("nan"), "is not finite")])
def test_a_useless_reference(value: float, message: str) -> None:
    with pytest.raises(VerificationError, match=message):
        check_useful({"y": torch.full((3,), value)})


def test_tf32_is_off_meanwhile_and_then_as_it_was() -> None:
    seen = []

    class Look(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
            return x

    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    dense_reference(Look(), (torch.ones(2),), {}, first, CPU)
    assert set(seen) == {(False, False)}
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before
