"""What the benchmarks share: inputs of a case, the peers that can run it, results as a table, as JSON and as a plot.

Timing and memory are in flash_ext/measure.py, the cases in flash_ext/testing.py.
"""

import argparse
import datetime
import json
import platform
import subprocess
import sys
import warnings
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import flash_ext
from flash_ext.backends import native
from flash_ext.measure import busy, cpu_name, seconds_per_call
from flash_ext.testing import BENCH_CASES

CASES = {case.id: case for case in BENCH_CASES}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
RESULTS = Path(__file__).parent / "results"

# ---- cases


def tensors(case, dtype, device="cpu", requires_grad=False):
    """q, k, v of a dense case."""
    shapes = (
        (case.batch, case.heads_q, case.seq_q, case.head_dim),
        (case.batch, case.heads_kv, case.seq_kv, case.head_dim),
        (case.batch, case.heads_kv, case.seq_kv, case.head_dim_v or case.head_dim),
    )
    generator = torch.Generator(device).manual_seed(0)
    make = partial(torch.randn, dtype=dtype, device=device, generator=generator)
    return [make(shape).requires_grad_(requires_grad) for shape in shapes]


def visible_pairs(case):
    """Pairs of a query and a key that it sees, of one head; without mask tensors."""
    left, right = case.window or (-1, -1)
    if case.is_causal:
        right = 0
    pairs = 0
    for key in range(case.seq_kv - case.seq_q, case.seq_kv):  # with which a query is aligned
        begin = 0 if left < 0 else max(key - left, 0)
        end = case.seq_kv if right < 0 else min(key + right + 1, case.seq_kv)
        pairs += max(end - begin, 0)
    return pairs


def flops(case, backward=False):
    """Of the matrix products: two forward, five backward."""
    dim, dim_v = case.head_dim, case.head_dim_v or case.head_dim
    return 2 * case.batch * case.heads_q * visible_pairs(case) * ((3 * dim + 2 * dim_v) if backward else (dim + dim_v))


def kv_bytes(case, dtype):
    dims = case.head_dim + (case.head_dim_v or case.head_dim)
    return case.batch * case.heads_kv * case.seq_kv * dims * dtype.itemsize


# ---- peers: name -> function(case, device), which returns attention(q, k, v), or None where the peer cannot run it


def flash_ext_peer(case, device):
    return partial(flash_ext.attn, is_causal=case.is_causal)


def sdpa_peer(backend):
    def peer(case, device):
        options = {"enable_gqa": case.heads_q != case.heads_kv}
        if case.is_causal and case.seq_q == case.seq_kv:
            options["is_causal"] = True
        elif case.is_causal:  # SDPA's flag aligns to the top left, so it gets the equivalent mask
            ones = torch.ones(case.seq_q, case.seq_kv, dtype=torch.bool, device=device)
            options["attn_mask"] = ones.tril(case.seq_kv - case.seq_q)

        def attention(q, k, v):
            if backend is None:
                return F.scaled_dot_product_attention(q, k, v, **options)
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, **options)

        return attention

    return peer


PEERS = {
    "flash_ext": flash_ext_peer,
    "SDPA": sdpa_peer(None),
    "SDPA flash": sdpa_peer(SDPBackend.FLASH_ATTENTION),
    "SDPA math": sdpa_peer(SDPBackend.MATH),
}
SDPA = tuple(name for name in PEERS if name.startswith("SDPA"))


def call(peer, case, dtype, device="cpu", backward=False):
    """The function to time; the backward alone, on a graph that is kept."""
    attention = PEERS[peer](case, device)
    q, k, v = tensors(case, dtype, device, requires_grad=backward)
    if not backward:
        return partial(torch.inference_mode()(attention), q, k, v)
    out = attention(q, k, v)
    return partial(torch.autograd.grad, out, (q, k, v), torch.randn_like(out), retain_graph=True)


def affordable(peer, case, dtype, device="cpu"):
    """Whether it is worth a try: SDPA's math backend stores the scores, and multiplies float16 on CPUs one by one."""
    if peer != "SDPA math" or torch.device(device).type != "cpu":
        return True
    pairs = case.batch * case.heads_q * case.seq_q * case.seq_kv
    slow = dtype == torch.float16 and flops(case) > 2e9
    return not slow and pairs * 4 <= 2**28


def fastest(names, case, dtype, device="cpu", backward=False):
    """The calls of the named peers that come within a tenth of the best of them, by one trial each."""
    calls, times = {}, {}
    for name in names:
        if not affordable(name, case, dtype, device):
            continue
        try:
            calls[name] = call(name, case, dtype, device, backward)
            calls[name]()
        except RuntimeError:  # not for this backend
            calls.pop(name, None)
            continue
        times[name] = min(seconds_per_call(calls[name], 1, device) for _ in range(2))
    if not times:
        raise RuntimeError(f"none of {', '.join(names)} can run {case} in {dtype}")
    limit = min(times.values()) * 1.1
    return {name: calls[name] for name in calls if times[name] <= limit}


def runs(call):
    """Whether a peer takes the call: backends that do not raise, and warn why."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except RuntimeError:
        return False
    return True


# ---- command line


def arguments(description):
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads, instead of torch's choice")
    if native is not None:
        parser.add_argument("--isa", choices=native.cpu_isas(), help="instruction set, instead of the best")
    return parser


def device_arguments(doc):
    """For a benchmark of CPUs and GPUs alike."""
    parser = arguments(doc.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default, help="where it runs")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="turns of each; the median counts")
    parser.add_argument("--markdown", action="store_true", help="tables in Markdown")
    return parser


def apply(options):
    if native is None:
        sys.exit(f"flash_ext's native extension is not there: {flash_ext.backends.native_error}")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.isa:
        native.set_cpu_isa(options.isa)


# ---- results


def machine():
    facts = {
        "cpu": cpu_name(),
        "isa": native.cpu_isa(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "flash_ext": flash_ext.__version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def commit():
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        name = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True, stderr=subprocess.DEVNULL)
        changed = subprocess.check_output([*git, "status", "--porcelain", "-uno"], text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.strip() + ("+changes" if changed else "")


def title(facts):
    return f"{facts['cpu']}, {facts['isa']}, {facts['threads']} threads, torch {facts['torch']}"


def announce(facts):
    print(*filter(None, (title(facts), busy())), sep="\n", end="\n\n", flush=True)


def announce_device(facts, device):
    if device == "cpu":
        return announce(facts)
    print(f"{facts['gpu']}, torch {facts['torch']}, commit {facts['commit']}\n", flush=True)


def finish(name, facts, results, heading, device, plotted):
    """Saves the results and, where matplotlib is, the plot of (labels, series, xlabel); prints where they are."""
    print(f"\n{save(name, facts, results)}")
    if not find_spec("matplotlib"):
        print("no plot: matplotlib is not installed")
        return
    machine = f"{facts['gpu']}, torch {facts['torch']}" if device == "cuda" else title(facts)
    labels, series, xlabel = plotted
    print(plot_bars(name, f"{heading}\n{machine}", labels, series, xlabel))


def save(name, facts, results):
    """Writes bench/results/<name>.json and returns its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": facts, "results": results}, indent=1) + "\n")
    return path


def plot_bars(name, heading, labels, series, xlabel, marks=None, xscale="linear"):
    """Horizontal bars, returns the path. series: name -> a value or None for each label; marks: the same, as ticks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 1 + 0.22 * len(labels) * (len(series) + 1)), layout="constrained")
    height = 1 / (len(series) + 1)
    for n, (series_name, values) in enumerate(series.items()):
        places = [i + (n - (len(series) - 1) / 2) * height for i in range(len(labels))]
        bars = axis.barh(places, [value or 0 for value in values], height * 0.9, label=series_name)
        axis.bar_label(
            bars, ["" if v is None else f"{v:,.0f}" if v >= 100 else f"{v:.3g}" for v in values], fontsize=7, padding=3
        )
        for place, mark in zip(places, (marks or {}).get(series_name, [None] * len(labels)), strict=True):
            if mark is not None:
                axis.plot([mark, mark], [place - height / 2, place + height / 2], color="black", linewidth=1.5)
    axis.set_yticks(range(len(labels)), labels)
    axis.invert_yaxis()
    axis.set(xlabel=xlabel, xscale=xscale, title=heading)
    axis.title.set_fontsize(9)
    axis.grid(axis="x", alpha=0.3)
    axis.legend()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
