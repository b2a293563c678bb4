"""What TensorRT's Python API has, and what of it this package uses: for comparing the two.

    python tests/build/tensorrt_api.py WHEEL    # a wheel of tensorrt-cu13-bindings, as pip download gives it

writes tensorrt_11.json: the classes of that TensorRT which the package uses, with the members, parameters and enum
values that its own docstrings name.  The libraries that the bindings are for need not be there: nothing of them is
called, and a linker makes empty ones in their place.
"""

from __future__ import annotations

import ast
import ctypes
import importlib.util
import inspect
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

PACKAGE = Path(__file__).resolve().parents[2] / "torchtrt_md"
LISTING = Path(__file__).parent / "tensorrt_11.json"
LAYERS = "ILayer"  # stands for all layers, of which a variable may be any
_LIBRARIES = ("libnvinfer.so.11", "libnvinfer_plugin.so.11", "libnvonnxparser.so.11")
_FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
# How files that use TensorRT call its objects: the last name before the dot -> the class.
_COMMON = {
    "trt": "",  # the module
    "network": "INetworkDefinition",
    "net": "INetworkDefinition",
    "builder": "Builder",
    "config": "IBuilderConfig",
    "context": "IExecutionContext",
    "loaded": "ICudaEngine",
    "runtime": "Runtime",
    "inspector": "EngineInspector",
    "layer": LAYERS,
}
RECEIVERS: dict[str, dict[str, str]] = {
    "build/builder.py": {"t": "ITensor"},
    "build/converters.py": {"shuffle": LAYERS},
    "build/flavour.py": {},
    "build/layers.py": {
        "attention": "IAttention",
        "copies": LAYERS,
        "wide": LAYERS,
        "shuffle": LAYERS,
        "words": LAYERS,
        "moved": "ITensor",
        "q": "ITensor",
        "k": "ITensor",
        "v": "ITensor",
        "x": "ITensor",
        "out": "ITensor",
        "mask": "ITensor",
        "scale": "ITensor",
    },
    "build/probes.py": {},
    "build/quantizers.py": {"x": "ITensor", "shuffle": LAYERS},
    "build/selftest.py": {"out": "ITensor"},
    "build/torch_trt.py": {},
    "launch/communicator.py": {},
    "runtime/bring_up.py": {},
    "runtime/engine.py": {"config": "IRuntimeConfig"},
    "runtime/inspect.py": {},
    "runtime/kernels.py": {"cache": "IRuntimeCache"},
    "runtime/offers.py": {},
    "runtime/timing.py": {},
}


class Use(NamedTuple):
    """One use of the API: where, of which class ("" for the module), and how it is called, if it is."""

    at: str
    kind: str
    member: str
    positional: int | None = None
    keywords: tuple[str, ...] = ()


def uses() -> list[Use]:
    """All uses of TensorRT's API in the package, found in its source."""
    return [use for file in RECEIVERS for use in _uses_in(file)]


def _uses_in(file: str) -> Iterator[Use]:
    tree = ast.parse((PACKAGE / file).read_text())
    receivers = {**_COMMON, **RECEIVERS[file]}
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("hasattr", "getattr"):
            holder, name = node.args[:2]
            kind = _kind(holder, receivers)
            if kind is not None and isinstance(name, ast.Constant):
                yield Use(f"{file}:{node.lineno}", kind, "?" + str(name.value))  # asked for: it may be missing
        if not isinstance(node, ast.Attribute) or node.attr == "__class__":
            continue
        kind = _kind(node.value, receivers)
        if kind is None:
            continue
        call = calls.get(id(node))
        at = f"{file}:{node.lineno}"
        if call is None or any(isinstance(arg, ast.Starred) for arg in call.args):
            yield Use(at, kind, node.attr)
        else:
            keywords = tuple(k.arg for k in call.keywords if k.arg is not None)
            yield Use(at, kind, node.attr, len(call.args), keywords)


def _kind(receiver: ast.expr, receivers: dict[str, str]) -> str | None:
    """The class of what stands before a dot; None where it is not TensorRT's."""
    if isinstance(receiver, ast.Attribute) and receiver.attr not in receivers:
        outer = _kind(receiver.value, receivers)  # trt.DataType.FLOAT
        return receiver.attr if outer == "" else None
    if isinstance(receiver, (ast.Name, ast.Attribute)):
        return receivers.get(receiver.id if isinstance(receiver, ast.Name) else receiver.attr)
    if isinstance(receiver, ast.Call) and isinstance(receiver.func, ast.Attribute):
        made = receiver.func.attr
        if _kind(receiver.func.value, receivers) == "INetworkDefinition" and made.startswith("add_"):
            return LAYERS  # net.add_slice(...).get_output
    return None


def unseen() -> list[str]:
    """Where a name that only TensorRT has is used in a file, or on a variable, that :data:`RECEIVERS` lacks."""
    names = {m for members in json.loads(LISTING.read_text())["classes"].values() for m in members}
    telling = {name for name in names if re.search("_.*_|^add_|enqueue|deserialize_cuda|streamable", name)}
    telling -= {"add_attention", "__init__"}  # our own function and any class have them too
    seen = {(use.at, use.member) for use in uses()}
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        file = path.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            at = f"{file}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Attribute) and node.attr in telling and (at, node.attr) not in seen:
                found.append(f"{at} {ast.unparse(node)}")
    return found


def listing(module: ModuleType) -> dict[str, dict[str, Any]]:
    """Class -> member -> the parameter lists of its overloads, or None for what is not called."""
    return {
        name: {member: _overloads(member, getattr(kind, member)) for member in dir(kind) if _is_public(member)}
        for name, kind in vars(module).items()
        if inspect.isclass(kind) and not name.startswith("_")
    }


def _is_public(member: str) -> bool:
    return member == "__init__" or not member.startswith("_")


def _overloads(name: str, member: object) -> list[list[list[str]]] | None:
    """Of each overload its parameters without self: [name] where one must be given, [name, default] where not."""
    text = getattr(member, "__doc__", None) or ""
    if not callable(member):
        return None
    found = re.findall(rf"^(?:\d+\. )?{name}\((.*)\)(?: ->.*)?$", text, re.MULTILINE)
    return [_parameters(one) for one in found if one != "*args, **kwargs"]


def _parameters(text: str) -> list[list[str]]:
    parts, depth, part = [], 0, ""
    for char in text + ",":
        depth += (char in "([{<") - (char in ")]}>")
        if char == "," and depth == 0:
            parts.append(part.strip())
            part = ""
        else:
            part += char
    found = []
    for part in filter(None, parts):
        if part in ("*", "/"):
            continue
        name, *_ = re.split(r"[:=]", part, maxsplit=1)
        default = re.search(r" = (.*)$", part)
        if name.strip() != "self":
            found.append([name.strip(), default.group(1)] if default else [name.strip()])
    return found


def members_of(kind: str, classes: dict[str, dict[str, Any]], module_names: set[str]) -> dict[str, Any]:
    """The members that a use of this class may name; of layers, those of any layer."""
    if kind == "":
        return dict.fromkeys(module_names)
    if kind == LAYERS:
        layers = (members for name, members in classes.items() if name.startswith("I") and "num_inputs" in members)
        return {member: of for members in layers for member, of in members.items()}
    return classes.get(kind, {})


def problem(use: Use, classes: dict[str, dict[str, Any]]) -> str | None:
    """What of a use an API does not have; None where all is there."""
    members = members_of(use.kind, classes, set(classes) | {"__version__"})
    if use.member.startswith("?"):
        return None
    if use.member not in members:
        return f"{use.at}: {use.kind or 'the module'} has no {use.member!r}"
    overloads = classes.get(use.member, {}).get("__init__") if use.kind == "" else members[use.member]
    if use.positional is None or not overloads:
        return None
    if any(_fits(use, parameters) for parameters in overloads):
        return None
    return f"{use.at}: {use.member} is called with {use.positional} arguments and {use.keywords}, and takes {overloads}"


def _fits(use: Use, parameters: list[list[str]]) -> bool:
    assert use.positional is not None
    names = [p[0] for p in parameters]
    given = set(names[: use.positional]) | set(use.keywords)
    needed = {p[0] for p in parameters if len(p) == 1}
    return use.positional <= len(names) and needed <= given and set(use.keywords) <= set(names[use.positional :])


def load_bindings(wheel: Path, folder: Path) -> tuple[str, ModuleType]:
    """The version and the bindings of a wheel, imported without the libraries that they are for."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    source = folder / "empty.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in _FUNCTIONS))
    for name in _LIBRARIES:
        made = folder / name
        subprocess.run(["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", made, source], check=True)
        ctypes.CDLL(str(made), mode=ctypes.RTLD_GLOBAL)
    spec = importlib.util.spec_from_file_location("tensorrt", folder / "tensorrt_bindings" / "tensorrt.so")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return wheel.name.split("-")[1], module


def main(wheel: Path) -> None:
    """Write the listing."""
    with tempfile.TemporaryDirectory() as folder:
        version, module = load_bindings(wheel, Path(folder))
    every = listing(module)
    used = {use.kind for use in uses()} | {use.member.lstrip("?") for use in uses() if use.kind == ""}
    used |= {"TensorIOMode", "LayerType"}  # whose values are compared by name
    keep = {n for n in every if n in used or (LAYERS in used and n.startswith("I") and "num_inputs" in every[n])}
    chosen = {name: every[name] for name in sorted(keep)}
    LISTING.write_text(json.dumps({"version": version, "classes": chosen}, indent=None, separators=(",", ":")) + "\n")
    print(f"{len(chosen)} classes of TensorRT {version} in {LISTING}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
