"""What the ops accept, for `math` and the fakes. The native backends check the same in C++, in the same words."""

import math

import torch
from torch import Tensor


def shape_of(tensor):
    return list(tensor.shape)


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def fail(name, expected, got):
    raise ValueError(f"{name}: expected {expected}, got {got}")


def acc_dtype(dtype):
    """What an input dtype is accumulated in; also the dtype of lse, alibi_slopes and sinks."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_tensor(name, tensor):
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")


def check_rank(name, tensor, rank, shape):
    check_tensor(name, tensor)
    if tensor.dim() != rank:
        fail(name, shape, shape_of(tensor))


def check_floating(name, tensor):
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype, got {name_of(tensor.dtype)}")


def check_dtype(name, tensor, dtype, why=""):
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected {name_of(dtype)}{why}, got {name_of(tensor.dtype)}")


def check_same_device(name, tensor, q):
    if tensor.device != q.device:
        fail(name, f"a tensor on {q.device} as q", f"one on {tensor.device}")


def check_qkv(q, k, v, rank, shape):
    """What holds for dense and packed inputs. shape: as the message shows it."""
    for name, tensor, side in (("q", q, "q"), ("k", k, "kv"), ("v", v, "kv")):
        check_rank(name, tensor, rank, shape.format(side, side[0]))
    check_floating("q", q)
    for name, tensor in (("k", k), ("v", v)):
        check_same_device(name, tensor, q)
        check_dtype(name, tensor, q.dtype, " as q")
    heads_q, heads_kv = q.shape[1], k.shape[1]
    for name, tensor in (("q", q), ("v", v)):
        if tensor.shape[-1] < 1:
            fail(name, "head_dim of at least 1", tensor.shape[-1])
    if k.shape[-1] != q.shape[-1]:
        fail("k", f"head_dim {q.shape[-1]} as in q", k.shape[-1])
    if v.shape[1] != heads_kv:
        fail("v", f"{heads_kv} heads as in k", v.shape[1])
    if heads_q % heads_kv != 0 if heads_kv > 0 else heads_q != 0:
        fail("k", f"a number of heads that divides {heads_q}, the heads of q", heads_kv)


def check_number(name, value, fits, expected):
    if isinstance(value, (int, float)) and not fits(value):  # a symbolic number is left to the run
        fail(name, expected, value)


def check_options(
    q, batch, seq_q, seq_kv, scale, window_left, window_right, softcap, dropout_p, attn_mask, alibi_slopes, sinks,
    rng_state,
):  # fmt: skip
    heads_q = q.shape[1]
    acc = acc_dtype(q.dtype)
    check_number("scale", scale, lambda x: 0 <= x < math.inf, "a finite number of at least 0")
    check_number("softcap", softcap, lambda x: 0 <= x < math.inf, "a finite number of at least 0")
    check_number("dropout_p", dropout_p, lambda x: 0 <= x < 1, "a number in [0, 1)")
    if window_left < -1:
        fail("window", "-1 or more to the left", window_left)
    if window_right < -1:
        fail("window", "-1 or more to the right", window_right)
    if attn_mask is not None:
        check_tensor("attn_mask", attn_mask)
        full = [batch, heads_q, seq_q, seq_kv]
        fits = attn_mask.dim() == 4 and all(
            size == whole or size == 1 for size, whole in zip(attn_mask.shape, full, strict=True)
        )
        if not fits:
            fail("attn_mask", f"a shape that broadcasts to {full}", shape_of(attn_mask))
        check_same_device("attn_mask", attn_mask, q)
        if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
            raise TypeError(f"attn_mask: expected bool or a floating-point dtype, got {name_of(attn_mask.dtype)}")
    if alibi_slopes is not None:
        check_tensor("alibi_slopes", alibi_slopes)
        if shape_of(alibi_slopes) not in ([heads_q], [batch, heads_q]):
            fail("alibi_slopes", f"[{heads_q}] or [{batch}, {heads_q}]", shape_of(alibi_slopes))
        check_same_device("alibi_slopes", alibi_slopes, q)
        check_dtype("alibi_slopes", alibi_slopes, acc)
    if sinks is not None:
        check_tensor("sinks", sinks)
        if shape_of(sinks) != [heads_q]:
            fail("sinks", f"[{heads_q}]", shape_of(sinks))
        check_same_device("sinks", sinks, q)
        check_dtype("sinks", sinks, acc)
    if rng_state is None:
        if dropout_p > 0:
            fail("rng_state", "a tensor with dropout_p above 0", None)
    else:
        check_tensor("rng_state", rng_state)
        if not dropout_p > 0:
            fail("rng_state", "none without dropout_p above 0", "one")
        if rng_state.dtype != torch.int64 or shape_of(rng_state) != [2]:
            fail("rng_state", "int64 [2]", f"{name_of(rng_state.dtype)} {shape_of(rng_state)}")
        check_same_device("rng_state", rng_state, q)


def check_dense(
    q, k, v, scale, window_left, window_right, softcap, dropout_p, attn_mask, alibi_slopes, sinks, rng_state,
):  # fmt: skip
    """Raises unless these are arguments of attn_fwd."""
    check_qkv(q, k, v, 4, "[batch, heads_{0}, seq_{0}, head_dim]")
    batch, seq_q, seq_kv = q.shape[0], q.shape[2], k.shape[2]
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape[0] != batch:
            fail(name, f"batch {batch} as in q", tensor.shape[0])
    if v.shape[2] != seq_kv:
        fail("v", f"seq_kv {seq_kv} as in k", v.shape[2])
    check_options(
        q, batch, seq_q, seq_kv, scale, window_left, window_right, softcap, dropout_p, attn_mask, alibi_slopes, sinks,
        rng_state,
    )  # fmt: skip


def check_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, window_left, window_right, softcap,
    dropout_p, attn_mask, alibi_slopes, sinks, rng_state,
):  # fmt: skip
    """Raises unless these are arguments of attn_varlen_fwd; what the cu_seqlens hold is for check_cu_seqlens."""
    check_qkv(q, k, v, 3, "[total_{1}, heads_{0}, head_dim]")
    if v.shape[0] != k.shape[0]:
        fail("v", f"total_k {k.shape[0]} as in k", v.shape[0])
    for name, cu_seqlens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_tensor(name, cu_seqlens)
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
            fail(name, "[batch + 1]", shape_of(cu_seqlens))
        check_dtype(name, cu_seqlens, torch.int32)
        check_same_device(name, cu_seqlens, q)
    for name, length in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if length < 0:
            fail(name, "0 or more", length)
    if cu_seqlens_k.shape[0] != cu_seqlens_q.shape[0]:
        fail("cu_seqlens_k", f"{cu_seqlens_q.shape[0]} values as in cu_seqlens_q", cu_seqlens_k.shape[0])
    check_options(
        q, cu_seqlens_q.shape[0] - 1, max_seqlen_q, max_seqlen_k, scale, window_left, window_right, softcap, dropout_p,
        attn_mask, alibi_slopes, sinks, rng_state,
    )  # fmt: skip


def check_cu_seqlens(side, cu_seqlens, total, max_seqlen):
    """Raises unless cu_seqlens_{side} cuts [0, total) into sequences of at most max_seqlen."""
    if torch.compiler.is_compiling():
        return
    try:
        values = cu_seqlens.tolist()
    except RuntimeError:  # a fake or batched tensor has no values to check
        return
    name = f"cu_seqlens_{side}"
    if values[0] != 0:
        fail(name, "to start with 0", values[0])
    for b, (begin, end) in enumerate(zip(values, values[1:], strict=False)):
        if end < begin:
            fail(name, "values that do not decrease", f"{begin} before {end}")
        if end - begin > max_seqlen:
            fail(f"max_seqlen_{side}", f"at least {end - begin}, the length of sequence {b}", max_seqlen)
    if values[-1] != total:
        fail(name, f"to end with total_{side} = {total}", values[-1])
