"""How many times as fast as eager attention: causal, batch 1, 32 heads of 128, from 256 to 4096 tokens.

python bench/speedup.py                  # on a GPU where there is one: float16
python bench/speedup.py --device cpu     # bfloat16, to 1024 tokens

Beside it each backend of scaled_dot_product_attention that runs the case, of which the fastest counts as SDPA's best.
Times are those of calls in eager mode, one after the other, so at few tokens the host's share is in them.
"""

import common
import eager
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import flash_ext
from flash_ext.measure import interleaved, milliseconds, progress, table

HEADS, HEAD_DIM = 32, 128
TOKENS = {"cuda": (256, 512, 1024, 2048, 4096), "cpu": (256, 512, 1024)}
DTYPES = {"cuda": "float16", "cpu": "bfloat16"}
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def by_sdpa(backend, q, k, v, is_causal=True):
    def call():
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)

    return call


def calls(tokens, dtype, device, heads):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, heads, tokens, HEAD_DIM, dtype=dtype, device=device)
    mask = eager.causal_mask(tokens, dtype, device)
    found = {
        "flash_ext": lambda: flash_ext.attn(q, k, v, is_causal=True),
        "eager": lambda: eager.attention(q, k, v, mask),
        "SDPA": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    }
    for name, backend in BACKENDS.items():
        call = by_sdpa(backend, q, k, v)
        if common.runs(call):
            found[f"SDPA {name}"] = call
    found["eager"]()
    expected = found["SDPA"]().float()
    error = (found["flash_ext"]().float() - expected).norm() / expected.norm()
    if not error < 0.02:
        raise RuntimeError(f"{tokens} tokens: flash_ext is {error:.3f} of the norm away from SDPA")
    return found


def main(arguments=None):
    parser = common.device_arguments(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", metavar="N", help="instead of the usual numbers of tokens")
    parser.add_argument("--dtype", choices=common.DTYPES)
    parser.add_argument("--heads", type=int, default=HEADS)
    options = parser.parse_args(arguments)
    common.apply(options)
    facts = common.machine()
    common.announce_device(facts, options.device)
    dtype = options.dtype or DTYPES[options.device]
    lengths = options.tokens or TOKENS[options.device]
    results = []
    with progress(len(lengths) * options.rounds, "measuring") as bar, torch.inference_mode():
        for tokens in lengths:
            found = calls(tokens, common.DTYPES[dtype], options.device, options.heads)
            seconds = interleaved(found, options.rounds, 0.02, device=options.device, on_round=bar.update)
            best = min((name for name in seconds if name.startswith("SDPA")), key=seconds.get)
            results.append({"tokens": tokens, "dtype": dtype, "seconds": seconds, "best_sdpa": best})
    rows = [
        (
            r["tokens"], milliseconds(r["seconds"]["eager"]), milliseconds(r["seconds"][r["best_sdpa"]]),
            r["best_sdpa"].removeprefix("SDPA").strip() or "default", milliseconds(r["seconds"]["flash_ext"]),
            f"{r['seconds']['eager'] / r['seconds']['flash_ext']:.1f}x",
            f"{r['seconds'][r['best_sdpa']] / r['seconds']['flash_ext']:.2f}x",
        )
        for r in results
    ]  # fmt: skip
    header = ("tokens", "eager", "SDPA's best", "which is", "flash_ext", "over eager", "over SDPA")
    print(table(header, rows, options.markdown))
    heading = f"Times as fast as eager attention: 1x{options.heads} heads of {HEAD_DIM}, causal, {dtype}"
    common.finish(f"speedup-{options.device}", facts, results, heading, options.device, plot_series(results))


def plot_series(results):
    def over(r, name):
        return r["seconds"]["eager"] / r["seconds"][name] if name in r["seconds"] else None

    names = ["flash_ext", *dict.fromkeys(name for r in results for name in r["seconds"] if name.startswith("SDPA"))]
    labels = [f"{r['tokens']} tokens" for r in results]
    return labels, {name: [over(r, name) for r in results] for name in names}, "times as fast as eager"


if __name__ == "__main__":
    main()
