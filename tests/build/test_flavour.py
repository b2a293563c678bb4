from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from torchtrt_md.build.flavour import CURRENT, PORTABLE, Flavour, boundary_dtypes, flavour, trt_dtype
from torchtrt_md.errors import BuildError, TargetError

flavour_module = importlib.import_module("torchtrt_md.build.flavour")


def test_targets_end_in_the_two_that_every_flavour_has() -> None:
    f = flavour()
    assert f.targets[-2:] == (PORTABLE, CURRENT)
    if f.name == "TensorRT-RTX":
        assert {"sm80", "sm86", "sm89", "sm120"} <= set(f.targets)
        f.check_target("sm80")
    else:
        assert len(f.targets) == 2


@pytest.mark.parametrize("target", ["sm70", "SM80", ""])
def test_check_target_lists_what_there_is(target: str) -> None:
    f = flavour()
    with pytest.raises(TargetError, match=f"cannot build for target {target!r}") as error:
        f.check_target(target)
    assert all(t in error.value.fix for t in f.targets)


def test_boundary_dtypes_are_those_of_tensorrt() -> None:
    f = flavour()
    supported = boundary_dtypes(f)
    assert {torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool} <= set(supported)
    assert torch.float64 not in supported
    assert torch.int16 not in supported
    assert all(hasattr(f.trt.DataType, trt_dtype(dtype)) for dtype in supported)


@pytest.mark.parametrize(
    ("target", "refusal"),
    [
        ("sm120", None),
        ("sm121", None),
        ("sm100", None),
        ("sm90", "compute capability 9.0, and it takes 10.0"),
        ("sm80", "compute capability 8.0"),
        ("sm75", "compute capability 7.5"),
        (PORTABLE, "does not say"),
        ("sm", "does not say"),
    ],
)
def test_ring_attention_is_for_compute_capability_10_and_later(target: str, refusal: str | None) -> None:
    f = flavour()
    found = f.ring_refusal(target)
    assert f.rings(target) == (refusal is None)
    if refusal is None:
        assert found is None
        f.check_ring(target)
    else:
        assert found is not None
        assert refusal in found
        with pytest.raises(TargetError, match="ring attention inside an engine") as error:
            f.check_ring(target)
        assert 'placement="split"' in error.value.fix


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU to build for")
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("raise OSError('libnvinfer.so.11: cannot open')", "does not load: OSError: libnvinfer.so.11: cannot open"),
        ("raise ImportError('GLIBC_2.99 not found')", "does not load: ImportError: GLIBC_2.99 not found"),
        ("import no_such_bindings", "does not load: ModuleNotFoundError: No module named 'no_such_bindings'"),
    ],
)
def test_a_tensorrt_that_does_not_load_is_not_reported_as_missing(
    text: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_tensorrt.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(flavour_module, "_MODULES", {"TensorRT-RTX": "no_such_tensorrt", "TensorRT": "broken_tensorrt"})
    with pytest.raises(BuildError, match=f"TensorRT is installed and {problem}"):
        flavour_module.flavour.__wrapped__()
    monkeypatch.setattr(flavour_module, "_MODULES", {"TensorRT-RTX": "no_such_tensorrt"})
    with pytest.raises(BuildError, match="no TensorRT is installed"):
        flavour_module.flavour.__wrapped__()


def test_the_current_gpu_must_be_there_to_be_known() -> None:
    assert not flavour().rings(CURRENT)


def test_a_tensorrt_without_it_has_no_ring_attention() -> None:
    """Versions before 10.16 have an IAttention without ranks; the module here stands for one."""
    older = Flavour("TensorRT", "10.14", ModuleType("tensorrt"))
    assert older.ring_refusal("sm120") == "TensorRT 10.14 has no attention over several ranks"
