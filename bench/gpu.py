"""Time of the GPU forward beside the backends of scaled_dot_product_attention, in turns and in one process."""

import random
import re
import statistics
import sys
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec

import common
import torch
from peers import PEERS, peers_of

import flash_ext
from flash_ext.measure import progress, table
from flash_ext.testing import Case

OURS = {"flash_ext": None, "gpu": "gpu"}  # the backend that is chosen, and the one of every GPU


def rows():
    """(case, dtype). 16k tokens in all and heads = 2048 / head_dim, then other shapes, then decoding."""
    for head_dim in (64, 128, 256):
        for seq in (1024, 4096, 16384):
            for is_causal in (False, True):
                name = f"d{head_dim}-{seq // 1024}k" + "-causal" * is_causal
                heads = 2048 // head_dim
                yield Case(name, 16384 // seq, heads, heads, seq, seq, head_dim, is_causal=is_causal), torch.bfloat16

    def causal(*args):
        return Case(*args, is_causal=True)

    yield causal("gqa-8k-causal", 2, 32, 8, 8192, 8192, 128), torch.bfloat16
    yield causal("chunk-1k-16k", 1, 32, 8, 1024, 16384, 128), torch.bfloat16
    yield causal("chunk-256-8k", 4, 32, 8, 256, 8192, 128), torch.bfloat16
    yield Case("window-1k-8k", 2, 32, 8, 8192, 8192, 128, is_causal=True, window=(1023, 0)), torch.bfloat16
    for head_dim in (80, 96, 192):
        yield causal(f"d{head_dim}-2k-causal", 4, 32, 32, 2048, 2048, head_dim), torch.float16
    yield Case("d32-256", 64, 32, 32, 256, 256, 32), torch.float16
    yield causal("d32-256-causal", 64, 32, 32, 256, 256, 32), torch.float16
    yield Case("d32-2048", 8, 64, 64, 2048, 2048, 32), torch.float16
    for seq in (256, 1024, 2048, 4096):
        yield causal(f"b1-{seq}-causal", 1, 32, 32, seq, seq, 128), torch.float16
    yield Case("decode-b1-8k-gqa", 1, 32, 8, 1, 8192, 128), torch.bfloat16
    yield Case("decode-b1-64k-gqa", 1, 32, 8, 1, 65536, 128), torch.bfloat16
    yield Case("decode-b16-4k-gqa", 16, 32, 8, 1, 4096, 128), torch.bfloat16
    yield Case("decode-b64-4k-gqa", 64, 32, 8, 1, 4096, 128), torch.bfloat16
    yield Case("decode-b32-8k-mha", 32, 32, 32, 1, 8192, 128), torch.bfloat16
    yield Case("decode-b64-4k-mqa", 64, 64, 1, 1, 4096, 128), torch.bfloat16
    yield causal("speculate-b16-4-8k-gqa", 16, 32, 8, 4, 8192, 128), torch.bfloat16

    for is_causal in (False, True):
        for name, *sizes in (
            ("f32-d64-2k", 4, 16, 16, 2048, 2048, 64),
            ("f32-d80-2k", 4, 16, 16, 2048, 2048, 80),
            ("f32-d128-4k", 2, 16, 16, 4096, 4096, 128),
            ("f32-d256-2k", 2, 8, 8, 2048, 2048, 256),
        ):
            yield Case(name + "-causal" * is_causal, *sizes, is_causal=is_causal), torch.float32
    yield Case("f32-d64-512", 16, 12, 12, 512, 512, 64), torch.float32
    yield Case("f32-decode-b1-8k-gqa", 1, 32, 8, 1, 8192, 128), torch.float32
    yield Case("f32-decode-b32-4k-mha", 32, 16, 16, 1, 4096, 64), torch.float32


def calls(case, dtype, names):
    """name -> what to time, a replay of a CUDA graph, so that the host does not count."""
    q, k, v = common.tensors(case, dtype, "cuda")
    found = {}
    for name in names:
        with without_what_fails(case, name), torch.no_grad():
            if name in OURS:
                call = partial(
                    flash_ext.attn, q, k, v, is_causal=case.is_causal, window=case.window, backend=OURS[name]
                )
            else:
                call = PEERS[name](case, q, k, v)
            found[name] = captured(call)
    return found


@contextmanager
def without_what_fails(case, name):
    try:
        yield
    except RuntimeError as error:
        print(f"{case}: {name}: {str(error).splitlines()[0]}", file=sys.stderr)


def captured(call):
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def replay(call=call):  # whose tensors the graph reads: they must live as long as it
        graph.replay()

    return replay


def seconds(call, least):
    """Of one call, in a turn that lasts at least so long."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def turn(count):
        begin.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / count

    return turn(max(2, int(least / max(turn(1), 1e-6))))


def measure(case, dtype, found, passes, options, tick):
    times = {name: [] for name in found}
    orders = random.Random(0)  # a busy call leaves a warm chip to the next
    for _ in range(options.rounds):
        for name in orders.sample(list(found), len(found)):
            times[name].append(seconds(found[name], options.turn))
        tick()
    medians = {name: statistics.median(each) for name, each in times.items()}
    decoding = case.seq_q < 16
    flops = sum(common.flops(case, backward) for backward in passes)
    work = common.kv_bytes(case, dtype) / 1e9 if decoding else flops / 1e12
    return {
        "title": case.id,
        "dtype": str(dtype).removeprefix("torch."),
        "unit": "GB/s" if decoding else "TFLOP/s",
        "seconds": medians,
        "rates": {name: work / time for name, time in medians.items()},
    }


def text_table(results, names, peers):
    def ratio(result, peer):
        rates = result["rates"]
        return f"{rates['flash_ext'] / rates[peer]:.2f}" if peer in rates else "-"

    def rate(result, name):
        return f"{result['rates'][name]:.0f}" if name in result["rates"] else "-"

    lines = [
        (
            r["title"], r["unit"], f"{r['seconds']['flash_ext'] * 1e6:.0f} us",
            *(rate(r, name) for name in names), *(ratio(r, name) for name in peers),
        )
        for r in results
    ]  # fmt: skip
    return table(("case", "unit", "time", *names, *(f"x {name}" for name in peers)), lines)


def plot_ratios(name, heading, results, names, peers):
    """Speed over the first peer that runs a case; returns the path."""

    def over(result, name):
        rates = result["rates"]
        return rates[name] / rates[next(peer for peer in peers if peer in rates)] if name in rates else None

    compared = [r for r in results if any(peer in r["rates"] for peer in peers)]
    series = {name: [over(r, name) for r in compared] for name in names}
    return common.plot_bars(
        name, heading, [r["title"] for r in compared], series, f"speed over {peers[0]}, or the next"
    )


SERIES = re.compile(r"d(\d+)-(\d+)k(-causal)?")  # the rows that differ in nothing but these


def plot_series(name, heading, results, names, ceiling=None):
    """TFLOP/s over tokens, a panel for each head_dim and mask, and the rate of a large product; returns the path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = {match: r["rates"] for r in results if (match := SERIES.fullmatch(r["title"]))}
    lengths = {int(match[1]): set() for match in found}
    for match in found:
        lengths[int(match[1])].add(match[2])
    dims = sorted(dim for dim, several in lengths.items() if len(several) > 1)
    figure, axes = pyplot.subplots(2, len(dims), figsize=(4 * len(dims), 7), sharey=True, squeeze=False)
    for row, mask in enumerate((None, "-causal")):
        for axis, dim in zip(axes[row], dims, strict=True):
            here = sorted((int(m[2]), rates) for m, rates in found.items() if (int(m[1]), m[3]) == (dim, mask))
            for peer in names:
                points = [(tokens, rates[peer]) for tokens, rates in here if peer in rates]
                if points:
                    axis.plot(*zip(*points, strict=True), marker="o", label=peer, linewidth=3 if peer in OURS else 1)
            if ceiling:
                axis.axhline(ceiling, color="gray", linestyle="--", label="matrix product")
            axis.set(title=f"head_dim {dim}{', causal' if mask else ''}", xscale="log")
            tokens = [tokens for tokens, _ in here]
            axis.set_xticks(tokens, [f"{n}k" for n in tokens], minor=False)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        axes[row][0].set_ylabel("TFLOP/s")
    axes[0][0].set_ylim(bottom=0)  # of all: they share it
    axes[0][0].legend(fontsize=7)
    figure.suptitle(heading, fontsize=9)
    figure.tight_layout()
    path = common.RESULTS / f"{name}.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def matrix_product_rate(size=8192):
    """TFLOP/s of a bfloat16 product through torch."""
    x = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    return 2 * size**3 / 1e12 / seconds(captured(lambda: x @ x), 0.3)


def main(title, name, all_rows, calls, names, passes=(False,), peers_of=peers_of):
    """The command line of a benchmark; calls(case, dtype, names) makes what is timed.

    passes: for each pass over the products that a call makes, whether it is the backward one.
    """
    parser = common.arguments(title)
    parser.add_argument("--rows", nargs="+", metavar="TEXT", help="rows whose name contains one of these")
    parser.add_argument("--peers", nargs="+", choices=PEERS, metavar="NAME", help=f"only these of {', '.join(PEERS)}")
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="turns of each, of which the median is taken"
    )
    parser.add_argument("--turn", type=float, default=0.05, metavar="S", help="seconds that a turn lasts at least")
    options = parser.parse_args()
    common.apply(options)
    chosen = [row for row in all_rows if not options.rows or any(text in row[0].id for text in options.rows)]
    facts = common.machine()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, commit {facts['commit']}")
    results = []
    with progress(len(chosen) * options.rounds, "measuring") as bar:
        for case, dtype in chosen:
            wanted = [name for name in peers_of(case, dtype) if not options.peers or name in options.peers]
            found = calls(case, dtype, [*names, *wanted])
            results.append(measure(case, dtype, found, passes, options, bar.update))
    ran = {name for result in results for name in result["rates"]}
    names, peers = [name for name in names if name in ran], [name for name in PEERS if name in ran]
    print(text_table(results, [*names, *peers], peers))
    for peer in peers:
        ratios = [r["rates"]["flash_ext"] / r["rates"][peer] for r in results if peer in r["rates"]]
        if ratios:
            print(f"geometric mean over {peer}: {statistics.geometric_mean(ratios):.3f}")
    if has_series := sum(bool(SERIES.fullmatch(result["title"])) for result in results) > 1:
        facts["matrix_product"] = matrix_product_rate()  # TFLOP/s
    print(common.save(name, facts, results))
    if not find_spec("matplotlib"):
        print("no plots: matplotlib is not installed")
        return
    heading = f"{title}\n{facts['gpu']}, torch {facts['torch']}"
    print(plot_ratios(name, heading, results, [*names, *peers], peers))
    if has_series:
        print(plot_series(f"{name}-series", heading, results, [*names, *peers], facts["matrix_product"]))


if __name__ == "__main__":
    main(__doc__, "gpu", list(rows()), calls, list(OURS))
