"""Build the engines of self-tests (:mod:`torchtrt_md.selftest`): one layer each, in milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchtrt_md.build import layers, probes
from torchtrt_md.build.builder import write_engine
from torchtrt_md.build.cache import EngineCache, engine_key
from torchtrt_md.build.flavour import Flavour, flavour, trt_dtype
from torchtrt_md.build.torch_trt import load
from torchtrt_md.errors import BuildError
from torchtrt_md.segment import Part, Segment
from torchtrt_md.selftest import RING, ROOT, SUMS


def build_self_tests(tests: Sequence[Segment], target: str, cache: EngineCache) -> list[Part]:
    """Each self-test with its engine's file.

    Args:
        tests: of :func:`torchtrt_md.selftest.self_tests`.
        target: as for :func:`torchtrt_md.build`.
        cache: where engines of earlier builds are, and these will be.

    Raises:
        TargetError: the target has no ring attention.
        BuildError: TensorRT cannot build one.
    """
    return [_built(test, target, cache) for test in tests]


def _built(test: Segment, target: str, cache: EngineCache) -> Part:
    f, (c,) = flavour(), test.collectives
    if c.op == RING:
        f.check_ring(target)
    key = engine_key(f"{test.name} {c}", axis=test.axis, size=c.ranks, target=target, flavour=f)
    found = cache.find(key)
    if found is None:
        builder = f.trt.Builder(load().logger)
        network, keep = self_test_network(f, builder, test)
        config = probes.builder_config(f, builder)
        f.set_target(config, target)
        with cache.unfinished() as file:
            if not write_engine(f, builder, network, config, file):
                raise BuildError(
                    f"{f.name} {f.version} could not build {test.name} for target {target!r}",
                    fix='its log above says why; use placement="split", where PyTorch communicates',
                )
            found = cache.store(key, file)
        del keep  # TensorRT has read it
    return Part(test, engine=found)


def self_test_network(f: Flavour, builder: Any, test: Segment) -> tuple[Any, list[Tensor]]:
    """The network of a self-test, and its constants, which must live until it is built."""
    network = builder.create_network(probes.network_flags(f))
    inputs = [network.add_input(b.name, getattr(f.trt.DataType, trt_dtype(b.dtype)), b.shape) for b in test.inputs]
    (c,), (result,), keep = test.collectives, test.outputs, []
    if c.op == RING:
        factor = torch.full((1, 1, 1, 1), layers.default_scale(test.inputs[0].shape[-1]))
        keep.append(factor)
        weights = f.trt.Weights(f.trt.DataType.FLOAT, factor.data_ptr(), 1)
        scale = network.add_constant((1, 1, 1, 1), weights).get_output(0)
        q, k, v = inputs
        out = layers.add_attention(f, network, q, k, v, None, False, scale, ranks=c.ranks)
    else:
        reduce_op = "sum" if c.op in SUMS else None
        root = ROOT if c.op == "broadcast" else layers.NO_ROOT
        out = layers.add_collective(f, network, inputs[0], c.op, c.ranks, reduce_op=reduce_op, root=root)
    out.name = result.name
    network.mark_output(out)
    return network, keep
