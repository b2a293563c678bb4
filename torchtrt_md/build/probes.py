"""What the installed TensorRT can build, found out with networks of a few layers.

Versions differ in this, and some fail on a combination of layers that they support one by one, so
nothing is concluded from a version number.  A probe takes milliseconds, needs no GPU, and is done once.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from torchtrt_md.build.flavour import Flavour, flavour
from torchtrt_md.build.layers import NO_ROOT, add_attention, add_collective

_RANKS = 2


@functools.cache
def gathers_beside_attention(dtype: str) -> bool:
    """Does ALL_GATHER build in a network with an attention?  TensorRT-RTX 1.6.1 cannot infer its shape there."""

    def network(f: Flavour, net: Any) -> Any:
        heads = (1, 2, 16, 64)
        q = net.add_input("q", getattr(f.trt.DataType, dtype), heads)
        kv = net.add_input("kv", getattr(f.trt.DataType, dtype), heads)
        whole = add_collective(f, net, kv, "all_gather", _RANKS)
        part = net.add_slice(whole, (1, 0, 0, 0), heads, (1, 1, 1, 1)).get_output(0)
        return add_attention(f, net, q, part, part, None, False, _one(f, net, dtype))

    return _builds(network)


@functools.cache
def exchanges(dtype: str) -> bool:
    """Does ALL_TO_ALL build in this dtype?  TensorRT 11.1 has none in bfloat16."""
    return moves("all_to_all", dtype)


@functools.cache
def moves(op: str, dtype: str) -> bool:
    """Does this collective, which computes nothing, build in this dtype?  TensorRT-RTX 1.6.1 has few in INT64."""

    def network(f: Flavour, net: Any) -> Any:
        x = net.add_input("x", getattr(f.trt.DataType, dtype), (2 * _RANKS, 64))
        return add_collective(f, net, x, op, _RANKS, root=0 if op == "broadcast" else NO_ROOT)

    return _builds(network)


def _one(f: Flavour, net: Any, dtype: str) -> Any:
    torch_dtype = {"BF16": torch.bfloat16, "HALF": torch.float16, "FLOAT": torch.float32}[dtype]
    one = torch.ones(1, 1, 1, 1, dtype=torch_dtype)
    _keep.append(one)  # TensorRT reads weights when it builds
    return net.add_constant((1, 1, 1, 1), f.trt.Weights(getattr(f.trt.DataType, dtype), one.data_ptr(), 1)).get_output(
        0
    )


_keep: list[torch.Tensor] = []


def _builds(network: Any) -> bool:
    f = flavour()
    # A probe that fails says so on TensorRT's log, where it would look like an error of the user's.
    builder = f.trt.Builder(_silent(f))
    net = builder.create_network(network_flags(f))
    output = network(f, net)
    net.mark_output(output)
    return builder.build_serialized_network(net, builder_config(f, builder)) is not None


def _silent(f: Flavour) -> Any:
    class Silent(f.trt.ILogger):  # type: ignore[name-defined, misc]
        def log(self, severity: Any, message: str) -> None:
            pass

    return Silent()


def network_flags(f: Flavour) -> int:
    """Strongly typed networks; TensorRT-RTX has no others and no flag for it."""
    if f.name == "TensorRT-RTX":
        return 0
    return 1 << int(f.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def builder_config(f: Flavour, builder: Any) -> Any:
    """A config that lets collectives in where that is still a preview, and computes float32 in float32."""
    config = builder.create_builder_config()
    preview = getattr(f.trt.PreviewFeature, "MULTIDEVICE_RUNTIME_10_16", None)
    if preview is not None:
        config.set_preview_feature(preview, True)
    config.clear_flag(f.trt.BuilderFlag.TF32)
    return config
