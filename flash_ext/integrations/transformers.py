"""flash_ext.attn as an attention implementation of Hugging Face transformers.

from flash_ext.integrations.transformers import register
model = AutoModel.from_pretrained(path, attn_implementation=register())
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from ..attn import attn, attn_varlen


def register(name="fused_ext", dense_masks=False):
    """Makes `attn_implementation=name` run flash_ext.attn, in this process. Returns the name.

    A name with "flash" in it is refused: transformers takes such a name for a FlashAttention package and looks it up.
    dense_masks: have transformers make all masks as for "sdpa", for a model whose own code looks into them.
    """
    if "flash" in name:
        raise ValueError(f"name: expected one without 'flash', which transformers treats as a package, got {name!r}")
    AttentionInterface.register(name, attention)
    # Without an entry here transformers builds no mask at all, and padding would be attended to.
    AttentionMaskInterface.register(name, sdpa_mask if dense_masks else mask)
    return name


def mask(**options):
    """What transformers calls for a mask, with keywords: its sdpa_mask, but for one that need not be there.

    That makes every mask that is not the square triangle: of a chunk of a prompt over what is cached, and of any
    prompt beyond a sliding window. Here they are [1, 1, 0, n], no memory, where no token is padding: each query sees
    the n newest keys up to its own, the last query the last key. A model that computes with it fails by the shape.
    Under torch.compile nobody can look whether there is padding, or, without a cache, whether sequences are packed:
    there a mask of tokens, or positions without a cache, means sdpa_mask.
    """
    if not newest_keys_say_all(**options):
        return sdpa_mask(**options)
    keys = options["local_size"] if options.get("local_size") else options["kv_length"]
    return torch.empty(1, 1, 0, keys, dtype=torch.bool, device=options.get("device"))


def newest_keys_say_all(
    *,
    q_length,
    kv_length,
    q_offset=0,
    kv_offset=0,
    attention_mask=None,
    local_size=None,
    allow_is_causal_skip=True,
    allow_is_bidirectional_skip=False,
    config=None,
    **others,
):
    """Whether this is a causal mask, or one with a sliding window, and nothing besides, aligned to the bottom right."""
    if not allow_is_causal_skip or allow_is_bidirectional_skip:
        return False
    if local_size is not None and local_size != getattr(config, "sliding_window", None):
        return False  # blocks of that size
    if getattr(config, "attention_chunk_size", None):
        return False  # the same
    if q_length in (1, kv_length) and kv_length < (local_size or kv_length + 1) and not torch.compiler.is_compiling():
        return False  # sdpa_mask leaves it out
    if isinstance(q_offset, torch.Tensor) or q_offset + q_length != kv_offset + kv_length:
        return False  # a static cache, whose last keys are empty
    return attention_mask is None or (not torch.compiler.is_compiling() and bool(attention_mask.all()))


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
    attention_mask: None, or what `mask` made (bool [batch, 1, seq_q, seq_kv], True = keep, or [1, 1, 0, n]; causality
    and window are in it), or the user's own of four dimensions, bool or added.
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
    window, causal_align = None, "bottom_right"
    if attention_mask is not None and attention_mask.shape[-2] == 0:  # see `mask`
        newest, is_causal, attention_mask = attention_mask.shape[-1], True, None
        window = (newest - 1, 0) if newest < seq_kv else None
    else:
        # A single query without a mask is the newest token and sees the whole cache.
        is_causal = bool(is_causal) and attention_mask is None and seq_q > 1
        if attention_mask is None and sliding_window is not None:
            window = (sliding_window - 1, sliding_window - 1)
        if is_causal and seq_kv > seq_q:  # the mask is left out only where the rest of a static cache is empty
            causal_align = "top_left"
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
        causal_align=causal_align,
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
