"""The functions of FlashAttention-2 (flash_attn 2.8), with its parameters in its order, running flash_ext.

from flash_ext.compat.flash_attn import flash_attn_func  # instead of: from flash_attn import flash_attn_func

Shapes, options and defaults are FlashAttention's; the causal mask and windows are aligned to the bottom right, as
everywhere in flash_ext. What differs:

* More runs: CPUs; float32 and float64; a head_dim of v's own, and above 256; softcap together with dropout. float16 and
  bfloat16 stay what they are; float32 is not refused, and takes float32's time.
* softmax_lse has a gradient. FlashAttention returns it outside the graph, so that a loss that uses it trains nothing.
* A query that sees no key has softmax_lse = -inf, where FlashAttention-2 says +inf. (FlashAttention-3 says -inf.)
* S_dmask, the third value of return_attn_probs, is None. FlashAttention returns a tensor for its own tests there: with
  dropout the softmax, rounded up to multiples of 128 in both lengths, negative where dropped; without dropout nothing
  ([0] since 2.7, None before).
* alibi_slopes that require a gradient get one; such a call runs on backend "math" and stores the scores.
* deterministic=False follows torch.use_deterministic_algorithms instead of ignoring it.
* The dropout mask is flash_ext's: drawn from torch's generator, but not the one that FlashAttention draws.
* Packed sequences are held to what they say where that costs nothing (on CPUs): cu_seqlens ends with the number of
  tokens, and no sequence is longer than max_seqlen. FlashAttention does not look.
* Errors name the argument, what was expected and what came. Most are RuntimeError, FlashAttention's kind; some are
  ValueError or TypeError. They say `scale` for softmax_scale, as flash_ext.attn does.

Not there: paged keys and values (block_table) and flash_attn_with_kvcache; both raise NotImplementedError. Neither is
FlashAttention-3, whose parameters have another order.
"""

from collections.abc import Sequence
from typing import NoReturn

from torch import Tensor

from ..attn import attn, attn_varlen
from ..checks import check_rank, fail, shape_of
from .bert_padding import index_first_axis, pad_input, unpad_input

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "index_first_axis",
    "pad_input",
    "unpad_input",
]

Result = Tensor | tuple[Tensor, Tensor, None]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Exact attention: softmax(softmax_scale * q @ k^T) @ v for each head.

        q              [batch, seq_q, heads_q, head_dim]
        k              [batch, seq_kv, heads_kv, head_dim]; heads_q is a multiple of heads_kv
        v              [batch, seq_kv, heads_kv, head_dim_v]
    All of one floating dtype and one device, of any strides.

        dropout_p      in [0, 1), in every call: give 0 during evaluation
        softmax_scale  at least 0; default 1 / sqrt(head_dim)
        causal         query i sees key j where j <= i + seq_kv - seq_q
        window_size    (left, right): query i sees keys i + seq_kv - seq_q - left to i + seq_kv - seq_q + right; a
                       negative number is unbounded. With causal, both hold
        softcap        scores become softcap * tanh(score / softcap); 0 is none
        alibi_slopes   [heads_q] or [batch, heads_q]: slope * abs(i + seq_kv - seq_q - j) is taken from the score
        deterministic  gradients are the same bit for bit from run to run; False follows torch's global setting

    Returns out, [batch, seq_q, heads_q, head_dim_v] in q's dtype, contiguous; 0 where a query sees no key. With
    return_attn_probs, (out, softmax_lse, None): softmax_lse is the natural logarithm of the softmax's denominator,
    [batch, heads_q, seq_q], float32 (float64 for float64), and gradients flow through it. The module's docstring says
    what FlashAttention has instead of the None.

    Raises ValueError, TypeError or RuntimeError, which name the argument, what was expected and what came.
    """
    out = attn(
        q, k, v, layout="bshd",
        **_options(
            dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        ),
    )  # fmt: skip
    return (*out, None) if return_attn_probs else out


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` with k and v in one tensor, kv [batch, seq_kv, 2, heads_kv, head_dim]; no copy is made."""
    k, v = _unpack("kv", kv, 2, 5, "[batch, seq_kv, 2, heads_kv, head_dim]")
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` with q, k and v in one tensor, qkv [batch, seq, 3, heads, head_dim]; no copy is made."""
    q, k, v = _unpack("qkv", qkv, 3, 5, "[batch, seq, 3, heads, head_dim]")
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """`flash_attn_func` over sequences of different lengths, packed one after the other without padding.

        q              [total_q, heads_q, head_dim]
        k              [total_k, heads_kv, head_dim]
        v              [total_k, heads_kv, head_dim_v]
        cu_seqlens_q   int32 [batch + 1], on q's device: sequence b is rows cu_seqlens_q[b] to cu_seqlens_q[b + 1] of q.
                       Starts at 0, does not decrease, ends at total_q. A sequence may be empty
        cu_seqlens_k   the same for k and v
        max_seqlen_q   at least the longest sequence's length, in tokens; max_seqlen_k likewise
        block_table    None; paged keys and values raise NotImplementedError
    The other options are those of `flash_attn_func`, within each sequence.

    Returns out, [total_q, heads_q, head_dim_v]; with return_attn_probs, (out, softmax_lse [heads_q, total_q], None).
    """
    if block_table is not None:
        raise NotImplementedError(
            "block_table: paged keys and values are not supported yet; gather each sequence's pages into k and v, one "
            "sequence after the other, and leave block_table out"
        )
    out = attn_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        **_options(
            dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        ),
    )  # fmt: skip
    return (*out, None) if return_attn_probs else out


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` with k and v in one tensor, kv [total_k, 2, heads_kv, head_dim]; no copy is made."""
    k, v = _unpack("kv", kv, 2, 4, "[total_k, 2, heads_kv, head_dim]")
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` with q, k and v in one tensor, qkv [total, 3, heads, head_dim]; no copy is made."""
    q, k, v = _unpack("qkv", qkv, 3, 4, "[total, 3, heads, head_dim]")
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> NoReturn:
    """Raises NotImplementedError: the name is here so that imports of it work."""
    raise NotImplementedError(
        "flash_attn_with_kvcache: not supported yet; write the new k and v into the cache yourself and call "
        "flash_attn_func(q, k_cache[:, :length], v_cache[:, :length], causal=True), or flash_attn_varlen_func where "
        "sequences have different lengths"
    )


def _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_lse):
    """FlashAttention's options in the words of flash_ext.attn."""
    return dict(
        dropout_p=dropout_p,
        is_causal=causal,
        scale=softmax_scale,
        window=_window(window_size),
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic or None,
        return_lse=return_lse,
    )


def _window(window_size):
    try:
        left, right = window_size
        return max(left, -1), max(right, -1)
    except (TypeError, ValueError):
        fail("window_size", "(left, right), two ints", repr(window_size))


def _unpack(name, packed, parts, rank, shape):
    check_rank(name, packed, rank, shape)
    if packed.shape[-3] != parts:
        fail(name, shape, shape_of(packed))
    return packed.unbind(-3)
