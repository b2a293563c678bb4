"""How tensors lie in memory: a program is given contiguous ones, whatever the example's strides were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchtrt_md as md
from torchtrt_md.errors import VerificationError
from torchtrt_md.program import placeholders, value_of
from torchtrt_md.runtime.signature import prepared
from torchtrt_md.verification.simulate import simulate

PARALLEL = md.ContextParallel("cp", plan={"up": {"input": md.Split(1)}, "down": md.Gather(1)})
SOUNDS = {
    "contiguous": lambda: torch.randn(4, 32),
    "transposed": lambda: torch.randn(32, 4).t(),
    "one of two channels": lambda: torch.randn(4, 2, 32)[:, 0],
    "every other": lambda: torch.randn(4, 64)[:, ::2],
    "expanded": lambda: torch.randn(1, 32).expand(4, 32),
}


class Spectrum(nn.Module):
    """``torch.stft`` reads its input by ``as_strided``, with its strides."""

    table: Tensor | None

    def __init__(self, table: Tensor | None = None) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 5)
        self.register_buffer("table", table)

    def forward(self, sound: Tensor) -> Tensor:
        read = sound if self.table is None else sound + self.table
        found = [read] if self.table is None else [read, self.table]
        window = torch.hann_window(8)
        spectra = [torch.stft(s, 8, hop_length=4, window=window, center=False, return_complex=True) for s in found]
        y: Tensor = self.down(self.up(torch.stack(spectra).sum(0).abs().transpose(1, 2)))
        return y


@pytest.mark.parametrize("later", SOUNDS)
@pytest.mark.parametrize("example", SOUNDS)
def test_any_layout_of_an_input(example: str, later: str) -> None:
    model, sound, other = Spectrum().eval(), SOUNDS[example](), SOUNDS[later]()
    program = md.lower(md.capture(model, (sound,), mesh=md.Mesh(cp=2), parallel=PARALLEL))
    assert all(value_of(node).is_contiguous() for node in placeholders(program.graphs[0]))
    md.verify(program, model, (sound,))
    with torch.no_grad():
        for outputs in simulate(program, {"sound": prepared(other)}):
            torch.testing.assert_close(outputs[0], model(other))


@pytest.mark.parametrize("table", SOUNDS)
def test_any_layout_of_a_buffer(table: str) -> None:
    model, sound = Spectrum(SOUNDS[table]()).eval(), torch.randn(4, 32)
    program = md.lower(md.capture(model, (sound,), mesh=md.Mesh(cp=2), parallel=PARALLEL))
    md.verify(program, model, (sound,))


@pytest.mark.parametrize(
    "read",
    [lambda t: t.as_strided((4, 8), (1, 4)), lambda t: t * (1 if t.is_contiguous() else 2), lambda t: t + t.stride(0)],
)
def test_what_depends_on_the_layout_itself_is_refused(read: Any) -> None:
    class Reads(Spectrum):
        def forward(self, sound: Tensor) -> Tensor:
            y: Tensor = self.down(self.up(sound[..., :5])).sum() + read(sound)
            return y

    model, sound = Reads().eval(), torch.randn(8, 4).t()
    plan = {"up": {"input": md.Split(0)}, "down": md.Gather(0)}
    parallel = md.ContextParallel("cp", plan=plan)
    program = md.capture(model, (sound,), mesh=md.Mesh(cp=2), parallel=parallel)
    with pytest.raises(VerificationError, match="something else than what is captured of it") as raised:
        md.verify(program, model, (sound,))
    assert "lies in memory" in raised.value.fix
    md.verify(
        md.capture(model, (sound.contiguous(),), mesh=md.Mesh(cp=2), parallel=parallel), model, (sound.contiguous(),)
    )


class Viewed(nn.Module):
    """Views that exist for the user's layout and not for contiguous tensors, and the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.randn(4, 8).t())

    def forward(self, image: Tensor) -> Tensor:
        rows = self.conv(image).permute(0, 2, 3, 1)
        rows = rows.view(size=(-1, 8)) if rows.is_contiguous() else rows.reshape(-1, 8)
        pixels = image.permute(0, 2, 3, 1)
        first = pixels.view(-1, 3)[:, :1].view_as(pixels[..., :1].reshape(-1, 1))
        y: Tensor = self.out(rows * self.scale.t().view(-1)[:8]) + first.view(torch.int32).view(torch.float32)
        return y


def test_views_of_what_lies_otherwise() -> None:
    model = Viewed().eval().to(memory_format=torch.channels_last)
    image = torch.randn(1, 3, 4, 4).to(memory_format=torch.channels_last)
    program = md.capture(model, (image,), mesh=md.Mesh(cp=1))
    md.verify(program, model, (image,))
