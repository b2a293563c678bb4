"""The private names of PyTorch that graphs need are there; each test says what goes without its name."""

from __future__ import annotations

import copy

import torch
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from torchtrt_md.graph.functional import copied
from torchtrt_md.graph.private import lazy_modules

X = torch.tensor([1.0, 2.0])


def test_code_is_generated_when_it_is_asked_for() -> None:
    with lazy_modules():
        graph = make_fx(lambda x: x + 1)(X)
    for module in (graph, copied(graph), copied(make_fx(lambda x: x + 1)(X)), copy.deepcopy(copied(graph))):
        assert "_code" not in vars(module), "the code of every graph would be generated, a tenth of a capture"
        (add,) = module.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
        add.args = (add.args[0], 3)
        module.recompile()
        assert module(X).tolist() == [4, 5]
        add.args = (add.args[0], 5)
        module.recompile()
        assert "5" in module.code
        assert module(X).tolist() == [6, 7]
    assert isinstance(graph, GraphModule)
    assert "_code" in vars(make_fx(lambda x: x)(X))
