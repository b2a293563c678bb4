"""The private name of PyTorch that graphs need: without it each copy of a large graph takes twice as long."""

from __future__ import annotations

from torch.fx import Graph, GraphModule
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.nn import Module


def graph_module(root: Module, graph: Graph) -> GraphModule:
    """A ``GraphModule`` of which Python code is generated when it is called, and so for most graphs never."""
    return _LazyGraphModule(root, graph)
