"""``triton``: a bundle -> a model that Triton Inference Server loads, a folder for its model repository."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Literal

from torchtrt_md.bundle.manifest import MANIFEST, Manifest
from torchtrt_md.bundle.read import check_files, read_manifest
from torchtrt_md.checks import FORMATS, check_choice, check_folder, check_type
from torchtrt_md.errors import BundleError
from torchtrt_md.serve.config import python_config, tensorrt_config

Format = Literal["triton-python", "triton"]

_MODEL = '''\
"""Starts the ranks of the bundle beside this file and hands them Triton's requests."""

import json
import subprocess
import sys
from pathlib import Path

# An interpreter that torchtrt_md is installed for, of the minor version of Triton's own; "" is Triton's own.
PYTHON = {python!r}


class TritonPythonModel:
    def initialize(self, args):
        import triton_python_backend_utils as triton

        if PYTHON:  # Triton's Python reads neither PYTHONPATH nor virtual environments
            ask = "import json, sys; print(json.dumps([sys.version_info[:2], sys.path[1:]]))"
            version, path = json.loads(subprocess.check_output([PYTHON, "-c", ask]))
            if version != list(sys.version_info[:2]):
                raise RuntimeError(f"{{PYTHON}} is Python {{version}}, and this Triton's is {{sys.version_info[:2]}}")
            sys.path[:0] = path
        from torchtrt_md.doors.triton_model import TritonModel

        self.model = TritonModel(Path(__file__).parent, args, triton, PYTHON)

    def execute(self, requests):
        return self.model.execute(requests)

    def is_ready(self):
        return self.model.is_ready()

    def finalize(self):
        self.model.finalize()
'''


def triton(bundle: str | Path, out: str | Path, *, format: Format = "triton-python", python: str | Path = "") -> Path:
    """Make a bundle a model that Triton loads.

    Args:
        bundle: the folder that the export wrote.  Its files are not copied where a second name for them will do.
        out: the model's folder in a model repository; its name is the model's.  It must be new or empty.
        format: ``"triton-python"``: a ``model.py`` that starts a process for each rank.  ``"triton"``:
            engines alone, for Triton's TensorRT backend.
        python: for ``"triton-python"``, the interpreter that torchtrt_md is installed for, of the minor version of
            Triton's own; Triton's own by default.

    Returns:
        ``out``.

    Raises:
        OptionError: an argument of another type, or a value that it cannot have.
        BundleError: there is no bundle or it is damaged, Triton cannot pass its tensors, or ``"triton"`` would not run
            it or run it to wrong values; or ``out`` is not empty.
    """
    check_folder("bundle", bundle)
    check_folder("out", out)
    check_choice("format", format, FORMATS[1:])
    check_type("python", python, (str, Path), "the path of an interpreter")
    bundle, out = Path(bundle), Path(out)
    check_new(out)
    manifest = read_manifest(bundle)
    config = python_config(manifest) if format == "triton-python" else tensorrt_config(manifest)
    check_files(bundle, manifest)
    unfinished: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        unfinished.chmod(0o755)
        version = unfinished / "1"
        version.mkdir()
        (unfinished / "config.pbtxt").write_text(config)
        if format == "triton-python":
            (version / "model.py").write_text(_MODEL.format(python=str(python)))
            (version / "bundle").mkdir()
            for name in manifest.files:
                _place(bundle / name, version / "bundle" / name)
            shutil.copyfile(bundle / MANIFEST, version / "bundle" / MANIFEST)  # whose name does not say what it holds
        else:
            _place_plans(bundle, manifest, version)
        unfinished.replace(out)
    except OSError as error:
        raise BundleError(
            f"no model can be written at {out}: {error.strerror or error}", fix="give a folder that can be written"
        ) from error
    finally:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)
    return out


def check_new(out: Path) -> None:
    """Refuse a folder for a model that holds something.

    Raises:
        BundleError: it does, or is no folder.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise BundleError(f"{out} is there already, and is not replaced", fix="give another folder, or remove it first")


def _place_plans(bundle: Path, manifest: Manifest, version: Path) -> None:
    placed: dict[str, Path] = {}
    plans = [(segments[0].file, f"model.plan.rank{rank}") for rank, segments in enumerate(manifest.ranks)]
    plans.append((manifest.ranks[0][0].file, "model.plan"))  # which Triton looks for before it asks the backend
    for file, name in plans:
        _place(placed.setdefault(file, bundle / file), version / name)
        placed[file] = version / name


def _place(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
