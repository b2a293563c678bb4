"""The names and calls of TensorRT's API in this package are those that TensorRT has: TensorRT-RTX as it is installed,
and TensorRT 11, which cannot be installed here, by what its own bindings say of themselves."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import tensorrt_api
from tensorrt_api import Use, listing, problem, unseen, uses

from torchtrt_md.build.flavour import TRT_DTYPES, flavour
from torchtrt_md.build.layers import _REDUCE_OPS, OPERATIONS

LISTED = json.loads(tensorrt_api.LISTING.read_text())
# What only TensorRT-RTX has.  Whoever uses it has asked for the flavour, or whether it is there, before.
RTX_ONLY = {
    ("build/flavour.py", "ComputeCapability"),
    ("build/flavour.py", "num_compute_capabilities"),
    ("build/flavour.py", "set_compute_capability"),
    ("runtime/engine.py", "create_runtime_cache"),
    ("runtime/engine.py", "set_runtime_cache"),
    ("runtime/kernels.py", "deserialize"),
    ("runtime/kernels.py", "serialize"),
}


def test_what_is_used_is_there_in_the_installed_flavour() -> None:
    classes = listing(flavour().trt)
    assert [p for use in uses() if (p := problem(use, classes))] == []


def test_what_is_used_is_there_in_tensorrt_11() -> None:
    assert LISTED["version"].startswith("11.")
    lacking = {(use.at.split(":")[0], use.member): problem(use, LISTED["classes"]) for use in uses()}
    assert {at for at, what in lacking.items() if what} == RTX_ONLY, [what for what in lacking.values() if what]


def test_no_use_is_overlooked() -> None:
    assert unseen() == []
    assert len({(use.kind, use.member) for use in uses()}) > 90


@pytest.mark.parametrize("there", ["installed", "11"])
def test_names_that_are_looked_up_by_text_are_there(there: str) -> None:
    if there == "installed" and flavour().name != "TensorRT-RTX":
        pytest.skip("the other case is about it")
    classes = listing(flavour().trt) if there == "installed" else LISTED["classes"]
    assert set(OPERATIONS.values()) <= set(classes["CollectiveOperation"])
    assert {"NONE", *_REDUCE_OPS.values()} <= set(classes["ReduceOperation"])
    assert set(TRT_DTYPES.values()) <= set(classes["DataType"])
    assert {"INPUT", "OUTPUT"} <= set(classes["TensorIOMode"])
    assert {"DIST_COLLECTIVE", "ATTENTION_OUTPUT"} <= set(classes["LayerType"])
    assert {"log"} <= set(classes["ILogger"])
    assert {"write"} <= set(classes["IStreamWriter"])
    assert [["layer_name"], ["ms"]] in classes["IProfiler"]["report_layer_time"]


@pytest.mark.parametrize(
    ("use", "told"),
    [
        (Use("a:1", "INetworkDefinition", "add_slices"), "INetworkDefinition has no 'add_slices'"),
        (Use("a:1", "", "Bilder"), "the module has no 'Bilder'"),
        (Use("a:1", "INetworkDefinition", "add_slice", 3), "add_slice is called with 3 arguments"),
        (Use("a:1", "INetworkDefinition", "add_slice", 5), "add_slice is called with 5 arguments"),
        (Use("a:1", "INetworkDefinition", "add_slice", 3, ("strides",)), "add_slice is called with 3 arguments"),
        (Use("a:1", "", "Weights", 4), "Weights is called with 4 arguments"),
        (Use("a:1", "ILayer", "get_outputs", 1), "ILayer has no 'get_outputs'"),
    ],
)
def test_a_typo_is_found_in_either(use: Use, told: str) -> None:
    for classes in (listing(flavour().trt), LISTED["classes"]):
        found = problem(use, classes)
        assert found is not None
        assert told in found


def test_a_right_call_is_none() -> None:
    for use in (
        Use("a:1", "INetworkDefinition", "add_slice", 4),
        Use("a:1", "INetworkDefinition", "add_slice", 3, ("stride",)),
        Use("a:1", "", "Weights", 3),
        Use("a:1", "", "Weights", 1),
        Use("a:1", "ILayer", "get_output", 1),
    ):
        assert problem(use, LISTED["classes"]) is None


def test_uses_are_found_in_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.py").write_text(
        "def f(net, f, engine, loaded):\n"
        "    layer = net.add_slice(x, (0,), shape, stride=(1,))\n"
        "    y = net.add_cast(x, f.trt.DataType.HALF).get_output(0)\n"
        "    engine.context.set_comunicator(y)\n"
        "    return hasattr(loaded, 'stream') or loaded.num_layers\n"
    )
    monkeypatch.setattr(tensorrt_api, "PACKAGE", tmp_path)
    monkeypatch.setattr(tensorrt_api, "RECEIVERS", {"a.py": {}})
    found = {(use.kind, use.member, use.positional, use.keywords) for use in tensorrt_api.uses()}
    assert found == {
        ("INetworkDefinition", "add_slice", 3, ("stride",)),
        ("INetworkDefinition", "add_cast", 2, ()),
        ("", "DataType", None, ()),
        ("DataType", "HALF", None, ()),
        ("ILayer", "get_output", 1, ()),
        ("IExecutionContext", "set_comunicator", 1, ()),
        ("ICudaEngine", "?stream", None, ()),
        ("ICudaEngine", "num_layers", None, ()),
    }


def test_all_files_that_name_a_tensorrt_module_are_looked_at() -> None:
    naming = set()
    for path in tensorrt_api.PACKAGE.rglob("*.py"):
        if any(isinstance(n, ast.Attribute) and n.attr == "trt" for n in ast.walk(ast.parse(path.read_text()))):
            naming.add(path.relative_to(tensorrt_api.PACKAGE).as_posix())
    assert naming <= set(tensorrt_api.RECEIVERS)
