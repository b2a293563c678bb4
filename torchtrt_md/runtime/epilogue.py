"""GELU in the epilogue of the product in front of it, for parts that Inductor compiles on a GPU.

    before    y = gelu(view(addmm(bias, x, w)), approximate="tanh")
    after     y = view(_addmm_activation(bias, x, w, use_gelu=True))

cuBLASLt's GELU is the tanh form.  It is applied to the product's float32 sums, before they are rounded to 16 bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from torchtrt_md.place.partition import VIEWS

aten = torch.ops.aten
_DTYPES = (torch.float16, torch.bfloat16)


def fuse_gelu(graph: GraphModule) -> int:
    """Rewrite the graph in place; the number of products that got an epilogue."""
    count = 0
    for node in list(graph.graph.find_nodes(op="call_function", target=aten.gelu.default)):
        product = _product(node)
        if product is None or _form(node) != "tanh":
            continue
        product.target = aten._addmm_activation.default
        product.kwargs = {**product.kwargs, "use_gelu": True}
        node.replace_all_uses_with(node.args[0])
        graph.graph.erase_node(node)
        count += 1
    graph.recompile()
    return count


def _form(node: Node) -> Any:
    return node.args[1] if len(node.args) > 1 else node.kwargs.get("approximate", "none")


def _product(node: Node) -> Node | None:
    """The product whose result, seen by views alone, is read by this node only."""
    x = node.args[0]
    assert isinstance(x, Node)
    while x.target in VIEWS and len(x.users) == 1:
        x = x.all_input_nodes[0]
    plain = x.target is aten.addmm.default and len(x.users) == 1 and not x.kwargs
    if not plain:
        return None
    bias, value = x.args[0], x.meta["val"]
    assert isinstance(bias, Node)
    return x if value.dtype in _DTYPES and bias.meta["val"].ndim == 1 else None
