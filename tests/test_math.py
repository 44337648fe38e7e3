"""The definition: against a loop over single numbers, against torch's own attention, and by finite differences."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

import flash_ext
from flash_ext.math import dropout_mask, dropout_threshold, philox
from flash_ext.testing import CASES, Case, make_inputs, run

SMALL = dict(batch=2, heads_q=4, heads_kv=2, seq_q=5, seq_kv=7, head_dim=3, head_dim_v=2)


def small(case):
    size = dict(SMALL, strides="contiguous")
    size |= dict(window=case.window and (2, 1), seq_q=0 if case.seq_q == 0 else 7 if case.seq_q > case.seq_kv else 5)
    size |= dict(seq_kv=0 if case.seq_kv == 0 else 5 if case.seq_q > case.seq_kv else 7, batch=min(case.batch, 2))
    return Case(**(vars(case) | size))


# One of each kind is enough: sizes do not matter to the definition.
KINDS = [
    case
    for case in CASES
    if not case.packed and not case.id.startswith(("head-dim", "blocks", "long", "decode", "heads", "strides"))
]


def one_number_at_a_time(case, q, k, v, options):
    """(out, lse) in Python floats: written from the table of meanings, sharing nothing with the definition."""
    batch, heads_q, seq_q, head_dim = q.shape
    heads_kv, seq_kv, dim_v = k.shape[1], k.shape[2], v.shape[3]
    mask, slopes, sinks = options["attn_mask"], options["alibi_slopes"], options["sinks"]
    scale = options["scale"] if options["scale"] is not None else 1 / math.sqrt(head_dim)
    if mask is not None:
        mask = mask.expand(batch, heads_q, seq_q, seq_kv).tolist()
    if slopes is not None:
        slopes = slopes.expand(batch, heads_q).tolist()
    out = torch.zeros(batch, heads_q, seq_q, dim_v, dtype=torch.float64)
    lse = torch.full((batch, heads_q, seq_q), -torch.inf, dtype=torch.float64)
    qs, ks, vs = q.tolist(), k.tolist(), v.tolist()
    for b in range(batch):
        for h in range(heads_q):
            h_kv = h // (heads_q // heads_kv)
            for i in range(seq_q):
                where = i if case.causal_align == "top_left" else i + seq_kv - seq_q
                scores = {}
                for j in range(seq_kv):
                    if case.is_causal and j > where:
                        continue
                    if case.window is not None:
                        left, right = case.window
                        if (left != -1 and j < where - left) or (right != -1 and j > where + right):
                            continue
                    s = scale * sum(x * y for x, y in zip(qs[b][h][i], ks[b][h_kv][j], strict=True))
                    if case.softcap:
                        s = case.softcap * math.tanh(s / case.softcap)
                    if slopes is not None:
                        s -= slopes[b][h] * abs(i + seq_kv - seq_q - j)
                    if mask is not None:
                        if mask[b][h][i][j] is False:
                            continue
                        s += 0.0 if mask[b][h][i][j] is True else mask[b][h][i][j]
                    scores[j] = s
                total = sum(math.exp(s) for s in scores.values())
                if sinks is not None:
                    total += math.exp(sinks[h].item())
                if total == 0:
                    continue
                lse[b, h, i] = math.log(total)
                for j, s in scores.items():
                    for d in range(dim_v):
                        out[b, h, i, d] += math.exp(s) / total * vs[b][h_kv][j][d]
    return out, lse


@pytest.mark.parametrize("case", [case for case in KINDS if not case.dropout_p], ids=str)
def test_against_one_number_at_a_time(case):
    case = small(case)
    inputs = make_inputs(case, torch.float64)
    q, k, v = (x.detach() for x in inputs.args)
    if case.layout == "bshd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = one_number_at_a_time(case, q, k, v, inputs.options)
    found = run(inputs, "math", grads=False)
    torch.testing.assert_close(found["out"], out.transpose(1, 2) if case.layout == "bshd" else out)
    torch.testing.assert_close(found["lse"], lse)


@pytest.mark.parametrize("heads_kv", [1, 2, 4])
@pytest.mark.parametrize("mask", [None, "causal", "bool", "float"])
def test_against_scaled_dot_product_attention(mask, heads_kv):
    q, k, v = (
        torch.randn(2, heads, seq, 8, dtype=torch.float64) for heads, seq in ((4, 5), (heads_kv, 7), (heads_kv, 7))
    )
    options = dict(scale=0.4, enable_gqa=True)
    if mask == "causal":
        options["is_causal"] = True
    elif mask is not None:
        options["attn_mask"] = torch.rand(2, 1, 5, 7) > 0.3 if mask == "bool" else torch.randn(2, 1, 5, 7).double()
    expected = scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(flash_ext.math(q, k, v, **options, causal_align="top_left"), expected)


def leaves_of(inputs):
    # finite differences of infinity are none
    for leaf in inputs.leaves.values():
        with torch.no_grad():
            leaf.masked_fill_(torch.isinf(leaf), -0.5)
    return list(inputs.leaves.values())


@pytest.mark.parametrize("name", ["plain", "everything", "sinks-empty-rows", "causal-long-q", "packed-everything"])
def test_gradcheck(name):
    case = next(case for case in CASES if case.id == name)
    size = dict(lengths_q=(2, 0, 3), lengths_kv=(4, 2, 2)) if case.packed else dict(SMALL, batch=1)
    size |= dict(seq_q=7, seq_kv=5) if case.seq_q > case.seq_kv else {}
    case = Case(**(vars(case) | size | dict(heads_q=2, heads_kv=1, head_dim=2, head_dim_v=2)))
    inputs = make_inputs(case, torch.float64)
    function = flash_ext.math_varlen if case.packed else flash_ext.math
    leaves = leaves_of(inputs)

    def call(*leaves):
        given = dict(zip(inputs.leaves, leaves, strict=True))
        options = inputs.options | {name: given[name] for name in ("attn_mask", "sinks") if name in given}
        torch.manual_seed(0)
        out, lse = function(*(given[name] for name in "qkv"), *inputs.args[3:], **options, return_lse=True)
        return (out, lse) if torch.isfinite(lse).all() else out

    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, leaves, atol=1e-4)


def test_half_inputs_are_computed_in_float32():
    q = torch.randn(2, 4, 33, 16).bfloat16()
    exact = flash_ext.math(q.double(), q.double(), q.double())
    torch.testing.assert_close(flash_ext.math(q, q, q), exact.bfloat16())
    in_bfloat16 = flash_ext.math(q, q, q, compute_dtype=torch.bfloat16)
    assert not torch.equal(in_bfloat16, exact.bfloat16())
    assert flash_ext.math(q, q, q, return_lse=True, compute_dtype=torch.bfloat16)[1].dtype == torch.float32


def test_float8_runs():
    q = torch.randn(1, 2, 8, 16)
    low = q.to(torch.float8_e4m3fn)
    out = flash_ext.attn(low, low, low)
    assert out.dtype == low.dtype and flash_ext.explain(low, low, low).backend == "math"
    widened = low.float()
    assert torch.equal(out.float(), flash_ext.math(widened, widened, widened).to(low.dtype).float())


class Dtypes(TorchDispatchMode):
    def __init__(self):
        self.seen = set()
        super().__init__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor):
                self.seen.add(x.dtype)
        return result


@pytest.mark.parametrize("name", ["everything", "packed-everything"])
def test_no_float64_unless_asked_for(name):
    """MPS has none."""
    inputs = make_inputs(next(case for case in CASES if case.id == name), torch.bfloat16)
    with Dtypes() as dtypes:
        run(inputs, "math")
    assert torch.float32 in dtypes.seen and torch.float64 not in dtypes.seen


def test_philox_gives_the_published_numbers():
    """Known answers of the reference implementation, Random123's kat_vectors."""

    def numbers(counter, key):
        words = philox([torch.tensor([c]) for c in counter], [torch.tensor(k) for k in key])
        return [int(word) for word in words]

    assert numbers([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    assert numbers([ones] * 4, [ones] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    assert numbers(pi, [0xA4093822, 0x299F31D0]) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_dropout_mask_is_the_formula():
    seed, offset = -(2**62) - 12345, 2**40 + 7
    rng_state = torch.tensor([seed, offset])
    keep = dropout_mask(rng_state, 2, 3, 4, 21, 0.3)
    threshold = round(0.3 * 65536)
    assert dropout_threshold(0.3) == threshold
    for b, h, i, j in [(0, 0, 0, 0), (1, 2, 3, 20), (0, 1, 2, 8), (1, 0, 3, 7), (0, 2, 0, 13)]:
        counter = (j >> 3, i, b * 3 + h, offset % 2**32)
        key = (seed % 2**64 % 2**32, seed % 2**64 >> 32)
        words = philox([torch.tensor([c]) for c in counter], [torch.tensor(k) for k in key])
        u = (int(words[(j & 7) >> 1]) >> 16 * (j & 1)) & 0xFFFF
        assert keep[b, h, i, j] == (u >= threshold)


def test_dropout_thresholds():
    assert dropout_threshold(0.0) == 0 and dropout_threshold(0.5) == 32768
    assert dropout_threshold(0.9999999) == 65535
