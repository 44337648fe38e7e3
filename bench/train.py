"""Training speed of a GPT of 124 million weights (examples/gpt.py), with SDPA and with flash_ext.

python bench/train.py                    # on a GPU where there is one: 16 x 1024 tokens a step
python bench/train.py --device cpu       # a small one, 4 x 64 tokens, float32

A step is forward, backward, clipping and AdamW; on a GPU the products are in bfloat16 by autocast. Tokens are random,
and already on the device. Both models are trained in turns.
"""

import sys
from dataclasses import replace
from pathlib import Path

import common
import torch

from flash_ext.measure import interleaved, megabytes, progress, table

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from gpt import ATTENTION, GPT, PRESETS, optimizer, train_step

SIZES = {"cuda": ("124m", 16), "cpu": ("tiny", 4)}  # preset, sequences


def trainer(attention, config, batch, options):
    """The call that trains one step more, and returns the loss."""
    torch.manual_seed(0)
    model = GPT(config, ATTENTION[attention]).to(options.device)
    adam = optimizer(model)
    step_with = torch.compile(model) if options.compile else model
    tokens = torch.randint(config.vocabulary, (batch, config.context + 1), device=options.device)
    tokens, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return lambda: train_step(step_with, adam, tokens, targets)


def peak_growth(call, device):
    """Bytes of a step beyond weights and the optimizer's state."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def main(arguments=None):
    parser = common.device_arguments(__doc__)
    parser.add_argument("--batch", type=int, metavar="N", help="sequences a step, instead of the usual number")
    parser.add_argument("--compile", action="store_true", help="torch.compile the models")
    options = parser.parse_args(arguments)
    common.apply(options)
    facts = common.machine()
    common.announce_device(facts, options.device)
    preset, batch = SIZES[options.device]
    config, batch = PRESETS[preset], options.batch or batch
    if options.device == "cpu":
        config = replace(config, vocabulary=1000)  # the logits would take nearly all of the time
    calls = {name: trainer(name, config, batch, options) for name in ("sdpa", "flash_ext")}
    losses = {name: [call().item() for _ in range(3)] for name, call in calls.items()}  # warms up, compiles
    peaks = {name: peak_growth(call, options.device) for name, call in calls.items()}
    with progress(options.rounds, "measuring") as bar:
        seconds = interleaved(calls, options.rounds, 0.2, device=options.device, on_round=bar.update)
    tokens = batch * config.context
    rows = [
        (
            name, f"{value * 1e3:.1f} ms", f"{tokens / value:,.0f}", f"{seconds['sdpa'] / value:.3f}x",
            megabytes(peaks[name]), f"{losses[name][-1]:.4f}",
        )
        for name, value in seconds.items()
    ]  # fmt: skip
    size = f"{config.layers} layers, {config.heads} heads of {config.width // config.heads}"
    compiled = ", compiled" if options.compile else ""
    print(f"{size}, {batch} x {config.context} tokens{compiled}")
    header = ("attention", "a step", "tokens/s", "over SDPA", "a step's memory", "loss at step 3")
    print(table(header, rows, options.markdown))
    result = {"config": preset, "batch": batch, "seconds": seconds, "losses": losses, "bytes": peaks}
    series = {name: [tokens / value] for name, value in seconds.items()}
    suffix = "-compiled" if options.compile else ""
    heading = f"Training a GPT: {size}, {batch} x {config.context} tokens{compiled}"
    plotted = ["training"], series, "tokens a second"
    common.finish(f"train-{options.device}{suffix}", facts, result, heading, options.device, plotted)


if __name__ == "__main__":
    main()
