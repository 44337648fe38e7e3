"""Time of the GPU backward beside the backends of scaled_dot_product_attention, in turns and in one process."""

from functools import partial

import common
import gpu
import torch
from peers import PEERS

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
        with gpu.without_what_fails(case, name):
            if name in OURS:
                out = flash_ext.attn(q, k, v, is_causal=case.is_causal, window=case.window, **OURS[name])
            else:
                out = PEERS[name](case, q, k, v)()
            found[name] = partial(torch.autograd.grad, out, (q, k, v), grad_out, retain_graph=True)
            found[name]()
    return found


if __name__ == "__main__":
    gpu.main(__doc__, "gpu-backward", rows(), calls, list(OURS), passes=(True,))
