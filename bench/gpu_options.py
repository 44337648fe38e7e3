"""Time of the GPU forward with options, beside what torch has for them: SDPA with a mask, compiled FlexAttention."""

import math
from functools import partial

import common
import gpu
import torch
import torch.nn.functional as F
from peers import compiled_flex
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask

import flash_ext
from flash_ext.testing import Case

DTYPE = torch.bfloat16
SIZES = (4, 16, 16, 4096, 4096)  # batch, heads_q, heads_kv, seq_q, seq_kv
WINDOW, SOFTCAP, DROPOUT = 1024, 30.0, 0.1
SDPA = {"mem-eff": SDPBackend.EFFICIENT_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
ALL_PEERS = (*SDPA, "Flex")
CAUSAL = ("alibi-causal", "softcap-causal", "window-causal")


def rows(head_dims=(64, 128)):
    """(case, dtype); what the option is, its id says."""
    for head_dim in head_dims:
        for option in ("bool", "padding", "bias", *CAUSAL, "dropout"):
            name = f"d{head_dim}-{option}"
            yield Case(name, *SIZES, head_dim, is_causal=option in CAUSAL, window=window_of(option)), DTYPE


def window_of(option):
    return (WINDOW, 0) if option.startswith("window") else None


def inputs(case):
    """What the options of a case are made of: a mask that keeps seven of eight pairs, or so many keys, or a bias."""
    generator = torch.Generator("cuda").manual_seed(1)
    random = partial(torch.rand, device="cuda", generator=generator)
    option = case.id.split("-")[1]
    mask = None
    if option == "bool":
        mask = random(1, 1, case.seq_q, case.seq_kv) < 7 / 8
    elif option == "padding":
        lengths = torch.linspace(case.seq_kv // 2, case.seq_kv, case.batch, device="cuda").long()
        mask = torch.arange(case.seq_kv, device="cuda") < lengths.view(-1, 1, 1, 1)
    elif option == "bias":
        mask = random(1, 1, case.seq_q, case.seq_kv).to(DTYPE)
    slopes = 2.0 ** (-8 * torch.arange(1, case.heads_q + 1, device="cuda") / case.heads_q)
    return option, mask, slopes


def flash_ext_call(backend, case, q, k, v, mask=None):
    """mask: instead of the case's own."""
    option, own_mask, slopes = inputs(case)
    mask = own_mask if mask is None else mask
    options = {
        "alibi": dict(alibi_slopes=slopes),
        "softcap": dict(softcap=SOFTCAP),
        "window": dict(window=case.window),
        "dropout": dict(dropout_p=DROPOUT),
    }.get(option, dict(attn_mask=mask))
    return partial(flash_ext.attn, q, k, v, is_causal=case.is_causal, backend=backend, **options)


def sdpa_call(backend, case, q, k, v, mask=None):
    """None where it would need another algorithm. ALiBi and windows are a mask, stored for all heads that differ."""
    option, own_mask, slopes = inputs(case)
    mask = own_mask if mask is None else mask
    if option == "softcap":
        return None
    distance = torch.arange(case.seq_q, device="cuda")[:, None] - torch.arange(case.seq_kv, device="cuda")
    if option == "alibi":
        mask = (-slopes[:, None, None] * distance.abs()).masked_fill(distance < 0, -math.inf).to(DTYPE)[None]
    elif option == "window":
        mask = (distance >= 0) & (distance <= WINDOW)

    def call():
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, mask, DROPOUT if option == "dropout" else 0.0)

    return call


def flex_call(case, q, k, v, mask=None):
    """None for dropout, which it does not have."""
    option, own_mask, slopes = inputs(case)
    mask = own_mask if mask is None else mask
    if option == "dropout":
        return None

    def causal(b, h, i, j):
        return i >= j

    visible = {
        "bool": lambda b, h, i, j: mask[0, 0, i, j],
        "padding": lambda b, h, i, j: mask[b, 0, 0, j],
        "window": lambda b, h, i, j: (i >= j) & (i - j <= WINDOW),
    }.get(option, causal if case.is_causal else None)
    score = {
        "bias": lambda score, b, h, i, j: score + mask[0, 0, i, j],
        "alibi": lambda score, b, h, i, j: score - slopes[h] * (i - j).abs(),
        "softcap": lambda score, b, h, i, j: SOFTCAP * torch.tanh(score / SOFTCAP),
    }.get(option)
    block_mask = None
    if visible is not None:
        batch = case.batch if option == "padding" else None
        block_mask = create_block_mask(visible, batch, None, case.seq_q, case.seq_kv, device="cuda")
    return partial(compiled_flex(), q, k, v, score_mod=score, block_mask=block_mask)


def calls(case, dtype, names):
    """name -> what to time."""
    q, k, v = common.tensors(case, dtype, "cuda")
    makers = {name: partial(flash_ext_call, backend) for name, backend in gpu.OURS.items()} | {"Flex": flex_call}
    makers |= {name: partial(sdpa_call, backend) for name, backend in SDPA.items()}
    found = {}
    for name in names:
        with gpu.without_what_fails(case, name), torch.inference_mode(name != "Flex"), torch.no_grad():
            call = makers[name](case, q, k, v)
            if call is not None:
                call()  # compiles
                found[name] = gpu.captured(call)
    return found


if __name__ == "__main__":
    gpu.main(__doc__, "gpu-options", list(rows()), calls, [*gpu.OURS], peers_of=lambda case, dtype: ALL_PEERS)
