"""The kernels of collectives without NCCL: run by Triton's interpreter on the CPU, and compiled for GPUs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from torchtrt_md.runtime import store as store_kernels

CHECK = """
import itertools
import torch
from torchtrt_md.runtime.store import add_up, store

def drawn(*shape, dtype):
    return torch.randint(0, 256, shape).to(dtype)

dtypes, sizes = [torch.uint8, torch.bfloat16, torch.float32], [1, 7, 8, 4099, 70000]
for dtype, size, shift in itertools.product(dtypes, sizes, [0, 1]):
    sources = [drawn(size + shift, dtype=dtype)[shift:] for _ in range(3)]
    around = [torch.full((size + 64,), 3, dtype=dtype) for _ in sources]
    store([(a[32 : 32 + size], s) for a, s in zip(around, sources)])
    for a, s in zip(around, sources):
        assert torch.equal(a[32 : 32 + size], s), (dtype, size, shift)
        assert (a[:32] == 3).all() and (a[32 + size :] == 3).all(), "it wrote beside its result"

for dtype, ranks in itertools.product([torch.float32, torch.bfloat16, torch.float16], [2, 4]):
    parts = torch.randn(ranks, 5, 1033).to(dtype)
    out = torch.full((5 * 1033 + 8,), 3, dtype=dtype)
    add_up(parts, out[: 5 * 1033], 0.5)
    right = parts.float()[0]
    for part in parts.float()[1:]:
        right = right + part
    ulp = 2**-7 if dtype == torch.bfloat16 else 0.0  # the interpreter cuts bits off where a GPU rounds
    torch.testing.assert_close(out[:-8].view(5, 1033), (right * 0.5).to(dtype), rtol=ulp, atol=0.0)
    assert (out[-8:] == 3).all()
store([(torch.empty(0), torch.empty(0))])
add_up(torch.empty(2, 0), torch.empty(0), 1.0)
"""
PACKS = """
import itertools
import torch
import triton.language as tl
from torchtrt_md.runtime import store
from torchtrt_md.lowering.float8_rows import packed, packed_bytes, unpacked
from torchtrt_md.runtime.store import pack, unpack

own_index = store._index

def drawn(rows, width, dtype):
    # Numbers that float8 has, of which the largest of a row is 2^6 to 2^13 times the others at most: the interpreter
    # does not round to float8 as GPUs do; tests/gpu compares that.
    x = torch.randint(8, 16, (rows, width)) * 2.0 ** torch.randint(-6, 1, (rows, width))
    return (x * torch.randint(0, 2, x.shape).mul(2).sub(1) * 2.0 ** torch.randint(-9, 9, (rows, 1))).to(dtype)

for dtype, width, rows, parts, index in itertools.product(
    [torch.bfloat16, torch.float16, torch.float32], [64, 72, 1], [1, 7, 700], [1, 3], [None, tl.int64]
):
    store._PROGRAMS = 1  # so that one packs several runs of rows
    store._index = own_index if index is None else lambda x: tl.int64
    sources = [drawn(rows, width, dtype) for _ in range(parts)]
    for x in sources:
        x[rows // 2, width // 3] = float("nan") if rows > 1 else 0.0
        x[rows // 3, -1] = float("inf") if rows > 2 else 0.0
    around = [torch.full((packed_bytes(x.shape, 1) + 64,), 3, dtype=torch.uint8) for x in sources]
    pack([(a[32:-32].view(1, -1), x) for a, x in zip(around, sources)])
    finite = torch.cat(sources).isfinite().all(-1)
    for a, x in zip(around, sources):
        assert (a[:32] == 3).all() and (a[-32:] == 3).all(), "it wrote beside its result"
        own, right = (n[: rows * width].view(rows, width)[x.isfinite().all(-1)] for n in (a[32:], packed(x, 1)[0]))
        assert torch.equal(own, right), (dtype, width, rows)
        exponents = slice(rows * width, rows * (width + 1))
        assert torch.equal(a[32:][exponents], packed(x, 1)[0][exponents]), (dtype, width, rows)
    arrived = torch.stack([a[32:-32] for a in around])
    out = torch.full((parts * rows * width + 8,), 3, dtype=dtype)
    unpack(arrived, out[:-8].view(parts * rows, width))
    assert (out[-8:] == 3).all()
    out = out[:-8].view(parts * rows, width)
    assert torch.equal(out[finite], torch.cat(sources)[finite]) and out[~finite].isnan().all()
    assert torch.equal(unpacked(arrived, out.shape, dtype).nan_to_num(7), out.nan_to_num(7))
pack([(torch.empty(1, 0, dtype=torch.uint8), torch.empty(0, 4))])
unpack(torch.empty(1, 0, dtype=torch.uint8), torch.empty(0, 4))
"""


@pytest.mark.parametrize("check", [CHECK, PACKS], ids=["words and sums", "rows in float8"])
def test_every_word_arrives_and_none_beside_it(tmp_path: Path, check: str) -> None:
    """In a process of its own: whether Triton interprets is decided when a kernel is defined."""
    file = tmp_path / "check.py"
    file.write_text(check)
    root = Path(__file__).resolve().parents[2]
    env = {"TRITON_INTERPRET": "1", "PYTHONPATH": str(root), "PATH": ""}
    done = subprocess.run(
        [sys.executable, str(file)], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", ["store", "add_up"])
def test_the_kernels_compile_for_gpus(name: str, capability: int) -> None:
    """The interpreter takes Python that the compiler refuses; it needs no GPU.  Words go four at a time."""
    constants = {"PARTS": 4, "WORDS": 2048}
    tensors = {"to": ("*i64",) * 4, "source": ("*i64",) * 4} if name == "store" else {"out": "*bf16", "parts": "*bf16"}
    kernel = store_kernels._store if name == "store" else store_kernels._add
    signature = {**tensors, "count": "i32", **({} if name == "store" else {"scale": "fp32"})}
    aligned = [(i, j) for i in range(2) for j in range(4)] if name == "store" else [(0,), (1,)]
    source = ASTSource(
        kernel,
        signature={**signature, **dict.fromkeys(constants, "constexpr")},
        constexprs={(kernel.arg_names.index(k),): v for k, v in constants.items()},
        attrs={key: [["tt.divisibility", 16]] for key in [*aligned, (2,)]},
    )
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert made.asm["cubin"]
    assert "st.global.v" in made.asm["ptx"]


@pytest.mark.parametrize("width", [128, 72])
@pytest.mark.parametrize("name", ["pack", "unpack"])
def test_rows_in_float8_compile_for_gpus_that_have_it(name: str, width: int) -> None:
    aligned: list[tuple[int, ...]]
    if name == "pack":
        kernel, constants = (
            store_kernels._pack,
            {"PARTS": 2, "WIDTH": width, "COLUMNS": 128, "ROWS": 64, "LEAST": 34, "INDEX": tl.int32},
        )
        signature = {"to": ("*u8",) * 2, "source": ("*bf16",) * 2, "rows": "i32"}
        aligned = [(i, j) for i in range(2) for j in range(2)]
    else:
        kernel, constants = (
            store_kernels._unpack,
            {"WIDTH": width, "COLUMNS": 128, "ROWS": 64, "NOT_FINITE": 255, "INDEX": tl.int32},
        )
        signature = {"out": "*bf16", "numbers": "*u8", "rows": "i32", "stride": "i32", "most": "fp32"}
        aligned = [(0,), (1,), (3,)]
    source = ASTSource(
        kernel,
        signature={**signature, **dict.fromkeys(constants, "constexpr")},
        constexprs={(kernel.arg_names.index(k),): v for k, v in constants.items()},
        attrs={key: [["tt.divisibility", 16]] for key in aligned},
    )
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 16})
    assert made.asm["cubin"]
    assert ("cvt.rn.satfinite.e4m3x2.f32" if name == "pack" else "cvt.rn.f16x2.e4m3x2") in made.asm["ptx"]
