"""FLOP counts for torch.utils.flop_counter.

By torch's convention for scaled_dot_product_attention: two matrix products forward, five backward, over all
[seq_q, seq_kv] scores, masked or not.
"""

import importlib.util
import sys

import torch


def fwd_flop(pairs, q_shape, v_shape):
    return 2 * pairs * (q_shape[-1] + v_shape[-1])


def bwd_flop(pairs, q_shape, v_shape):
    return 2 * pairs * (3 * q_shape[-1] + 2 * v_shape[-1])


def packed_pairs(q, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    """Scores of all heads and sequences; fake tensors do not tell their lengths, so those count as the longest."""
    lengths = [(max_seqlen_q, max_seqlen_k)] * (cu_seqlens_q.shape[0] - 1)
    if type(cu_seqlens_q) is torch.Tensor and cu_seqlens_q.device.type != "meta":
        lengths = zip(cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist(), strict=True)
    return q.shape[1] * sum(seq_q * seq_kv for seq_q, seq_kv in lengths)


def attn_fwd_flop(q_shape, k_shape, v_shape, *args, **kwargs):
    return fwd_flop(q_shape[0] * q_shape[1] * q_shape[2] * k_shape[2], q_shape, v_shape)


def attn_bwd_flop(grad_out_shape, grad_lse_shape, q_shape, k_shape, v_shape, *args, **kwargs):
    return bwd_flop(q_shape[0] * q_shape[1] * q_shape[2] * k_shape[2], q_shape, v_shape)


def attn_plain_bwd_flop(grad_out_shape, *shapes, **kwargs):
    return attn_bwd_flop(grad_out_shape, None, *shapes)


def attn_varlen_fwd_flop(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *args, **kwargs):
    return fwd_flop(packed_pairs(q, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), q.shape, v.shape)


def attn_varlen_bwd_flop(
    grad_out, grad_lse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *args, **kwargs
):
    return bwd_flop(packed_pairs(q, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), q.shape, v.shape)


def register(flop_counter):
    ops = torch.ops.flash_ext
    flop_counter.register_flop_formula(ops.attn_fwd)(attn_fwd_flop)
    flop_counter.register_flop_formula(ops.attn_plain)(attn_fwd_flop)
    flop_counter.register_flop_formula(ops.attn_bwd)(attn_bwd_flop)
    flop_counter.register_flop_formula(ops.attn_plain_bwd)(attn_plain_bwd_flop)
    flop_counter.register_flop_formula(ops.attn_varlen_fwd, get_raw=True)(attn_varlen_fwd_flop)
    flop_counter.register_flop_formula(ops.attn_varlen_bwd, get_raw=True)(attn_varlen_bwd_flop)


class RegisterOnImport:
    """torch.utils.flop_counter imports Triton, a fifth of a second where that is installed: wait until it is wanted."""

    name = "torch.utils.flop_counter"

    def find_spec(self, name, path, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_register(module):
            execute(module)
            register(module)

        spec.loader.exec_module = execute_and_register
        return spec


if RegisterOnImport.name in sys.modules:
    register(sys.modules[RegisterOnImport.name])
else:
    sys.meta_path.insert(0, RegisterOnImport())
