"""The C++ core and its test programs, built once."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from torchtrt_md.build.flavour import flavour

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "g++": "/usr/include/c++",
    "cmake": "/usr/bin/cmake",
    "nlohmann-json3-dev": "/usr/include/nlohmann/json.hpp",
    "libssl-dev": "/usr/include/openssl/evp.h",
    "libcli11-dev": "/usr/include/CLI/CLI.hpp",
    "doctest-dev": "/usr/include/doctest/doctest.h",
    "openmpi-bin": "/usr/bin/mpiexec.openmpi",
    "mpich": "/usr/bin/mpiexec.mpich",
}


@pytest.fixture(scope="session")
def programs() -> Path:
    """The folder of ``mdtrt_check`` and ``mdtrt_launch_test``: built with sanitizers, or TORCHTRT_MD_CPP_PROGRAMS."""
    if "TORCHTRT_MD_CPP_PROGRAMS" in os.environ:
        return Path(os.environ["TORCHTRT_MD_CPP_PROGRAMS"])
    missing = [package for package, file in PACKAGES.items() if not Path(file).exists()]
    if missing:
        problem = f"the tests of the C++ runner lack packages: apt-get install {' '.join(missing)}"
        if os.environ.get("TORCHTRT_MD_REQUIRE_CPP"):  # CI sets it
            pytest.fail(problem)
        pytest.skip(problem)
    make = shutil.which("make")
    assert make is not None
    (ROOT / "build").mkdir(exist_ok=True)
    with (ROOT / "build/cpp-tests.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # each test process has a session, and one folder is for all
        built = subprocess.run([make, "-s", "cpp-tests"], cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    return ROOT / "build/cpp-tests"


@pytest.fixture(scope="session")
def tensorrt() -> str:
    """The library that this process has loaded."""
    assert flavour().name == "TensorRT-RTX"
    return next(
        line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libtensorrt_rtx" in line
    )
