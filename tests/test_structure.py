"""The rules of the structure that docs/design.md states, and what README and the docs say that can be compared."""

from __future__ import annotations

import ast
import dataclasses
import fnmatch
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from torchtrt_md.bundle.manifest import SCHEMA
from torchtrt_md.lowering import PASSES
from torchtrt_md.options import Options

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [*(ROOT / "lowering").glob("*.py"), *(ROOT / "torchtrt_md").rglob("*.py")]
SOURCES = [path for path in SOURCES if "torchtrt_md/lowering" not in path.as_posix()]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
STAGES = ["graph", "capture", "lowering", "verification", "place", "build", "bundle", "launch", "runtime", "doors"]
# Files of later stages that are types or tables, as docs/design.md lists them.
USED_EARLIER = {"lowering.ops", "lowering.passes", "bundle.limits", "bundle.read.NO_JSON"}


@functools.cache
def imports(path: Path) -> list[str]:
    """Names of this package that a file imports, anywhere in it and for types only too: ``road.Road``."""
    return list(_imports(ast.parse(path.read_text())))


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "torchtrt_md":
            yield from (f"{node.module}.{alias.name}".removeprefix("torchtrt_md.") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("torchtrt_md.") for a in node.names if a.name.startswith("torchtrt_md."))


def stage_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] == "lowering" else parts[1]


def test_nothing_imports_a_door() -> None:
    front = {"__init__", "__main__", "run", "doors"}  # where users come in
    found = [
        (path.name, name)
        for path in SOURCES
        if stage_of(path) not in front
        for name in imports(path)
        if name.split(".")[0] == "doors"
    ]
    assert found == []


def test_nothing_but_a_door_imports_tuning() -> None:
    found = {stage_of(path) for path in SOURCES for name in imports(path) if name.split(".")[0] == "tune"}
    assert found == {"tune", "doors"}


def test_a_stage_imports_earlier_stages() -> None:
    found = []
    for path in SOURCES:
        stage = stage_of(path)
        if stage not in STAGES:
            continue
        for name in imports(path):
            of = name.split(".")[0]
            late = of in STAGES and STAGES.index(of) > STAGES.index(stage)
            tables = stage == "graph" and of == "lowering"
            if late and not tables and not any(name.startswith(used) for used in USED_EARLIER):
                found.append(f"{stage}/{path.name}: {name}")
    assert found == []


def test_no_folder_of_tests_is_passed_over(pytestconfig: pytest.Config) -> None:
    """pytest leaves out folders named ``build`` unless it is told."""
    folders = {part for path in (ROOT / "tests").rglob("test_*.py") for part in path.relative_to(ROOT).parts[:-1]}
    assert "build" in folders
    passed_over: list[str] = pytestconfig.getini("norecursedirs")
    assert [name for name in folders if any(fnmatch.fnmatch(name, pattern) for pattern in passed_over)] == []


def test_no_product_function_is_named_as_a_test() -> None:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.FunctionDef) and node.name.startswith("test_")), (path, node.name)


def test_readme_is_short_and_its_python_is_python() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 250
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 5
    for block in blocks:
        ast.parse(block)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_what_a_document_points_to_is_there(path: Path) -> None:
    text = path.read_text()
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert link.startswith("http") or (path.parent / link).exists(), link
    tops = "tests|torchtrt_md|lowering|docs|benchmarks|examples|capture|runtime|build|bundle|doors|graph|launch|place"
    for named in re.findall(rf"`((?:{tops}|verification)/[\w/.-]*)`", text):
        assert (ROOT / named).exists() or (ROOT / "torchtrt_md" / named).exists(), named


def test_the_design_lists_all_passes_and_the_manifests_schema() -> None:
    text = (ROOT / "docs" / "design.md").read_text()
    table = text.split("| pass | rewrites | when |")[1].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == list(PASSES)
    assert f"(schema {SCHEMA})" in text


def test_the_table_of_options_has_all_with_their_defaults() -> None:
    table = (ROOT / "docs" / "options.md").read_text().split("|---|---|---|---|")[1].split("\n\n")[0]
    told = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", table, re.MULTILINE))
    assert told == {field.name: repr(field.default).replace("'", '"') for field in dataclasses.fields(Options)}


# Names with a leading underscore that all FX code shares, as docs/design.md lists them.
SHARED = ("torch.utils._pytree", "torch._ops", "torch.ops.", "torch.utils._python_dispatch.TorchDispatchMode")
SHARED_ATTRIBUTES = {
    "_schema",
    "_parameters",
    "_buffers",
    "_modules",
    "_version",
    "_base",
    "_fields",
    "_cp_plan",
    "_tp_plan",
}
LIBRARIES = ("torch", "torch_tensorrt", "tensorrt", "transformers", "diffusers", "modelopt", "torchao", "triton")
# Names of objects that are no library's: Python's, this package's, and the namespace of ops.
OWN = ("self", "cls", "other", "os", "functools", "aten", "_aten")


def is_private(name: str) -> bool:
    """Has a dotted name a part that a library may move without saying so?"""
    root, *parts = name.split(".")
    if root in OWN or name.startswith(SHARED):
        return False
    private = {
        part for part in parts if part.startswith("_") and not part.startswith(("__", "_forward_", "_torchtrt_md"))
    }
    return bool(private - SHARED_ATTRIBUTES)


def private_names(path: Path) -> Iterator[str]:
    """What a file uses of libraries by private names."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            told = node.args[1]
            names = [f"torch.{told.value}"] if isinstance(told, ast.Constant) and isinstance(told.value, str) else []
        elif isinstance(node, ast.Attribute) and re.fullmatch(r"[\w.]+", ast.unparse(node)):
            names = [ast.unparse(node)]
        if not isinstance(node, ast.Attribute):
            names = [name for name in names if name.split(".")[0] in LIBRARIES]
        yield from (f"{path.relative_to(ROOT)}:{name}" for name in names if is_private(name))


def test_private_names_of_libraries_are_in_their_files() -> None:
    """One that moves then breaks one small file, whose test says what goes without it."""
    (table,) = re.findall(r"## Private names\n.*?(?=\n## )", (ROOT / "docs" / "design.md").read_text(), re.DOTALL)
    files = {ROOT / "torchtrt_md" / name for name in re.findall(r"^\| `([\w/]+\.py)` \|", table, re.MULTILINE)}
    assert all(path.exists() for path in files)
    assert [name for path in SOURCES if path not in files for name in private_names(path)] == []
    assert any(map(is_private, ("torch._inductor.compile", "torch._C._distributed_c10d.X", "module._hidden")))
