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


def check_dtype(name, tensor, dtype, why=""):
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {name_of(dtype)}{why}, got {name_of(tensor.dtype)}")


def check_device(name, tensor, q):
    if tensor.device != q.device:
        fail(name, f"device {q.device} as q", tensor.device)


def check_qkv(q, k, v, rank, layout):
    """What holds for dense and packed inputs."""
    heads = 1  # the dimension, in both
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, tensor)
        if tensor.dim() != rank:
            fail(name, f"{rank} dimensions {layout}", f"{tensor.dim()}: {shape_of(tensor)}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point dtype, got {name_of(tensor.dtype)}")
    for name, tensor in (("k", k), ("v", v)):
        check_device(name, tensor, q)
        check_dtype(name, tensor, q.dtype, " as q")
    if q.shape[-1] < 1:
        fail("q", "head_dim of at least 1", q.shape[-1])
    if k.shape[-1] != q.shape[-1]:
        fail("k", f"head_dim {q.shape[-1]} as in q", k.shape[-1])
    if v.shape[-1] < 1:
        fail("v", "head_dim of at least 1", v.shape[-1])
    if k.shape[heads] < 1:
        fail("k", "at least 1 head", k.shape[heads])
    if v.shape[heads] != k.shape[heads]:
        fail("v", f"{k.shape[heads]} heads as in k", v.shape[heads])
    if q.shape[heads] < 1 or q.shape[heads] % k.shape[heads] != 0:
        fail("q", f"a multiple of the {k.shape[heads]} heads of k", f"{q.shape[heads]} heads")


def check_number(name, value, low, high=math.inf, below=False):
    """NaN fails every comparison, and with it the check. A symbolic number is left to the run."""
    if isinstance(value, (int, float)) and not (low <= value and (value < high or (value == high and not below))):
        fail(name, f"a number in [{low}, {high}{')' if below else ']'}", value)


def check_options(
    q, batch, seq_q, seq_kv, scale, window, softcap, dropout_p, attn_mask, alibi_slopes, sinks, rng_state
):
    heads_q = q.shape[1]
    acc = acc_dtype(q.dtype)
    check_number("scale", scale, 0.0, math.inf, below=True)
    check_number("softcap", softcap, 0.0, math.inf, below=True)
    check_number("dropout_p", dropout_p, 0.0, 1.0, below=True)
    for name, value in zip(("window_left", "window_right"), window, strict=True):
        if value < -1:
            fail(name, "-1 (unbounded) or more", value)
    if attn_mask is not None:
        check_tensor("attn_mask", attn_mask)
        check_device("attn_mask", attn_mask, q)
        if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
            raise TypeError(f"attn_mask: expected dtype bool or floating point, got {name_of(attn_mask.dtype)}")
        full = [batch, heads_q, seq_q, seq_kv]
        if attn_mask.dim() != 4:
            fail("attn_mask", "2 to 4 dimensions", f"{attn_mask.dim()}: {shape_of(attn_mask)}")
        if any(size != 1 and size != whole for size, whole in zip(attn_mask.shape, full, strict=True)):
            fail("attn_mask", f"a shape that broadcasts to {full}", shape_of(attn_mask))
    if alibi_slopes is not None:
        check_tensor("alibi_slopes", alibi_slopes)
        check_device("alibi_slopes", alibi_slopes, q)
        check_dtype("alibi_slopes", alibi_slopes, acc)
        if shape_of(alibi_slopes) not in ([heads_q], [batch, heads_q]):
            fail("alibi_slopes", f"shape [{heads_q}] or [{batch}, {heads_q}]", shape_of(alibi_slopes))
    if sinks is not None:
        check_tensor("sinks", sinks)
        check_device("sinks", sinks, q)
        check_dtype("sinks", sinks, acc)
        if shape_of(sinks) != [heads_q]:
            fail("sinks", f"shape [{heads_q}]", shape_of(sinks))
    if rng_state is not None:
        check_tensor("rng_state", rng_state)
        check_device("rng_state", rng_state, q)
        check_dtype("rng_state", rng_state, torch.int64)
        if shape_of(rng_state) != [2]:
            fail("rng_state", "shape [2]", shape_of(rng_state))
    if (rng_state is not None) != (dropout_p > 0):
        fail("rng_state", "a tensor exactly when dropout_p > 0", f"dropout_p {dropout_p} and rng_state {rng_state}")


def check_dense(
    q, k, v, scale, window_left, window_right, softcap, dropout_p, attn_mask, alibi_slopes, sinks, rng_state
):
    """Raises unless these are arguments of attn_fwd."""
    check_qkv(q, k, v, 4, "[batch, heads, seq, head_dim]")
    batch, seq_q, seq_kv = q.shape[0], q.shape[2], k.shape[2]
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape[0] != batch:
            fail(name, f"batch {batch} as in q", tensor.shape[0])
    if v.shape[2] != seq_kv:
        fail("v", f"seq {seq_kv} as in k", v.shape[2])
    window = (window_left, window_right)
    check_options(q, batch, seq_q, seq_kv, scale, window, softcap, dropout_p, attn_mask, alibi_slopes, sinks, rng_state)


def check_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, window_left, window_right, softcap,
    dropout_p, attn_mask, alibi_slopes, sinks, rng_state,
):  # fmt: skip
    """Raises unless these are arguments of attn_varlen_fwd; what the cu_seqlens hold is for check_cu_seqlens."""
    check_qkv(q, k, v, 3, "[total, heads, head_dim]")
    if v.shape[0] != k.shape[0]:
        fail("v", f"total {k.shape[0]} as in k", v.shape[0])
    for name, cu_seqlens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_tensor(name, cu_seqlens)
        check_device(name, cu_seqlens, q)
        check_dtype(name, cu_seqlens, torch.int32)
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
            fail(name, "shape [batch + 1]", shape_of(cu_seqlens))
    if cu_seqlens_k.shape[0] != cu_seqlens_q.shape[0]:
        fail("cu_seqlens_k", f"shape [{cu_seqlens_q.shape[0]}] as cu_seqlens_q", shape_of(cu_seqlens_k))
    for name, length in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if length < 0:
            fail(name, "0 or more", length)
    batch, window = cu_seqlens_q.shape[0] - 1, (window_left, window_right)
    check_options(
        q,
        batch,
        max_seqlen_q,
        max_seqlen_k,
        scale,
        window,
        softcap,
        dropout_p,
        attn_mask,
        alibi_slopes,
        sinks,
        rng_state,
    )


def check_cu_seqlens(name, cu_seqlens, total, max_seqlen):
    """Raises unless cu_seqlens cuts [0, total) into sequences of at most max_seqlen."""
    if torch.compiler.is_compiling():
        return
    try:
        values = cu_seqlens.tolist()
    except RuntimeError:  # a fake or batched tensor has no values to check
        return
    lengths = [end - begin for begin, end in zip(values, values[1:], strict=False)]
    if values[0] != 0:
        fail(name, "to start at 0", values[0])
    if any(length < 0 for length in lengths):
        fail(name, "not to decrease", values)
    if values[-1] != total:
        fail(name, f"to end at the total {total}", values[-1])
    if lengths and max(lengths) > max_seqlen:
        fail(name, f"sequences of at most max_seqlen {max_seqlen}", max(lengths))
