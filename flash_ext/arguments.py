"""From the arguments of the public functions to those of the ops."""

import torch

from .checks import acc_dtype, check_floating, check_rank, check_tensor, fail


def dense(
    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, window, softcap, alibi_slopes, sinks,
    causal_align, deterministic, layout,
):  # fmt: skip
    """The positional arguments of torch.ops.flash_ext.attn_fwd. The op itself checks the tensors."""
    if not isinstance(query, torch.Tensor):
        check_tensor("q", query)
    if query.ndim != 4:
        fail("q", _LAYOUTS.get(layout, "4 dimensions"), list(query.shape))
    if layout == "bhsd":
        out_bshd = lies_by_token(query, value)
    elif layout == "bshd":
        query, key, value = query.transpose(1, 2), _transpose("k", key), _transpose("v", value)
        out_bshd = True
    else:
        fail("layout", "'bhsd' or 'bshd'", repr(layout))
    place, options = _options(
        query, key, attn_mask, dropout_p, is_causal, scale, enable_gqa, window, softcap, alibi_slopes, sinks,
        causal_align, deterministic,
    )  # fmt: skip
    return query, key, value, *place, out_bshd, *options


def varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, attn_mask, dropout_p, is_causal, scale, enable_gqa,
    window, softcap, alibi_slopes, sinks, causal_align, deterministic,
):  # fmt: skip
    """The positional arguments of torch.ops.flash_ext.attn_varlen_fwd."""
    check_rank("q", q, 3, "[total_q, heads_q, head_dim]")
    check_tensor("cu_seqlens_q", cu_seqlens_q)
    check_tensor("cu_seqlens_k", cu_seqlens_k)
    place, options = _options(
        q, k, attn_mask, dropout_p, is_causal, scale, enable_gqa, window, softcap, alibi_slopes, sinks, causal_align,
        deterministic,
    )  # fmt: skip
    if isinstance(max_seqlen_q, torch.Tensor):  # a model's bookkeeping may say it so
        max_seqlen_q = max_seqlen_q.item()
    if isinstance(max_seqlen_k, torch.Tensor):
        max_seqlen_k = max_seqlen_k.item()
    lengths = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), max_seqlen_q, max_seqlen_k
    return q, k, v, *lengths, *place, *options


def lies_by_token(query, value):
    """Whether the result of a call with layout="bhsd" lies in memory as [batch, seq_q, heads_q, head_dim_v].

    As one of these does, so that transpose(1, 2).flatten(2) after attention is a view: a model by tokens may have
    copied query for its rotary embedding, but hardly value.
    """
    return any(not x.is_contiguous() and x.ndim == 4 and x.stride(1) < x.stride(2) for x in (query, value))


_LAYOUTS = {"bhsd": "[batch, heads_q, seq_q, head_dim]", "bshd": "[batch, seq_q, heads_q, head_dim]"}


def _transpose(name, tensor):
    check_rank(name, tensor, 4, "[batch, seq_kv, heads_kv, head_dim]")
    return tensor.transpose(1, 2)


def _options(
    query, key, attn_mask, dropout_p, is_causal, scale, enable_gqa, window, softcap, alibi_slopes, sinks, causal_align,
    deterministic,
):  # fmt: skip
    left = right = -1
    if window is not None:
        left, right = sides(window)
    if is_causal:
        right = 0  # of a window's right side and this, the smaller
    if scale is None:
        scale = query.shape[-1] ** -0.5 if query.shape[-1] else 1.0
    if causal_align == "bottom_right":
        top_left = False
    elif causal_align == "top_left":
        top_left = True
    else:
        fail("causal_align", "'bottom_right' or 'top_left'", repr(causal_align))
    if not enable_gqa and query.shape[1] != key.shape[1]:
        fail("k", f"{query.shape[1]} heads as in q with enable_gqa=False", key.shape[1])
    if attn_mask is not None:
        attn_mask = _rank4(attn_mask)
    if alibi_slopes is not None:
        alibi_slopes = _as_acc("alibi_slopes", alibi_slopes, query)
    if sinks is not None:
        sinks = _as_acc("sinks", sinks, query)
    # Drawn by torch, so that torch.manual_seed, torch.compile and CUDA graphs all work.
    rng_state = torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=query.device) if dropout_p > 0 else None
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    return (scale, left, right, top_left), (
        softcap, dropout_p, attn_mask, alibi_slopes, sinks, rng_state, deterministic,
    )  # fmt: skip


def sides(window):
    """(left, right) of the argument `window`."""
    try:
        left, right = window
    except (TypeError, ValueError):
        fail("window", "(left, right)", repr(window))
    for side in (left, right):
        if not isinstance(side, int | torch.SymInt) or side < -1:
            fail("window", "(left, right), each an int of -1 (unbounded) or more", repr(window))
    return left, right


def _rank4(mask):
    check_tensor("attn_mask", mask)
    if not 2 <= mask.ndim <= 4:
        fail("attn_mask", "2 to 4 dimensions, to broadcast to [batch, heads_q, seq_q, seq_kv]", list(mask.shape))
    return mask[(None,) * (4 - mask.ndim)] if mask.ndim < 4 else mask


def _as_acc(name, tensor, query):
    check_tensor(name, tensor)
    check_floating(name, tensor)
    return tensor.to(acc_dtype(query.dtype)).contiguous()
