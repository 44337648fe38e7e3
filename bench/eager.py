"""Attention that stores the scores, in the steps that the eager attention of Hugging Face transformers takes."""

import torch


def causal_mask(tokens, dtype, device):
    """[tokens, tokens], to add to the scores."""
    mask = torch.full((tokens, tokens), torch.finfo(dtype).min, dtype=dtype, device=device)
    return mask.triu(1)


def repeat_heads(x, times):
    """[batch, heads, tokens, head_dim] to [batch, heads * times, tokens, head_dim], each head times over."""
    if times == 1:
        return x
    batch, heads, tokens, dim = x.shape
    return x[:, :, None].expand(batch, heads, times, tokens, dim).reshape(batch, heads * times, tokens, dim)


def attention(q, k, v, mask):
    """q [batch, heads_q, tokens, head_dim]; k, v [batch, heads_kv, tokens, head_dim]"""
    times = q.shape[1] // k.shape[1]
    k, v = repeat_heads(k, times), repeat_heads(v, times)
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + mask
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v
