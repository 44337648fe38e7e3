"""What the GPU benchmarks compare with: attention of other projects, where it is installed.

PEERS: name -> function of (case, q, k, v), tensors [batch, heads, seq, head_dim], that returns the call to time. All of
them start at the bottom right corner, as flash_ext does.
"""

from functools import cache, partial
from importlib.util import find_spec

import torch
from torch.nn.attention import SDPBackend, bias, sdpa_kernel


def sdpa_default(case, q, k, v):
    """The backend that PyTorch chooses."""
    if case.window:
        raise RuntimeError("no windows")
    options = {"enable_gqa": case.heads_q != case.heads_kv}
    if case.is_causal and case.seq_q == case.seq_kv:
        options["is_causal"] = True
    elif case.is_causal:
        options["attn_mask"] = bias.causal_lower_right(case.seq_q, case.seq_kv)
    return partial(torch.nn.functional.scaled_dot_product_attention, q, k, v, **options)


def sdpa(backend):
    def make(case, q, k, v):
        default = sdpa_default(case, q, k, v)

        def call():
            with sdpa_kernel(backend):
                return default()

        return call

    return make


@cache
def compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = 64  # each shape is another program; the default would run some eagerly
    return torch.compile(flex_attention, dynamic=False)


def flex(case, q, k, v):
    from torch.nn.attention.flex_attention import create_block_mask

    block_mask = None
    if case.is_causal:
        offset = case.seq_kv - case.seq_q

        def visible(b, h, i, j):
            causal = i + offset >= j
            return causal & (i + offset - j <= case.window[0]) if case.window else causal

        block_mask = create_block_mask(visible, None, None, case.seq_q, case.seq_kv, device=q.device)
    return partial(compiled_flex(), q, k, v, block_mask=block_mask, enable_gqa=case.heads_q != case.heads_kv)


def flash_attn(module):
    """FlashAttention's own packages: 2; FA3, for Hopper; FA4, in CuTe's language. For [batch, seq, heads, head_dim]."""

    def make(case, q, k, v):
        function = __import__(module, fromlist=["flash_attn_func"]).flash_attn_func
        by_token = [x.transpose(1, 2) for x in (q, k, v)]
        window = {"window_size": case.window} if case.window else {}

        def call():
            result = function(*by_token, causal=case.is_causal, **window)
            return (result[0] if isinstance(result, tuple) else result).transpose(1, 2)

        return call

    return make


def is_installed(module):
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


PACKAGES = {"flash-attn": "flash_attn.flash_attn_interface", "FA3": "flash_attn_interface", "FA4": "flash_attn.cute"}
PEERS = {
    "SDPA": sdpa_default,  # where the host counts: sdpa_kernel(...), by which the next are chosen, costs it time
    "FA2": sdpa(SDPBackend.FLASH_ATTENTION),
    "cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
    "mem-eff": sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "math": sdpa(SDPBackend.MATH),  # in float32 proper: torch.backends.cuda.matmul.allow_tf32 is False by default
    "Flex": flex,
} | {name: flash_attn(module) for name, module in PACKAGES.items()}


def peers_of(case, dtype):
    """The names of those that are worth their time."""
    if dtype == torch.float32:
        return "mem-eff", "math"
    usual = ("FA2", "cuDNN", "mem-eff") if case.seq_q < 16 else ("FA2", "cuDNN", "mem-eff", "Flex")
    return *usual, *(name for name, module in PACKAGES.items() if is_installed(module))
