"""Every wrong argument raises, on every path, and the message names it, what was expected and what came."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

import flash_ext

ERRORS = (ValueError, TypeError, RuntimeError)
PATHS = ["cpu", "math", "fake"]


def dense():
    return dict(query=torch.randn(2, 4, 5, 8), key=torch.randn(2, 2, 7, 8), value=torch.randn(2, 2, 7, 6))


def packed():
    cu_q, cu_k = torch.tensor([0, 2, 2, 5], dtype=torch.int32), torch.tensor([0, 3, 5, 7], dtype=torch.int32)
    q, k, v = torch.randn(5, 4, 8), torch.randn(7, 2, 8), torch.randn(7, 2, 6)
    return dict(q=q, k=k, v=v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=3, max_seqlen_k=3)


def call(path, function, arguments):
    if path != "fake":  # what "cpu" does not take goes to math of itself
        return function(**arguments, backend="math" if path == "math" else None)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        return function(
            **{name: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
        )


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


META = torch.device("meta")

# What the message starts with -> the arguments that are wrong.
DENSE = {
    "q: expected .*, got list": dict(query=[1.0]),
    "q: expected .batch, heads_q, seq_q, head_dim., got .4, 5, 8.": dict(query=torch.randn(4, 5, 8)),
    "q: expected .batch, heads_q, seq_q, head_dim., got .1, 2, 4, 5, 8.": dict(query=torch.randn(1, 2, 4, 5, 8)),
    "q: expected .batch, seq_q, heads_q, head_dim., got .4, 5.": dict(query=torch.randn(4, 5), layout="bshd"),
    "k: expected .*, got .7, 8.": dict(key=torch.randn(7, 8)),
    "v: expected .*, got .2, 7, 6.": dict(value=torch.randn(2, 7, 6)),
    "k: expected .*, got .2, 7.": dict(key=torch.randn(2, 7), layout="bshd"),
    "k: expected float32 as q, got float16": dict(key=torch.randn(2, 2, 7, 8).half()),
    "v: expected float32 as q, got float64": dict(value=torch.randn(2, 2, 7, 6).double()),
    "q: expected .*, got .*[Ii]nt": dict(
        {name: torch.ones(2, 2, 7, 8, dtype=torch.int32) for name in dense()}, scale=1.0
    ),
    "q: expected .*, got .*[Bb]ool": dict(
        {name: torch.ones(2, 2, 7, 8, dtype=torch.bool) for name in dense()}, scale=1.0
    ),
    "q: expected .*, got .*[Cc]omplex": {name: torch.ones(2, 2, 7, 8, dtype=torch.complex64) for name in dense()},
    "k: expected batch 2 as in q, got 3": dict(key=torch.randn(3, 2, 7, 8)),
    "v: expected batch 2 as in q, got 1": dict(value=torch.randn(1, 2, 7, 6)),
    "k: expected head_dim 8 as in q, got 9": dict(key=torch.randn(2, 2, 7, 9)),
    "v: expected seq_kv 7 as in k, got 8": dict(value=torch.randn(2, 2, 8, 6)),
    "v: expected 2 heads as in k, got 4": dict(value=torch.randn(2, 4, 7, 6)),
    "k: expected a number of heads that divides 4, the heads of q, got 3": dict(
        key=torch.randn(2, 3, 7, 8), value=torch.randn(2, 3, 7, 6)
    ),
    "k: expected a number of heads that divides 4, the heads of q, got 8": dict(
        key=torch.randn(2, 8, 7, 8), value=torch.randn(2, 8, 7, 6)
    ),
    "k: expected a number of heads that divides 4, the heads of q, got 0": dict(
        key=torch.randn(2, 0, 7, 8), value=torch.randn(2, 0, 7, 6)
    ),
    "k: expected 4 heads as in q with enable_gqa=False, got 2": dict(enable_gqa=False),
    "q: expected head_dim of at least 1, got 0": dict(query=torch.randn(2, 4, 5, 0), key=torch.randn(2, 2, 7, 0)),
    "v: expected head_dim of at least 1, got 0": dict(value=torch.randn(2, 2, 7, 0)),
    "scale: expected a finite number of at least 0, got -?nan": dict(scale=float("nan")),
    "scale: expected a finite number of at least 0, got -1": dict(scale=-1.0),
    "scale: expected a finite number of at least 0, got inf": dict(scale=float("inf")),
    "softcap: expected a finite number of at least 0, got -2": dict(softcap=-2.0),
    "softcap: expected a finite number of at least 0, got -?nan": dict(softcap=float("nan")),
    "dropout_p: expected a number in .0, 1., got -0.1": dict(dropout_p=-0.1),
    "dropout_p: expected a number in .0, 1., got 1": dict(dropout_p=1.0),
    "dropout_p: expected a number in .0, 1., got 7": dict(dropout_p=7.0),
    "dropout_p: expected a number in .0, 1., got -?nan": dict(dropout_p=float("nan")),
    "window: expected .left, right.*, got 3": dict(window=3),
    "window: expected .left, right.*, got .1, 2, 3.": dict(window=(1, 2, 3)),
    "window: expected .left, right.*, got .-2, 0.": dict(window=(-2, 0)),
    "window: expected .left, right.*, got .0, -9.": dict(window=(0, -9), is_causal=True),
    "window: expected .left, right.*, got .1.5, 0.": dict(window=(1.5, 0)),
    "causal_align: expected 'bottom_right' or 'top_left', got 'left'": dict(causal_align="left"),
    "layout: expected 'bhsd' or 'bshd', got 'sbhd'": dict(layout="sbhd"),
    "attn_mask: expected .*, got list": dict(attn_mask=[True]),
    "attn_mask: expected 2 to 4 dimensions.*, got .7.": dict(attn_mask=torch.ones(7)),
    "attn_mask: expected 2 to 4 dimensions.*, got .1, 1, 1, 1, 1.": dict(attn_mask=torch.ones(1, 1, 1, 1, 1)),
    "attn_mask: expected a shape that broadcasts to .2, 4, 5, 7., got .1, 1, 5, 8.": dict(attn_mask=torch.ones(5, 8)),
    "attn_mask: expected a shape that broadcasts to .2, 4, 5, 7., got .1, 2, 5, 7.": dict(
        attn_mask=torch.ones(2, 5, 7)
    ),
    "attn_mask: expected a shape that broadcasts to .2, 4, 5, 7., got .3, 1, 1, 1.": dict(
        attn_mask=torch.ones(3, 1, 1, 1)
    ),
    "attn_mask: expected .*, got (Long|int64)": dict(attn_mask=torch.ones(5, 7, dtype=torch.int64)),
    "alibi_slopes: expected .*, got float": dict(alibi_slopes=0.5),
    "alibi_slopes: expected .4. or .2, 4., got .3.": dict(alibi_slopes=torch.ones(3)),
    "alibi_slopes: expected .4. or .2, 4., got .3, 4.": dict(alibi_slopes=torch.ones(3, 4)),
    "alibi_slopes: expected .*, got .*int": dict(alibi_slopes=torch.ones(4, dtype=torch.int32)),
    "sinks: expected .4., got .2, 4.": dict(sinks=torch.ones(2, 4)),
    "sinks: expected .4., got .1.": dict(sinks=torch.ones(1)),
    "sinks: expected .*, got .*bool": dict(sinks=torch.ones(4, dtype=torch.bool)),
    "k: expected a tensor on .*, got one on": dict(key=torch.randn(2, 2, 7, 8, device=META)),
    "v: expected a tensor on .*, got one on": dict(value=torch.randn(2, 2, 7, 6, device=META)),
    "attn_mask: expected a tensor on .*, got one on": dict(attn_mask=torch.ones(5, 7, device=META)),
    "alibi_slopes: expected a tensor on .*, got one on": dict(alibi_slopes=torch.ones(4, device=META)),
    "sinks: expected a tensor on .*, got one on": dict(sinks=torch.ones(4, device=META)),
}

PACKED = {
    "q: expected .total_q, heads_q, head_dim., got .1, 5, 4, 8.": dict(q=torch.randn(1, 5, 4, 8)),
    "k: expected .total_k, heads_kv, head_dim., got .7, 16.": dict(k=torch.randn(7, 16)),
    "v: expected total_k 7 as in k, got 6": dict(v=torch.randn(6, 2, 6)),
    "v: expected 2 heads as in k, got 1": dict(v=torch.randn(7, 1, 6)),
    "k: expected head_dim 8 as in q, got 4": dict(k=torch.randn(7, 2, 4)),
    "k: expected a number of heads that divides 4, the heads of q, got 3": dict(
        k=torch.randn(7, 3, 8), v=torch.randn(7, 3, 6)
    ),
    "cu_seqlens_q: expected .*, got list": dict(cu_seqlens_q=[0, 5]),
    "cu_seqlens_q: expected int32, got .*([Ll]ong|int64)": dict(cu_seqlens_q=torch.tensor([0, 2, 2, 5])),
    "cu_seqlens_q: expected .batch . 1., got .0.": dict(cu_seqlens_q=int32(), cu_seqlens_k=int32()),
    "cu_seqlens_q: expected .batch . 1., got .1, 4.": dict(cu_seqlens_q=int32(0, 2, 2, 5)[None]),
    "cu_seqlens_k: expected 4 values as in cu_seqlens_q, got 3": dict(cu_seqlens_k=int32(0, 3, 7), max_seqlen_k=7),
    "cu_seqlens_k: expected a tensor on .*, got one on": dict(cu_seqlens_k=int32(0, 3, 5, 7).to(META)),
    "max_seqlen_q: expected 0 or more, got -1": dict(max_seqlen_q=-1),
    "max_seqlen_k: expected 0 or more, got -5": dict(max_seqlen_k=-5),
    "attn_mask: expected a shape that broadcasts to .3, 4, 3, 3., got .1, 1, 5, 7.": dict(attn_mask=torch.ones(5, 7)),
    "alibi_slopes: expected .4. or .3, 4., got .2, 4.": dict(alibi_slopes=torch.ones(2, 4)),
    "sinks: expected .4., got .5.": dict(sinks=torch.ones(5)),
    "scale: expected a finite number of at least 0, got -?nan": dict(scale=float("nan")),
    "dropout_p: expected a number in .0, 1., got 1": dict(dropout_p=1.0),
    "window: expected .left, right.*, got .-2, 0.": dict(window=(-2, 0)),
}

# These read the values of cu_seqlens, which a fake tensor does not have.
PACKED_VALUES = {
    "cu_seqlens_q: expected to start with 0, got 1": dict(cu_seqlens_q=int32(1, 2, 2, 5)),
    "cu_seqlens_k: expected to start with 0, got -1": dict(cu_seqlens_k=int32(-1, 3, 5, 7), max_seqlen_k=9),
    "cu_seqlens_q: expected values that do not decrease, got 4 before 2": dict(
        cu_seqlens_q=int32(0, 4, 2, 5), max_seqlen_q=9
    ),
    "cu_seqlens_k: expected values that do not decrease, got 2000000000 before -2000000000": dict(
        cu_seqlens_k=int32(0, 2_000_000_000, -2_000_000_000, 7), max_seqlen_k=2_000_000_000
    ),
    "cu_seqlens_q: expected to end with total_q = 5, got 4": dict(cu_seqlens_q=int32(0, 2, 2, 4)),
    "cu_seqlens_q: expected to end with total_q = 5, got 6": dict(cu_seqlens_q=int32(0, 3, 3, 6)),
    "cu_seqlens_k: expected to end with total_k = 7, got 8": dict(cu_seqlens_k=int32(0, 3, 5, 8)),
    "max_seqlen_q: expected at least 3, the length of sequence 2, got 2": dict(max_seqlen_q=2),
    "max_seqlen_k: expected at least 4, the length of sequence 0, got 3": dict(cu_seqlens_k=int32(0, 4, 5, 7)),
}


@pytest.mark.sanitize
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("message", DENSE)
def test_dense(message, path):
    arguments = dense()
    call(path, flash_ext.attn, arguments)  # right without the wrong ones
    with pytest.raises(ERRORS, match="^" + message):
        call(path, flash_ext.attn, arguments | DENSE[message])


@pytest.mark.sanitize
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("message", PACKED)
def test_packed(message, path):
    arguments = packed()
    call(path, flash_ext.attn_varlen, arguments)
    with pytest.raises(ERRORS, match="^" + message):
        call(path, flash_ext.attn_varlen, arguments | PACKED[message])


@pytest.mark.sanitize
@pytest.mark.parametrize("path", ["cpu", "math"])
@pytest.mark.parametrize("message", PACKED_VALUES)
def test_packed_values(message, path):
    with pytest.raises(ERRORS, match="^" + message):
        call(path, flash_ext.attn_varlen, packed() | PACKED_VALUES[message])


def forward_arguments():
    q, k, v = dense().values()
    return dict(q=q, k=k, v=v, scale=0.3)


def backward_arguments():
    forward = forward_arguments()
    out, lse = torch.ops.flash_ext.attn_fwd(**forward)
    rest = dict(window_left=-1, window_right=-1, top_left=False, softcap=0.0, dropout_p=0.0, attn_mask=None)
    rest |= dict(alibi_slopes=None, sinks=None, rng_state=None, need_mask_grad=False, deterministic=False)
    return dict(grad_out=torch.ones_like(out), grad_lse=None, out=out, lse=lse) | forward | rest


# Only who calls the ops themselves can get these wrong.
FORWARD = {
    "window: expected -1 or more to the left, got -2": dict(window_left=-2),
    "window: expected -1 or more to the right, got -3": dict(window_right=-3),
    "alibi_slopes: expected float32, got float64": dict(alibi_slopes=torch.ones(4).double()),
    "sinks: expected float32, got float16": dict(sinks=torch.ones(4).half()),
    "attn_mask: expected a shape that broadcasts to .2, 4, 5, 7., got .5, 7.": dict(attn_mask=torch.ones(5, 7)),
    "rng_state: expected": dict(dropout_p=0.5),
    "rng_state: expected .*": dict(rng_state=torch.zeros(2, dtype=torch.int64)),
    "rng_state: expected int64 .2.": dict(dropout_p=0.5, rng_state=torch.zeros(3, dtype=torch.int64)),
    "rng_state: expected int64 .2.*": dict(dropout_p=0.5, rng_state=torch.zeros(2)),
}

BACKWARD = {
    "grad_out: expected .2, 4, 5, 6., got .2, 4, 5, 7.": dict(grad_out=torch.ones(2, 4, 5, 7)),
    "grad_out: expected .*float32.*, got .*float16": dict(grad_out=torch.ones(2, 4, 5, 6).half()),
    "grad_lse: expected .2, 4, 5., got .2, 4, 5, 1.": dict(grad_lse=torch.ones(2, 4, 5, 1)),
    "grad_lse: expected .*float32.*, got .*float64": dict(grad_lse=torch.ones(2, 4, 5).double()),
    "out: expected .2, 4, 5, 6., got .2, 4, 6.": dict(out=torch.ones(2, 4, 6)),
    "lse: expected .2, 4, 5., got .2, 5, 4.": dict(lse=torch.ones(2, 5, 4)),
    "lse: expected .*float32.*, got .*float64": dict(lse=torch.ones(2, 4, 5).double()),
    "need_mask_grad: expected": dict(need_mask_grad=True),
    "need_mask_grad: expected.*": dict(need_mask_grad=True, attn_mask=torch.ones(1, 1, 5, 7, dtype=torch.bool)),
    "sinks: expected .4., got .3.": dict(sinks=torch.ones(3)),
}


def as_fake(arguments):
    mode = FakeTensorMode()
    return {name: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}


def test_devices_without_a_kernel():
    """What torch runs for tensors on a GPU where the extension has nothing for it."""
    fake = flash_ext.registration.fake_attn_fwd
    q, k, v = (x.to(META) for x in dense().values())
    with pytest.raises(RuntimeError, match="no native kernel for tensors on meta; use backend='math'"):
        flash_ext.registration.refuse(fake)(q, k, v, 0.3)
    with pytest.raises(ValueError, match="k: expected a tensor on meta as q, got one on cpu"):
        flash_ext.registration.refuse(fake)(q, dense()["key"], v, 0.3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["q", "k", "v", "attn_mask", "sinks"])
def test_mixed_devices(name):
    q, k, v = dense().values()
    arguments = dict(query=q, key=k, value=v, attn_mask=torch.ones(5, 7), sinks=torch.ones(4))
    wrong = {"q": "query", "k": "key", "v": "value"}.get(name, name)
    with pytest.raises(ERRORS, match=f"^{'k' if name == 'q' else name}: expected a tensor on .*, got one on"):
        flash_ext.attn(**(arguments | {wrong: arguments[wrong].cuda()}))


@pytest.mark.sanitize
@pytest.mark.parametrize("convert", [dict, as_fake], ids=["native", "fake"])
@pytest.mark.parametrize("message", FORWARD)
def test_forward_op(message, convert):
    with pytest.raises(ERRORS, match="^" + message):
        torch.ops.flash_ext.attn_fwd(**convert(forward_arguments() | FORWARD[message]))


@pytest.mark.sanitize
@pytest.mark.parametrize("convert", [dict, as_fake], ids=["native", "fake"])
@pytest.mark.parametrize("message", BACKWARD)
def test_backward_op(message, convert):
    torch.ops.flash_ext.attn_bwd(**convert(backward_arguments()))
    with pytest.raises(ERRORS, match="^" + message):
        torch.ops.flash_ext.attn_bwd(**convert(backward_arguments() | BACKWARD[message]))


def test_a_failed_call_leaves_no_trace():
    q, k, v = dense().values()
    before = [x.clone() for x in (q, k, v)]
    expected = flash_ext.attn(q, k, v)
    for arguments in DENSE.values():
        with pytest.raises(ERRORS):
            flash_ext.attn(**(dense() | arguments))
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))
    assert torch.equal(flash_ext.attn(q, k, v), expected)
