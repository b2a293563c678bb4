"""The package: importing it is free, and every way to install it has all of it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from fresh_python import fresh_python

ROOT = Path(__file__).resolve().parents[1]


def _python(code: str, executable: str = sys.executable, **env: str) -> str:
    done = subprocess.run(
        [executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd="/",
        env={**os.environ, **env},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_nothing_heavy() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import torchtrt_md, torch.distributed as d;"
        "new = {m.split('.')[0] for m in set(sys.modules) - before};"
        "assert not new & {'tensorrt', 'tensorrt_rtx', 'torch_tensorrt', 'typer', 'rich', 'diffusers'}, new;"
        "assert 'torch.distributed.tensor' not in sys.modules;"
        "assert not d.is_initialized() and not torch.cuda.is_initialized()"
    )
    fresh_python(code)


def test_import_takes_less_than_a_fifth_of_a_second() -> None:
    """Of the CPU's time, which is the same beside other tests."""
    code = "import time, torch; t = time.process_time(); import torchtrt_md; print(time.process_time() - t)"
    assert any(float(fresh_python(code)) < 0.2 for _ in range(3))


def test_all_public_names_are_there() -> None:
    code = (
        "import torchtrt_md as md, torchtrt_md.verification, torchtrt_md.doors.export, torchtrt_md.runtime,"
        " torchtrt_md.doors.compile, torchtrt_md.doors.triton;"
        "names = 'Mesh ContextParallel TensorParallel Split Gather split gather use_mesh capture lower verify build"
        " export load compile triton Runner InputError VerificationError MDError'.split();"
        "assert all(callable(getattr(md, n)) for n in names); assert set(names) <= set(dir(md))"
    )
    _python(code)


def test_only_public_names_are_listed() -> None:
    code = (
        "import types, torchtrt_md as md; from torchtrt_md import errors;"
        "assert dir(md) == sorted(md.__all__); assert len(set(dir(md))) == len(dir(md));"
        "values = {n: getattr(md, n) for n in dir(md)};"  # each is found
        "assert not [n for n, v in values.items() if isinstance(v, types.ModuleType)];"
        "assert [n for n in values if n.startswith('_')] == ['__version__'];"
        "raised = {n for n, v in vars(errors).items() if isinstance(v, type) and issubclass(v, errors.MDError)};"
        "assert len(raised) > 10; assert raised <= set(dir(md)), raised - set(dir(md));"
        "names = {}; exec('from torchtrt_md import *', names); assert set(md.__all__) <= set(names)"
    )
    fresh_python(code)


@pytest.mark.parametrize("name", ["Runner", "load", "compile"])
def test_a_name_is_the_same_however_it_is_imported(name: str) -> None:
    """In a process that has imported nothing of the package yet."""
    fresh_python(f"import torchtrt_md as md; from torchtrt_md import {name}; assert {name} is md.{name}")


@pytest.mark.parametrize("how", ["wheel", "folder", "editable"])
def test_installed_in_every_way(how: str, tmp_path: Path) -> None:
    home = tmp_path / "venv"
    venv.create(home, with_pip=False)
    python = str(home / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-build-isolation"]
    what = [str(ROOT)]
    if how == "wheel":
        wheels = tmp_path / "wheels"
        build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(wheels), str(ROOT)]
        subprocess.run(build, check=True, capture_output=True, timeout=300)
        (wheel,) = wheels.glob("*.whl")
        what = [str(wheel)]
        with zipfile.ZipFile(wheel) as files:
            (text,) = (files.read(name) for name in files.namelist() if name.endswith("/licenses/LICENSE"))
        assert text == (ROOT / "LICENSE").read_bytes()
        assert b"Apache License" in text
        assert b"END OF TERMS AND CONDITIONS" in text
    elif how == "editable":
        what = ["-e", str(ROOT)]
    # Build tools and dependencies come from this environment; its own .pth files, of an editable install, do not.
    here = sysconfig.get_path("purelib")
    subprocess.run([*pip, *what], check=True, capture_output=True, timeout=300, env={**os.environ, "PYTHONPATH": here})
    code = (
        "import torchtrt_md, torchtrt_md.lowering.ulysses, torchtrt_md.runtime, torchtrt_md.bundle,"
        " torchtrt_md.place, torchtrt_md.build.cache, torchtrt_md.serve.supervisor;"
        "from importlib.metadata import entry_points;"
        "assert any(e.name == 'torchtrt-md' for e in entry_points(group='console_scripts'));"
        "assert any(e.name == 'torchtrt_md' for e in entry_points(group='torch_dynamo_backends'));"
        "print(torchtrt_md.__file__)"
    )
    found = Path(_python(code, python, PYTHONPATH=here).strip())
    assert found.is_relative_to(ROOT if how == "editable" else home)
