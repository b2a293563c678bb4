"""Experts of transformers that loop over those that got a token, and cannot be asked for another form, without a loop.

What a loop runs depends on the values of tensors, and no graph has that.  Every token is multiplied by the weights of
each of its experts instead, which are looked up for it: right for a table of models, and more memory than a large
model should spend.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

WITHOUT = "experts without a loop"


def calls(name: str) -> list[str]:
    """The calls of a class, or configuration, in which its experts have no loop."""
    return [f"{name}, {WITHOUT}"] if name in ("LongcatFlashForCausalLM", "Step3p7TextConfig") else []


def replace(model: nn.Module) -> None:
    """Let the experts of this model run without a loop."""
    for module in model.modules():
        if forward := _FORWARDS.get(type(module).__name__):
            module.forward = MethodType(forward, module)


def _longcat_flash(experts: Any, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """x [T, D]; indices and weights [T, k].  The last experts give a token back as it is."""
    same = indices >= experts.num_routed_experts
    chosen = indices.clamp(max=experts.num_routed_experts - 1)
    gate, up = torch.einsum("tkof,tf->tko", experts.gate_up_proj[chosen], x).chunk(2, -1)
    made = torch.einsum("tkfo,tko->tkf", experts.down_proj[chosen], experts.act_fn(gate) * up)
    total = (made * weights.masked_fill(same, 0).unsqueeze(-1)).sum(1)
    total += experts.identity_expert(x) * (weights * same).sum(-1, keepdim=True)
    return total


def _step3p7(experts: Any, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """x [T, D]; indices and weights [T, k].  One behind the last expert stands for those of other ranks."""
    there = indices < experts.num_experts
    chosen = indices.clamp(max=experts.num_experts - 1)
    gated = experts._apply_gate(torch.einsum("tkof,tf->tko", experts.gate_up_proj[chosen], x))
    made = torch.einsum("tkfo,tko->tkf", experts.down_proj[chosen], gated)
    return torch.einsum("tkf,tk->tf", made, weights * there)


_FORWARDS = {"LongcatFlashExperts": _longcat_flash, "Step3p7Experts": _step3p7}
