"""Speed on CPUs: flash_ext beside the fastest backend of F.scaled_dot_product_attention, in one process, taking turns.

python bench/cpu.py [--rows decode gqa] [--dtypes bfloat16] [--isa avx2] [--quick] [--markdown]
"""

import sys
from dataclasses import dataclass

import common

from flash_ext.backends import native
from flash_ext.measure import interleaved, milliseconds, progress, table


@dataclass(frozen=True)
class Row:
    case: str
    title: str
    targets: dict  # dtype -> how many times as fast as SDPA, with AVX-512-BF16
    backward: bool = False

    @property
    def id(self):
        return self.case + "-backward" * self.backward


def targets(float32, bfloat16, float16):
    return {"float32": float32, "bfloat16": bfloat16, "float16": float16}


# batch x heads x tokens x head_dim
ROWS = (
    Row("1k", "1x32x1024x128", targets(2.3, 4, 3)),
    Row("1k-causal", "1x32x1024x128 causal", targets(3, 5, 3.5)),
    Row("4k-causal", "1x32x4096x128 causal", targets(2.5, 4.5, 3.5)),
    Row("512-d64", "2x16x512x64", targets(2.6, 4, 3)),
    Row("512-d64-causal", "2x16x512x64 causal", targets(4, 5.6, 6)),
    Row("gqa-1k-causal", "1x32/8x1024x128 causal, GQA", targets(3, 5, 4)),
    Row("chunk-256-2k-causal", "chunk: 256 queries, 2048 keys, causal", targets(2.5, 6, 4)),
    Row("decode-4k-gqa", "decode: 4x32/8x1x128, 4096 keys", targets(3.3, 22, 37)),
    Row("train-1k-d64", "backward 1x16x1024x64", targets(2, 2, 2), backward=True),
    Row("train-1k-d64-causal", "backward 1x16x1024x64 causal", targets(3, 3, 3), backward=True),
)


def target(row, dtype, isa):
    if isa == "avx512_bf16":
        return row.targets.get(dtype)
    return 1.0 if isa == "avx2" and dtype == "float32" else None


def measure(row, dtype, options, on_round):
    case, torch_dtype = common.CASES[row.case], common.DTYPES[dtype]
    calls = {"flash_ext": common.call("flash_ext", case, torch_dtype, backward=row.backward)}
    calls |= common.fastest(common.SDPA, case, torch_dtype, backward=row.backward)
    seconds = interleaved(calls, options.rounds, options.turn, on_round=on_round)
    best = min((name for name in seconds if name != "flash_ext"), key=seconds.get)
    if case.seq_q == 1:  # bound by reading keys and values
        rate = f"{common.kv_bytes(case, torch_dtype) / seconds['flash_ext'] / 1e9:.0f} GB/s"
    else:
        rate = f"{common.flops(case, row.backward) / seconds['flash_ext'] / 1e9:.0f} GF/s"
    return {
        "row": row.id,
        "title": row.title,
        "dtype": dtype,
        "isa": native.cpu_isa(),
        "flash_ext_seconds": seconds["flash_ext"],
        "sdpa_seconds": seconds[best],
        "sdpa_backend": best,
        "ratio": seconds[best] / seconds["flash_ext"],
        "target": target(row, dtype, native.cpu_isa()),
        "rate": rate,
    }


def verdict(result):
    if result["target"] is None:
        return ""
    return "reached" if result["ratio"] >= result["target"] else "MISSED"


def text_table(results):
    rows = []
    for result in results:
        if rows and not rows[-1][0].startswith(result["dtype"]):
            rows.append(None)
        rows.append((
            f"{result['dtype']:8} {result['title']}",
            milliseconds(result["flash_ext_seconds"]),
            result["rate"],
            milliseconds(result["sdpa_seconds"]),
            result["sdpa_backend"],
            f"{result['ratio']:.2f} x",
            "-" if result["target"] is None else f"{result['target']:g} x",
            verdict(result),
        ))  # fmt: skip
    return table(("", "flash_ext", "", "SDPA", "its fastest", "ratio", "target", ""), rows)


def markdown_table(results):
    """Rows by dtypes, as in README.md: how many times as fast as SDPA, and the milliseconds of both."""
    dtypes = list(dict.fromkeys(result["dtype"] for result in results))
    found = {(result["title"], result["dtype"]): result for result in results}

    def cell(title, dtype):
        result = found.get((title, dtype))
        if result is None:
            return ""
        ours, theirs = (milliseconds(result[name]) for name in ("flash_ext_seconds", "sdpa_seconds"))
        return f"**{result['ratio']:.1f}×** ({ours.removesuffix(' ms')}, {theirs})"

    titles = list(dict.fromkeys(result["title"] for result in results))
    rows = [(title.replace("x", "×"), *(cell(title, dtype) for dtype in dtypes)) for title in titles]
    return table(("batch×heads×tokens×head_dim", *dtypes), rows, markdown=True)


def plot(results, facts):
    titles = list(dict.fromkeys(result["title"] for result in results))
    dtypes = list(dict.fromkeys(result["dtype"] for result in results))
    found = {(result["title"], result["dtype"]): result for result in results}

    def series(key):
        return {d: [found.get((t, d), {}).get(key) for t in titles] for d in dtypes}

    heading = common.title(facts) + "\nblack: target"
    xlabel = "times as fast as SDPA's fastest backend"
    return common.plot_bars(f"cpu-{facts['isa']}", heading, titles, series("ratio"), xlabel, series("target"))


def main():
    parser = common.arguments(__doc__.splitlines()[0])
    names = ", ".join(row.id for row in ROWS)
    parser.add_argument("--rows", nargs="+", metavar="TEXT", help=f"rows whose name contains one of these: {names}")
    parser.add_argument("--dtypes", nargs="+", choices=common.DTYPES, default=list(common.DTYPES)[:3], help="dtypes")
    parser.add_argument(
        "--rounds", type=int, default=9, metavar="N", help="turns of each, of which the median is taken"
    )
    parser.add_argument("--turn", type=float, default=0.1, metavar="S", help="seconds that a turn lasts at least")
    parser.add_argument("--quick", action="store_true", help="3 rounds of short turns, without the longest row")
    parser.add_argument("--markdown", action="store_true", help="also print the table as it stands in README.md")
    options = parser.parse_args()
    common.apply(options)
    rows = [row for row in ROWS if not options.rows or any(text in row.id for text in options.rows)]
    if options.quick:
        options.rounds, options.turn = 3, 0.02
        rows = [row for row in rows if row.case != "4k-causal"]
    if not rows:
        parser.error(f"--rows: none of {names} contains {' or '.join(options.rows)}")

    facts = common.machine()
    common.announce(facts)
    results = []
    with progress(len(rows) * len(options.dtypes) * options.rounds, "measuring") as bar:
        for dtype in options.dtypes:
            for row in rows:
                bar.set_postfix_str(f"{dtype} {row.id}", refresh=False)
                results.append(measure(row, dtype, options, bar.update))
    print(text_table(results))
    if options.markdown:
        print("\n" + markdown_table(results))
    print(f"\n{common.save('cpu-' + facts['isa'], facts, results)}")
    print(plot(results, facts))
    missed = [result for result in results if verdict(result) == "MISSED"]
    if missed:
        print(f"{len(missed)} of {len(results)} miss their target")
    return 0


if __name__ == "__main__":
    sys.exit(main())
