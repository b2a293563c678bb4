"""What can be known of an engine without running it."""

import ctypes
import struct
from pathlib import Path

import pytest
import torch

from torchtrt_md.build.flavour import TRT_DTYPES, flavour
from torchtrt_md.errors import BundleError, LaunchError
from torchtrt_md.launch import communicator
from torchtrt_md.runtime.engine import Io, check_io, check_scratch, deserialize
from torchtrt_md.segment import Binding, Segment, Wire

F16, F32 = torch.float16, torch.float32
SEGMENT = Segment(
    runs="engine",
    file="e",
    axis=None,
    inputs=(Binding("x", Wire("input", "x"), F16, (2, 8)),),
    outputs=(Binding("y", Wire("output", "y"), F16, (2, 8)),),
    collectives=(),
)
X, Y = Io("x", True, F16, (2, 8)), Io("y", False, F16, (2, 8))


def test_an_engine_of_this_segment() -> None:
    check_io([Y, X], SEGMENT, "segment 0")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([X], "segment 0 has no 'y' and the manifest has output 'y' float16 [2, 8]"),
        ([X, Y, Io("z", True, torch.int32, (1,))], "segment 0 has input 'z' int32 [1] and the manifest has no 'z'"),
        ([X, Y._replace(shape=(2, 4))], "output 'y' float16 [2, 4] and the manifest has output 'y' float16 [2, 8]"),
        (
            [X._replace(dtype=F32), Y],
            "input 'x' float32 [2, 8] and the manifest has input 'x' float16 [2, 8]",
        ),
        ([X, Y._replace(is_input=True)], "input 'y' float16 [2, 8] and the manifest has output 'y'"),
    ],
)
def test_an_engine_of_another_segment(found: list[Io], message: str) -> None:
    with pytest.raises(BundleError) as raised:
        check_io(found, SEGMENT, "segment 0")
    assert message in str(raised.value)


def test_the_names_of_dtypes_are_tensorrt_s_and_tell_them_apart() -> None:
    names = list(TRT_DTYPES.values())
    assert set(names) <= set(flavour().trt.DataType.__members__)
    assert len(set(names)) == len(names)


def test_what_is_no_engine_is_refused_by_name(tmp_path: Path) -> None:
    trt = flavour().trt
    path = tmp_path / "x.engine"
    path.write_bytes(struct.pack("100i", *range(100)))
    with pytest.raises(LaunchError, match=r"does not load .*x\.engine, an engine built for sm80"):
        deserialize(trt.Runtime(trt.Logger(trt.Logger.INTERNAL_ERROR)), path, "sm80")


def test_scratch_that_is_too_small_is_refused_with_both_sizes() -> None:
    check_scratch(2**20, 2**20, "segment 0")
    check_scratch(1, 0, "segment 0")
    with pytest.raises(LaunchError, match=r"segment 0 was given 1\.0 MiB for its activations, which need 1\.5 MiB"):
        check_scratch(2**20, 2**20 + 2**19, "segment 0")


def test_tensorrt_has_what_contexts_are_made_with() -> None:
    trt = flavour().trt
    used = {
        "ICudaEngine": ["create_execution_context", "create_runtime_config", "device_memory_size_v2"],
        "IRuntimeConfig": ["set_execution_context_allocation_strategy"],
        "IExecutionContext": ["set_device_memory", "set_tensor_address", "execute_async_v3", "set_communicator"],
        "ExecutionContextAllocationStrategy": ["USER_MANAGED"],
    }
    if flavour().name == "TensorRT-RTX":  # TensorRT compiles nothing at run time
        used["IRuntimeConfig"] += ["create_runtime_cache", "set_runtime_cache"]
    for kind, names in used.items():
        assert set(names) <= set(dir(getattr(trt, kind))), kind


def test_the_capsule_is_what_tensorrt_asks_for() -> None:
    capsule = communicator._new_capsule(0x1234, communicator._NAME, None)
    pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
        ("PyCapsule_GetPointer", ctypes.pythonapi)
    )
    assert "ncclComm_t" in repr(capsule)
    assert pointer(capsule, b"ncclComm_t") == 0x1234
