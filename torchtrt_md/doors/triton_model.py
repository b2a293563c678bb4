"""What a model of Triton's Python backend is: the ``model.py`` of a repository hands everything to this."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils import dlpack

from torchtrt_md.errors import MDError, OptionError
from torchtrt_md.serve.config import dims
from torchtrt_md.serve.supervisor import Supervisor

_BUNDLE = "bundle"
_TRUE = {"true": True, "1": True, "false": False, "0": False}


class TritonModel:
    """A bundle, served.

    Args:
        folder: of this version of the model; it holds the bundle.
        arguments: what Triton passes to ``initialize``.
        triton: the module ``triton_python_backend_utils``.
        python: the interpreter that runs the ranks; Triton's own by default.

    Raises:
        MDError: the ranks did not come up, or a parameter that is not understood.
    """

    def __init__(self, folder: Path, arguments: dict[str, str], triton: Any, python: str = "") -> None:
        self._triton, self._name = triton, arguments["model_name"]
        given = json.loads(arguments["model_config"]).get("parameters", {})
        parameters = {key: value["string_value"] for key, value in given.items()}
        self._unload = _parsed(parameters, "unload_on_failure", "true", _TRUE.__getitem__)
        self._supervisor = Supervisor(
            folder / _BUNDLE,
            python=python or _own_python(),
            gpus=_parsed(parameters, "gpus", "", lambda text: [int(gpu) for gpu in text.split(",") if gpu.strip()]),
            timeout=_parsed(parameters, "timeout_seconds", "300", float),
            cuda_graph=_parsed(parameters, "cuda_graph", "false", _TRUE.__getitem__),
            on_failure=self._failed,
        )

    def is_ready(self) -> bool:
        """Whether all ranks are up.  Triton asks it from 26.03 on."""
        return self._supervisor.failure is None

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """A response to each request: the outputs, or what is wrong."""
        return [self._response(request) for request in requests]

    def finalize(self) -> None:
        """End every process."""
        self._supervisor.close()

    def _response(self, request: Any) -> Any:
        triton, manifest = self._triton, self._supervisor.manifest
        try:
            inputs = {}
            for value in manifest.inputs:
                given = triton.get_input_tensor_by_name(request, value.name)
                tensor = dlpack.from_dlpack(given.to_dlpack())
                inputs[value.name] = tensor.reshape(value.shape) if tensor.shape == dims(value) else tensor
            outputs = self._supervisor.call(inputs)
        except MDError as error:
            return triton.InferenceResponse(error=triton.TritonError(str(error)))
        wanted = set(request.requested_output_names())
        return triton.InferenceResponse(
            [
                triton.Tensor.from_dlpack(value.name, outputs[value.name].reshape(dims(value)).clone())
                for value in manifest.outputs
                if value.name in wanted
            ]
        )

    def _failed(self, reason: str) -> None:
        log = self._triton.Logger.log_error
        log(f"the ranks of model {self._name!r} were ended: {reason}")
        if self._unload:
            try:
                self._triton.unload_model(self._name)
            except Exception as error:  # the server loads and unloads on its own terms
                log(f"model {self._name!r} stays loaded, and its requests fail: {error}")


def _own_python() -> str:
    """The interpreter that this process embeds; ``sys.executable`` is whatever PATH has."""
    return f"{sys.exec_prefix}/bin/python{sys.version_info.major}.{sys.version_info.minor}"


def _parsed(parameters: dict[str, str], name: str, default: str, parse: Any) -> Any:
    text = parameters.get(name, default)
    try:
        return parse(text)
    except (KeyError, ValueError) as error:
        raise OptionError(
            f"the model configuration's parameter {name!r} cannot be {text!r}",
            fix=f"give one like {default!r}" if default else "give GPUs like 0,1, one for each rank",
        ) from error
