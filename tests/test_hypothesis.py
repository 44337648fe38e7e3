"""Any combination of the options, sizes and strides, as `testing.Case`; shrinks to the smallest that fails."""

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from flash_ext.testing import DTYPES, Case, check

# Plain torch is exact by luck in some of the smallest cases; errors of meaning are larger than this by far.
LIMIT = 4.0

few = st.integers(0, 3)
some = st.one_of(st.integers(1, 8), st.integers(1, 70))
dims = st.one_of(st.integers(1, 20), st.sampled_from([24, 31, 32, 33, 64, 72, 128, 129]))
letters = {"b": "b1B", "h": "h1H", "q": "q1Q", "k": "k1K"}
shapes = st.one_of(
    st.tuples(*(st.sampled_from(letters[d]) for d in "bhqk")).map("".join),
    st.tuples(*(st.sampled_from(letters[d]) for d in "hqk")).map("".join),
    st.tuples(*(st.sampled_from(letters[d]) for d in "qk")).map("".join),
)
masks = st.one_of(st.none(), st.builds("{}:{}".format, st.sampled_from(["bool", "float", "half", "same"]), shapes))
windows = st.one_of(st.none(), st.tuples(st.integers(-1, 40), st.integers(-1, 40)))
options = dict(
    head_dim=dims,
    head_dim_v=st.one_of(st.none(), dims),
    mask=masks,
    is_causal=st.booleans(),
    causal_align=st.sampled_from(["bottom_right", "top_left"]),
    window=windows,
    scale=st.one_of(st.none(), st.floats(0, 2)),
    softcap=st.one_of(st.just(0.0), st.floats(0.5, 30)),
    alibi=st.sampled_from([None, "h", "bh"]),
    sinks=st.booleans(),
    dropout_p=st.one_of(st.just(0.0), st.floats(0, 0.95)),
    grad_lse=st.booleans(),
)
heads = st.tuples(st.integers(1, 3), st.integers(1, 4)).map(
    lambda pair: dict(heads_kv=pair[0], heads_q=pair[0] * pair[1])
)
dtypes = st.sampled_from(DTYPES)


def build(heads, **kwargs):
    return Case("random", **heads, **kwargs)


def check_on_gpu(case, dtype, seed=0):
    if torch.cuda.is_available() and dtype != torch.float64:
        check(case, dtype, "cuda", "gpu", grads=False, seed=seed, limit=LIMIT)


@given(
    case=st.builds(
        build,
        heads,
        batch=few,
        seq_q=st.one_of(few, some),
        seq_kv=st.one_of(few, some, st.integers(100, 700)),
        layout=st.sampled_from(["bhsd", "bshd"]),
        strides=st.sampled_from(["contiguous", "transposed", "gaps", "last", "expanded"]),
        **options,
    ),
    dtype=dtypes,
    seed=st.integers(0, 2**20),
)
def test_dense(case, dtype, seed):
    assume(case.strides != "expanded" or case.batch)
    check(case, dtype, seed=seed, limit=LIMIT)
    check_on_gpu(case, dtype, seed)


@given(
    case=st.builds(
        lambda lengths, heads, **kwargs: build(
            heads, lengths_q=tuple(q for q, _ in lengths), lengths_kv=tuple(k for _, k in lengths), **kwargs
        ),
        st.lists(st.tuples(st.one_of(few, some), st.one_of(few, some, st.integers(100, 400))), max_size=4),
        heads,
        strides=st.sampled_from(["contiguous", "gaps", "last", "qkv-packed"]),
        **options,
    ),
    dtype=dtypes,
    seed=st.integers(0, 2**20),
)
def test_packed(case, dtype, seed):
    check(case, dtype, seed=seed, limit=LIMIT)
    check_on_gpu(case, dtype, seed)


@given(
    heads=heads,
    seq_q=st.integers(1, 4),
    seq_kv=st.integers(500, 3000),
    head_dim=dims,
    window=windows,
    is_causal=st.booleans(),
    sinks=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_decoding(heads, seq_q, seq_kv, head_dim, window, is_causal, sinks, dtype):
    case = build(
        heads, batch=2, seq_q=seq_q, seq_kv=seq_kv, head_dim=head_dim, window=window, is_causal=is_causal, sinks=sinks
    )
    check(case, dtype, grads=False, limit=LIMIT)
    check_on_gpu(case, dtype)
