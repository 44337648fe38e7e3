"""Time of the GPU forward beside the backends of scaled_dot_product_attention, in turns and in one process."""

import statistics
import sys
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec

import common
import torch

import flash_ext
from flash_ext.measure import progress, table
from flash_ext.testing import Case

OURS = {"flash_ext": None, "gpu": "gpu", "sm90": "sm90"}  # the one chosen, and by name
PEERS = {
    "FA2": "FLASH_ATTENTION",
    "cuDNN": "CUDNN_ATTENTION",
    "mem-eff": "EFFICIENT_ATTENTION",
    "math": "MATH",  # its products in float32 proper: torch.backends.cuda.matmul.allow_tf32 is False by default
}


def peers_of(dtype):
    return ("mem-eff", "math") if dtype == torch.float32 else ("FA2", "cuDNN", "mem-eff")


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
    for head_dim in (80, 96, 192):
        yield causal(f"d{head_dim}-2k-causal", 4, 32, 32, 2048, 2048, head_dim), torch.float16
    yield Case("d32-256", 64, 32, 32, 256, 256, 32), torch.float16
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


def sdpa_call(backend, case, q, k, v):
    from torch.nn.attention import SDPBackend, bias, sdpa_kernel

    options = {"enable_gqa": case.heads_q != case.heads_kv}
    if case.is_causal and case.seq_q == case.seq_kv:
        options["is_causal"] = True
    elif case.is_causal:
        options["attn_mask"] = bias.causal_lower_right(case.seq_q, case.seq_kv)

    def call():
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)

    return call


def calls(case, dtype, names):
    """name -> what to time, a replay of a CUDA graph, so that the host does not count."""
    q, k, v = common.tensors(case, dtype, "cuda")
    found = {}
    for name in names:
        if name in OURS:
            call = partial(flash_ext.attn, q, k, v, is_causal=case.is_causal, backend=OURS[name])
        else:
            call = sdpa_call(PEERS[name], case, q, k, v)
        with without_what_fails(case, name):
            found[name] = captured(torch.inference_mode()(call))
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


def measure(case, dtype, found, backward, options, tick):
    times = {name: [] for name in found}
    for _ in range(options.rounds):
        for name, call in found.items():
            times[name].append(seconds(call, options.turn))
        tick()
    medians = {name: statistics.median(each) for name, each in times.items()}
    decoding = case.seq_q < 16
    work = common.kv_bytes(case, dtype) / 1e9 if decoding else common.flops(case, backward) / 1e12
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


def plot(name, title, facts, results, names, peers):
    """Speed over the first peer that runs a case; returns the path."""

    def over(result, name):
        rates = result["rates"]
        return rates[name] / rates[next(peer for peer in peers if peer in rates)] if name in rates else None

    compared = [r for r in results if any(peer in r["rates"] for peer in peers)]
    series = {name: [over(r, name) for r in compared] for name in names}
    series = {name: values for name, values in series.items() if any(values)}
    heading = f"{title}\n{facts['gpu']}, torch {facts['torch']}"
    return common.plot_bars(
        name, heading, [r["title"] for r in compared], series, f"speed over {peers[0]}, or the next"
    )


def main(title, name, all_rows, calls, names, backward=False, peers=tuple(PEERS), peers_of=peers_of):
    """The command line of a benchmark; calls(case, dtype, names) makes what is timed."""
    parser = common.arguments(title)
    parser.add_argument("--rows", nargs="+", metavar="TEXT", help="rows whose name contains one of these")
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
            found = calls(case, dtype, [*names, *peers_of(dtype)])
            results.append(measure(case, dtype, found, backward, options, bar.update))
    print(text_table(results, [*names, *peers], peers))
    for peer in peers:
        ratios = [r["rates"]["flash_ext"] / r["rates"][peer] for r in results if peer in r["rates"]]
        if ratios:
            print(f"geometric mean over {peer}: {statistics.geometric_mean(ratios):.3f}")
    print(common.save(name, facts, results))
    if find_spec("matplotlib"):
        print(plot(name, title, facts, results, [*names, *peers], peers))
    else:
        print("no plot: matplotlib is not installed")


if __name__ == "__main__":
    main(__doc__, "gpu", rows(), calls, list(OURS))
