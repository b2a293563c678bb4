"""Programs that are right for the example and wrong for other inputs: what is tried beside the example."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import torchtrt_md as md
from torchtrt_md.errors import VerificationError
from torchtrt_md.verification import draw as drawing
from torchtrt_md.verification.draw import drawn_constants, repeats

NONE = torch.zeros(2, 8, dtype=torch.bool)
SOME = NONE.clone()
SOME[1, 5:] = True


class Encoder(nn.Module):
    """PyTorch's own encoder, which in ``eval()`` gives zeros where a sequence is padded, unless it is traced."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        y: Tensor = self.down(self.up(self.encoder(x, src_key_padding_mask=padding))).mean(1)
        return y


@pytest.mark.parametrize("padding", [NONE, SOME], ids=["no padding", "padding"])
def test_a_mask_that_masks_nothing_is_tried_with_something_masked(padding: Tensor) -> None:
    model, x = Encoder().eval(), torch.randn(2, 8, 16)
    parallel = md.ContextParallel("cp", plan={"up": {"input": md.Split(1)}, "down": md.Gather(1)})
    program = md.capture(model, (x, padding), mesh=md.Mesh(cp=2), parallel=parallel)
    with pytest.raises(VerificationError, match="something else than what is captured") as raised:
        md.verify(program, model, (x, padding))
    assert "set_fastpath_enabled(False)" in raised.value.fix
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        md.verify(program, model, (x, padding))
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class Masked(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)


@pytest.mark.parametrize("shape", [(8,), (1, 8), (8, 8), (2, 1, 1, 8)])
@pytest.mark.parametrize("value", [False, True])
def test_booleans_that_are_all_equal_are_drawn(shape: tuple[int, ...], value: bool) -> None:
    class Chosen(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return torch.where(mask, x, -x)

    model, x, mask = Chosen(), torch.randn(2, 1, 8, 8), torch.full(shape, value)
    report = md.verify(md.capture(model, (x, mask), mesh=md.Mesh(cp=1)), model, (x, mask))
    assert report.notes == ("'mask' cannot tell programs apart, so others were drawn too",)
    assert repeats(mask)


@pytest.mark.parametrize("padding", [torch.zeros(2, 1), torch.tensor([[1, 1, 0, 0]] * 2), torch.tensor([[1, 0]] * 2)])
def test_a_mask_that_does_not_fit_is_told_of(padding: Tensor) -> None:
    """Where all that is not padding would be masked, attention gives NaN, of which the caller knows nothing."""

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            y: Tensor = self.attention(x, x, x, key_padding_mask=padding, need_weights=False)[0]
            return y

    padding = padding.bool()
    model, x = Attending().eval(), torch.randn(2, padding.shape[1], 16)
    program = md.capture(model, (x, padding), mesh=md.Mesh(cp=1))
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        report = md.verify(program, model, (x, padding))
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    assert all("do not fit" in note or "cannot tell" in note for note in report.notes)


def test_numbers_are_drawn_where_a_mask_does_not_fit() -> None:
    """A norm across split features shows with numbers that are drawn, which a mask that cannot be must not hide."""

    class Filled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(16, 64, bias=False), nn.Linear(64, 16)

        def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
            y = self.up(x)
            y = y / (y.norm(dim=-1, keepdim=True) + 1)
            z: Tensor = self.down(y) + torch.zeros(2, 2).masked_fill(hidden, -torch.inf).softmax(-1)[:, :1]
            return z

    model, x, hidden = Filled().eval(), torch.zeros(2, 16), torch.tensor([[True, False]] * 2)
    parallel = md.TensorParallel("tp", {"up": "colwise", "down": "rowwise"})
    program = md.capture(model, (x, hidden), mesh=md.Mesh(tp=2), parallel=parallel)
    with pytest.raises(VerificationError, match="does not compute what Filled computes"):
        md.verify(program, model, (x, hidden))


def test_a_mask_leaves_something_to_see() -> None:
    mask = torch.ones(2, 1, 8, 8, dtype=torch.bool)
    model, x = Masked(), torch.randn(2, 1, 8, 8)
    report = md.verify(md.capture(model, (x, mask), mesh=md.Mesh(cp=1)), model, (x, mask))
    assert report.error < 1e-5


class Bounded(nn.Module):
    """No row of what is between the two layers is longer than a bound."""

    def __init__(self, bound: float, least: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64, bias=False), nn.Linear(64, 16)
        self.bound, self.least = bound, least

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        length = y.norm(dim=-1, keepdim=True)
        if self.least:
            y = y * (self.bound / length).clamp(min=1)
        else:
            y = y * torch.minimum(self.bound / length, torch.ones_like(length))
        z: Tensor = self.down(y)
        return z


@pytest.mark.parametrize(("bound", "least"), [(100.0, False), (0.1, True)])
def test_a_bound_across_features_that_the_example_stays_inside(bound: float, least: bool) -> None:
    model, x = Bounded(bound, least).eval(), torch.randn(4, 16)
    parallel = md.TensorParallel("tp", {"up": "colwise", "down": "rowwise"})
    program = md.capture(model, (x,), mesh=md.Mesh(tp=2), parallel=parallel)
    with pytest.raises(VerificationError, match="does not compute what Bounded computes") as raised:
        md.verify(program, model, (x,))
    assert "reads across the features" in raised.value.fix


def test_a_bound_across_features_of_a_model_that_attends() -> None:
    """What is compiled is not compared with large numbers where attention is; graphs are, in fp64."""

    class Attending(Bounded):
        def forward(self, x: Tensor) -> Tensor:
            heads = x.reshape(4, 2, 8).transpose(0, 1)[None]
            return super().forward(F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2))

    model, x = Attending(100.0, False).eval(), torch.randn(4, 16)
    parallel = md.TensorParallel("tp", {"up": "colwise", "down": "rowwise"})
    program = md.capture(model, (x,), mesh=md.Mesh(tp=2), parallel=parallel)
    with pytest.raises(VerificationError, match="does not compute what Attending computes"):
        md.verify(program, model, (x,))


def test_a_bound_of_each_feature_is_right() -> None:
    class Clamped(Bounded):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.down(F.relu6(self.up(x)))
            return y

    model, x = Clamped(0, False).eval(), torch.randn(4, 16)
    parallel = md.TensorParallel("tp", {"up": "colwise", "down": "rowwise"})
    md.verify(md.capture(model, (x,), mesh=md.Mesh(tp=2), parallel=parallel), model, (x,))


class Gated(nn.Module):
    """A softmax over features of which a rank has a part, behind weights with which it adds nothing."""

    def __init__(self, hidden: str) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.gate = nn.Parameter(torch.ones(1))
        zeros: dict[str, list[Tensor]] = {"matrix": [self.down.weight], "scalar": [self.gate]}
        for parameter in zeros.get(hidden, []):
            nn.init.zeros_(parameter)
        self.scale = nn.Parameter(torch.zeros(8) if hidden == "vector" else torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.up(x).softmax(-1))
        return x + self.gate * self.scale * y


@pytest.mark.parametrize("hidden", ["nothing", "matrix", "scalar", "vector"])
def test_weights_that_hide_an_error_are_drawn(hidden: str) -> None:
    """A bundle may get other weights than it was verified with."""
    model, x = Gated(hidden).eval(), torch.randn(2, 4, 8)
    program = md.capture(
        model, (x,), mesh=md.Mesh(tp=2), parallel=md.TensorParallel("tp", {"up": "colwise", "down": "rowwise"})
    )
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(VerificationError, match="does not compute what Gated computes") as raised:
        md.verify(program, model, (x,))
    assert ("with other numbers in " in raised.value.problem) == (hidden != "nothing")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()), "the model is as it was"


class Routed(nn.Module):
    """Of tokens that go to one expert, a softmax over features of which a rank has a part; the router's bias is 0."""

    def __init__(self, wrong: int) -> None:
        super().__init__()
        self.router, self.bias = nn.Linear(8, 4), nn.Parameter(torch.zeros(4))
        self.up, self.down, self.wrong = nn.Linear(8, 16), nn.Linear(16, 8), wrong

    def forward(self, x: Tensor) -> Tensor:
        chosen = (self.router(x).softmax(-1) + self.bias).topk(1).indices
        y = self.up(x)
        z: Tensor = self.down(torch.where(chosen == self.wrong, y + 1e-3 * y.softmax(-1), y))
        return z


@pytest.mark.parametrize("wrong", range(4))
def test_structure_is_asked_with_the_given_weights_too(wrong: int) -> None:
    """What is drawn in the place of zeros may send all tokens past an error."""
    torch.manual_seed(1)
    model, x = Routed(wrong).to(torch.bfloat16).eval(), torch.randn(4, 32, 8, dtype=torch.bfloat16)
    program = md.capture(
        model, (x,), mesh=md.Mesh(tp=2), parallel=md.TensorParallel("tp", {"up": "colwise", "down": "rowwise"})
    )
    with pytest.raises(VerificationError, match="does not compute what Routed computes"):
        md.verify(program, model, (x,))


class KeepsATable(nn.Module):
    """As LeViT does in ``eval()``: a table of what a parameter says is made once."""

    def __init__(self) -> None:
        super().__init__()
        self.biases, self.linear, self.cache = nn.Parameter(torch.zeros(8)), nn.Linear(8, 8), dict[str, Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        if "table" not in self.cache:
            self.cache["table"] = self.biases[torch.arange(7, -1, -1)]
        y: Tensor = self.linear(x) + self.cache["table"]
        return y


@pytest.mark.parametrize("called", [False, True])
def test_a_table_that_was_made_of_a_constant_stays(called: bool) -> None:
    model, x = KeepsATable().eval(), torch.randn(2, 4, 8)
    plan = {"": {"x": md.Split(1)}, "linear": md.Gather(1)}
    program = md.capture(model, (x,), mesh=md.Mesh(cp=2), parallel=md.ContextParallel("cp", plan=plan))
    if called:
        with torch.no_grad():
            model(x)
    md.verify(program, model, (x,))


class OnlyZeros(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.zeros, self.linear = nn.Parameter(torch.zeros(8)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x) * (-self.zeros.abs()).sqrt()
        return y


def test_a_model_that_other_numbers_make_nan_of_is_compared_with_its_own() -> None:
    model, x = OnlyZeros().eval(), torch.randn(2, 4, 8)
    plan = {"": {"x": md.Split(1)}, "linear": md.Gather(1)}
    program = md.capture(model, (x,), mesh=md.Mesh(cp=2), parallel=md.ContextParallel("cp", plan=plan))
    report = md.verify(program, model, (x,))
    assert report.structure_error == 0.0
    (note,) = report.notes  # zeros are all that it takes
    assert "some weights hide errors, being one number everywhere" in note
    assert "is not finite" in note


def test_what_is_drawn_of_constants() -> None:
    ones, tied = torch.ones(4, 6, dtype=torch.bfloat16), torch.zeros(3)
    parameters = {
        "ones": ones,
        "a": tied,
        "b": tied.view(3),
        "one": torch.ones(1),
        "zero": torch.zeros(()),
        "numbers": torch.arange(4.0),
        "integers": torch.zeros(4, dtype=torch.int64),
        "none": torch.zeros(0, 3),
    }
    found = drawn_constants(parameters)
    assert sorted(found) == ["a", "b", "ones", "zero"]
    assert found["a"] is found["b"]
    assert found["ones"].dtype == torch.bfloat16
    assert 0.7 < float(found["ones"].min()) < float(found["ones"].max()) < 1.3
    assert float(found["zero"]) != 0.0
    assert not repeats(found["ones"])
    again = drawn_constants(parameters)
    assert all(torch.equal(found[name], again[name]) for name in found), "each run draws the same"


def test_the_largest_of_many_constants_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "_MOST_BYTES", 100)
    found = drawn_constants({"large": torch.zeros(20), "small": torch.zeros(10), "tied": torch.zeros(10)})
    assert list(found) == ["small", "tied"]


class Packed(nn.Module):
    """A model that looks at its positions where it is not traced, as masks of transformers' Llama 4 do."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        y: Tensor = self.down(self.up(x))
        consecutive = not isinstance(positions, FakeTensor) and bool((positions.diff(dim=-1) == 1).all())
        return y * 2 if consecutive else y


def test_what_a_model_does_with_the_given_inputs_alone_is_compared_beside_what_is_drawn() -> None:
    """Rows of positions that are equal tell no programs apart, so that others are drawn: which it takes otherwise."""
    model, x = Packed().eval(), torch.randn(2, 8, 16)
    positions = torch.arange(8).expand(2, -1).contiguous()
    parallel = md.ContextParallel("cp", plan={"up": {"input": md.Split(1)}, "down": md.Gather(1)})
    program = md.capture(model, (x, positions), mesh=md.Mesh(cp=2), parallel=parallel)
    with pytest.raises(VerificationError, match="something else than what is captured"):
        md.verify(program, model, (x, positions))
    others = torch.arange(16).reshape(2, 8) * 3  # neither does anything else with these
    md.verify(md.capture(model, (x, others), mesh=md.Mesh(cp=2), parallel=parallel), model, (x, others))


def test_a_rowwise_layer_keeps_the_dtype_that_autocast_gives_and_another_one_is_refused() -> None:
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.down(self.up(x).relu())
            return y

    model, x = Mlp().eval(), torch.randn(4, 16)
    how = {"mesh": md.Mesh(tp=2), "parallel": md.TensorParallel("tp", {"up": "colwise", "down": "rowwise"})}
    plain = md.capture(model, (x,), **how)  # type: ignore[arg-type]
    with torch.autocast("cpu", torch.bfloat16):
        program = md.capture(model, (x,), **how)  # type: ignore[arg-type]
        assert [value.dtype for value in program.outputs] == [torch.bfloat16]
        with pytest.raises(VerificationError, match="Mlp returns bfloat16, and the program float32"):
            md.verify(plain, model, (x,))


def test_a_buffer_that_is_zero_everywhere_is_drawn() -> None:
    """A rowwise layer that adds one adds it once on each rank."""

    class Shifted(nn.Linear):
        shift: Tensor

        def __init__(self) -> None:
            super().__init__(8, 4)
            self.register_buffer("shift", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.shift

    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Shifted()).eval(), torch.randn(3, 4)
    parallel = md.TensorParallel("tp", {"0": "colwise", "2": "rowwise"})
    program = md.capture(model, (x,), mesh=md.Mesh(tp=2), parallel=parallel)
    with pytest.raises(VerificationError, match=r"with other numbers in .*2\.shift"):
        md.verify(program, model, (x,))


def test_what_overflows_does_not_hide_the_rest() -> None:
    """In float16 one channel is beyond its range in each token; the others are off by the width of a rank's part."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
            with torch.no_grad():
                self.down.weight.mul_(180)
                self.down.bias.copy_(torch.linspace(3e4, 5e4, 16))
                self.down.bias[3] = 65400
                self.down.weight[3] = self.down.weight[3].abs() * 20

        def forward(self, x: Tensor) -> Tensor:
            h = F.gelu(self.up(x))
            y: Tensor = self.down(h * (h.shape[-1] / 16))
            return y

    model = Scaled().half().eval()
    x = (torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(1)) * 4).half()
    assert not model(x)[..., 3].isfinite().any()
    parallel = md.TensorParallel("tp", {"up": "colwise", "down": "rowwise"})
    program = md.capture(model, (x,), mesh=md.Mesh(tp=2), parallel=parallel)
    with pytest.raises(VerificationError, match="does not compute what Scaled computes"):
        md.verify(program, model, (x,))
