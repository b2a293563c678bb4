from __future__ import annotations

import pytest
import torch

from torchtrt_md.build.flavour import CURRENT, PORTABLE, boundary_dtypes, flavour, trt_dtype
from torchtrt_md.errors import TargetError


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
    assert all(hasattr(f.trt.DataType, trt_dtype(f, dtype)) for dtype in supported)
