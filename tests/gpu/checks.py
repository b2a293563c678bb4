"""Weights, memory, the cost of a call, CUDA graphs, and rings: what has to be seen on a GPU."""

from __future__ import annotations

import gc
import itertools
import os
import statistics
import time
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchtrt_md as md
from gpu.case import TIMEOUT, Found, Rank, first_tensor
from gpu.doors import Door
from torchtrt_md.errors import LaunchError
from torchtrt_md.lowering import quantize_math
from torchtrt_md.lowering.float8_rows import DTYPES, LARGEST_ERROR, packed_bytes, rounded
from torchtrt_md.lowering.ops import fake_quantize
from torchtrt_md.runtime import rows
from torchtrt_md.verification.compare import relative_error

CALLS = 500


@torch.no_grad()
def weights_once(at: Rank) -> Found:
    """A model on the GPU whose weights TensorRT takes transposed, and joined, is there once."""
    at.clean_up()
    before = torch.cuda.memory_allocated()
    model, args, _ = at.model("wide decoder")
    size = sum(p.nbytes for p in model.parameters())
    options = {**Door("md.compile", "wide decoder", "ulysses").options(at.size), "cuda_graph": False}
    runner = md.compile(model, args, **options)
    runner(*args)
    at.synchronize()
    gc.collect()
    ratio = (torch.cuda.memory_allocated() - before) / size
    found = Found(message=f"{ratio:.3f} times its {size / 1e6:.0f} MB of weights")
    found.expect(ratio < 1.25, "more than 1.25 times the weights are allocated")
    runner.close()
    return found


def vote_cost(at: Rank) -> Found:
    """What the votes of a call cost the host; told, not judged."""
    told = []
    for votes in ("always", "first"):
        model, args, _ = at.model("decoder")
        options = Door("md.compile", "decoder", "ring").options(at.size) | {"votes": votes}
        if at.device.type == "cpu":
            options |= {"compute": "inductor", "cuda_graph": False}
        runner = md.compile(model, args, **options)
        times = []
        for _ in range(200):
            start = time.perf_counter()
            runner(*args)
            times.append(time.perf_counter() - start)
            at.synchronize()
        told.append(f"{statistics.median(times) * 1e6:.0f} us with votes={votes!r}")
        runner.close()
    return Found(message=f"host time of a call, median of 200: {', '.join(told)}")


def many_calls(at: Rank) -> Found:
    """Memory and files stay as they are, and so do the bits."""
    model, args, kwargs = at.model("flux")
    runner = md.compile(model, args, kwargs, **Door("md.compile", "flux", "ulysses", graph=False).options(at.size))
    results = [first_tensor(runner(*args, **kwargs)).clone()]

    def half() -> tuple[int, int]:
        """The bytes allocated and the open files after half of the calls."""
        for number in range(CALLS // 2):
            result = first_tensor(runner(*args, **kwargs))
            if number % 50 == 0:
                results[1:] = [result.clone()]
                found.expect(torch.equal(results[1], results[0]), "later calls gave other bits than the first")
        at.synchronize()
        return torch.cuda.memory_allocated(), len(os.listdir("/proc/self/fd"))

    found, start = Found(), time.perf_counter()
    before, after = half(), half()
    seconds = time.perf_counter() - start
    found.message = f"{seconds / CALLS * 1e3:.2f} ms a call with its votes"
    found.compare(results, *at.reference("flux"))
    found.expect(
        after[0] <= before[0] and after[1] == before[1], f"bytes allocated and open files: {before}, then {after}"
    )
    runner.close()
    return found


def float8_exchanges(at: Rank) -> Found:
    """Rows in float8: the kernels give the bits that the CPU gives, and programs the same by either transport."""
    found = Found()
    for dtype, width in itertools.product(DTYPES, (128, 72)):
        generator = torch.Generator(at.device).manual_seed(at.rank)
        count = 29_997  # of each of 3 parts more than all programs have in hand at once
        scales = 2.0 ** torch.linspace(-14, 14, count, device=at.device).unsqueeze(1)
        x = (torch.randn(count, width, generator=generator, device=at.device) * scales).to(dtype)
        x[7, 3], x[8, 4], x[9], x[10, 5] = float("nan"), float("inf"), 0.0, torch.finfo(dtype).max
        sent = torch.zeros(3, packed_bytes(x.shape, 3), dtype=torch.uint8, device=at.device)
        rows.pack([*zip(sent.chunk(3), x.chunk(3), strict=True)])
        right = torch.where(x.isfinite().all(-1, keepdim=True), rounded(x.cpu()).to(at.device), torch.nan)
        arrived = torch.empty_like(x)
        rows.unpack(sent, arrived)
        same = torch.equal(arrived.nan_to_num(7.0), right.to(dtype).nan_to_num(7.0))
        found.expect(same and torch.equal(arrived.isnan(), right.isnan()), f"{dtype} {width} wide: other bits")
    results, told = {}, []
    reference, _ = at.reference("flux")
    for transport, sent_as in itertools.product(("nccl", "store"), ("model", "float8")):
        model, args, kwargs = at.model("flux")
        door = Door("md.compile", "flux", "ulysses", compute="inductor", transport=transport)
        runner = md.compile(model, args, kwargs, **door.options(at.size), exchange_dtype=sent_as)
        for _ in range(3):
            results[transport, sent_as] = first_tensor(runner(*args, **kwargs)).clone()
        error = float((results[transport, sent_as].double() - reference).norm() / reference.norm())
        told.append(f"{error:.2e} in {sent_as} by {transport}")
        found.expect(error < LARGEST_ERROR, f"{told[-1]}, by L2 norms")
        runner.close()
    unchanged = torch.equal(results["nccl", "model"], results["nccl", "float8"])
    found.expect(not unchanged, "nothing was rounded")
    found.expect(torch.equal(results["nccl", "float8"], results["store", "float8"]), "transports differ")
    found.message = f"errors by L2 norms: {', '.join(told)}"
    return found


class Quantized(nn.Module):
    """A linear layer with quantizers, as Model Optimizer's: of its argument by one number, of its weight by rows.

    Args:
        how: the bits to round to, as ``fake_quantize`` has them.
        held: hold the weight in these 8 bits, as ``mtq.compress`` does.
    """

    def __init__(self, how: tuple[int, int, bool], *, held: bool = False, width: int = 512) -> None:
        super().__init__()
        self.how, self.linear, self.out = how, nn.Linear(width, width), nn.Linear(width, width)
        self.amax = nn.Buffer(torch.tensor(4.0))
        self.of_rows = nn.Buffer(self.linear.weight.detach().abs().amax(1, keepdim=True) * 0.75)  # outliers left out
        self.held: nn.Parameter | None = None
        if held:
            scale = quantize_math.scale_of(self.of_rows, *how[:2])
            numbers = quantize_math.rounded(self.linear.weight.detach(), self.of_rows, *how)
            self.held = nn.Parameter(numbers.to(torch.float8_e4m3fn if how[1] else torch.int8), requires_grad=False)
            self.scale = nn.Buffer(1 / scale)

    def forward(self, x: Tensor) -> Tensor:
        if self.held is not None:
            weight = self.held.to(x.dtype) * self.scale.to(x.dtype)
        else:
            weight = fake_quantize(self.linear.weight, self.of_rows, *self.how)
        y: Tensor = self.out(F.linear(fake_quantize(x, self.amax, *self.how), weight, self.linear.bias))
        return y


@torch.no_grad()
def quantizers(at: Rank) -> Found:
    """Engines round what is beyond the range of 8 bits to its end, as the model does, and leave NaN what it is."""
    found, told = Found(), []
    parallel = md.ContextParallel("cp", plan={"": {"x": md.Split(1)}, "out": md.Gather(1)})
    options: dict[str, Any] = {"mesh": md.Mesh(cp=at.size), "parallel": parallel, "compute": "tensorrt"}
    options |= {"timeout": TIMEOUT, "report": False}
    for (kind, how), held, placement in itertools.product(
        {"float8": (8, 4, False), "int8": (8, 0, False)}.items(), (False, True), ("engine", "split")
    ):
        torch.manual_seed(0)
        name = f"{kind}, held," if held else kind
        model = Quantized(how, held=held).to(at.device).eval()
        model.linear, model.out = model.linear.to(torch.bfloat16), model.out.to(torch.bfloat16)
        x = torch.randn(1, 256, 512, device=at.device, dtype=torch.bfloat16)
        with md.compile(model, (x,), placement=placement, **options) as runner:
            for factor in (1.0, 64.0):
                error = relative_error(first_tensor(runner(x * factor)), model(x * factor))
                told.append(f"{error:.2e} of {name} {factor:g} times, {placement}")
                found.expect(error < 8 * torch.finfo(torch.bfloat16).eps, told[-1])
            if kind == "float8":  # of 8 bits NaN is some number
                x[0, 7, 3] = float("nan")
                found.expect(bool(first_tensor(runner(x))[0, 7].isnan().all()), f"NaN is lost in {name}, {placement}")
    found.message = f"errors: {'; '.join(told)}"
    return found


def graphs(at: Rank) -> Found:
    """CUDA graphs of calls, on each GPU by itself."""
    from torchtrt_md.runtime.graphs import Budget, Graphs
    from torchtrt_md.segment import Wire

    x, y = Wire("input", "x"), Wire("output", "y")
    found = Found()

    def double(inputs: Any) -> Any:
        return {y: inputs[x] * 2}

    def waits(inputs: Any) -> Any:
        torch.cuda.current_stream().synchronize()  # which no capture allows
        return double(inputs)

    def of(size: int) -> Any:
        return {x: torch.randn(size, device=at.device)}

    def right(made: Graphs, size: int) -> bool:
        inputs = of(size)
        return torch.equal(made(inputs)[y], inputs[x] * 2)

    stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for static in (False, True):
            made = Graphs(double, Budget(1), at.device, static_outputs=static)
            found.expect(all(right(made, 4) for _ in range(4)), "a replay on new inputs is wrong")
            result = made(of(4))[y]
            kept, inputs = result.clone(), of(4)
            made(inputs)
            found.expect(torch.equal(result, inputs[x] * 2 if static else kept), "whose memory the results are")
        for run, sizes, words in ((double, (2, 3, 4), "max_graphs"), (waits, (4, 4), "could not be captured")):
            made = Graphs(run, Budget(2), at.device)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found.expect(all(right(made, size) for size in (*sizes, sizes[-1])), "a call without a graph is wrong")
            told = [str(w.message) for w in caught]
            found.expect(len(told) == 1 and words in told[0], f"one warning of {words!r}, but {told}")
        made = Graphs(double, Budget(1), at.device)
        found.expect(right(made, 4), "a call that is captured is wrong")
        (held,) = made.captured.values()  # as an error does that was raised in a replay
        made.release()
        try:
            held.replay(of(4))  # type: ignore[union-attr]
            found.problems.append("a graph that was let go of lives on where something refers to it")
        except RuntimeError:
            pass
        found.expect(_outlives_another(at), "a graph writes where one that was let go of had cuBLAS's workspace")
    torch.cuda.synchronize()
    return found


def _outlives_another(at: Rank) -> bool:
    """Whether a graph of products leaves others' memory alone when another of its stream has been destroyed."""
    from torchtrt_md.runtime.graphs import Budget, Graphs
    from torchtrt_md.segment import Wire

    x, y = Wire("input", "x"), Wire("output", "y")
    weight = torch.randn(8192, 64, device=at.device, dtype=torch.bfloat16)  # a long sum, which cuBLAS splits

    def product(inputs: Any) -> Any:
        return {y: inputs[x] @ weight}

    inputs: Any = {x: torch.randn(64, 8192, device=at.device, dtype=torch.bfloat16)}
    first, second = (Graphs(product, Budget(1), at.device) for _ in range(2))
    results = [made(inputs)[y].clone() for made in (first, second)]
    torch.cuda.synchronize()
    first.release()
    gc.collect()
    others = [torch.full((2**18,), 7, dtype=torch.uint8, device=at.device) for _ in range(400)]
    fine = all(torch.equal(second(inputs)[y], results[1]) for _ in range(3))
    return fine and all(bool((other == 7).all()) for other in others)


def _self_test(at: Rank, op: str, dtype: torch.dtype, target: str) -> None:
    """Build one self-test and run it as a launch does."""
    from torchtrt_md.build.cache import EngineCache
    from torchtrt_md.build.selftest import build_self_tests
    from torchtrt_md.launch import Launch
    from torchtrt_md.runtime.bring_up import check_communication
    from torchtrt_md.selftest import self_test

    mesh, launch = md.Mesh(cp=at.size), Launch.join(TIMEOUT, device=at.device)
    groups = launch.connect(mesh)
    cache = EngineCache(at.work / f"self-tests {at.rank}")
    tests = launch.together(
        "building a self-test", lambda: build_self_tests([self_test(op, "cp", at.size, dtype)], target, cache)
    )
    check_communication(launch, mesh, groups, tests, target)


def self_tests(at: Rank) -> Found:
    """The self-test of each op gives what every rank must get."""
    from torchtrt_md.selftest import OPS, RING

    begin = time.perf_counter()
    for op in OPS:
        if op != RING:
            _self_test(at, op, torch.float32, "portable")
    return Found(message=f"{len(OPS) - 1} ops, built, loaded and run in {time.perf_counter() - begin:.2f} s")


def ring_self_test(at: Rank) -> Found:
    """The self-test of rings inside engines refuses GPUs without kernels for them, once the gate on them is opened."""
    from torchtrt_md.build import flavour
    from torchtrt_md.selftest import RING

    if torch.cuda.get_device_capability() >= (10, 0):
        _self_test(at, RING, torch.bfloat16, "current")
        return Found(message="the ring gives what it must")
    gate, found = flavour._RING_CAPABILITY, Found()
    flavour._RING_CAPABILITY = (8, 0)
    try:
        found.must_refuse(LaunchError, lambda: _self_test(at, RING, torch.bfloat16, "sm80"), "ring")
    finally:
        flavour._RING_CAPABILITY = gate
    return found
