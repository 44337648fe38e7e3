"""Prefill latency of whole decoders, batch 1: eager attention, SDPA, flash_ext.

python bench/prefill.py                                       # on a GPU where there is one; bfloat16, 16 GB of weights
python bench/prefill.py --device cpu                          # the same blocks, two layers and few heads, float32
python bench/prefill.py --models Phi-2 --tokens 512 4096

The models have the exact shapes of Mistral-7B, Llama-3-8B and Phi-2, with random weights, in plain PyTorch
(bench/decoders.py): not taken from transformers, whose own host work comes on top of these times. A latency is the time
from the call until the logits of the last token are there, the host's work included.
"""

import common
import eager
import torch
from decoders import ATTENTION, SHAPES, random_decoder

from flash_ext.measure import interleaved, progress, table

TOKENS = {"cuda": (512, 1024, 2048), "cpu": (64, 128)}
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}


def measure(name, model, tokens, options, tick):
    """One row: seconds of each attention, and how far its logits are from those of eager attention."""
    device, dtype = options.device, DTYPES[options.device]
    generator = torch.Generator(device).manual_seed(1)
    prompt = torch.randint(model.shape.vocabulary, (1, tokens), device=device, generator=generator)

    def prefill(attention):
        mask = eager.causal_mask(tokens, dtype, device) if attention == "eager" else None
        logits, _ = model(prompt, ATTENTION[attention], mask)
        if device == "cuda":
            torch.cuda.synchronize()
        return logits

    logits = {attention: prefill(attention).float() for attention in ATTENTION}
    expected = logits["eager"]
    errors = {a: ((x - expected).norm() / expected.norm()).item() for a, x in logits.items() if a != "eager"}
    calls = {attention: lambda attention=attention: prefill(attention) for attention in ATTENTION}
    seconds = interleaved(calls, options.rounds, 0.1, device=device, on_round=tick)
    return {"model": name, "tokens": tokens, "seconds": seconds, "errors": errors}


def main(arguments=None):
    parser = common.device_arguments(__doc__)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", type=int, nargs="+", metavar="N", help="instead of the usual numbers of tokens")
    options = parser.parse_args(arguments)
    common.apply(options)
    facts = common.machine()
    common.announce_device(facts, options.device)
    lengths = options.tokens or TOKENS[options.device]
    results = []
    with progress(len(options.models) * len(lengths) * options.rounds, "measuring") as bar, torch.inference_mode():
        for name in options.models:
            shape = SHAPES[name] if options.device == "cuda" else SHAPES[name].small()
            model = random_decoder(shape, DTYPES[options.device], options.device)
            results += [measure(name, model, tokens, options, bar.update) for tokens in lengths]
            del model  # before the next one takes its place
    rows = []
    for r in results:
        times = {name: value * 1e3 for name, value in r["seconds"].items()}
        rows.append(
            (
                f"{r['model']}, {r['tokens']}", *(f"{times[name]:.2f}" for name in ATTENTION),
                f"{times['eager'] / times['flash_ext']:.2f}x", f"{times['SDPA'] / times['flash_ext']:.2f}x",
                *(f"{r['errors'][name]:.1e}" for name in ("SDPA", "flash_ext")),
            )
        )  # fmt: skip
    small = "" if options.device == "cuda" else ", made small"
    header = (
        f"model{small}, tokens", *(f"{name}, ms" for name in ATTENTION), "over eager", "over SDPA",
        "SDPA's logits off", "flash_ext's",
    )  # fmt: skip
    print(table(header, rows, options.markdown))
    labels = [f"{r['model']}, {r['tokens']}" for r in results]
    series = {name: [r["seconds"][name] * 1e3 for r in results] for name in ATTENTION}
    dtype = str(DTYPES[options.device]).removeprefix("torch.")
    heading = f"Prefill, batch 1, {dtype}, random weights in the models' shapes{small}"
    plotted = labels, series, "ms until the logits are there"
    common.finish(f"prefill-{options.device}", facts, results, heading, options.device, plotted)


if __name__ == "__main__":
    main()
