"""A GPT in the shape of GPT-2, in plain PyTorch. Its attention is a function that it is given.

ATTENTION: name -> function(q, k, v, dropout_p) of [batch, tokens, heads, head_dim], which is causal.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flash_ext


def by_sdpa(q, k, v, dropout_p):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True).transpose(1, 2)


def by_flash_ext(q, k, v, dropout_p):
    return flash_ext.attn(q, k, v, dropout_p=dropout_p, is_causal=True, layout="bshd")


ATTENTION = {"flash_ext": by_flash_ext, "sdpa": by_sdpa}


@dataclass(frozen=True)
class Config:
    layers: int = 12
    heads: int = 12
    width: int = 768
    context: int = 1024  # the most tokens
    vocabulary: int = 50304  # GPT-2's 50257, rounded up to a multiple of 64
    dropout: float = 0.0


PRESETS = {"124m": Config(), "tiny": Config(layers=2, heads=4, width=64, context=64)}


class CausalSelfAttention(nn.Module):
    def __init__(self, config: Config, attention: Callable):
        super().__init__()
        self.heads, self.dropout, self.attention = config.heads, config.dropout, attention
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.project = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).unbind(2)
        out = self.attention(q, k, v, self.dropout if self.training else 0.0)  # [batch, tokens, heads, head_dim]
        return F.dropout(self.project(out.flatten(2)), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: Config, attention: Callable):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.attention = CausalSelfAttention(config, attention)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, 4 * config.width),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * config.width, config.width),
            nn.Dropout(config.dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, config: Config, attention: Callable = by_flash_ext):
        super().__init__()
        self.config = config
        self.token = nn.Embedding(config.vocabulary, config.width)
        self.position = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config, attention) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.apply(self.initialise)

    def initialise(self, module):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, Block):  # what is added to the residual stream: the sum keeps its size
            for layer in (module.attention.project, module.mlp[2]):
                nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * self.config.layers))

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """tokens [batch, n]: logits [batch, n, vocabulary]; with targets, of the same shape, the mean loss."""
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.token.weight)  # the embedding is used twice, as in GPT-2
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def size(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


def optimizer(model: GPT, rate: float = 6e-4) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)


def train_step(model: GPT, optimizer: torch.optim.Optimizer, tokens: Tensor, targets: Tensor) -> Tensor:
    """Returns the loss before the step. On a GPU the products are in bfloat16, the weights in float32."""
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.device.type == "cuda"):
        loss = model(tokens, targets)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()
