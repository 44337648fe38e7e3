"""Time of the GPU backward beside the backends of scaled_dot_product_attention, in turns and in one process."""

from functools import partial

import common
import gpu
import torch

import flash_ext

OURS = {"flash_ext": {}, "gpu": {"backend": "gpu"}, "deterministic": {"deterministic": True}}


def rows():
    """(case, dtype): the forward's, but for decoding."""
    return [(case, dtype) for case, dtype in gpu.rows() if case.seq_q == case.seq_kv]


def calls(case, dtype, names):
    """name -> what to time: the gradients of q, k and v alone."""
    q, k, v = (x.requires_grad_() for x in common.tensors(case, dtype, "cuda"))
    grad_out = torch.randn_like(q)
    found = {}
    for name in names:
        if name in OURS:
            call = partial(flash_ext.attn, q, k, v, is_causal=case.is_causal, **OURS[name])
        else:
            call = gpu.sdpa_call(gpu.PEERS[name], case, q, k, v)
        with gpu.without_what_fails(case, name):
            found[name] = partial(torch.autograd.grad, call(), (q, k, v), grad_out, retain_graph=True)
            found[name]()
    return found


if __name__ == "__main__":
    gpu.main(__doc__, "gpu-backward", rows(), calls, list(OURS), backward=True)
