"""A bundle behind a real Triton server: two ranks over gloo, called over HTTP and gRPC."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

import torchtrt_md as md
from serve.op_by_op import op_by_op
from serve.triton_server import SECONDS, Server, processes_of, served, wait_until

REQUESTS, AT_A_TIME = 200, 8


class Model(nn.Module):
    """Inputs and outputs of several dtypes, with and without dims, and a nested result."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor, scale: Tensor, keep: Tensor) -> dict[str, Any]:
        y = self.down(torch.nn.functional.gelu(self.up(x))) * scale
        return {"y": torch.where(keep, y, 0.0), "more": (keep.sum(), y.to(torch.bfloat16))}


def inputs(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    own = torch.Generator().manual_seed(seed)  # threads share PyTorch's
    scale = torch.randn((), generator=own).to(torch.bfloat16)
    return torch.randn(2, 8, 16, generator=own), scale, torch.rand(2, 8, 1, generator=own) < 0.5


@pytest.fixture(scope="module")
def dense() -> Model:
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture(scope="module")
def models(dense: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository with two models of one bundle; ``kept`` stays loaded when it fails."""
    work = tmp_path_factory.mktemp("models")
    plan = {"up": "colwise", "down": "rowwise"}
    md.export(
        *(dense, inputs(0)),
        mesh=md.Mesh(tp=2),
        parallel=md.TensorParallel("tp", plan=plan),
        compute="inductor",
        out=work / "bundle",
    )
    for name in ("model", "kept"):
        md.triton(work / "bundle", work / "models" / name, python=sys.executable)
    op_by_op(work / "models/kept/1/bundle")
    config = work / "models/kept/config.pbtxt"
    text = config.read_text()
    changed = re.sub(r'(key: "unload_on_failure" value \{ string_value: )"true"', r'\1"false"', text)
    assert changed != text
    config.write_text(changed)
    return work / "models"


@pytest.fixture(scope="module")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served(models, tmp_path_factory.mktemp("server")) as running:
        _load(running, "model")
        yield running


def _load(server: Server, name: str) -> None:
    (client, _), _ = server.clients()
    client.load_model(name)
    assert client.is_model_ready(name)


def _call(client: Any, module: Any, name: str, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    given = []
    for key, value in values.items():
        given.append(module.InferInput(key, list(value.shape), np_to_triton_dtype(value.dtype)))
        given[-1].set_data_from_numpy(value)
    result = client.infer(name, given)
    return {key: result.as_numpy(key) for key in ("output0", "output1", "output2")}


def _values(seed: int) -> dict[str, np.ndarray]:
    x, scale, keep = inputs(seed)
    return {"x": x.numpy(), "scale": np.array([scale.item()], dtype=ml_dtypes.bfloat16), "keep": keep.numpy()}


def _is_right(dense: Model, seed: int, found: dict[str, np.ndarray]) -> None:
    with torch.no_grad():
        expected = dense(*inputs(seed))
    kept, rounded = expected["more"]
    np.testing.assert_allclose(found["output0"], expected["y"].numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found["output1"], [kept.item()])
    assert found["output2"].dtype == ml_dtypes.bfloat16
    np.testing.assert_allclose(found["output2"].astype(np.float32), rounded.float().numpy(), rtol=2e-2, atol=1e-3)


def test_two_hundred_requests_eight_at_a_time(server: Server, dense: Model) -> None:
    held = threading.local()

    def request(seed: int) -> dict[str, np.ndarray]:
        if not hasattr(held, "clients"):
            held.clients = server.clients()
        client, module = held.clients[seed % 2]
        return _call(client, module, "model", _values(seed))

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        answers = list(pool.map(request, range(REQUESTS)))
    for seed, found in enumerate(answers):
        _is_right(dense, seed, found)


@pytest.mark.parametrize("protocol", [0, 1], ids=["http", "grpc"])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": np.zeros((2, 7, 16), np.float32)}, r"'x'.*\[2,8,16\].*\[2,7,16\]"),
        ({"x": np.zeros((2, 8, 16), np.float16)}, r"'x'.*FP16.*FP32"),
        ({"keep": None}, r"expected 3 inputs but got 2"),
    ],
    ids=["shape", "dtype", "missing"],
)
def test_a_wrong_request_is_refused_and_the_next_is_answered(
    server: Server, dense: Model, protocol: int, changed: dict[str, Any], message: str
) -> None:
    client, module = server.clients()[protocol]
    values = {key: value for key, value in {**_values(1), **changed}.items() if value is not None}
    with pytest.raises(InferenceServerException, match=message):
        _call(client, module, "model", values)
    _is_right(dense, 1, _call(client, module, "model", _values(1)))


def test_a_killed_rank_makes_the_model_unready_and_a_reload_brings_it_back(
    server: Server, models: Path, dense: Model
) -> None:
    ranks = processes_of(models / "model")
    assert sorted(ranks) == [0, 1]
    killed, stop = threading.Event(), threading.Event()
    problems: list[tuple[str, float]] = []

    def requests(number: int) -> None:
        client, module = server.clients()[number % 2]
        while not stop.is_set():
            start = time.monotonic()
            try:
                _call(client, module, "model", _values(number))
            except InferenceServerException as error:
                if not killed.is_set():
                    raise
                problems.append((str(error), time.monotonic() - start))

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        calling = [pool.submit(requests, number) for number in range(AT_A_TIME)]
        try:
            time.sleep(0.5)
            killed.set()
            os.kill(ranks[1], signal.SIGKILL)
            (client, _), _ = server.clients()
            wait_until(lambda: not client.is_model_ready("model"), "the model is unready")
            wait_until(lambda: len(problems) > AT_A_TIME, "requests fail")
        finally:
            stop.set()
        for done in calling:
            done.result(SECONDS)
    assert any(f"rank 1 (process {ranks[1]}) was killed by SIGKILL" in problem for problem, _ in problems)
    assert max(seconds for _, seconds in problems) < 30.0  # and not a deadline of 300
    wait_until(lambda: not processes_of(models / "model"), "every process has ended")
    wait_until(lambda: _state(server, "model") == "UNAVAILABLE", "the model is unloaded")

    _load(server, "model")
    assert not set(processes_of(models / "model").values()) & set(ranks.values())
    for client, module in server.clients():
        _is_right(dense, 2, _call(client, module, "model", _values(2)))


def test_a_model_that_stays_loaded_says_why_to_every_request(server: Server, models: Path) -> None:
    _load(server, "kept")
    ranks = processes_of(models / "kept")
    os.kill(ranks[0], signal.SIGKILL)  # while nobody calls
    wait_until(lambda: not processes_of(models / "kept"), "every process has ended")
    for client, module in [*server.clients(), *server.clients()]:
        start = time.monotonic()
        with pytest.raises(InferenceServerException, match=rf"rank 0 \(process {ranks[0]}\) was killed by SIGKILL"):
            _call(client, module, "kept", _values(0))
        assert time.monotonic() - start < 30.0  # and not a deadline of 300
    (client, _), _ = server.clients()
    assert client.is_model_ready("model")


def test_an_unload_leaves_no_process(server: Server, models: Path) -> None:
    assert len(processes_of(models / "model")) == 2
    (client, _), _ = server.clients()
    client.unload_model("model")
    wait_until(lambda: not processes_of(models / "model"), "every process has ended")
    wait_until(lambda: _state(server, "model") == "UNAVAILABLE", "the model is unloaded")


def _state(server: Server, name: str) -> str:
    (client, _), _ = server.clients()
    found: str = next(model["state"] for model in client.get_model_repository_index() if model["name"] == name)
    return found
