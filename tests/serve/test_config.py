"""``config.pbtxt``, parsed by protobuf as Triton's own message, and the bundles that a backend cannot be given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from bundle import bundle_samples
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

import torchtrt_md as md
from torchtrt_md.bundle import write_bundle
from torchtrt_md.bundle.manifest import Manifest, Versions
from torchtrt_md.errors import BundleError, OptionError
from torchtrt_md.program import Sharding, Value
from torchtrt_md.segment import Binding, Collective, Segment, Wire
from torchtrt_md.selftest import self_test
from torchtrt_md.serve.config import TYPES, check_tensorrt, python_config, tensorrt_config

TENSORRT = Versions("0.1.0", "2.14.0", "TensorRT", "11.1.0.106")


def parsed(text: str) -> Any:
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def one_engine(**changes: Any) -> Manifest:
    """x and mask.0 go whole through one engine on each of two ranks, which reduces: what Triton's backend can run."""
    ranks = [
        [
            Segment(
                runs="engine",
                file=f"rank{rank}",
                axis="tp",
                inputs=(
                    Binding("x", Wire("input", "x"), torch.bfloat16, (4, 8)),
                    Binding("mask.0", Wire("input", "mask.0"), torch.bool, (4,)),
                ),
                outputs=(Binding("output0", Wire("output", "output0"), torch.float32, (4, 8)),),
                collectives=(Collective("all_reduce", "tp", 2, torch.float32, 32, 128),),
            )
        ]
        for rank in range(2)
    ]
    one = {
        "mesh": {"tp": 2},
        "inputs": [Value("x", (4, 8), torch.bfloat16), Value("mask.0", (4,), torch.bool)],
        "outputs": [Value("output0", (4, 8), torch.float32)],
        "ranks": ranks,
        "versions": TENSORRT,
        "self_tests": [msgspec.structs.replace(self_test("all_reduce", "tp", 2), file="self-test")],
    }
    return bundle_samples.manifest(**one | changes)


def with_segment(**changes: Any) -> Manifest:
    """:func:`one_engine` with another segment on rank 1."""
    whole = one_engine()
    return msgspec.structs.replace(
        whole, ranks=[whole.ranks[0], [msgspec.structs.replace(whole.ranks[1][0], **changes)]]
    )


def test_the_python_backend_takes_whole_tensors_one_request_at_a_time() -> None:
    config = parsed(python_config(bundle_samples.manifest()))
    assert config.backend == "python"
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    kind = model_config_pb2.ModelInstanceGroup.Kind.KIND_MODEL
    assert [(group.kind, group.count) for group in config.instance_group] == [(kind, 1)]
    told = [(t.name, model_config_pb2.DataType.Name(t.data_type), list(t.dims)) for t in config.input]
    assert told == [("x", "TYPE_FP32", [4, 8]), ("mask.0", "TYPE_BOOL", [4])]
    assert [(t.name, list(t.dims)) for t in config.output] == [("output0", [4, 8])]
    assert config.parameters["gpus"].string_value == "0,1"
    assert config.parameters["timeout_seconds"].string_value == "300"


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_dtype_has_the_name_that_triton_has(dtype: torch.dtype) -> None:
    config = parsed(python_config(bundle_samples.manifest(outputs=[Value("y", (), dtype)])))
    (output,) = config.output
    name = model_config_pb2.DataType.Name(output.data_type)
    bits = int("".join(filter(str.isdigit, name)) or 8)
    assert bits == 8 * dtype.itemsize
    assert list(output.dims) == [1]  # Triton has no tensors without dims


@pytest.mark.parametrize("name", ['with "quotes"', "back\\slash", "ünïcode", "new\nline", "tab\t", "\x01"])
def test_any_name_arrives_as_it_is(name: str) -> None:
    config = parsed(python_config(bundle_samples.manifest(inputs=[Value(name, (2,), torch.int8)])))
    assert config.input[0].name == name


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Value("y", (2,), torch.complex64), r"output 'y' is torch.complex64, which Triton does not have"),
        (Value("y", (2, 0), torch.float32), r"output 'y' of shape \[2, 0\] has no elements"),
    ],
)
def test_what_triton_cannot_pass_is_refused(value: Value, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        python_config(bundle_samples.manifest(outputs=[value]))


def test_a_bundle_without_its_weights_is_refused() -> None:
    with pytest.raises(BundleError, match=r"without its weights \(w is one\)"):
        python_config(bundle_samples.manifest(given=[Value("w", (4, 8), torch.bfloat16)]))


def test_the_tensorrt_backend_reads_the_parameters_of_its_documentation() -> None:
    config = parsed(tensorrt_config(one_engine()))
    assert config.backend == "tensorrt"
    assert config.max_batch_size == 0
    kind = model_config_pb2.ModelInstanceGroup.Kind.KIND_MODEL
    assert [(group.kind, group.count) for group in config.instance_group] == [(kind, 1)]
    assert {key: value.string_value for key, value in config.parameters.items()} == {
        "enable_multi_device": "true",
        "multi_device_gpus": "0,1",
        "multi_device_per_rank_engines": "true",
    }
    assert [t.name for t in config.input] == ["x", "mask.0"]


def _split(values: list[Value]) -> list[Value]:
    return [msgspec.structs.replace(values[0], sharding=(Sharding(0, "tp"),)), *values[1:]]


def _inputs(*more: Binding) -> tuple[Binding, ...]:
    return (*one_engine().ranks[1][0].inputs, *more)


@pytest.mark.parametrize(
    ("made", "message", "fix"),
    [
        (lambda: one_engine(versions=bundle_samples.installed()), "the engines are of TensorRT-RTX", "triton-python"),
        (
            lambda: one_engine(versions=Versions("", "", "", "")),
            "nothing of the program is in an engine",
            "triton-python",
        ),
        (
            lambda: one_engine(versions=Versions("", "", "TensorRT", "10.9.0")),
            "the engines are of TensorRT 10.9.0",
            "TensorRT 11",
        ),
        (lambda: one_engine(mesh={"tp": 1, "cp": 1}), "has 0 axes of more than one rank", "triton-python"),
        (lambda: one_engine(mesh={"tp": 2, "dp": 2}), "has 2 axes of more than one rank", "export for one axis"),
        (
            lambda: one_engine(inputs=_split(one_engine().inputs)),
            "input 'x' is split on dim 0 along axis 'tp', and .* gives the whole of it to every rank",
            "triton-python",
        ),
        (
            lambda: one_engine(outputs=_split(one_engine().outputs)),
            "output 'output0' is split on dim 0 along axis 'tp', and .* returns what rank 0 has of it",
            "triton-python",
        ),
        (lambda: one_engine(inputs=[Value("x", (), torch.float32)]), "input 'x' has no dims", "give it a dim of 1"),
        (
            lambda: one_engine(ranks=[one_engine().ranks[0], one_engine().ranks[1] * 2]),
            "rank 1 has 2 segments",
            'placement="engine"',
        ),
        (lambda: with_segment(runs="inductor"), r"rank 1 has 1 segments \(inductor\)", 'placement="engine"'),
        (
            lambda: with_segment(inputs=_inputs(Binding("coordinate_tp", Wire("coordinate", "tp"), torch.int32, (1,)))),
            "the engine of rank 1 reads its coordinate along axis 'tp', .* all ranks would compute what rank 0 does",
            "coordinates_inside=True",
        ),
        (
            lambda: with_segment(inputs=_inputs(Binding("w", Wire("weight", "up"), torch.bfloat16, (8, 8)))),
            "the engine of rank 1 reads the weight 'up'",
            "as one engine",
        ),
        (lambda: with_segment(axis=None, collectives=()), "has no collectives along axis 'tp'", "one GPU"),
        (lambda: with_segment(inputs=_inputs()[:1]), "the engine of rank 1 has other inputs than", "triton-python"),
        (
            lambda: one_engine(
                ranks=[
                    [msgspec.structs.replace(s, inputs=(msgspec.structs.replace(s.inputs[0], name="x0"),))]
                    for (s,) in one_engine().ranks
                ]
            ),
            "the engine of rank 0 calls 'x' 'x0'",
            "as one engine",
        ),
    ],
)
def test_what_the_tensorrt_backend_would_not_run_or_run_wrong_is_refused(
    made: Callable[[], Manifest], message: str, fix: str
) -> None:
    check_tensorrt(one_engine())
    with pytest.raises(BundleError, match=message) as caught:
        tensorrt_config(made())
    assert fix in caught.value.fix


def test_a_tensorrt_bundle_becomes_the_files_that_the_backend_looks_for(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    files = {name: tmp_path / name for name in ("rank0", "rank1", "self-test")}
    for name, path in files.items():
        path.write_bytes(f"the engine of {name}".encode())
    write_bundle(bundle, one_engine(), files)
    model = md.triton(bundle, tmp_path / "models/m", format="triton")
    assert {p.name for p in (model / "1").iterdir()} == {"model.plan", "model.plan.rank0", "model.plan.rank1"}
    for rank in range(2):
        assert (model / f"1/model.plan.rank{rank}").read_bytes() == f"the engine of rank{rank}".encode()
    assert (model / "1/model.plan").read_bytes() == b"the engine of rank0"
    assert parsed((model / "config.pbtxt").read_text()).backend == "tensorrt"


def test_the_python_model_has_the_whole_bundle(tmp_path: Path) -> None:
    bundle = bundle_samples.split_bundle(tmp_path / "bundle")
    model = md.triton(bundle, tmp_path / "models/m", python="/opt/it's/python")
    copied = {p.relative_to(model / "1/bundle"): p.read_bytes() for p in model.rglob("1/bundle/**/*") if p.is_file()}
    assert copied == {p.relative_to(bundle): p.read_bytes() for p in bundle.rglob("*") if p.is_file()}
    compile((model / "1/model.py").read_text(), "model.py", "exec")
    assert parsed((model / "config.pbtxt").read_text()).backend == "python"
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["m"]


def test_nothing_is_replaced_and_nothing_is_left_of_what_was_refused(tmp_path: Path) -> None:
    bundle, out = bundle_samples.split_bundle(tmp_path / "bundle"), tmp_path / "models/m"
    with pytest.raises(BundleError, match="the engines are of TensorRT-RTX"):
        md.triton(bundle, out, format="triton")
    next(bundle.glob("graphs/*")).write_text("damaged")
    with pytest.raises(BundleError, match="is damaged"):
        md.triton(bundle, out)
    assert not (tmp_path / "models").exists()
    out.mkdir(parents=True)
    (out / "config.pbtxt").write_text("somebody's")
    with pytest.raises(BundleError, match="is there already"):
        md.triton(bundle, out)
    with pytest.raises(OptionError, match="'format' cannot be 'bundle'"):
        md.triton(bundle, out, format="bundle")  # type: ignore[arg-type]
    assert [p.name for p in out.iterdir()] == ["config.pbtxt"]
