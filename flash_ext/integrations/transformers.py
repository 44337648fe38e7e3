"""flash_ext.attn as an attention implementation of Hugging Face transformers.

from flash_ext.integrations.transformers import register
model = AutoModel.from_pretrained(path, attn_implementation=register())
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from ..attn import attn, attn_varlen


def register(name="fused_ext"):
    """Makes `attn_implementation=name` run flash_ext.attn, in this process. Returns the name.

    A name with "flash" in it is refused: transformers takes such a name for a FlashAttention package and looks it up.
    """
    if "flash" in name:
        raise ValueError(f"name: expected one without 'flash', which transformers treats as a package, got {name!r}")
    AttentionInterface.register(name, attention)
    # Without an entry here transformers builds no mask at all, and padding would be attended to.
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def attention(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout=0.0,
    scaling=None,
    is_causal=None,
    sliding_window=None,
    softcap=None,
    s_aux=None,
    position_bias=None,
    cu_seq_lens_q=None,
    cu_seq_lens_k=None,
    max_length_q=None,
    max_length_k=None,
    **kwargs,
):
    """What transformers' models call: see transformers.integrations.sdpa_attention for the contract.

    query [batch, heads_q, seq_q, head_dim]; key, value [batch, heads_kv, seq_kv, head_dim], not expanded.
    attention_mask: None, or what sdpa_mask made (bool [batch, 1, seq_q, seq_kv], True = keep; causality and window are
    in it), or the user's own of four dimensions, bool or added.
    position_bias: [1 or batch, heads_q, seq_q, seq_kv], added to the scores (T5). s_aux: [heads_q], the sinks.
    cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: several sequences one after the other in a batch of one,
    as DataCollatorWithFlattening(return_flash_attn_kwargs=True) packs them; attention_mask, which then only says the
    same once more, is not read.
    Returns (output [batch, seq_q, heads_q, head_dim_v], None).
    """
    refuse_unsupported(kwargs)
    seq_q, seq_kv = query.shape[2], key.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if cu_seq_lens_q is not None:
        if position_bias is not None:
            raise NotImplementedError("position_bias: not supported with cu_seq_lens_q; pad the sequences")
        if query.shape[0] != 1:
            raise ValueError(f"cu_seq_lens_q: expected a batch of 1 with all sequences in it, got {query.shape[0]}")
        left = -1 if sliding_window is None else sliding_window - 1
        output = attn_varlen(
            *(x[0].transpose(0, 1) for x in (query, key, value)),
            cu_seq_lens_q.int(),
            (cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k).int(),
            max_length_q,
            max_length_q if max_length_k is None else max_length_k,
            dropout_p=dropout,
            is_causal=bool(is_causal),
            scale=scaling,
            window=(left, left),
            softcap=softcap or 0.0,
            sinks=s_aux,
        )
        return output[None], None
    # A single query without a mask is the newest token and sees the whole cache.
    is_causal = bool(is_causal) and attention_mask is None and seq_q > 1
    window = None
    if attention_mask is None and sliding_window is not None:
        window = (sliding_window - 1, sliding_window - 1)
    if position_bias is not None:
        attention_mask = add_bias(attention_mask, position_bias)
    output = attn(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=attention_mask,
        dropout_p=dropout,
        is_causal=is_causal,
        scale=scaling,
        window=window,
        softcap=softcap or 0.0,
        sinks=s_aux,
        # transformers leaves the mask out for more keys than queries only where the rest of a static cache is empty.
        causal_align="top_left" if is_causal and seq_kv > seq_q else "bottom_right",
        layout="bshd",
    )
    return output, None


def add_bias(mask, bias):
    if mask is None:
        return bias
    return torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else mask + bias


def refuse_unsupported(kwargs):
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions: fused attention has no weights to return; use attn_implementation='eager'")
    if kwargs.get("cache") is not None:
        raise NotImplementedError("cache: transformers' paged cache (continuous batching) is not supported yet")
