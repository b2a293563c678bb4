"""The command line in this process: what it prints, what it refuses before any work, and what needs no build."""

from __future__ import annotations

import inspect
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
from torchtrt_md.doors.flags import in_flags

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
    defaults = {
        "--target": "portable",
        "--placement": "auto",
        "--seed": "0",
        "--strategy": "(the file's, else ulysses)",
    }
    for option, default in defaults.items():
        (line,) = (line for line in said.splitlines() if option in line)
        assert f"[default: {default}]" in line
    assert all(target in said for target in ("sm75", "sm121"))
    assert "inspect" in run("--help")[1]


def test_a_dry_run_proves_the_program_and_builds_nothing(run: Run, mine: Path, tmp_path: Path) -> None:
    code, said, wrong = run("export", mine, "--mesh", "sp=2", "--dry-run", "-o", tmp_path / "out.mdtrt")
    assert code == 0, wrong
    for what in ("capture", "lower", "verify", "all_to_all", "is it the same function"):
        assert what in said
    assert "build" not in said
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix) == ["mine.py"]


def test_a_dry_run_asks_for_no_target(run: Run, mine: Path) -> None:
    """A machine without the GPU can prove a program that is built on one with it."""
    code, _, wrong = run("export", mine, "--mesh", "sp=2", "--dry-run", "--no-verify", "--target", "current")
    assert code == 0, wrong


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
        (("--mesh", "sp=2", "-o", "{}/mine.py/o"), "mine.py is a file"),
        (("--mesh", "sp=2", "-o", "{}/o", "--strategy", "rings"), "'strategy' cannot be 'rings'"),
        (("--mesh", "sp=2", "-o", "{}/o", "--target", "sm70"), "cannot build for target 'sm70'"),
        (("--mesh", "sp=2", "-o", "{}/o", "--weights", "{}/none"), "{}/none"),
        (("--mesh", "sp=2", "-o", "{}/o", "--report", "{}/taken"), "'--report' cannot be {}/taken, which is a folder"),
        (("--mesh", "sp=2", "-o", "{}/o", "--report", "{}/mine.py/rep.json"), "mine.py is a file"),
        (("--mesh", "sp=2", "-o", "{}/o", "--dump", "{}/mine.py"), "'--dump' cannot be {}/mine.py, which is a file"),
        (("--mesh", "sp=2", "--dry-run", "--dump", "{}/mine.py"), "'--dump' cannot be"),
        (("--mesh", "sp=2", "-o", "{}/o", "--model-device", "bogus"), "no model can be made on the device 'bogus'"),
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
    assert message.format(tmp_path) in wrong
    assert "Instead:" in wrong
    assert "my_model" not in wrong
    assert (tmp_path / "taken" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("content", "message", "line"),
    [
        ("def model():\n    return 1 / 0\n", "mine.py failed: ZeroDivisionError: division by zero", "return 1 / 0"),
        ("def model():\n    raise SystemExit(0)\n", "mine.py failed: SystemExit: 0", "raise SystemExit"),
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
        (("examples/flux.py", "--mesh", "cp=2"), "has 1 entries on dim 1, of which each of 2 ranks would get 1"),
        (("examples/flux.py", "--mesh", "cp=4", "--target", "sm70"), "cannot build for target 'sm70'"),
    ],
)
def test_errors_are_messages_and_not_tracebacks(
    arguments: tuple[str, ...], message: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for name, size in models.SMALL_EXAMPLES.items():
        monkeypatch.setenv(name, size)
    monkeypatch.setenv("FLUX_TEXT_TOKENS", "1")
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


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("export", "x.py", "--mesh", "cp=2", "-o", "y"), "x.py on Mesh(cp=2)"),
        (("inspect", "b.mdtrt"), "b.mdtrt"),
        (("triton", "b.mdtrt", "-o", "m"), "b.mdtrt"),
    ],
)
def test_the_first_line_is_there_before_pytorch_is_imported(arguments: tuple[str, ...], line: str) -> None:
    """Which takes seconds; the line itself comes within one."""
    code = (
        "import sys; from torchtrt_md.doors import cli\n"
        "def first(*printed, **_):\n"
        "    print(*printed, 'torch' in sys.modules)\n"
        "    sys.exit(3)\n"
        "cli.console.print = first\n"
        f"sys.argv = ['torchtrt-md', *{arguments}]; cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 3, done.stderr
    assert done.stdout == f"torchtrt-md {md.__version__}: {line} False\n"


def test_the_first_line_of_a_run_is_there_before_pytorch_is_imported() -> None:
    code = (
        "import builtins, runpy, sys\n"
        "real = print\n"
        "def first(*printed, **_):\n"
        "    real(*printed, 'torch' in sys.modules)\n"
        "    sys.exit(3)\n"
        "builtins.print = first\n"
        "sys.argv = ['run', 'b.mdtrt', '--iterations', '3']\n"
        "runpy.run_module('torchtrt_md.run', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 3, done.stderr
    assert done.stdout == f"torchtrt_md.run {md.__version__}: b.mdtrt --iterations 3 False\n"


@pytest.mark.parametrize("form", ["one", "several", "tuple"])
def test_what_is_parallel_may_be_one_or_several(form: str, run: Run, tmp_path: Path) -> None:
    one = 'md.ContextParallel("sp", plan={"": {"x": md.Split(1)}, "out": md.Gather(1)})'
    written = {"one": one, "several": f"[{one}]", "tuple": f"({one},)"}[form]
    file = tmp_path / "mine.py"
    file.write_text(MODEL.replace(MODEL.splitlines()[3], f"parallel = {written}"))
    code, _, wrong = run("export", file, "--mesh", "sp=2", "--dry-run", "--no-verify")
    assert code == 0, wrong


@pytest.mark.parametrize("written", ['["sp"]', '"sp"', '{"": 1}', "3"])
def test_what_is_parallel_is_something_else(written: str, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(MODEL.replace(MODEL.splitlines()[3], f"parallel = {written}"))
    code, _, wrong = run("export", file, "--mesh", "sp=2", "--dry-run")
    assert code == 1
    assert f"OptionError: `parallel` of {file}: 'parallel' cannot be" in wrong
    assert "md.ContextParallel" in wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--strategy", "ring", "--placement", "engine"), "ring attention inside an engine cannot be built"),
        (("--weight-streaming", "--placement", "split"), "placement 'split' makes several parts"),
        (("--weight-streaming", "--strategy", "ring"), "placement 'split' makes several parts"),
        (("--weight-streaming", "--strip-weights"), "weights that are not in an engine cannot be streamed"),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_the_capture(
    arguments: tuple[str, ...], message: str, run: Run, mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def captured(*_: object, **__: object) -> None:
        raise AssertionError("the model was captured first")

    monkeypatch.setattr("torchtrt_md.doors.export.capture", captured)
    code, _, wrong = run("export", mine, "--mesh", "sp=2", "-o", tmp_path / "o", *arguments)
    assert code == 1
    assert message in wrong
    assert "Instead: use --placement" in wrong or "Instead: leave" in wrong


def test_a_bundle_without_engines(run: Run, mine: Path, tmp_path: Path) -> None:
    code, _, wrong = run("export", mine, "--mesh", "sp=2", "-o", tmp_path / "o", "--compute", "inductor")
    assert code == 0, wrong
    assert {segment.runs for segment in read_manifest(tmp_path / "o").ranks[0]} == {"eager", "inductor"}
    code, _, wrong = run("export", mine, "--mesh", "sp=2", "--dry-run", "--compute", "inductor", "--placement=engine")
    assert code == 1
    assert "Instead: use --placement split, or --compute tensorrt" in wrong


def test_all_that_export_takes_is_an_option() -> None:
    of_python = {"model", "args", "kwargs", "parallel", "choices", "dense", "coordinates_inside", "progress"}
    taken = set(inspect.signature(md.export).parameters) - of_python
    options = {"verify" if name == "check" else name for name in taken}
    assert options <= set(inspect.signature(cli.export).parameters)


def test_a_report_gets_the_folders_above_it(run: Run, mine: Path, tmp_path: Path) -> None:
    report = tmp_path / "new" / "folder" / "rep.json"
    code, _, wrong = run("export", mine, "--mesh", "sp=2", "-o", tmp_path / "o", "--no-verify", "--report", report)
    assert code == 0, wrong
    assert json.loads(report.read_text())["target"] == "portable"


@pytest.mark.parametrize(
    ("hint", "expected"),
    [
        ("pass weights=..., the folder of it", "pass --weights, the folder of it"),
        ('use placement="split", or strategy="ulysses"', "use --placement split, or --strategy ulysses"),
        ("pass weights that fit, x=3", "pass weights that fit, x=3"),
        ("export with weight_streaming=True", "export with --weight-streaming"),
        ("or leave it out: check=False, --no-verify", "or leave it out: --no-verify"),
        ('pass parallel=[..., DataParallel("dp")]', 'let the model file say parallel = [..., DataParallel("dp")]'),
    ],
)
def test_hints_are_in_the_words_of_the_command_line(hint: str, expected: str) -> None:
    assert in_flags(hint) == expected
