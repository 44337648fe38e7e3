"""Time of attention in a training step, forward and backward as a user calls them, the host's work included."""

import common
import gpu
import torch
from peers import PEERS

import flash_ext
from flash_ext.testing import Case

OURS = {"flash_ext": {}, "deterministic": {"deterministic": True}}


def rows():
    """(case, dtype): one sequence, as in fine-tuning, then the batches of a small GPT."""
    for heads_kv, dtype in ((32, torch.float16), (8, torch.bfloat16)):
        for seq in (512, 1024, 2048, 4096):
            name = f"b1-{seq}-h32-{heads_kv}-d128-causal"
            yield Case(name, 1, 32, heads_kv, seq, seq, 128, is_causal=True), dtype
    for batch, seq in ((1, 1024), (4, 1024), (16, 1024), (4, 2048), (4, 4096)):
        yield Case(f"b{batch}-{seq}-h12-d64-causal", batch, 12, 12, seq, seq, 64, is_causal=True), torch.bfloat16
    for seq in (1024, 4096):
        yield Case(f"b4-{seq}-h16-d128", 4, 16, 16, seq, seq, 128), torch.bfloat16


def calls(case, dtype, names):
    """name -> what to time: the result and the gradients of q, k and v."""
    q, k, v = (x.requires_grad_() for x in common.tensors(case, dtype, "cuda"))
    grad_out = torch.randn_like(q)

    def step(forward):
        return lambda: torch.autograd.grad(forward(), (q, k, v), grad_out)

    found = {}
    for name in names:
        with gpu.without_what_fails(case, name):
            if name in OURS:
                options = OURS[name]
                found[name] = step(lambda o=options: flash_ext.attn(q, k, v, is_causal=case.is_causal, **o))
            else:
                found[name] = step(PEERS[name](case, q, k, v))
            found[name]()
    return found


def peers_of(case, dtype):
    return "SDPA", "FA2", "cuDNN"


if __name__ == "__main__":
    gpu.main(__doc__, "gpu-step", list(rows()), calls, list(OURS), passes=(False, True), peers_of=peers_of)
