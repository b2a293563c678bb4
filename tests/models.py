"""Small models with the structure of the real ones, for all tests."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel, LTXVideoTransformer3DModel, WanTransformer3DModel
from diffusers.utils import logging
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

logging.set_verbosity_error()

# What makes the models of examples/ small.
SMALL_EXAMPLES = {
    "FLUX_LAYERS": "1",
    "FLUX_SINGLE_LAYERS": "1",
    "FLUX_IMAGE_TOKENS": "32",
    "FLUX_TEXT_TOKENS": "16",
    "LLAMA_HIDDEN": "128",
    "LLAMA_INTERMEDIATE": "256",
    "LLAMA_TOKENS": "16",
    "VIT_HIDDEN": "64",
    "VIT_INTERMEDIATE": "128",
    "WAN_FRAMES": "1",
    "WAN_FFN": "256",
    "WAN_TEXT_TOKENS": "16",
}

Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def flux(
    dtype: torch.dtype = torch.float32,
    heads: int = 4,
    image: int = 32,
    text: int = 16,
    layers: int = 1,
    single_layers: int = 2,
) -> Call:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        num_layers=layers,
        num_single_layers=single_layers,
        num_attention_heads=heads,
        attention_head_dim=16,
        axes_dims_rope=(4, 6, 6),
        joint_attention_dim=32,
        pooled_projection_dim=24,
        in_channels=16,
    )
    inputs = {
        "hidden_states": torch.randn(1, image, 16),
        "encoder_hidden_states": torch.randn(1, text, 32),
        "pooled_projections": torch.randn(1, 24),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.stack([torch.zeros(image), torch.arange(image) // 8, torch.arange(image) % 8], dim=1),
        "txt_ids": torch.zeros(text, 3),
    }
    kwargs = {name: t.to(dtype) for name, t in inputs.items()}
    return model.to(dtype).eval(), (), {**kwargs, "return_dict": False}


def llama(dtype: torch.dtype = torch.float32, heads: int = 8, kv_heads: int = 4, batch: int = 1) -> Call:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16 * heads,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=128,
    )
    return LlamaForCausalLM(config).to(dtype).eval(), (torch.randint(0, 128, (batch, 24)),), {"use_cache": False}


def wan(dtype: torch.dtype = torch.float32) -> Call:
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    inputs = {"hidden_states": torch.randn(1, 4, 2, 8, 8), "encoder_hidden_states": torch.randn(1, 8, 16)}
    kwargs = {name: t.to(dtype) for name, t in inputs.items()}
    return model.to(dtype).eval(), (), {**kwargs, "timestep": torch.tensor([500]), "return_dict": False}


def qwen3(dtype: torch.dtype = torch.float32) -> Call:
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=128,
    )
    return Qwen3ForCausalLM(config).to(dtype).eval(), (torch.randint(0, 128, (1, 16)),), {"use_cache": False}


class MLP(nn.Module):
    """Two linear layers with biases, the smallest model that tensor parallelism has something to do in."""

    def __init__(self, width: int = 32, hidden: int = 64) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(torch.nn.functional.gelu(self.up(x)))
        return result


def mlp(dtype: torch.dtype = torch.float32) -> Call:
    torch.manual_seed(0)
    return MLP().to(dtype).eval(), (torch.randn(2, 8, 32, dtype=dtype),), {}


class SelfAttention(nn.Module):
    """One attention over a sequence: the smallest model that context parallelism has something to do in."""

    def __init__(self, heads: int = 4, kv_heads: int = 4, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.causal = heads, kv_heads, causal
        self.q = nn.Linear(32, heads * 8)
        self.kv = nn.Linear(32, 2 * kv_heads * 8)
        self.out = nn.Linear(heads * 8, 32)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q = self.q(x).view(batch, tokens, self.heads, 8).transpose(1, 2)
        k, v = self.kv(x).view(batch, tokens, 2, self.kv_heads, 8).permute(2, 0, 3, 1, 4).unbind(0)
        attended = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=self.causal, enable_gqa=self.kv_heads != self.heads
        )
        result: Tensor = self.out(attended.transpose(1, 2).reshape(batch, tokens, -1))
        return result


class Deep(nn.Module):
    """Equal attentions in a row."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(SelfAttention() for _ in range(depth))
        self.out = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.out(x)
        return result


def attention(
    dtype: torch.dtype = torch.float32, heads: int = 4, kv_heads: int = 4, causal: bool = False, tokens: int = 16
) -> Call:
    torch.manual_seed(0)
    return SelfAttention(heads, kv_heads, causal).to(dtype).eval(), (torch.randn(2, tokens, 32, dtype=dtype),), {}


def ltx() -> Call:
    """With a masked prompt, and lengths that do not divide by the ranks."""
    torch.manual_seed(0)
    model = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=16,
    )
    kept = torch.ones(1, 7)
    kept[:, 4:] = 0  # padding of the prompt
    return (
        model.eval(),
        (),
        {
            "hidden_states": torch.randn(1, 2 * 3 * 3, 8),
            "encoder_hidden_states": torch.randn(1, 7, 16),
            "timestep": torch.tensor([500]),
            "encoder_attention_mask": kept,
            "num_frames": 2,
            "height": 3,
            "width": 3,
            "return_dict": False,
        },
    )
