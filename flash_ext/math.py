"""The definition: what every backend computes, in plain torch operations on any device and floating dtype.

It is the backend "math", and the reference of all tests. It materialises the [seq_q, seq_kv] scores.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import arguments
from .checks import acc_dtype, check_cu_seqlens, check_dense, check_varlen

AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")


def math(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = True,
    *,
    window: Sequence[int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    causal_align: str = "bottom_right",
    layout: str = "bhsd",
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str = "math",
    compute_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attn` on the backend "math". compute_dtype: the dtype of the arithmetic, for error bounds; default as `attn`."""
    args = arguments.dense(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, window, softcap, alibi_slopes, sinks,
        causal_align, deterministic, layout,
    )  # fmt: skip
    out, lse = run(attention, *args, compute_dtype=compute_dtype)
    if layout == "bshd":
        out = out.transpose(1, 2)
    return (out, lse) if return_lse else out


def math_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = True,
    *,
    window: Sequence[int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    causal_align: str = "bottom_right",
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str = "math",
    compute_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attn_varlen` on the backend "math"; compute_dtype as for `math`."""
    args = arguments.varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, attn_mask, dropout_p, is_causal, scale,
        enable_gqa, window, softcap, alibi_slopes, sinks, causal_align, deterministic,
    )  # fmt: skip
    out, lse = run(attention_varlen, *args, compute_dtype=compute_dtype)
    return (out, lse) if return_lse else out


def run(definition, q, k, v, *args, **kwargs):
    """The definition with q, k, v cast where torch.autocast is on, and its arithmetic out of autocast's reach."""
    device_type = q.device.type
    if device_type not in AUTOCAST_DEVICES or not torch.is_autocast_enabled(device_type):
        return definition(q, k, v, *args, **kwargs)
    dtype = torch.get_autocast_dtype(device_type)
    q, k, v = (x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v))
    with torch.autocast(device_type, enabled=False):
        return definition(q, k, v, *args, **kwargs)


def attention(
    q, k, v, scale, window_left=-1, window_right=-1, top_left=False, out_bshd=False, softcap=0.0, dropout_p=0.0,
    attn_mask=None, alibi_slopes=None, sinks=None, rng_state=None, deterministic=False, *, compute_dtype=None,
):  # fmt: skip
    """torch.ops.flash_ext.attn_fwd: (out, lse) of dense q, k, v, [batch, heads, seq, head_dim].

    compute_dtype replaces the dtype of the arithmetic (float32, or float64 for float64 inputs), for error bounds.
    """
    check_dense(
        q, k, v, scale, window_left, window_right, softcap, dropout_p, attn_mask, alibi_slopes, sinks, rng_state
    )
    out, lse = _attend(
        q, k, v, q.shape[2], k.shape[2], scale, window_left, window_right, top_left, softcap, dropout_p, attn_mask,
        alibi_slopes, sinks, rng_state, compute_dtype,
    )  # fmt: skip
    return (out.transpose(1, 2).contiguous().transpose(1, 2) if out_bshd else out), lse


def attention_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, window_left=-1, window_right=-1,
    top_left=False, softcap=0.0, dropout_p=0.0, attn_mask=None, alibi_slopes=None, sinks=None, rng_state=None,
    deterministic=False, *, compute_dtype=None,
):  # fmt: skip
    """torch.ops.flash_ext.attn_varlen_fwd: (out, lse) of packed q, k, v, [total, heads, head_dim]."""
    check_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, window_left, window_right, softcap,
        dropout_p, attn_mask, alibi_slopes, sinks, rng_state,
    )  # fmt: skip
    check_cu_seqlens("q", cu_seqlens_q, q.shape[0], max_seqlen_q)
    check_cu_seqlens("k", cu_seqlens_k, k.shape[0], max_seqlen_k)

    # Padded to [batch, heads, max_seqlen, head_dim], it is the dense case with a length per sequence.
    def length(cu_seqlens):
        return cu_seqlens.diff()[:, None, None, None]

    out, lse = _attend(
        _pad(q, cu_seqlens_q, max_seqlen_q), _pad(k, cu_seqlens_k, max_seqlen_k), _pad(v, cu_seqlens_k, max_seqlen_k),
        length(cu_seqlens_q), length(cu_seqlens_k), scale, window_left, window_right, top_left, softcap, dropout_p,
        attn_mask, alibi_slopes, sinks, rng_state, compute_dtype,
    )  # fmt: skip
    row = torch.arange(q.shape[0], dtype=torch.int32, device=q.device)
    sequence = torch.searchsorted(cu_seqlens_q[1:], row, right=True)
    position = row - cu_seqlens_q[sequence]
    return out[sequence, :, position], lse[sequence, :, position].T.contiguous()


def _pad(packed, cu_seqlens, max_seqlen):
    position = torch.arange(max_seqlen, dtype=torch.int32, device=packed.device)
    begin, end = cu_seqlens[:-1, None], cu_seqlens[1:, None]
    beyond = packed.shape[0]  # a row of zeros, read where a sequence has ended
    row = torch.where(begin + position < end, begin + position, beyond)
    packed = torch.cat([packed, packed.new_zeros(1, *packed.shape[1:])])
    return packed[row].transpose(1, 2)


def _attend(
    q, k, v, seq_q, seq_kv, scale, window_left, window_right, top_left, softcap, dropout_p, attn_mask, alibi_slopes,
    sinks, rng_state, compute_dtype,
):  # fmt: skip
    """seq_q and seq_kv: the true lengths, either numbers or [batch, 1, 1, 1]."""
    batch, heads_q, rows, _ = q.shape
    heads_kv, columns = k.shape[1], k.shape[2]
    dtype = compute_dtype or acc_dtype(q.dtype)
    out_dtype, lse_dtype = q.dtype, acc_dtype(q.dtype)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    k, v = (x.repeat_interleave(heads_q // heads_kv, dim=1) for x in (k, v))

    s = scale * (q @ k.transpose(-2, -1))
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)

    i = torch.arange(rows, device=q.device)[:, None]
    j = torch.arange(columns, device=q.device)[None, :]
    diagonal = i + seq_kv - seq_q
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(dtype).expand(batch, heads_q)[:, :, None, None]
        s = s - slopes * (diagonal - j).abs().to(dtype)

    visible = (i < seq_q) & (j < seq_kv)
    aligned = i if top_left else diagonal
    if window_left >= 0:
        visible = visible & (j >= aligned - window_left)
    if window_right >= 0:
        visible = visible & (j <= aligned + window_right)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            visible = visible & attn_mask
        else:
            s = s + attn_mask.to(dtype)
    s = s.masked_fill(~visible, -torch.inf)

    # Softmax over the keys and one more column, the sink (-inf: none), which has no value. It also makes the row
    # non-empty where seq_kv is 0. In a row that sees nothing, the sum is 0.
    sink = torch.full((heads_q,), -torch.inf, dtype=dtype, device=q.device) if sinks is None else sinks.to(dtype)
    s = torch.cat([s, sink[:, None, None].expand(batch, heads_q, rows, 1)], dim=-1)
    peak = s.detach().amax(dim=-1, keepdim=True)
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    e = torch.exp(s - peak)
    total = e.sum(dim=-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    p = e[..., :-1] / total
    lse = (peak + torch.log(total)).masked_fill(empty, -torch.inf).squeeze(-1)

    if dropout_p > 0:
        threshold = dropout_threshold(dropout_p)
        keep = dropout_mask(rng_state, batch, heads_q, rows, columns, dropout_p)
        p = (p * (65536 / (65536 - threshold))).masked_fill(~keep, 0.0)
    return (p @ v).to(out_dtype), lse.to(lse_dtype)


def dropout_threshold(dropout_p):
    return min(round(dropout_p * 65536), 65535)


def dropout_mask(rng_state, batch, heads, seq_q, seq_kv, dropout_p):
    """Bool [batch, heads, seq_q, seq_kv], True where dropout keeps: a pure function of rng_state and the position."""

    def counter(size, *shape):
        return torch.arange(size, device=rng_state.device).view(shape)

    blocks = (seq_kv + 7) // 8  # one Philox call gives eight keys their 16 bits each
    key_block = counter(blocks, 1, 1, 1, blocks)
    row = counter(seq_q, 1, 1, seq_q, 1)
    head = counter(batch * heads, batch, heads, 1, 1)
    seed, offset = rng_state[0], rng_state[1]
    words = philox((key_block, row, head, offset & 0xFFFFFFFF), (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    numbers = torch.stack(halves, dim=-1).view(batch, heads, seq_q, blocks * 8)
    return numbers[..., :seq_kv] >= dropout_threshold(dropout_p)


def philox(counter, key):
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) on uint32 held in int64."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(10):
        # The product of two uint32 wraps around in int64, but its 64 bits are the right ones.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = ((p1 >> 32) & 0xFFFFFFFF) ^ c1 ^ k0, ((p0 >> 32) & 0xFFFFFFFF) ^ c3 ^ k1
        c1, c3 = p1 & 0xFFFFFFFF, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3
