"""Backends beside each other at batch 64, 32 heads, 256 tokens of 32, and in nanoGPT's CausalSelfAttention.

python bench/module.py                            # on a GPU where there is one: float16
python bench/module.py --device cpu --no-compile

First the function alone, not causal. Then the module of examples/gpt.py at GPT-2's size, as it is and compiled by
torch.compile: forward under inference_mode, and forward with backward.
"""

import sys
from pathlib import Path

import common
import torch
from speedup import BACKENDS, by_sdpa

import flash_ext
from flash_ext.measure import interleaved, milliseconds, progress, table

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from gpt import ATTENTION, CausalSelfAttention, Config

SHAPES = {"cuda": (64, 32, 256, 32), "cpu": (4, 8, 256, 32)}  # batch, heads, tokens, head_dim
MODULES = {"cuda": (16, Config()), "cpu": (1, Config(heads=4, width=256, context=256))}  # batch, sizes
DTYPES = {"cuda": torch.float16, "cpu": torch.bfloat16}


def function_calls(device):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, *SHAPES[device], dtype=DTYPES[device], device=device)
    found = {"flash_ext": lambda: flash_ext.attn(q, k, v)}
    for name, backend in BACKENDS.items():
        call = by_sdpa(backend, q, k, v, is_causal=False)
        if common.runs(call):
            found[f"SDPA {name}"] = call
    return found


def modules(device, compiled):
    """name -> module, all with the same weights, and their input."""
    batch, config = MODULES[device]
    found = {}
    for name, attention in ATTENTION.items():
        torch.manual_seed(0)
        module = CausalSelfAttention(config, attention).to(device, DTYPES[device])
        found[name] = torch.compile(module, fullgraph=True) if compiled else module
    x = torch.randn(batch, config.context, config.width, dtype=DTYPES[device], device=device, requires_grad=True)
    return found, x


def forward(module, x):
    def call():
        with torch.inference_mode():
            return module(x)

    return call


def forward_backward(module, x):
    grad = torch.randn_like(x)
    leaves = [x, *module.parameters()]
    return lambda: torch.autograd.grad(module(x), leaves, grad)


def rows_of(options):
    """(what is measured, the calls)"""
    device = options.device
    batch, heads, tokens, head_dim = SHAPES[device]
    yield f"function {batch}x{heads}x{tokens}x{head_dim}", function_calls(device)
    for compiled in (False, True)[: 1 if options.no_compile else 2]:
        found, x = modules(device, compiled)
        for what, make in {"forward": forward, "forward and backward": forward_backward}.items():
            yield f"module, {what}{', compiled' * compiled}", {n: make(module, x) for n, module in found.items()}


def main(arguments=None):
    parser = common.device_arguments(__doc__)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options = parser.parse_args(arguments)
    common.apply(options)
    facts = common.machine()
    common.announce_device(facts, options.device)
    results = []
    with progress((3 if options.no_compile else 5) * options.rounds, "measuring") as bar:
        for what, calls in rows_of(options):
            for call in calls.values():
                call()  # compiles
            with torch.no_grad() if what.startswith("function") else torch.enable_grad():
                seconds = interleaved(calls, options.rounds, 0.02, device=options.device, on_round=bar.update)
            results.append({"title": what, "seconds": seconds})
    function, *others = results
    rows = [
        (name, milliseconds(value), f"{value / function['seconds']['flash_ext']:.2f}x")
        for name, value in function["seconds"].items()
    ]
    dtype = str(DTYPES[options.device]).removeprefix("torch.")
    print(table((f"{function['title']}, {dtype}", "time", "flash_ext's speed over it"), rows, options.markdown))
    batch, config = MODULES[options.device]
    sizes = f"{batch}x{config.context} tokens, {config.heads} heads of {config.width // config.heads}, {dtype}"
    rows = [
        (
            r["title"].removeprefix("module, "), milliseconds(r["seconds"]["sdpa"]),
            milliseconds(r["seconds"]["flash_ext"]), f"{r['seconds']['sdpa'] / r['seconds']['flash_ext']:.2f}x",
        )
        for r in others
    ]  # fmt: skip
    print("\n" + table((f"CausalSelfAttention, {sizes}", "SDPA", "flash_ext", "speed-up"), rows, options.markdown))
    labels = [f"{function['title']}, SDPA's best", *(r["title"] for r in others)]
    series = {
        name: [min(t for n, t in r["seconds"].items() if (n == "flash_ext") == ours) * 1e3 for r in results]
        for name, ours in {"SDPA": False, "flash_ext": True}.items()
    }
    heading = f"Attention alone and in a module, {dtype}"
    common.finish(f"module-{options.device}", facts, results, heading, options.device, (labels, series, "ms"))


if __name__ == "__main__":
    main()
