"""What a call costs besides its arithmetic: microseconds on the host for a tiny input, and the time of the import.

python bench/overhead.py                # on the CPU
python bench/overhead.py --device cuda  # on a GPU, beside what one launch costs
"""

import contextlib
import statistics
import subprocess
import sys
from functools import partial

import common
import torch

from flash_ext.measure import interleaved, progress, table

SHAPES = {"cpu": (1, 2, 4, 16), "cuda": (1, 8, 128, 64)}  # batch, heads, tokens, head_dim
DTYPES = {"cpu": torch.float32, "cuda": torch.float16}
TARGETS = {"cpu": {"no grad": 10, "grad": 30}}  # microseconds
IMPORT_TARGET = 50  # milliseconds


def modes(attention, device):
    """The calls to time."""
    q, k, v, grad = (torch.randn(SHAPES[device], device=device, dtype=DTYPES[device]) for _ in range(4))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]

    def both():
        torch.autograd.grad(attention(*leaves), leaves, grad)

    return {
        "no grad": partial(attention, q, k, v),  # under torch.no_grad
        "no tensor needs grad": partial(attention, q, k, v),
        "grad": partial(attention, *leaves),
        "grad, and backward": both,
    }


def call_rows(options):
    case = common.CASES["1k"]  # any that needs no mask
    peers = {name: modes(common.PEERS[name](case, options.device), options.device) for name in ("flash_ext", "SDPA")}
    rows = []
    if options.device == "cuda":
        small = torch.zeros(8, device="cuda")
        peers["a launch"] = dict.fromkeys(peers["SDPA"], small.zero_)
    with progress(len(peers["SDPA"]) * options.rounds, "measuring") as bar:
        for mode in peers["SDPA"]:
            calls = {name: functions[mode] for name, functions in peers.items()}
            with torch.no_grad() if mode == "no grad" else contextlib.nullcontext():
                seconds = interleaved(calls, options.rounds, 0.02, pick=min, on_round=bar.update)
            microseconds = {name: value * 1e6 for name, value in seconds.items()}
            rows.append({"call": mode, **microseconds, "target": TARGETS.get(options.device, {}).get(mode)})
    return rows


def import_seconds(runs=7):
    """Of flash_ext, where torch has been imported already."""
    code = "import torch, time; t = time.perf_counter(); import flash_ext; print(time.perf_counter() - t)"
    return statistics.median(
        float(subprocess.check_output([sys.executable, "-c", code], text=True)) for _ in range(runs)
    )


def main():
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--device", choices=SHAPES, default="cpu")
    parser.add_argument(
        "--rounds", type=int, default=50, metavar="N", help="turns of each, of which the fastest counts"
    )
    options = parser.parse_args()
    common.apply(options)
    facts = common.machine()
    common.announce(facts)
    rows = call_rows(options)
    names = [name for name in rows[0] if name not in ("call", "target")]
    cells = [
        (row["call"], *(f"{row[name]:.1f}" for name in names), f"< {row['target']}" if row["target"] else "")
        for row in rows
    ]
    shape = "x".join(map(str, SHAPES[options.device]))
    print(table((f"microseconds a call, {shape}", *names, "target"), cells))
    milliseconds = import_seconds() * 1e3
    print(f"\nimport flash_ext after torch: {milliseconds:.0f} ms (target < {IMPORT_TARGET})")
    name = "overhead" if options.device == "cpu" else "overhead-gpu"
    print(f"\n{common.save(name, facts, {'calls': rows, 'import_milliseconds': milliseconds})}")


if __name__ == "__main__":
    main()
