"""Decoders with the exact shapes of models in use and random weights, in plain PyTorch, as transformers writes them.

Two blocks: RMSNorm, rotary embedding of the whole head_dim, grouped heads and SwiGLU, one after the other (Mistral,
Llama); LayerNorm, rotary embedding of a part, a plain MLP, biases, attention and MLP side by side (Phi-2). Sizes are
those of the published configurations. Left out is what transformers needs for its own ends: cache classes, hooks,
arguments that pass through.

ATTENTION: name -> function(q, k, v, mask) of [batch, heads, tokens, head_dim] (transposed views), which is causal and
returns [batch, tokens, heads, head_dim]; only eager attention looks at the mask.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import eager
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flash_ext


@dataclass(frozen=True)
class Shape:
    layers: int
    heads_q: int
    heads_kv: int
    head_dim: int
    hidden: int  # of the MLP
    vocabulary: int
    theta: float  # base of the rotary embedding
    rotary_dim: int
    is_phi: bool = False

    @property
    def width(self):
        return self.heads_q * self.head_dim  # true of these models

    def small(self):
        """The same block in sizes for a test."""
        heads_kv = max(1, self.heads_kv // 8)
        return replace(self, layers=2, heads_q=4, heads_kv=heads_kv, hidden=4 * self.head_dim, vocabulary=1000)


SHAPES = {
    "Mistral-7B": Shape(32, 32, 8, 128, 14336, 32000, 1e4, 128),
    "Llama-3-8B": Shape(32, 32, 8, 128, 14336, 128256, 5e5, 128),
    "Phi-2": Shape(32, 32, 32, 80, 10240, 51200, 1e4, 32, is_phi=True),
}


def by_eager(q, k, v, mask):
    return eager.attention(q, k, v, mask).transpose(1, 2).contiguous()


def by_sdpa(q, k, v, mask):
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).contiguous()


def by_flash_ext(q, k, v, mask):
    return flash_ext.attn(q, k, v, is_causal=True).transpose(1, 2)  # lies by tokens, as v does


ATTENTION = {"eager": by_eager, "SDPA": by_sdpa, "flash_ext": by_flash_ext}


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
        return self.weight * wide.to(x.dtype)


def rotary(tokens, shape, dtype, device):
    """cos and sin, [tokens, rotary_dim]"""
    powers = torch.arange(0, shape.rotary_dim, 2, device=device) / shape.rotary_dim
    angles = torch.arange(tokens, device=device)[:, None] * shape.theta**-powers
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    """x [batch, heads, tokens, head_dim], of which the first rotary_dim are turned."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


class Attention(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.head_dim = shape.head_dim
        for name, heads in (("q", shape.heads_q), ("k", shape.heads_kv), ("v", shape.heads_kv)):
            self.add_module(name, nn.Linear(shape.width, heads * shape.head_dim, bias=shape.is_phi))
        self.out = nn.Linear(shape.width, shape.width, bias=shape.is_phi)

    def forward(self, x, cos, sin, mask, attention, cache):
        batch, tokens, _ = x.shape
        q, k, v = (f(x).view(batch, tokens, -1, self.head_dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        cache.append((k, v))  # what decoding would go on with
        return self.out(attention(q, k, v, mask).flatten(2))


class GatedMLP(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.gate, self.up = (nn.Linear(shape.width, shape.hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(shape.width), RMSNorm(shape.width)
        self.attention, self.mlp = Attention(shape), GatedMLP(shape)

    def forward(self, x, *options):
        x = x + self.attention(self.norm1(x), *options)
        return x + self.mlp(self.norm2(x))


class PhiBlock(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(shape.width), Attention(shape)
        self.mlp = nn.Sequential(
            nn.Linear(shape.width, shape.hidden), nn.GELU(approximate="tanh"), nn.Linear(shape.hidden, shape.width)
        )

    def forward(self, x, *options):
        normed = self.norm(x)
        return x + self.attention(normed, *options) + self.mlp(normed)


class Decoder(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        block = PhiBlock if shape.is_phi else Block
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width) if shape.is_phi else RMSNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=shape.is_phi)

    def forward(self, tokens: Tensor, attention: Callable, mask: Tensor | None = None) -> tuple[Tensor, list]:
        """tokens [batch, n]: logits of the last one [batch, vocabulary], and each layer's keys and values."""
        x, cache = self.embedding(tokens), []
        cos, sin = rotary(tokens.shape[1], self.shape, x.dtype, x.device)
        for block in self.blocks:
            x = block(x, cos, sin, mask, attention, cache)
        return self.head(self.norm(x[:, -1])), cache


def random_decoder(shape: Shape, dtype: torch.dtype, device: str) -> Decoder:
    """Made where it runs, at the dtype that it has: 8 billion weights take 16 GB and no more."""
    with torch.device("meta"):
        model = Decoder(shape).to(dtype)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_(std=0.02, generator=generator)
    return model.eval().requires_grad_(False)
