"""What can be known of an engine without running it."""

import ctypes
import struct
from pathlib import Path

import pytest

from torchtrt_md.build.flavour import flavour
from torchtrt_md.bundle.manifest import Binding, Segment
from torchtrt_md.errors import BundleError, LaunchError
from torchtrt_md.runtime import communicator
from torchtrt_md.runtime.engine import DTYPES, Io, check_io, deserialize
from torchtrt_md.runtime.runner import last_uses
from torchtrt_md.runtime.signature import dtype_of

SEGMENT = Segment(
    engine="e",
    axis=None,
    inputs=[Binding("x", "input:x", "float16", [2, 8])],
    outputs=[Binding("y", "output:y", "float16", [2, 8])],
    collectives=[],
)
X, Y = Io("x", True, "float16", (2, 8)), Io("y", False, "float16", (2, 8))


def test_an_engine_of_this_segment() -> None:
    check_io([Y, X], SEGMENT, "segment 0")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([X], "segment 0 has no 'y' and the manifest has output 'y' float16 [2, 8]"),
        ([X, Y, Io("z", True, "int32", (1,))], "segment 0 has input 'z' int32 [1] and the manifest has no 'z'"),
        ([X, Y._replace(shape=(2, 4))], "output 'y' float16 [2, 4] and the manifest has output 'y' float16 [2, 8]"),
        ([X._replace(dtype="float32"), Y], "input 'x' float32 [2, 8] and the manifest has input 'x' float16 [2, 8]"),
        ([X, Y._replace(is_input=True)], "input 'y' float16 [2, 8] and the manifest has output 'y'"),
    ],
)
def test_an_engine_of_another_segment(found: list[Io], message: str) -> None:
    with pytest.raises(BundleError) as raised:
        check_io(found, SEGMENT, "segment 0")
    assert message in str(raised.value)


def test_the_names_of_dtypes_are_tensorrt_s_and_pytorch_s() -> None:
    assert set(DTYPES) <= set(flavour().trt.DataType.__members__)
    for name in DTYPES.values():
        dtype_of(name)


def test_what_is_no_engine_is_refused_by_name(tmp_path: Path) -> None:
    trt = flavour().trt
    path = tmp_path / "x.engine"
    path.write_bytes(struct.pack("100i", *range(100)))
    with pytest.raises(LaunchError, match=r"does not load .*x\.engine, an engine built for sm80"):
        deserialize(trt.Runtime(trt.Logger(trt.Logger.INTERNAL_ERROR)), path, "sm80")


def test_the_capsule_is_what_tensorrt_asks_for() -> None:
    capsule = communicator._new_capsule(0x1234, communicator._NAME, None)
    pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
        ("PyCapsule_GetPointer", ctypes.pythonapi)
    )
    assert "ncclComm_t" in repr(capsule)
    assert pointer(capsule, b"ncclComm_t") == 0x1234


def test_a_value_is_dropped_after_the_last_engine_that_reads_it() -> None:
    def segment(reads: list[str], writes: list[str]) -> Segment:
        inputs, outputs = ([Binding(s, s, "int32", [1]) for s in sources] for sources in (reads, writes))
        return Segment("e", None, inputs, outputs, [])

    segments = [
        segment(["input:x"], ["value:a", "value:unused"]),
        segment(["value:a", "input:x"], ["value:b", "output:y"]),
        segment(["value:a", "value:b"], ["output:z"]),
    ]
    assert last_uses(segments) == [["value:unused"], [], ["value:a", "value:b"]]
