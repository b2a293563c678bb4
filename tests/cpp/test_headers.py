"""Programs made with other headers of TensorRT than the installed one's: refused before they call anything of it.

The file that asks is ``trt/library.cpp``, as it is in ``mdtrt_run``.  Of the vendor's headers it reads the version's
alone, which is numbers; so each program here is really compiled for the TensorRT that it says.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from torchtrt_md.build.flavour import flavour

CPP = Path(__file__).parents[2] / "examples/cpp"
MAIN = """
#include <cstdio>
#include "core/error.h"
#include "trt/library.h"

int main(int, char** argv) {
    try {
        mdtrt::open_tensorrt(argv[1]);
    } catch (const mdtrt::Error& error) {
        std::fprintf(stderr, "%s: %s\\n", error.kind.c_str(), error.what());
        return mdtrt::kFailed;
    }
    std::puts("taken");
}
"""
PARTS = ("MAJOR", "MINOR", "PATCH", "BUILD")


def run(folder: Path, marker: str, version: str, library: str) -> subprocess.CompletedProcess[str]:
    """Compile a program for this TensorRT, and let it open that library."""
    numbers = zip(PARTS, version.split("."), strict=True)
    lines = [f"#define NV_TENSORRT_{part} {number}" for part, number in numbers]
    (folder / "NvInferVersion.h").write_text("\n".join([f"#define {marker} 1", *lines, ""]))
    (folder / "main.cpp").write_text(MAIN)
    sources = [CPP / "trt/library.cpp", CPP / "core/guard.cpp", CPP / "core/text.cpp", folder / "main.cpp"]
    compiler = shutil.which("c++")
    if compiler is None and not os.environ.get("TORCHTRT_MD_REQUIRE_CPP"):
        pytest.skip("there is no C++ compiler")
    assert compiler is not None, "there is no C++ compiler"
    command = [compiler, "-std=c++17", "-I", folder, "-I", CPP, *sources, "-ldl", "-o", folder / "program"]
    built = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr[-3000:]
    return subprocess.run([str(folder / "program"), library], capture_output=True, text=True, timeout=100)


def test_a_program_of_the_installed_headers_takes_the_library(tmp_path: Path, tensorrt: str) -> None:
    found = run(tmp_path, "TRT_MAJOR_RTX", flavour().version, tensorrt)
    assert (found.returncode, found.stdout) == (0, "taken\n"), found.stderr


@pytest.mark.parametrize(
    ("marker", "version", "name"),
    [("TRT_MAJOR_RTX", "1.5.0.114", "TensorRT-RTX"), ("TRT_MAJOR_ENTERPRISE", "11.1.0.106", "TensorRT")],
)
def test_a_program_of_other_headers_refuses_it(
    tmp_path: Path,
    tensorrt: str,
    marker: str,
    version: str,
    name: str,
) -> None:
    found = run(tmp_path, marker, version, tensorrt)
    assert found.returncode == 1
    assert f"{tensorrt} is of version {flavour().version}" in found.stderr
    assert f"this program was compiled for {name} {version}" in found.stderr


def test_a_program_of_both_flavours_does_not_compile(tmp_path: Path, tensorrt: str) -> None:
    with pytest.raises(AssertionError, match="says neither TensorRT-RTX nor TensorRT"):
        run(tmp_path, "TRT_MAJOR_RTX 1\n#define TRT_MAJOR_ENTERPRISE", "1.6.1.120", tensorrt)
