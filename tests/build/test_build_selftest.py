"""Self-tests are built without a GPU, and their networks are the one collective that they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from torchtrt_md.build import layers
from torchtrt_md.build.cache import EngineCache
from torchtrt_md.build.flavour import flavour
from torchtrt_md.build.selftest import build_self_tests, self_test_network
from torchtrt_md.build.torch_trt import load
from torchtrt_md.errors import TargetError
from torchtrt_md.segment import Segment
from torchtrt_md.selftest import OPS, RING, self_test

RTX = pytest.mark.skipif(flavour().name != "TensorRT-RTX", reason="TensorRT builds for the GPU that is there only")
TESTS = [self_test(op, "cp", 4, torch.bfloat16 if op == RING else torch.float32) for op in OPS]


@RTX
def test_all_are_built_once_and_found_again(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path)
    tests = [t for t in TESTS if t.collectives[0].op != RING]
    built = build_self_tests(tests, "portable", cache)
    assert [part.segment for part in built] == tests
    assert all(part.engine is not None and part.engine.stat().st_size > 0 for part in built)
    assert len({part.engine for part in built}) == len(tests)
    assert build_self_tests(tests, "portable", cache) == built
    assert (cache.hits, cache.misses) == (len(tests), len(tests))


@RTX
def test_a_ring_is_built_where_the_target_has_one(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path)
    for dtype in (torch.bfloat16, torch.float16):
        (part,) = build_self_tests([self_test(RING, "cp", 4, dtype)], "sm120", cache)
        assert part.engine is not None
    for target in ("sm80", "portable"):
        with pytest.raises(TargetError, match="ring attention inside an engine cannot be built"):
            build_self_tests(TESTS, target, cache)


@pytest.mark.parametrize("test", TESTS, ids=OPS)
def test_the_network_is_the_one_collective(test: Segment) -> None:
    f, (c,) = flavour(), test.collectives
    builder = f.trt.Builder(load().logger)
    network, keep = self_test_network(f, builder, test)
    (found,) = layers.communications(f, network)
    assert (found.op, found.ranks, found.elements_in) == (c.op, 4, c.elements)
    assert [network.get_input(i).name for i in range(network.num_inputs)] == [b.name for b in test.inputs]
    (result,) = test.outputs
    out = network.get_output(0)
    assert (out.name, tuple(out.shape)) == (result.name, result.shape)
    if c.op == RING:
        assert keep[0].item() == pytest.approx(128**-0.5)
