"""Speed and memory of eager attention, SDPA and flash_ext, alone and inside the encoder."""

import contextlib
import math
from functools import partial
from pathlib import Path

import torch

from ..attn import attn
from ..measure import available_memory, busy, interleaved, megabytes, milliseconds, peak_memory, progress, table

DTYPES = (torch.float32, torch.bfloat16)
HEADS, HEAD_DIM = 12, 64  # those of BERT-base and GPT-2
ENCODER_LENGTHS = (128, 256, 512)  # 512 is the longest that the encoder knows
ENCODER_BATCH = 4
MAX_SECONDS = 3  # for one length, on a slow or busy machine


def eager(q, k, v):
    """As transformers' eager attention computes it."""
    return (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1) @ v


ATTENTION = {"eager": eager, "SDPA": torch.nn.functional.scaled_dot_product_attention, "flash_ext": attn}


def inputs(dtype, length):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, HEADS, length, HEAD_DIM, dtype=dtype, generator=generator) for _ in range(3)]


def prepare(name, dtype, length):
    """The call to measure the memory of; runs in another process."""
    ATTENTION[name](*inputs(dtype, 32))
    return partial(ATTENTION[name], *inputs(dtype, length))


def names_that_fit(length):
    """Eager attention has up to three matrices of scores in memory; it sits out where they would fill half of it."""
    available = available_memory() or math.inf
    scores = HEADS * length**2 * 4
    return [name for name in ATTENTION if name != "eager" or 3 * scores < available / 2]


def show(encoder, texts, options):
    keys = [(dtype, length) for dtype in DTYPES for length in sorted(set(options.lengths))]
    encoder_keys = [(dtype, length) for dtype in DTYPES for length in ENCODER_LENGTHS]
    steps = sum(options.rounds + len(names_that_fit(length)) for _, length in keys) + len(encoder_keys) * options.rounds
    seconds, memory, encoder_seconds = {}, {}, {}
    print()
    if warning := busy():
        print(warning)
    with progress(steps, "measuring") as bar:
        for dtype, length in keys:
            names = names_that_fit(length)
            tensors = inputs(dtype, length)
            calls = {name: partial(ATTENTION[name], *tensors) for name in names}
            with torch.inference_mode():
                seconds[dtype, length] = interleaved(
                    calls, options.rounds, min_seconds=0.05, max_seconds=MAX_SECONDS, on_round=bar.update
                )
            memory[dtype, length] = {}
            for name in names:
                with contextlib.suppress(RuntimeError):  # killed, most likely for want of memory
                    memory[dtype, length][name] = peak_memory(prepare, name, dtype, length)
                bar.update()
        for dtype, length in encoder_keys:
            batch = long_batch(encoder, texts, length)
            calls = {name: partial(embed_with, encoder, name, dtype, batch) for name in encoder.attention}
            encoder_seconds[dtype, length] = interleaved(
                calls, options.rounds, min_seconds=0.05, max_seconds=MAX_SECONDS, on_round=bar.update
            )
    encoder.use("flash_ext")

    print(f"Attention alone, 1 x {HEADS} heads x N tokens x {HEAD_DIM}: time, and memory beyond the inputs\n")
    header = ("", *ATTENTION, "faster than SDPA", *(f"{name} memory" for name in ATTENTION))
    print(table(header, attention_rows(seconds, memory)))
    print(f"\nThe whole encoder, {ENCODER_BATCH} passages of N tokens (most of its time goes to other layers)\n")
    print(table(("", *ATTENTION, "faster than SDPA"), encoder_rows(encoder_seconds)))
    path = Path(options.output).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    plot(seconds, memory, encoder_seconds, path)
    print(f"\nplot: {path}")


def embed_with(encoder, name, dtype, batch):
    encoder.use(name, dtype)  # costs next to nothing where it is in use already
    encoder.embed(batch)


def long_batch(encoder, texts, length):
    """Passages joined until each item of the batch has `length` tokens."""
    parts = [" ".join(texts[i:] + texts[:i]) for i in range(0, len(texts), max(1, len(texts) // ENCODER_BATCH))]
    while len(encoder.tokenizer(parts[0])["input_ids"]) < length:
        parts = [part + " " + part for part in parts]
    return encoder.tokens(parts[:ENCODER_BATCH], max_length=length)


def attention_rows(seconds, memory):
    rows = []
    for (dtype, length), times in seconds.items():
        if rows and rows[-1][0].split()[0] != short(dtype):
            rows.append(None)
        extra = memory[dtype, length]
        rows.append((
            f"{short(dtype)} {length}",
            *(milliseconds(times[name]) if name in times else "too large" for name in ATTENTION),
            f"{times['SDPA'] / times['flash_ext']:.1f} x",
            *(megabytes(extra.get(name)) for name in ATTENTION),
        ))  # fmt: skip
    return rows


def encoder_rows(seconds):
    rows = []
    for (dtype, length), times in seconds.items():
        if rows and rows[-1][0].split()[0] != short(dtype):
            rows.append(None)
        ratio = f"{times['SDPA'] / times['flash_ext']:.2f} x"
        rows.append((f"{short(dtype)} {length}", *(milliseconds(times[name]) for name in ATTENTION), ratio))
    return rows


def short(dtype):
    return str(dtype).removeprefix("torch.")


def plot(seconds, memory, encoder_seconds, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullLocator

    colours = dict(zip(ATTENTION, ("#999999", "#1f77b4", "#d62728"), strict=True))
    figure, axes = pyplot.subplots(len(DTYPES), 3, figsize=(13, 7), layout="constrained", squeeze=False)
    for row, dtype in zip(axes, DTYPES, strict=True):
        time_axis, memory_axis, encoder_axis = row
        for name, colour in colours.items():
            style = {"color": colour, "marker": "o", "markersize": 4, "label": name}
            lengths = [n for (d, n), times in seconds.items() if d == dtype and name in times]
            time_axis.plot(lengths, [seconds[dtype, n][name] * 1e3 for n in lengths], **style)
            with_memory = [n for n in lengths if memory[dtype, n].get(name)]
            memory_axis.plot(with_memory, [memory[dtype, n][name] / 2**20 for n in with_memory], **style)
            lengths = [n for d, n in encoder_seconds if d == dtype]
            rates = [ENCODER_BATCH * n / encoder_seconds[dtype, n][name] / 1e3 for n in lengths]
            encoder_axis.plot(lengths, rates, **style)
        time_axis.set(title=f"attention, {short(dtype)}", ylabel="milliseconds", yscale="log")
        memory_axis.set(title="memory beyond the inputs", ylabel="MB", yscale="log")
        encoder_axis.set(title="the whole encoder", ylabel="thousand tokens a second", ylim=0)
        for axis in row:
            axis.set(xlabel="sequence length", xscale="log")
            ticks = sorted({int(n) for line in axis.get_lines() for n in line.get_xdata()})
            axis.set_xticks(ticks, ticks)
            axis.xaxis.set_minor_locator(NullLocator())
            if axis.get_yscale() == "log":
                axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
