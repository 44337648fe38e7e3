"""Memory at its peak beyond the inputs: flash_ext beside SDPA's backends, each call in a process of its own.

python bench/memory.py [--quick]
"""

from dataclasses import replace
from functools import partial

import common
import torch

from flash_ext.measure import available_memory, megabytes, peak_memory, progress, table
from flash_ext.testing import Case

LONG = Case("", 1, 32, 32, 4096, 4096, 128, is_causal=True)
CASES = {
    "1x32x1024x128": replace(LONG, seq_q=1024, seq_kv=1024, is_causal=False),
    "1x32x4096x128 causal": LONG,
    "1x32/8x4096x128 causal": replace(LONG, heads_kv=8),
    "256 queries, 4096 keys, causal": replace(LONG, seq_q=256),
    "decode 4x32/8x1x128, 4096 keys": Case("", 4, 32, 8, 1, 4096, 128),
}
TRAINING = {
    "forward and backward 1x16x1024x64": Case("", 1, 16, 16, 1024, 1024, 64),
    "forward and backward 1x16x4096x64 causal": Case("", 1, 16, 16, 4096, 4096, 64, is_causal=True),
}
PEERS = ("flash_ext", "SDPA flash", "SDPA math")


def prepare(peer, case, dtype, training):
    """The call to measure; runs in another process."""

    def call(case):
        attention = common.PEERS[peer](case, "cpu")
        q, k, v = common.tensors(case, dtype, requires_grad=training)
        if not training:
            return partial(torch.inference_mode()(attention), q, k, v)
        grad = torch.randn(case.batch, case.heads_q, case.seq_q, case.head_dim, dtype=dtype)
        return lambda: torch.autograd.grad(attention(q, k, v), (q, k, v), grad)

    call(replace(case, batch=1, heads_q=4, heads_kv=4, seq_q=min(case.seq_q, 32), seq_kv=64))()
    return call(case)


def result_bytes(case, dtype, training):
    queries = case.batch * case.heads_q * case.seq_q * case.head_dim
    keys = case.batch * case.heads_kv * case.seq_kv * case.head_dim
    return dtype.itemsize * (2 * queries + 2 * keys if training else queries)  # training: out, dq, dk, dv


def affordable(peer, case, training):
    scores = case.batch * case.heads_q * case.seq_q * case.seq_kv * 4
    return peer != "SDPA math" or scores * (4 if training else 3) < (available_memory() or 2**33) / 2


def main():
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", choices=common.DTYPES, default=["float32", "bfloat16"], help="dtypes")
    parser.add_argument("--quick", action="store_true", help="only flash_ext and SDPA's flash backend")
    options = parser.parse_args()
    common.apply(options)
    facts = common.machine()
    common.announce(facts)
    peers = PEERS[:2] if options.quick else PEERS
    keys = [(d, name, case, name in TRAINING) for d in options.dtypes for name, case in (CASES | TRAINING).items()]
    results = []
    with progress(len(keys) * len(peers), "measuring") as bar:
        for dtype_name, name, case, training in keys:
            dtype = common.DTYPES[dtype_name]
            result = {"dtype": dtype_name, "case": name, "result": result_bytes(case, dtype, training)}
            for peer in peers:
                if affordable(peer, case, training):
                    result[peer] = peak_memory(prepare, peer, case, dtype, training)
                bar.update()
            results.append(result)
    rows = []
    for result in results:
        if rows and not rows[-1][0].startswith(result["dtype"]):
            rows.append(None)
        sizes = (megabytes(result.get(key)) for key in ("result", *peers))
        rows.append((f"{result['dtype']:8} {result['case']}", *sizes))
    print(table(("", "the result itself", *peers), rows))
    print(f"\n{common.save('memory', facts, results)}")
    labels = [f"{result['dtype']} {result['case']}" for result in results]
    series = {peer: [(result.get(peer) or 0) / 2**20 or None for result in results] for peer in peers}
    print(common.plot_bars("memory", common.title(facts), labels, series, "MB beyond the inputs", xscale="log"))


if __name__ == "__main__":
    main()
