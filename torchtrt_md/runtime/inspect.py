"""What is in an engine, layer by layer, as TensorRT tells it."""

from __future__ import annotations

from pathlib import Path

import torch

from torchtrt_md.build.flavour import flavour
from torchtrt_md.errors import LaunchError
from torchtrt_md.runtime.engine import deserialize, trt_runtime


def layers_of(file: Path, target: str) -> list[str]:
    """A line for each layer of an engine, in the order in which they run.  TensorRT reads engines on a GPU only.

    Args:
        file: the engine, of the installed TensorRT.
        target: what it was built for, for messages.

    Raises:
        LaunchError: there is no GPU, or TensorRT refuses the file on it.
    """
    if not torch.cuda.is_available():
        raise LaunchError(
            "TensorRT shows the layers of an engine on a GPU only, and this machine has none",
            fix="ask on a machine with the GPU; without --layers no GPU is needed",
        )
    device = torch.device("cuda", torch.cuda.current_device())
    runtime, _ = trt_runtime(device)
    with torch.cuda.device(device):
        loaded = deserialize(runtime, file, target)
        inspector = loaded.create_engine_inspector()
        form = flavour().trt.LayerInformationFormat.ONELINE
        return [inspector.get_layer_information(i, form).strip() for i in range(loaded.num_layers)]
