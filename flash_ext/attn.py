"""The public functions: from arguments to the op of the backend that runs them."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import arguments, backends, usual
from .math import attention, attention_varlen, run

if backends.native is not None:
    from . import registration

    attn_fwd = torch.ops.flash_ext.attn_fwd.default
    attn_plain = torch.ops.flash_ext.attn_plain.default
    attn_varlen_fwd = torch.ops.flash_ext.attn_varlen_fwd.default


def attn(
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
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention, softmax(scale * query @ key^T) @ value, without the matrix of scores in memory.

    A drop-in for torch.nn.functional.scaled_dot_product_attention: the same first eight parameters. Two meanings are
    wider: grouped heads need no flag, and is_causal aligns the last query with the last key.

    Shapes, with layout="bhsd" ("bshd" has heads and seq swapped):
        query          [batch, heads_q, seq_q, head_dim]
        key            [batch, heads_kv, seq_kv, head_dim]; heads_q is a multiple of heads_kv, and query head h reads
                       head h // (heads_q / heads_kv) of key and value (enable_gqa=False: the counts must be equal)
        value          [batch, heads_kv, seq_kv, head_dim_v]
        result         [batch, heads_q, seq_q, head_dim_v], of query's dtype
    All of one floating dtype and one device. Accumulation is in float32 (float64 for float64). Any strides do; a tensor
    whose last dimension is not contiguous is copied.

    Options, in the order in which they act on s = scale * query @ key^T; `i` counts queries and `j` keys:
        scale          default 1 / sqrt(head_dim)
        softcap        s = softcap * tanh(s / softcap); 0 is none (Gemma 2, arXiv:2408.00118)
        alibi_slopes   s = s - slope * abs(i + seq_kv - seq_q - j); [heads_q] or [batch, heads_q]. Only "math" has its
                       gradient; a call that needs it runs there (ALiBi, arXiv:2108.12409)
        attn_mask      bool, True = keep, or floating, added to s; broadcasts to [batch, heads_q, seq_q, seq_kv]; 2 to 4
                       dimensions. A floating mask gets a gradient, of its own shape
        is_causal      key j is visible where j <= i + seq_kv - seq_q; with causal_align="top_left", where j <= i
        window         (left, right): visible where i' - left <= j <= i' + right, i' being i aligned as for is_causal;
                       -1 is unbounded (Longformer, arXiv:2004.05150). Mask, causal and window hold together
        sinks          [heads_q], a logit per head that takes part in the softmax's denominator only; gets a gradient
                       (StreamingLLM, arXiv:2309.17453)
        dropout_p      in [0, 1): the probability that a weight is dropped, in every call where it is not 0 (there is no
                       training flag). Drawn from torch's generator of the device; the same mask on every backend
    A query that sees no key gives 0, and passes no gradient.

    return_lse: also return the natural logarithm of the softmax's denominator, [batch, heads_q, seq_q], float32
        (float64 for float64), sinks included; -inf where a query sees no key. Gradients flow through it.
    deterministic: whether gradients must be the same bit for bit from run to run; None follows
        torch.use_deterministic_algorithms. (The CPU backend always is deterministic.)
    backend: the name of the one to run, see `explain` and `use_backend`; None is the fastest that can.

    Under torch.autocast, query, key and value are cast as for scaled_dot_product_attention; masks, slopes and sinks are
    not. Works with torch.compile, torch.export, torch.func.grad and vmap; torch.func.jvp and second derivatives raise
    RuntimeError on native backends and work on backend="math".

    Raises ValueError, TypeError or RuntimeError with a message that names the argument (q, k, v for query, key, value),
    what was expected and what came: "k: expected head_dim 64 as in q, got 32".

    Method: FlashAttention-2 (arXiv:2307.08691), with the online softmax of arXiv:1805.02867.
    """
    if (
        attn_mask is None and alibi_slopes is None and sinks is None and backend is None
        and not (dropout_p or softcap or return_lse)
    ):  # fmt: skip
        out = _usual(
            query, key, value, is_causal, scale, enable_gqa, window, causal_align, layout, deterministic,
        )  # fmt: skip
        if out is not None:
            return out
    args = arguments.dense(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, window, softcap, alibi_slopes, sinks,
        causal_align, deterministic, layout,
    )  # fmt: skip
    kernels = _kernels(args[:3], attn_mask, alibi_slopes, deterministic, softcap, dropout_p, None, backend)
    if kernels is None:
        out, lse = run(attention, *args)
    elif _skips_autograd(query, key, value, attn_mask, sinks):
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = attn_fwd(*args, kernels)
    else:
        out, lse = attn_fwd(*args, kernels)
    if layout == "bshd":
        out = out.transpose(1, 2)
    return (out, lse) if return_lse else out


def attn_varlen(
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
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attn` over sequences of different lengths, packed one after the other without padding.

        q              [total_q, heads_q, head_dim]
        k              [total_k, heads_kv, head_dim]
        v              [total_k, heads_kv, head_dim_v]
        cu_seqlens_q   int32 [batch + 1], on q's device: sequence b is rows cu_seqlens_q[b] to cu_seqlens_q[b + 1] of q.
                       Starts at 0, does not decrease, ends at total_q. A sequence may be empty
        cu_seqlens_k   the same for k and v
        max_seqlen_q   at least the longest sequence's length; max_seqlen_k likewise
        result         [total_q, heads_q, head_dim_v]

    All options mean what they mean in `attn`, within each sequence: seq_q and seq_kv are the sequence's own lengths.
    attn_mask broadcasts to [batch, heads_q, max_seqlen_q, max_seqlen_k], of which each sequence uses its top-left
    corner; alibi_slopes is [heads_q] or [batch, heads_q]; lse is [heads_q, total_q].
    """
    args = arguments.varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, attn_mask, dropout_p, is_causal, scale,
        enable_gqa, window, softcap, alibi_slopes, sinks, causal_align, deterministic,
    )  # fmt: skip
    lengths = cu_seqlens_q.shape[0] - 1, *args[5:7]
    kernels = _kernels(args[:3], attn_mask, alibi_slopes, deterministic, softcap, dropout_p, lengths, backend)
    if kernels is None:
        out, lse = run(attention_varlen, *args)
    elif _skips_autograd(q, k, v, attn_mask, sinks):
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = attn_varlen_fwd(*args, kernels)
    else:
        out, lse = attn_varlen_fwd(*args, kernels)
    return (out, lse) if return_lse else out


def _usual(query, key, value, is_causal, scale, enable_gqa, window, causal_align, layout, deterministic):
    """The usual call, said shortly, which spares half of its time on the host; None where the long way is needed."""
    by_token = layout == "bshd"
    top_left = causal_align == "top_left"
    if not (
        type(query) is type(key) is type(value) is Tensor
        and backends.surely_native(query, value, None)
        and _only_autograd()
        and (by_token or layout == "bhsd")
        and (top_left or causal_align == "bottom_right")
        and (enable_gqa or query.ndim == key.ndim == 4 and query.shape[1 + by_token] == key.shape[1 + by_token])
    ):
        return None
    # As in arguments.dense, scale and the output's place in memory, too.
    left, right = (-1, -1) if window is None else arguments.sides(window)
    if is_causal:
        right = 0
    if usual.call is not None and torch._C._get_tracing_state() is None:
        return usual.call(query, key, value, scale, left, right, top_left, by_token, deterministic)
    if not query.ndim == key.ndim == value.ndim == 4:
        return None
    if scale is None:
        scale = query.shape[-1] ** -0.5 if query.shape[-1] else 1.0
    place = scale, left, right, top_left, by_token or arguments.lies_by_token(query, value)
    if not _needs_gradients(query, key, value):
        with torch._C._AutoDispatchBelowAutograd():
            if not by_token:
                return attn_plain(query, key, value, *place)
            views = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
            return attn_plain(*views, *place).transpose(1, 2)
    if torch._C._is_any_autocast_enabled():
        return None
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    return registration.apply_attn_plain(query, key, value, by_token, *place, deterministic)


def _kernels(tensors, attn_mask, alibi_slopes, deterministic, softcap, dropout_p, lengths, backend):
    """The op's argument `kernels`, or None where "math" runs the call."""
    query = tensors[0]
    if backend is None and alibi_slopes is None and backends.surely_native(query, tensors[2], attn_mask):
        return 0  # the common case, said shortly
    call = backends.Call(*tensors, attn_mask, alibi_slopes, deterministic, softcap, dropout_p, lengths)
    name = backends.select(call, backend)
    if name == "math":
        return None
    return 0 if backend is None and backends.forced is None else backends.KERNELS.get(name, 0)


def _needs_gradients(*tensors):
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)


def _only_autograd():
    """Not while tracing, under functorch or in forward-mode AD, where autograd's kernel is part of what happens."""
    return not (
        torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )


def _skips_autograd(*tensors):
    """Whether autograd's kernel, a Python function, would have nothing to do: worth a third of an eager call's time."""
    return _only_autograd() and not _needs_gradients(*tensors)
