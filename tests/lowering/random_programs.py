"""Random small models over split sequences, as Python text: what a user could have written, right or wrong to split.

Every number may be a literal or be made from a shape, lengths are small so that many coincide, and every line was run
on the whole tensors when it was chosen.  So the model itself is right, and only what is made of it can be wrong.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchtrt_md as md
from torchtrt_md.parallel import Placement

MAX_ELEMENTS, MAX_DIMS = 4096, 5
GLOBALS = {"torch": torch, "F": F, "math": math}
TABLE = 12


class Body(nn.Module):
    """What the lines of a program may use beside its inputs."""

    def __init__(self) -> None:
        super().__init__()
        values = torch.randn(TABLE, TABLE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        self.w = nn.Parameter(values, requires_grad=False)
        for dim in range(3):  # where a plan can split and gather
            setattr(self, f"split{dim}", nn.Identity())
            setattr(self, f"gather{dim}", nn.Identity())


@dataclass(frozen=True)
class Program:
    """A model, its inputs, and how it is to be split.

    Attributes:
        lines: the statements of its forward.
        returned: the names of what it returns.
        inputs: name -> whole tensor.
        plan: of a ContextParallel.
        size: the number of ranks.
        strategy: of a ContextParallel.
        placement: where attention runs.
        split_batch: whether the batch of x is split too, over a second axis.
        several: whether the 4 ranks of a sequence are 2 along each of two axes.
    """

    lines: tuple[str, ...]
    returned: tuple[str, ...]
    inputs: dict[str, Tensor]
    plan: dict[str, object]
    size: int
    strategy: str
    placement: Placement
    split_batch: bool
    several: bool

    @property
    def text(self) -> str:
        body = "".join(f"    {line}\n" for line in self.lines)
        return f"def forward(self, {', '.join(self.inputs)}):\n{body}    return {', '.join(self.returned)},\n"

    def __str__(self) -> str:
        shapes = {name: list(x.shape) for name, x in self.inputs.items()}
        return f"{self.text}# {shapes}, {self.mesh()}, {self.strategy}, {self.placement}\n# plan: {self.plan['']}\n"

    def model(self) -> nn.Module:
        namespace = dict(GLOBALS)
        exec(compile(self.text, "<random program>", "exec"), namespace)
        model: nn.Module = type("Random", (Body,), {"forward": namespace["forward"]})()
        return model

    def parallel(self) -> list[md.ContextParallel]:
        axis = ("out", "in") if self.several else "cp"
        split = [md.ContextParallel(axis, self.strategy, self.plan)]  # type: ignore[arg-type]
        return [*split, md.ContextParallel("dp", plan={"": {"x": md.Split(0)}})] if self.split_batch else split

    def mesh(self) -> md.Mesh:
        over = {"out": 2, "in": 2} if self.several else {"cp": self.size}
        return md.Mesh({**over, "dp": 2} if self.split_batch else over)


def program(random: Random) -> Program:
    """A program whose lines all run on whole tensors."""
    size = random.choice([2, 2, 2, 3, 4])
    split_batch = random.random() < 0.1
    batch = random.choice([2, 4]) if split_batch else random.choice([1, 1, 2])
    width = random.choice([2, 4, 4, 6, 8])
    length, other = (size * random.choice([1, 2, 2, 3, 4]) for _ in "xy")
    if random.random() < 0.4:  # lengths that the ranks need not divide
        length, other = (random.randint(2, 4 * size) for _ in "xy")
    inputs = {"x": _values((batch, length, width)), "y": _values((batch, random.choice([length, other]), width))}
    plan: dict[str, object] = {"": {"x": md.Split(1)}}
    if random.random() < 0.6:
        plan[""] = {"x": md.Split(1), "y": md.Split(1)}
    if random.random() < 0.1:
        plan[""] = {"x": md.Split(2)} if width % size == 0 and width > size else {"x": md.Split(1)}
    plan |= {f"split{d}": {0: md.Split(d, output=True)} for d in range(3)}
    plan |= {f"gather{d}": md.Gather(d) for d in range(3)}
    lines = _Lines(random, inputs)
    for _ in range(random.choice([1, 2, 3, 4, 6, 8])):
        lines.add()
    if random.random() < 0.5:  # what is left split must be the ranks' parts in a row, of equal lengths
        lines.add(_of("self.gather1(A)"))
    returned = lines.last[-random.choice([1, 1, 2]) :]
    strategy = random.choice(["ulysses", "allgather_kv", "auto", "ring"])
    placement: Placement = "split" if strategy == "ring" else random.choice(["engine", "split"])
    several = size == 4 and random.random() < 0.5
    text = _needed(lines.text, returned)
    return Program(text, tuple(returned), inputs, plan, size, strategy, placement, split_batch, several)


def _needed(lines: list[str], returned: list[str]) -> tuple[str, ...]:
    """The lines that take part in what is returned."""
    names, kept = set(returned), list[str]()
    for number, line in reversed([*enumerate(lines)]):
        if f"v{number}" in names:
            names |= set(re.findall(r"\bv\d+\b", line))
            kept.insert(0, line)
    return tuple(kept)


def _values(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)), dtype=torch.float64)


class _Lines:
    """Lines so far, and what their names hold on the whole."""

    def __init__(self, random: Random, inputs: dict[str, Tensor]) -> None:
        self.random, self.text = random, list[str]()
        self.held = dict(inputs)
        self.names: dict[str, object] = {**GLOBALS, "self": Body(), **self.held}
        self.last = [*reversed(inputs)]

    def add(self, wanted: Line | None = None) -> None:
        """One more line, of any kind or a wanted one; several that do not run may be tried before."""
        new = f"v{len(self.text)}"
        for _ in range(20):
            line = (wanted or self.random.choice(LINES))(self).replace("NEW", new)
            names = dict(self.names)
            try:
                exec(line, names)
            except Exception:  # whatever PyTorch or Python says of it, this line is no program
                continue
            value = names[new]
            if isinstance(value, Tensor) and 0 < value.numel() <= MAX_ELEMENTS and 0 < value.dim() <= MAX_DIMS:
                if value.dtype != torch.float64:
                    line, value = f"{line}; {new} = {new}.double()", value.double()
                if not value.isfinite().all() or value.abs().max() > 1e6:
                    continue
                self.text.append(line)
                self.held[new] = self.names[new] = value
                self.last.append(new)
                return

    def value(self) -> str:
        """A name, mostly the last or one of those before it."""
        return self.random.choice(self.last[-self.random.choice([1, 1, 1, 3, 3, 9]) :])

    def sequence(self) -> str:
        """A value that is [batch, length, width]; in doubt x."""
        name = self.value()
        return name if self.held[name].dim() == 3 else "x"

    def dim(self, name: str) -> int:
        ndim = self.held[name].dim()
        return self.random.randrange(ndim) - (ndim if self.random.random() < 0.3 else 0)

    def length(self, n: int, of: str) -> str:
        """``n`` as a number, or from a shape of ``of`` or another value where that gives it."""
        said = [str(n)]
        for name in (of, self.random.choice(self.last)):
            for dim, extent in enumerate(self.held[name].shape):
                if extent == n:
                    said += [f"{name}.shape[{dim}]", f"{name}.size({dim - self.held[name].dim()})"]
                elif n and extent % n == 0:
                    said.append(f"{name}.shape[{dim}] // {extent // n}")
                elif extent and n % extent == 0:
                    said.append(f"{name}.shape[{dim}] * {n // extent}")
                elif n > extent:
                    said.append(f"{name}.shape[{dim}] + {n - extent}")
        return self.random.choice(said)

    def part(self, name: str, dim: int) -> str:
        """A number up to the extent of a dim."""
        extent = self.held[name].shape[dim]
        return self.length(self.random.choice([1, 2, 3, extent // 2, extent - 1, extent, extent, extent + 1]), name)

    def shape(self, name: str) -> str:
        """Another shape for as many elements, one of the sizes perhaps left open."""
        old = list(self.held[name].shape)
        for _ in range(self.random.choice([1, 1, 2])):
            at = self.random.randrange(len(old))
            divisors = [n for n in range(1, old[at] + 1) if old[at] % n == 0]
            if self.random.random() < 0.5 and len(old) > 1:
                at = min(at, len(old) - 2)
                old[at : at + 2] = [old[at] * old[at + 1]]
            else:
                n = self.random.choice(divisors)
                old[at : at + 1] = [n, old[at] // n]
        sizes = [self.length(n, name) for n in old]
        if self.random.random() < 0.6:
            sizes[self.random.randrange(len(sizes))] = "-1"
        return ", ".join(sizes)

    def heads(self, name: str, count: int) -> str:
        return f"{name}.unflatten(-1, ({count}, -1)).transpose(1, 2)"


Line = Callable[[_Lines], str]


def _of(*templates: str) -> Line:
    """A line from one of the templates: ``A`` and ``B`` are values, ``D`` a dim of A, ``L`` its extent, ``N`` a number
    up to it, ``M`` a small number, ``S`` a shape for A, ``W`` A's last extent."""

    def line(lines: _Lines) -> str:
        a, b = lines.value(), lines.value()
        dim = lines.dim(a)
        filled: dict[str, Callable[[], str]] = {
            "A": lambda: a,
            "B": lambda: b,
            "D": lambda: str(dim),
            "N": lambda: lines.part(a, dim),
            "L": lambda: lines.length(lines.held[a].shape[dim], a),
            "M": lambda: str(lines.random.choice([1, 2, 3, 4])),
            "S": lambda: lines.shape(a),
            "W": lambda: lines.length(lines.held[a].shape[-1], a),
        }
        text = lines.random.choice(templates)
        return "NEW = " + re.sub(r"\b[ABDNLMSW]\b", lambda letter: filled[letter[0]](), text)

    return line


def _attention(lines: _Lines) -> str:
    q, k = lines.sequence(), lines.sequence()
    k = q if lines.random.random() < 0.6 else k
    heads = lines.random.choice([1, 2, 2, 3, 4])
    kv = lines.random.choice([heads, heads, 2 if heads == 4 else 1, 1])
    rows, keys = f"{q}.shape[1]", f"{k}.shape[1]"
    made = lines.value()  # of an input, in whatever shape fits
    masks = ["None"] * 6 + [
        f"{q}[:, None, :, :1] > 0",
        f"{k}[:, None, :, 0].unsqueeze(2)",
        f"(({k}[:, None, None, :, 0] > 0) | (torch.arange({keys}) < 1))",
        f"({q}.sum(-1)[:, None, :, None] > torch.arange({keys})) | (torch.arange({keys}) < 1)",
        f"{q}[:, None] @ {k}[:, None].mT",
        f"({made}.flatten()[:{keys}] > 0) | (torch.arange({keys}) < 2)",
        f"{made}.flatten()[:{rows}, None] * torch.arange({heads})[:, None, None]",
        f"torch.ones({rows}, {keys}, dtype=torch.bool).tril()",
        f"torch.arange({rows})[:, None] >= torch.arange({keys})",
        f"(torch.arange({rows})[:, None] - torch.arange({keys})).abs() < {lines.part(q, 1)}",
        f"torch.ones({rows}, {keys}, dtype=torch.bool)",
        f"self.w[:{rows}, :{keys}]",
        f"torch.arange({keys}) * 0.1",
        f"torch.full(({rows}, {keys}), -math.inf, dtype=torch.float64).triu(1)",
    ]
    causal = lines.random.random() < 0.3
    mask = "None" if causal else lines.random.choice(masks)
    operands = f"{lines.heads(q, heads)}, {lines.heads(k, kv)}, {lines.heads(k, kv)}"
    if kv == 1 and lines.random.random() < 0.5:
        operands = operands.replace(
            f"({kv}, -1)).transpose(1, 2)", f"({kv}, -1)).transpose(1, 2).expand(-1, {heads}, -1, -1)"
        )
    grouped = ", enable_gqa=True" if 1 < kv < heads else ""
    attended = f"F.scaled_dot_product_attention({operands}, {mask}, is_causal={causal}{grouped})"
    return f"NEW = {attended}.transpose(1, 2).flatten(2)"


def _index(lines: _Lines) -> str:
    a = lines.value()
    dim = lines.dim(a) % lines.held[a].dim()
    n = lines.part(a, dim)
    picks = [":"] * dim + [
        lines.random.choice([f":{n}", f"{n}:", f"-{n}:", f":-{n}", "::2", "0", "-1", "None", f"torch.arange({n})"])
    ]
    return f"NEW = {a}[{', '.join(picks)}]"


def _write(lines: _Lines) -> str:
    a, b = lines.value(), lines.value()
    dim = lines.dim(a) % lines.held[a].dim()
    n = lines.part(a, dim)
    where = ", ".join([":"] * dim + [lines.random.choice([f":{n}", f"{n}:", "0", f"-{n}:"])])
    return f"NEW = {a}.clone(); NEW[{where}] = {lines.random.choice(['0.5', b])}"


_POSITIONWISE: list[Line] = [
    _of("A.tanh()", "F.gelu(A)", "A.sigmoid() * A", "-A", "A.abs().sqrt()", "torch.where(A > 0, A, 0.1)", "A.float()"),
    _of("A + B", "A * B", "A - B", "torch.maximum(A, B)", "torch.where(A > B, A, B)", "A.lerp(B, 0.3)", "(A > B)"),
    _of("F.layer_norm(A, A.shape[-1:])", "F.rms_norm(A, (W,))", "F.layer_norm(A, (W,), self.w[0, :W], self.w[1, :W])"),
    _of("A.softmax(-1)", "F.normalize(A, dim=-1)", "A.mean(-1, keepdim=True)", "A.sum(-1)", "A.cumsum(-1)"),
    _of("A @ self.w[:W]", "F.linear(A, self.w[:, :W])", "A @ self.w[:W, :W] + A", "A @ self.w[:W, :4]"),
    _of("A.transpose(0, 1)", "A.mT", "A.movedim(D, -1)", "A.unsqueeze(D)", "A.squeeze()", "A.squeeze(D)"),
    _of("torch.cat([A, B], -1)", "torch.stack([A, B], -1)", "torch.cat([A, B], D)", "torch.stack([A, A])"),
    _of("A / L", "A * N", "A + A.shape[1]", "A / A.numel()", "A * len(B)", "A if A.shape[D] > N else -A"),
    _of("A + torch.arange(L)", "A * torch.arange(L)[:, None]", "A + self.w[:L, 0, None]", "A + self.w[:L, :W]"),
    _of("A * torch.arange(A.shape[1])[:, None].cos()", "A + torch.linspace(0, 1, A.shape[1])[:, None]"),
    _of("torch.cat([-A[..., W // 2 :], A[..., : W // 2]], -1) * torch.arange(A.shape[1])[:, None].sin() + A"),
]
_MOVES: list[Line] = [
    _of("A.view(S)", "A.reshape(S)", "A.contiguous().view(S)", "A.reshape(S)"),
    _of("A.flatten(0, 1)", "A.flatten(1)", "A.flatten()", "A.unflatten(D, (M, -1))", "A.unflatten(D, (-1, M))"),
    _of("A.unflatten(1, (M, -1)).transpose(1, 2).flatten(1, 2)", "A.unflatten(1, (-1, M)).sum(2)"),
    _of("A.unflatten(1, (-1, M)).flatten(2)", "A.unflatten(1, (M, -1)).cumsum(2).flatten(1, 2)"),
    _of("A.view(A.shape[0], -1, M).tanh().view(A.shape)", "A.view(A.shape[0], M, -1).softmax(-1).view(A.shape)"),
    _of("A.view(-1, W).view(A.shape)", "A.view(-1, A.shape[1], M)", "A.reshape(A.shape[1], -1)"),
    _of("A.chunk(M, D)[0]", "A.split(N, D)[0]", "A.split(N, D)[-1]", "A.unbind(D)[0]", "A.narrow(D, 0, N)"),
    _of(
        "A.chunk(2, -1)[1]", "A.split([N, L - N], D)[0]", "A.tensor_split(2, D)[1]", "torch.cat(A.chunk(2, D)[::-1], D)"
    ),
    _of("torch.cat([A, B], 1)", "torch.cat([A, B], 1)[:, : A.shape[1]]", "torch.cat([A, B], 1)[:, A.shape[1] :]"),
    _of("torch.cat([A, B], 1).split([A.shape[1], B.shape[1]], 1)[1]", "torch.stack([A, A], D)"),
    _of("A.expand(M, *A.shape)", "A.unsqueeze(D).expand(S)", "A.mean(D, keepdim=True).expand(A.shape)"),
    _of("A.repeat_interleave(M, D)", "A.tile(M)", "A.repeat(M, *[1] * (A.dim() - 1))", "A.expand(S)"),
    _of("F.pad(A, (1, M))", "F.pad(A, (0, 0, M, 0))", "A.roll(M, D)", "A.flip(D)", "A.rot90()"),
    _index,
    _index,
    _write,
]
_BESIDE: list[Line] = [  # tokens that every rank has, beside those that are split, and apart again
    _of("torch.cat([A, x.new_ones(A.shape[0], M, A.shape[2])], 1)", "torch.cat([A[:, :1] * 0 + 1, A], 1)"),
    _of("torch.cat([self.w[None, :M, :W].expand(A.shape[0], -1, -1), A], 1)", "torch.cat([A, B], 1)[:, -B.shape[1] :]"),
    _of("torch.cat([x.new_ones(A.shape[0], M, W).cumsum(1), A], 1)", "A[:, M:]", "A[:, :-M]", "A[:, 0]", "A[:, -1:]"),
    _of("torch.cat([self.w[None, :M, :W].expand(A.shape[0], -1, -1), A, x.new_ones(A.shape[0], 1, W)], 1)"),
]
_MIXES: list[Line] = [
    _of(
        "A.mean(D)",
        "A.sum(D, keepdim=True)",
        "A.amax(D)",
        "A.var(D)",
        "A.logsumexp(D)",
        "A.norm(dim=D)",
        "A.sum()[None]",
    ),
    _of("A.softmax(D)", "A.cumsum(D)", "A.sort(D)[0]", "A.tril()", "A.log_softmax(D)", "A.topk(1, D)[0]"),
    _of(
        "A @ B.mT",
        "A.mT @ B",
        "A @ B",
        "torch.einsum('bsc,btc->bst', A, B)",
        "torch.einsum('bsc,cd->bsd', A, self.w[:W])",
    ),
    _of(
        "F.layer_norm(A, A.shape[1:])",
        "F.group_norm(A, 1)",
        "F.group_norm(A.mT, 1).mT",
        "F.conv1d(A.mT, self.w[:2, :W, None]).mT",
    ),
]
_MADE: list[Line] = [
    _of(
        "A + A.new_ones(A.shape)",
        "A * torch.ones(A.shape[1], 1).cumsum(0)",
        "A + torch.zeros(L)",
        "A * torch.ones_like(A)",
    ),
    _of("A + A.new_ones(A.shape).sum(D, keepdim=True)", "A + torch.ones_like(A).sum(D, keepdim=True)"),
    _of(
        "A * torch.full((L, 1), 2.0)",
        "A + torch.full_like(A, N)",
        "A + torch.tensor([L, 1.0])[0]",
        "A * A.new_zeros(L).numel()",
    ),
    _of(
        "torch.arange(L) + 0.5",
        "A.new_ones(A.shape)",
        "torch.zeros(A.shape)",
        "torch.ones_like(A).cumsum(D)",
        "torch.eye(L)",
    ),
    _of("torch.eye(A.shape[1]) @ A", "A.new_tensor([1.0, 2.0]).repeat(L)", "torch.arange(A.numel()).view(A.shape) * A"),
    _of(
        "self.w[torch.arange(L) % 12, 0]", "F.embedding((A > 0).long(), self.w[:2, :3])", "F.one_hot((A > 0).long(), 2)"
    ),
    _of(
        "A.index_select(D, torch.arange(L).flip(0))",
        "A.gather(-1, (A > 0).long())",
        "A.gather(D, torch.zeros(S).long())",
    ),
    _of("A.take_along_dim(A.argsort(-1), -1)", "A.masked_fill(torch.arange(W) > 1, 0.0)", "A.masked_fill(B > 0, 0.0)"),
]
_PLANNED: list[Line] = [_of(f"self.gather{d}(A)") for d in (0, 1, 1, 2)] + [_of(f"self.split{d}(A)") for d in (0, 1, 2)]
LINES: list[Line] = [*_POSITIONWISE * 4, *_MOVES * 2, *_MIXES, *_MADE * 2, *_BESIDE * 2, *_PLANNED, *[_attention] * 10]
