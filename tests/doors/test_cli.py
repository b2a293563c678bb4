"""The command line in this process: what it prints, what it refuses before any work, and what needs no build."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import models
import pytest
from bundle import bundle_samples
from command_line import Run

import torchtrt_md as md
from torchtrt_md.bundle.manifest import encode
from torchtrt_md.bundle.read import read_manifest
from torchtrt_md.doors import cli, user_file

ROOT = Path(__file__).resolve().parents[2]
MODEL = f"""\
import sys; sys.path.insert(0, {str(ROOT / "tests")!r})
import torchtrt_md as md
import models
parallel = [md.ContextParallel("sp", plan={{"": {{"x": md.Split(1)}}, "out": md.Gather(1)}})]
def model():
    return models.attention()
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A user's model file."""
    file = tmp_path / "mine.py"
    file.write_text(MODEL)
    return file


def test_version_and_help(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("--version") == (0, f"torchtrt-md {md.__version__}\n", "")
    monkeypatch.setenv("COLUMNS", "200")
    code, said, _ = run("export", "--help")
    assert code == 0
    for option, default in (("--target", "portable"), ("--placement", "auto"), ("--seed", "0")):
        (line,) = (line for line in said.splitlines() if option in line)
        assert f"[default: {default}]" in line
    assert "inspect" in run("--help")[1]


def test_a_dry_run_proves_the_program_and_builds_nothing(run: Run, mine: Path, tmp_path: Path) -> None:
    code, said, wrong = run("export", mine, "--mesh", "sp=2", "--dry-run", "-o", tmp_path / "out.mdtrt")
    assert code == 0, wrong
    for what in ("capture", "lower", "verify", "all_to_all", "is it the same function"):
        assert what in said
    assert "build" not in said
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix) == ["mine.py"]


def test_inspect(run: Run, tmp_path: Path) -> None:
    bundle = bundle_samples.split_bundle(tmp_path / "b")
    code, said, wrong = run("inspect", bundle)
    assert code == 0, wrong
    manifest = read_manifest(bundle)
    for what in (
        *("Mesh(cp=2)", "placement split", "target portable", f"schema {manifest.schema}"),
        *(manifest.versions.tensorrt, manifest.versions.torch, "dim 0 over cp", "[4, 8]", "output1"),
        *("0 block 0", "engine", "eager", "inductor", "1 all_gather", "cp (2)"),
        "block 0: engine, faster",
    ):
        assert what in said, what
    assert "0 block 0" in said


def test_inspect_as_json_is_the_manifest(run: Run, tmp_path: Path) -> None:
    bundle = bundle_samples.bundle(tmp_path / "b")
    code, said, _ = run("inspect", bundle, "--json")
    assert code == 0
    assert json.loads(said) == json.loads((bundle / "manifest.json").read_bytes())
    assert said.encode() == encode(read_manifest(bundle))


def test_inspect_of_no_bundle(run: Run, tmp_path: Path) -> None:
    code, _, wrong = run("inspect", tmp_path)
    assert code == 1
    assert "BundleError: " in wrong
    assert "Instead:" in wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--mesh", "cp4", "-o", "{}/o"), "'cp4' is not a mesh"),
        (("--mesh", "sp=2", "--placement", "splti", "-o", "{}/o"), "placement"),
        (("--mesh", "sp=2", "--transport", "copy", "-o", "{}/o"), "transport"),
        (("--mesh", "sp=2"), "there is no place for the bundle"),
        (("--mesh", "sp=2", "-o", "{}/taken"), "is not a bundle"),
    ],
)
def test_what_needs_no_work_is_checked_before_the_file_is_run(
    arguments: tuple[str, ...], message: str, run: Run, mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ran(*_: object) -> None:
        raise AssertionError("the model was made first")

    monkeypatch.setattr(user_file, "read_user_file", ran)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("years of work")
    code, _, wrong = run("export", mine, *(argument.format(tmp_path) for argument in arguments))
    assert code == 1
    assert message in wrong
    assert "Instead:" in wrong
    assert (tmp_path / "taken" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("content", "message", "line"),
    [
        ("def model():\n    return 1 / 0\n", "mine.py failed: ZeroDivisionError: division by zero", "return 1 / 0"),
        ("import no_such_module\n", "mine.py failed: ModuleNotFoundError", "import no_such_module"),
        ("def model(:\n", "mine.py failed: SyntaxError", ""),
        ("x = 1\n", "mine.py has no function 'model'", ""),
        ("def model():\n    return 3\n", "returned int, not a triple", ""),
    ],
)
def test_an_error_in_the_users_file_names_its_line(
    content: str, message: str, line: str, run: Run, tmp_path: Path
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(content)
    code, said, wrong = run("export", file, "--mesh", "cp=2", "-o", tmp_path / "o")
    assert code == 1
    assert message in wrong
    assert line in wrong
    assert "Traceback" not in said + wrong
    assert "typer" not in said + wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing.py", "--mesh", "cp=4"), "there is no model file 'nothing.py'"),
        (("examples/flux.py", "--mesh", "xx=4"), "does not say what is parallel along it"),
        (("examples/llama.py", "--mesh", "tp=4", "--strategy", "ulysses"), "no axis is context parallel"),
        (("examples/flux.py", "--mesh", "cp=200"), "not every rank would get some of its own"),
        (("examples/flux.py", "--mesh", "cp=4", "--target", "sm70"), "cannot build for target 'sm70'"),
    ],
)
def test_errors_are_messages_and_not_tracebacks(
    arguments: tuple[str, ...], message: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for name, size in models.SMALL_EXAMPLES.items():
        monkeypatch.setenv(name, size)
    code, said, wrong = run("export", *arguments, "-o", tmp_path / "out.mdtrt")
    assert code == 1
    assert message in wrong
    assert "Instead:" in wrong
    assert "Traceback" not in said + wrong
    assert "typer" not in said + wrong, "the line of an error is the user's"
    assert not (tmp_path / "out.mdtrt").exists()


@pytest.mark.parametrize(
    ("mesh", "strategy", "expected"),
    [
        ("ring=2,ulysses=2", "", [md.ContextParallel(("ring", "ulysses"), "ring")]),
        ("tp=2,ulysses=2,ring=2", "", [md.ContextParallel(("ring", "ulysses"), "ring"), md.TensorParallel("tp")]),
        ("ring=2,ulysses=2", "auto", [md.ContextParallel(("ring", "ulysses"), "auto")]),
        ("ring=2,dp=2", "", [md.ContextParallel("ring", "ring"), md.DataParallel("dp")]),
        ("ulysses=4", "", [md.ContextParallel("ulysses", "ulysses")]),
    ],
)
def test_axes_by_their_names(mesh: str, strategy: str, expected: list[object]) -> None:
    assert cli._parallel(md.Mesh.parse(mesh), None, strategy) == expected


def test_one_sequence_over_two_axes(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name, size in models.SMALL_EXAMPLES.items():
        monkeypatch.setenv(name, size)
    code, said, wrong = run("export", "examples/flux.py", "--mesh", "ring=2,ulysses=2", "--dry-run")
    assert code == 0, wrong
    for told in ("permute_ten", "ring (2)", "ulysses (2)", "is it the same function"):
        assert told in said


def test_a_users_own_file_with_its_own_plan(run: Run, mine: Path, tmp_path: Path) -> None:
    code, _, wrong = run("export", mine, "--mesh", "sp=2", "-o", tmp_path / "mine.mdtrt")
    assert code == 0, wrong
    assert read_manifest(tmp_path / "mine.mdtrt").mesh == {"sp": 2}


def test_the_first_line_is_there_before_pytorch_is_imported() -> None:
    """Which takes seconds; the line itself comes within one."""
    code = (
        "import sys; from torchtrt_md.doors import cli\n"
        "def first(*printed, **_):\n"
        "    print(*printed, 'torch' in sys.modules)\n"
        "    sys.exit(3)\n"
        "cli.console.print = first\n"
        "sys.argv = ['torchtrt-md', 'export', 'x.py', '--mesh', 'cp=2', '-o', 'y']; cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 3, done.stderr
    assert done.stdout == f"torchtrt-md {md.__version__}: x.py on Mesh(cp=2) False\n"
