"""flash_ext behind torch's own hook: what torch runs where it would run its FlashAttention-2 (torch 2.11 and newer).

from flash_ext.integrations import torch_hook
torch_hook.activate()   # torch.nn.attention.activate_flash_attention_impl("flash_ext")
with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
    F.scaled_dot_product_attention(q, k, v)
"""

from typing import Any

import torch
from torch import Tensor

from .. import backends, registration

NAME = "flash_ext"
ops = registration.ops


class Handle:
    """What keeps the kernels registered; torch calls remove."""

    def __init__(self, library: torch.library.Library) -> None:
        self.library: torch.library.Library | None = library

    def remove(self) -> None:
        if self.library is not None:
            self.library._destroy()
        self.library = None


def register() -> str:
    """Makes torch.nn.attention.activate_flash_attention_impl("flash_ext") known, in this process. Returns the name.

    Raises NotImplementedError where this torch has no such hook.
    """
    if not hasattr(torch.nn.attention, "register_flash_attention_impl"):
        raise NotImplementedError(f"torch {torch.__version__} has no register_flash_attention_impl; use sdpa.patch")
    torch.nn.attention.register_flash_attention_impl(NAME, register_fn=put_kernels)
    return NAME


def activate() -> None:
    """Registers, and has torch's FLASH_ATTENTION backend be flash_ext until restore_flash_attention_impl()."""
    torch.nn.attention.activate_flash_attention_impl(register())


def put_kernels(key: str = "CUDA") -> Handle:
    if key == "CUDA" and not backends.GPU_KERNELS:
        raise RuntimeError("flash_ext was built without GPU kernels (FLASH_EXT_DEVICE=cuda builds them)")
    library = torch.library.Library("aten", "IMPL", key)
    for name, kernel in KERNELS.items():
        if hasattr(torch.ops.aten, name):
            library.impl(name, kernel, key)
    return Handle(library)


def side(window_size):
    return -1 if window_size is None else window_size


def refuse(**options):
    for name, value in options.items():
        if value is not None and value is not False:
            raise RuntimeError(f"{name}: flash_ext does not have it here")


def rows_as(out, query):
    """out, lying in memory as torch says that it does: as torch.empty_like(query)."""
    expected = torch.empty_like(query, device="meta").stride()
    return out if out.stride() == expected else torch.empty_like(query).copy_(out)


def options_of(query, dropout_p, is_causal, scale, window_left, window_right):
    """scale, window_left, window_right, top_left; rng_state. As FlashAttention-2, aligned to the bottom right."""
    right = 0 if is_causal else side(window_right)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    rng_state = torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=query.device) if dropout_p > 0 else None
    return (scale, side(window_left), right, False), rng_state


def as_torch_has_it(rng_state, query):
    """Seed and offset: two tensors, of which the first holds both."""
    if rng_state is None:
        state = torch.empty(2, dtype=torch.uint64, device=query.device)
    else:
        state = rng_state.view(torch.uint64)
    return state, torch.empty((), dtype=torch.uint64, device=query.device)


def forward_dense(query, key, value, dropout_p, is_causal, scale, left=None, right=None):
    """[batch, heads, seq, head_dim]."""
    place, rng_state = options_of(query, dropout_p, is_causal, scale, left, right)
    out_bshd = not query.is_contiguous() and query.stride(1) < query.stride(2)
    out, lse = ops.attn_fwd.default(query, key, value, *place, out_bshd, 0.0, dropout_p, rng_state=rng_state)
    return rows_as(out, query), lse, rng_state


def scaled_dot_product_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    refuse(return_debug_mask=return_debug_mask)
    out, lse, rng_state = forward_dense(query, key, value, dropout_p, is_causal, scale)
    debug_mask = torch.empty(0, dtype=query.dtype, device=query.device)
    return (
        out, lse, None, None, query.shape[2], key.shape[2], *as_torch_has_it(rng_state, query), debug_mask,
    )  # fmt: skip


def scaled_dot_product_flash_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return backward(
        grad_out, query, key, value, out, logsumexp, None, (), dropout_p, is_causal, philox_seed, scale, None, None
    )


def backward(grad_out, query, key, value, out, lse, op, packing, dropout_p, is_causal, rng_state, scale, left, right):
    place, _ = options_of(query, 0.0, is_causal, scale, left, right)
    state = rng_state.view(torch.int64) if dropout_p > 0 else None
    gradients = (op or ops.attn_bwd.default)(
        grad_out, None, query, key, value, out, lse, *packing, *place, 0.0, dropout_p, None, None, None, state, False,
        torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return gradients[:3]


def flash_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    **others: Any,
) -> tuple[Any, ...]:
    """[batch, seq, heads, head_dim], or packed [total, heads, head_dim] with cum_seq_q and cum_seq_k.

    others: what torch's versions differ in (alibi_slopes, seqused_k, block_table, num_splits); torch's backward knows
    nothing of them, and they are refused.
    """
    refuse(return_debug_mask=return_debug_mask, **others)
    windows = window_size_left, window_size_right
    if cum_seq_q is None:
        by_head = (x.transpose(1, 2) for x in (query, key, value))
        out, lse, rng_state = forward_dense(*by_head, dropout_p, is_causal, scale, *windows)
        out = rows_as(out.transpose(1, 2), query)
    else:
        place, rng_state = options_of(query, dropout_p, is_causal, scale, *windows)
        out, lse = ops.attn_varlen_fwd.default(
            query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, *place, 0.0, dropout_p, rng_state=rng_state
        )
        out = rows_as(out, query)
    debug_mask = torch.empty(0, dtype=query.dtype, device=query.device)
    return out, lse, *as_torch_has_it(rng_state, query), debug_mask


def flash_attention_forward_inplace(out: Tensor, *args: Any, **options: Any) -> Tensor:
    """The same into `out`; returns lse."""
    result, lse, *_ = flash_attention_forward(*args, **options)
    out.copy_(result)
    return lse


def flash_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    options = dropout_p, is_causal, rng_state, scale, window_size_left, window_size_right
    if cum_seq_q is not None:
        packing = cum_seq_q, cum_seq_k, max_q, max_k
        return backward(grad_out, query, key, value, out, logsumexp, ops.attn_varlen_bwd.default, packing, *options)
    by_head = [x.transpose(1, 2) for x in (grad_out, query, key, value, out)]
    dq, dk, dv = backward(*by_head, logsumexp, None, (), *options)
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


KERNELS = {
    "_scaled_dot_product_flash_attention": scaled_dot_product_flash_attention,
    "_scaled_dot_product_flash_attention_backward": scaled_dot_product_flash_attention_backward,
    "_flash_attention_forward": flash_attention_forward,
    "_flash_attention_forward_no_dropout_inplace": flash_attention_forward_inplace,
    "_flash_attention_backward": flash_attention_backward,
}
