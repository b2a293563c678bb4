"""transformers' BERT, sharded by PyTorch's own parallelize_module and compiled by torch.compile's backend.

    torchrun --nproc_per_node=2 examples/bert.py              # TensorRT on 2 GPUs; without any, Inductor
    torchrun --nproc_per_node=2 examples/bert.py --compute inductor
    torchrun --nproc_per_node=4 examples/bert.py --large      # of the size of BERT-large, 512 tokens

Weights are random and nothing is downloaded.
"""

from __future__ import annotations

import argparse
import copy
import os
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import BertConfig, BertModel

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}


def shard(bert: BertModel, mesh: DeviceMesh) -> BertModel:
    """Split heads and the feed-forward's hidden size; each attention and each feed-forward ends in an all_reduce."""
    plan = {
        "attention.self.query": ColwiseParallel(),
        "attention.self.key": ColwiseParallel(),
        "attention.self.value": ColwiseParallel(),
        "attention.output.dense": RowwiseParallel(),
        "intermediate.dense": ColwiseParallel(),
        "output.dense": RowwiseParallel(),
    }
    for layer in bert.encoder.layer:
        parallelize_module(layer, mesh, plan)
    return bert


def main() -> None:
    parser = argparse.ArgumentParser(description="BERT, tensor parallel, with torch.compile(backend='torchtrt_md')")
    parser.add_argument("--compute", choices=("tensorrt", "inductor"), help="by default TensorRT where there are GPUs")
    parser.add_argument("--large", action="store_true", help="the size of BERT-large")
    options = parser.parse_args()
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, tokens = (torch.bfloat16 if kind == "cuda" else torch.float32), (512 if options.large else 32)
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    mesh = init_device_mesh(kind, (int(os.environ["WORLD_SIZE"]),), mesh_dim_names=("tp",))

    torch.manual_seed(0)  # weights and inputs must be equal on all ranks
    config = BertConfig(**(LARGE if options.large else SMALL))
    dense = BertModel(config).to(kind, dtype).eval()
    sharded = shard(copy.deepcopy(dense), mesh)
    compute = options.compute or ("tensorrt" if kind == "cuda" else "inductor")
    compiled: Any = torch.compile(sharded, backend="torchtrt_md", options={"compute": compute})

    ids = torch.randint(0, config.vocab_size, (2, tokens), device=kind)
    with torch.no_grad():
        expected, found = dense(ids).last_hidden_state, compiled(ids).last_hidden_state
    error = (torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected)).item()
    if dist.get_rank() == 0:
        print(f"last_hidden_state {list(found.shape)}; relative error against the dense model {error:.1e}")
    dist.destroy_process_group()
    allowed = 1e-5 if dtype is torch.float32 else 5e-2
    if not error <= allowed:
        raise SystemExit(f"the error is {error:.1e}, and {allowed} is rounding")


if __name__ == "__main__":
    main()
