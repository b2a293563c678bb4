"""xDiT (https://github.com/xdit-project/xDiT, the package ``xfuser``) as a peer: Ulysses of FLUX.1.

Its pipelines keep what is parallel in one state for the process; here a model alone takes the pipeline's place.
"""

from __future__ import annotations

import functools
import importlib.util
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
from torch import nn

BACKEND = "cudnn"  # of attention: what it takes by default where no flash-attn is installed, for all its models


def is_there() -> bool:
    """Is the package installed?"""
    return importlib.util.find_spec("xfuser") is not None


def ulysses(model: Any, text_tokens: int) -> nn.Module:
    """diffusers' FLUX.1 made xDiT's, in place.  It takes and returns the whole, on every rank.

    Args:
        text_tokens: which the ranks divide; else xDiT computes something else.
    """
    from xfuser.core.distributed import get_runtime_state, initialize_runtime_state
    from xfuser.model_executor.models.transformers import transformer_flux

    assert text_tokens % dist.get_world_size() == 0
    model.__class__ = transformer_flux.xFuserFlux1Transformer2DWrapper
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.attn.processor = transformer_flux.xFuserFluxAttnProcessor()
    initialize_runtime_state(SimpleNamespace(transformer=model), _config())
    state = get_runtime_state()
    state.set_attention_backend(BACKEND)
    state.max_condition_sequence_length = text_tokens
    parallel: nn.Module = model
    return parallel


@functools.cache
def _config() -> Any:
    """The groups of all ranks, which there may be once, and the configuration that goes with them."""
    from xfuser import xFuserArgs
    from xfuser.core.distributed import init_distributed_environment, initialize_model_parallel

    rank, size = dist.get_rank(), dist.get_world_size()
    init_distributed_environment(rank=rank, world_size=size, local_rank=rank, backend="nccl")
    initialize_model_parallel(sequence_parallel_degree=size, ulysses_degree=size, backend="nccl")
    return xFuserArgs(model="FLUX.1", ulysses_degree=size).create_config()[0]
