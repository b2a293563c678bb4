"""Every private name of PyTorch that graphs need, and what breaks without it."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch._decomp import decomposition_table as decomposition_table
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.fx import Graph, GraphModule
from torch.fx._lazy_graph_module import _LazyGraphModule, _use_lazy_graph_module
from torch.nn import Module


def lazy_modules() -> AbstractContextManager[None]:
    """Let graphs that PyTorch traces in here generate their Python code when it is asked for.

    Stages read nodes, so the code of most graphs is never run.  Without it, each trace and each copy makes some.
    """
    return _use_lazy_graph_module(True)


def lazy_module(root: Module, graph: Graph) -> GraphModule:
    """The graph as a module that generates its Python code when it is asked for; see :func:`lazy_modules`.

    Args:
        root: where the graph's constants are.
    """
    return _LazyGraphModule(root, graph)
