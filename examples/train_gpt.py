"""Trains a GPT on text, byte by byte, with flash_ext's attention or PyTorch's, or with one after the other.

python examples/train_gpt.py --preset tiny --steps 200                      # on a CPU: a minute
python examples/train_gpt.py --steps 1000 --attention flash_ext sdpa --plot losses.png

Every run starts with the same weights and sees the same batches, so the losses differ by rounding only (and by the
dropout mask, with --dropout). The text is the source of the running Python's standard library unless --data names a
file; its last tenth is kept for the validation loss.
"""

import argparse
import json
import sysconfig
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from gpt import ATTENTION, GPT, PRESETS, optimizer, train_step

import flash_ext
from flash_ext.measure import cpu_name, megabytes, progress, table


def read_text(path):
    """uint8 [bytes]"""
    if path:
        data = Path(path).read_bytes()
    else:
        folder = Path(sysconfig.get_path("stdlib"))
        data = b"".join(file.read_bytes() for file in sorted(folder.glob("*.py")))
    if not data:
        raise SystemExit(f"no text in {path or folder}; name a file with --data")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def batch(text, size, context, generator, device):
    """Tokens and the ones that follow them, int64 [size, context]."""
    begins = torch.randint(len(text) - context, (size, 1), generator=generator)
    pieces = text[begins + torch.arange(context + 1)].long().to(device)
    return pieces[:, :-1].contiguous(), pieces[:, 1:].contiguous()


def train(name, config, text, options):
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    model = GPT(config, ATTENTION[name]).to(options.device)
    step_with = torch.compile(model) if options.compile else model
    adam = optimizer(model)
    held_back = max(config.context + 1, len(text) // 10)
    training, validation = text[:-held_back], text[-held_back:]
    cuda = torch.device(options.device).type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    losses, seconds = [], 0.0
    with progress(options.steps, name) as bar:
        for step in range(options.steps):
            warmth = min(1.0, (step + 1) / max(1, options.steps // 10))
            for group in adam.param_groups:
                group["lr"] = options.rate * warmth
            tokens, targets = batch(training, options.batch, config.context, generator, options.device)
            begin = time.perf_counter()
            losses.append(train_step(step_with, adam, tokens, targets).item())  # .item() waits for the GPU
            seconds += time.perf_counter() - begin if step else 0.0  # the first step is slow for its own reasons
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            bar.update()
    model.eval()
    with torch.no_grad():
        loss = model(*batch(validation, options.batch, config.context, generator, options.device)).item()
    timed = options.batch * config.context * (options.steps - 1)
    return {
        "attention": name,
        "losses": losses,
        "validation_loss": loss,
        "tokens_per_second": timed / seconds if seconds else None,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
    }


def plot(results, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for number, result in enumerate(results):  # the curves lie on one another: the lower is drawn wider
        axis.plot(result["losses"], label=result["attention"], linewidth=3 if number == 0 else 1)
    axis.set(xlabel="step", ylabel="loss, nats a byte")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments=None):
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--attention", nargs="+", choices=ATTENTION, default=["flash_ext"])
    parser.add_argument("--preset", choices=PRESETS, default="124m" if default == "cuda" else "tiny")
    parser.add_argument("--steps", type=int, default=200, metavar="N")
    parser.add_argument("--batch", type=int, default=12, metavar="N", help="sequences of the preset's context a step")
    parser.add_argument("--rate", type=float, default=6e-4, help="learning rate, after a warm-up")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--data", metavar="FILE", help="the text, instead of the standard library's source")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--device", default=default)
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--json", default="train_gpt.json", metavar="FILE", help="where the results go")
    parser.add_argument("--plot", metavar="FILE", help="draw the loss curves into this file")
    options = parser.parse_args(arguments)
    text = read_text(options.data)
    config = replace(PRESETS[options.preset], vocabulary=256, dropout=options.dropout)
    cuda = torch.device(options.device).type == "cuda"
    machine = torch.cuda.get_device_name() if cuda else f"{cpu_name()}, {torch.get_num_threads()} threads"
    print(f"{machine}, torch {torch.__version__}, flash_ext {flash_ext.__version__}")
    shape = f"{config.layers} layers, {config.heads} heads, width {config.width}, {config.context} tokens"
    print(f"{GPT(config).size() / 1e6:.1f} million weights ({shape}); {len(text):,} bytes of text\n")
    results = [train(name, config, text, options) for name in options.attention]
    rows = [
        (
            r["attention"], f"{r['losses'][0]:.4f}", f"{r['losses'][-1]:.4f}", f"{r['validation_loss']:.4f}",
            f"{r['tokens_per_second']:,.0f}" if r["tokens_per_second"] else "-", megabytes(r["peak_bytes"]),
        )
        for r in results
    ]  # fmt: skip
    print(table(("attention", "first loss", "last loss", "validation", "tokens/s", "GPU memory"), rows))
    facts = {"machine": machine, "torch": torch.__version__, "config": asdict(config), "options": vars(options)}
    Path(options.json).write_text(json.dumps(facts | {"results": results}, indent=1) + "\n")
    print(f"\n{options.json}")
    if options.plot:
        plot(results, options.plot)
        print(options.plot)


if __name__ == "__main__":
    main()
