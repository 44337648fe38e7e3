"""Errors against float64: flash_ext beside plain PyTorch in the same dtype and the backends of SDPA.

python bench/accuracy.py [--device cpu]
"""

import common
import eager
import gpu
import torch
from peers import PEERS

import flash_ext
from flash_ext.measure import progress, table
from flash_ext.testing import Case

TOKENS = {"cuda": (1024, 16384), "cpu": (256,)}
NAMES = {"cuda": ("flash_ext", "PyTorch", "FA2", "cuDNN"), "cpu": ("flash_ext", "PyTorch", "SDPA")}


def rows(tokens, dtypes, head_dims):
    """(case, dtype, what is added to the values: their mean does not cancel then)"""
    for head_dim in head_dims:
        for dtype in dtypes:
            for seq in tokens:
                for is_causal in (False, True):
                    for shift in (0, 1):
                        name = f"d{head_dim}-{seq}" + "-causal" * is_causal + "-shifted" * shift
                        yield Case(name, 1, 4, 4, seq, seq, head_dim, is_causal=is_causal), dtype, shift


def call(name, case, q, k, v):
    if name == "flash_ext":
        return flash_ext.attn(q, k, v, is_causal=case.is_causal)
    if name == "PyTorch":
        mask = eager.causal_mask(case.seq_q, q.dtype, q.device) if case.is_causal else 0
        return eager.attention(q, k, v, mask)
    return PEERS[name](case, q, k, v)()


def exact(q, k, v, is_causal, at_once=2048):
    """In float64, some rows of one head at a time."""
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    for head in range(q.shape[1]):
        keys, values = k[0, head].double(), v[0, head].double()
        for begin in range(0, q.shape[2], at_once):
            some = q[0, head, begin : begin + at_once].double()
            scores = some @ keys.T * q.shape[-1] ** -0.5
            if is_causal:
                key, query = torch.arange(len(keys), device=q.device), torch.arange(len(some), device=q.device)
                scores.masked_fill_(key > begin + query[:, None], -torch.inf)
            out[0, head, begin : begin + at_once] = scores.softmax(-1) @ values
    return out


def measure(case, dtype, shift, names, device):
    q, k, v = common.tensors(case, dtype, device)
    v = v + shift
    reference = exact(q, k, v, case.is_causal)
    errors = {}
    for name in names:
        with gpu.without_what_fails(case, name), torch.inference_mode():
            error = (call(name, case, q, k, v).double() - reference).abs()
            errors[name] = {"largest": error.max().item(), "mean": error.mean().item()}
    return {"title": case.id, "dtype": str(dtype).removeprefix("torch."), "errors": errors}


def text_table(results, names, markdown):
    def cell(errors):
        return f"{errors['largest']:.1e}, {errors['mean']:.1e}" if errors else "-"

    lines = [(f"{r['dtype']} {r['title']}", *(cell(r["errors"].get(name)) for name in names)) for r in results]
    return table(("largest error, mean", *names), lines, markdown)


def main(arguments=None):
    parser = common.arguments(__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=NAMES, default=default, help="where it runs")
    parser.add_argument("--markdown", action="store_true", help="a table in Markdown")
    parser.add_argument("--tokens", type=int, nargs="+", metavar="N", help="lengths, instead of the usual ones")
    parser.add_argument("--dtypes", nargs="+", choices=common.DTYPES, default=["bfloat16", "float16"], help="dtypes")
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128, 256], metavar="N", help="head_dims")
    options = parser.parse_args(arguments)
    common.apply(options)
    facts = common.machine()
    common.announce_device(facts, options.device)
    names, dtypes = NAMES[options.device], [common.DTYPES[name] for name in options.dtypes]
    chosen = list(rows(options.tokens or TOKENS[options.device], dtypes, options.head_dims))
    results = []
    with progress(len(chosen), "measuring") as bar:
        for case, dtype, shift in chosen:
            results.append(measure(case, dtype, shift, names, options.device))
            bar.update()
    print(text_table(results, names, options.markdown))
    print(f"\n{common.save(f'accuracy-{options.device}', facts, results)}")


if __name__ == "__main__":
    main()
