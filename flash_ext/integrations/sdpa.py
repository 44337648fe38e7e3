"""torch.nn.functional.scaled_dot_product_attention by flash_ext, for code that calls it and cannot be edited.

from flash_ext.integrations import sdpa
with sdpa.patch():          # or sdpa.install(), for good
    model(x)
"""

import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant

from .. import backends
from ..attn import attn

original = F.scaled_dot_product_attention
PLAIN = (Tensor, torch.nn.Parameter)

_lock = threading.Lock()
_depth = 0
_fast_path = True


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What takes the place of torch's function, with its parameters and meanings: `is_causal` starts at the top left.

    query [..., heads_q, seq_q, head_dim], key and value alike, with any leading dimensions, also none. attn_mask: bool
    (True takes part), float32 or of query's dtype, broadcast; or one of torch.nn.attention.bias. Calls that flash_ext
    has no native kernel for, or that torch refuses, go to torch's own function: nested and other special tensors, masks
    of another dtype, heads that differ without enable_gqa, a mask together with is_causal, other leading dimensions.
    The dropout mask is flash_ext's, not torch's. Errors are torch's or flash_ext's own.
    """
    if not takes_call(query, key, value, attn_mask, is_causal, enable_gqa):
        return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    causal_align = "top_left"
    if isinstance(attn_mask, CausalBias):
        is_causal, attn_mask, variant = True, None, attn_mask.variant
        causal_align = "bottom_right" if variant == CausalVariant.LOWER_RIGHT else "top_left"
    leading = query.shape[:-3]
    q, k, v = (four_dimensions(x) for x in (query, key, value))
    if attn_mask is not None and len(leading) > 1 and attn_mask.ndim > 3:
        attn_mask = four_dimensions(attn_mask.expand(*leading, *attn_mask.shape[-3:]))
    out = attn(
        q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa=enable_gqa, causal_align=causal_align,
    )  # fmt: skip
    return out if query.ndim == 4 else out.reshape(*query.shape[:-1], value.shape[-1])


def takes_call(query, key, value, attn_mask, is_causal, enable_gqa):
    """Whether flash_ext has a native kernel for the call and torch does not refuse it."""
    tensors = query, key, value
    if any(type(x) not in PLAIN or x.layout != torch.strided for x in tensors) or not 2 <= query.ndim:
        return False
    if not query.ndim == key.ndim == value.ndim or not query.shape[:-3] == key.shape[:-3] == value.shape[:-3]:
        return False
    if query.ndim > 2 and (key.shape[-3] != value.shape[-3] or not (enable_gqa or query.shape[-3] == key.shape[-3])):
        return False
    if key.shape[-2] != value.shape[-2] or not query.dtype == key.dtype == value.dtype:
        return False
    if isinstance(attn_mask, CausalBias):
        if is_causal or (attn_mask.seq_len_q, attn_mask.seq_len_kv) != (query.shape[-2], key.shape[-2]):
            return False
        attn_mask = None
    elif attn_mask is not None:
        if is_causal or type(attn_mask) not in PLAIN or attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
            return False
        if not 2 <= attn_mask.ndim <= query.ndim:
            return False
    call = backends.Call(query, key, value, attn_mask)
    return backends.forced is not None or backends.select(call, None) != "math"


def four_dimensions(x):
    while x.ndim < 4:
        x = x.unsqueeze(0)
    return x if x.ndim == 4 else x.flatten(0, -4)


class patch:
    """Runs torch.nn.functional.scaled_dot_product_attention on flash_ext inside the `with` block, in the whole process.

    That covers what looks the function up when it calls it, as nn.MultiheadAttention and nn.TransformerEncoderLayer do;
    not code that keeps a reference to torch's own function (`from torch.nn.functional import ...` before), nor
    nn.MultiheadAttention(need_weights=True), which does without it. torch's fused inference path of these two modules,
    which does not call it either, is off meanwhile.
    Blocks may nest.
    """

    def __enter__(self) -> None:
        global _depth, _fast_path
        with _lock:
            if _depth == 0:
                _fast_path = torch.backends.mha.get_fastpath_enabled()
                torch.backends.mha.set_fastpath_enabled(False)
                F.scaled_dot_product_attention = scaled_dot_product_attention
            _depth += 1

    def __exit__(self, *exception: Any) -> None:
        global _depth
        with _lock:
            _depth -= 1
            if _depth == 0:
                F.scaled_dot_product_attention = original
                torch.backends.mha.set_fastpath_enabled(_fast_path)


_installed: list[patch] = []


def install() -> None:
    """As `patch`, until `uninstall`. Calling it again does nothing."""
    if not _installed:
        _installed.append(patch())
        _installed[0].__enter__()


def uninstall() -> None:
    """Puts torch's function back, where `install` has taken its place."""
    if _installed:
        _installed.pop().__exit__()
