"""The dense model as a reference, on the CPU: the same code that runs it on a GPU.  And the inputs that are drawn."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import torchtrt_md as md
from torchtrt_md.errors import VerificationError
from torchtrt_md.verification.compare import relative_error, rounding
from torchtrt_md.verification.dense import captured, check_finite, dense_reference, longest_sum
from torchtrt_md.verification.draw import draw

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


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_reference_is_finer_than_the_model(dtype: torch.dtype, inner: bool) -> None:
    model, x = Model(dtype, dtype if inner else None), torch.randn(8, 64, dtype=dtype)
    exact = nn.functional.linear(x.double(), model.linear.weight.double(), model.linear.bias.double()) * 2
    reference = dense_reference(model, (x,), {"scale": 2}, first, CPU)
    assert reference.precision == reference.outputs["y"].dtype == torch.float64
    assert not reference.limited
    assert relative_error(reference.outputs["y"], exact.detach()) < 1e-12
    sample, eps = reference.samples["y"], torch.finfo(dtype).eps
    assert torch.equal(sample.value, model(x, scale=2))
    assert eps / 20 < sample.error < 2 * eps
    assert sample.coarse == dtype


def test_a_model_that_takes_other_arguments() -> None:
    with pytest.raises(VerificationError, match="the dense Model cannot be run to compare with: RuntimeError: "):
        dense_reference(Model(torch.float32), (torch.randn(8, 63),), {"scale": 2}, first, CPU)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_token_that_is_much_smaller_than_the_others_has_a_scale_of_its_own(dtype: torch.dtype) -> None:
    """So an engine that gets it wrong is found without a comparison in fp64."""
    model, x = Model(dtype), torch.randn(2, 24, 64)
    x[:, 7] *= 1e-3
    with torch.no_grad():
        model.linear.bias.zero_()
    x = x.to(dtype)
    reference = dense_reference(model, (x,), {"scale": 2}, first, CPU)
    sample, expected = reference.samples["y"], reference.outputs["y"]

    def error(value: Tensor) -> float:
        return rounding(value, expected, sample.value, dtype, sample.noise).error

    with torch.no_grad():
        halves = [x[..., i : i + 32] @ model.linear.weight[:, i : i + 32].t() for i in (0, 32)]
    right = (halves[0] + halves[1]) * 2
    assert error(right) <= sample.ratio
    wrong = right.clone()
    wrong[:, 7] *= 1.25
    assert error(wrong) > sample.ratio


def test_the_longest_sum() -> None:
    class Sums(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return x * 2, x.unsqueeze(0).transpose(1, 2), self.summed(x)

        def __init__(self, summed: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.summed = summed

    w = torch.ones(9, 64)
    for summed, terms in (
        (torch.relu, 1),
        (lambda x: nn.functional.linear(x, w), 64),
        (lambda x: x.t() @ x, 32),
        (lambda x: x.sum(), 32 * 64),
        (lambda x: x.view(2, 16, 64).mean((1, 2)), 16 * 64),
        (lambda x: x.softmax(-1), 64),
        (lambda x: nn.functional.conv1d(x[None], torch.ones(4, 32, 3)), 96),
    ):
        assert longest_sum(captured(Sums(summed), (torch.randn(32, 64),), {})) == terms


def test_a_sixteen_bit_weight_is_not_sixteen_bit_rounding() -> None:
    class Stored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(32, 32).bfloat16())

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.t().float()

    reference = dense_reference(Stored(), (torch.randn(8, 32),), {}, first, CPU)
    assert reference.samples["y"].coarse == torch.float32


def test_integer_outputs() -> None:
    class Pick(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.argmax(-1)

    x = torch.randn(8, 64)
    reference = dense_reference(Pick(), (x,), {}, first, CPU)
    assert torch.equal(reference.outputs["y"], x.argmax(-1))
    assert reference.samples["y"].error == 0.0


@pytest.mark.parametrize("values", [[1.0, float("nan")], [float("inf")] * 2])
def test_a_useless_reference(values: list[float]) -> None:
    with pytest.raises(VerificationError, match="'y' of the dense model is not finite"):
        check_finite({"x": torch.zeros(3), "z": torch.tensor([1.0, -torch.inf]), "y": torch.tensor(values)})


def test_tf32_is_off_meanwhile_and_then_as_it_was() -> None:
    seen = []

    class Look(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
            return x * 2

    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    dense_reference(Look(), (torch.ones(2),), {}, first, CPU)
    assert set(seen) == {(False, False)}
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before


class Lookups(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 4)
        self.positions = nn.Embedding(30, 4)

    def forward(self, tokens: Tensor, at: Tensor, x: Tensor, mask: Tensor, count: Tensor) -> Tensor:
        looked_up: Tensor = self.embedding(tokens) + self.positions(at.view(1, -1) + 2)
        return looked_up * (tokens != 1).unsqueeze(-1) + x * mask + count.unsqueeze(-1)


def test_what_is_drawn() -> None:
    zeros = torch.zeros(1, 8, dtype=torch.long)
    given = {
        "tokens": zeros,
        "at": torch.arange(8),
        "x": torch.zeros(1, 8, 4),
        "mask": torch.ones(8, 1, dtype=torch.bool),
        "count": zeros + 3,
    }
    dense = captured(Lookups(), tuple(given.values()), {})
    drawn = draw(dense, given)
    assert set(drawn) == {"tokens", "x"}, "a count may be anything, and it was 3"
    assert len(set(drawn["tokens"].reshape(-1).tolist())) > 4
    assert 0 <= int(drawn["tokens"].min()) <= int(drawn["tokens"].max()) < 50
    assert drawn["x"].std() > 0.5
    assert all(torch.equal(a, b) for a, b in zip(drawn.values(), draw(dense, given).values(), strict=True))

    tell = {"tokens": torch.randint(0, 50, (1, 8)), "x": torch.randn(1, 8, 4)}
    assert draw(dense, {**given, **tell}) == {}
    rows = torch.tensor([1.0, -2, 0, -torch.inf]).expand(1, 8, 4)
    (new,) = draw(dense, {**given, **tell, "x": rows}).values()
    assert torch.equal(new.sign(), rows.sign())
    assert torch.equal(new.isfinite(), rows.isfinite())
    assert len(set(new[0, :, 1].tolist())) == 8
    positions = torch.tensor([4, 4, 4, 4, 4, 4, 4, 4])
    assert draw(dense, {**given, **tell, "at": positions}) == {}, "what is added to is no index alone"


class Otherwise(Model):
    """It adds something where it is not traced, as a forward may that asks whether it is compiled."""

    def __init__(self, dtype: torch.dtype, more: float) -> None:
        super().__init__(dtype)
        self.more = more

    def forward(self, x: Tensor, *, scale: float) -> Tensor:
        y = super().forward(x, scale=scale)
        return y if isinstance(x, FakeTensor) else y + self.more


@pytest.mark.parametrize("more", [1.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_model_that_is_not_what_is_captured_of_it(dtype: torch.dtype, more: float) -> None:
    """Its own result is no measure of how far off it may be."""
    model, x = Otherwise(dtype, more), torch.randn(8, 64, dtype=dtype)
    with pytest.raises(VerificationError, match="Otherwise computes something else than what is captured of it"):
        dense_reference(model, (x,), {"scale": 2}, first, CPU)
    plan = md.TensorParallel("tp", {"linear": "colwise_gather_output"})
    program = md.lower(md.capture(model, (x,), {"scale": 2}, mesh=md.Mesh(tp=2), parallel=plan))
    with pytest.raises(VerificationError, match="Otherwise computes something else than what is captured of it"):
        md.verify(program, model, (x,), {"scale": 2})
