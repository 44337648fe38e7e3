"""What a query sees reaches its output, NaN included; what it does not see does not. All memory round the inputs of the
other tests holds NaN (testing.poisoned)."""

import pytest
import torch

import flash_ext

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
shapes = pytest.mark.parametrize(
    "seq_q, seq_kv, dim", [(6, 6, 8), (1, 700, 16), (70, 130, 64), (256, 256, 64)], ids=lambda x: str(x)
)


def inputs(seq_q, seq_kv, dim, dtype):
    return [torch.randn(2, 4, seq_q, dim).to(dtype), *(torch.randn(2, 2, seq_kv, dim).to(dtype) for _ in range(2))]


@pytest.mark.sanitize
@dtypes
@shapes
def test_nan_in_a_query_is_in_its_row_only(seq_q, seq_kv, dim, dtype, forward_backend):
    q, k, v = inputs(seq_q, seq_kv, dim, dtype)
    q[1, 2, seq_q // 2, dim - 1] = torch.nan
    out, lse = flash_ext.attn(q, k, v, return_lse=True, backend=forward_backend)
    expected = torch.zeros(2, 4, seq_q, dtype=torch.bool)
    expected[1, 2, seq_q // 2] = True
    assert torch.equal(out.isnan(), expected[..., None].expand(out.shape))
    assert torch.equal(lse.isnan(), expected)


@dtypes
@shapes
def test_nan_in_a_key_is_where_it_is_seen(seq_q, seq_kv, dim, dtype, forward_backend):
    q, k, v = inputs(seq_q, seq_kv, dim, dtype)
    j = seq_kv - 1 - seq_q // 2
    k[1, 1, j, 0] = torch.nan
    out, lse = flash_ext.attn(q, k, v, is_causal=True, return_lse=True, backend=forward_backend)
    sees = torch.arange(seq_q) + seq_kv - seq_q >= j
    expected = torch.zeros(2, 4, seq_q, dtype=torch.bool)
    expected[1, 2:] = sees
    assert torch.equal(lse.isnan(), expected)
    assert torch.equal(out.isnan(), expected[..., None].expand(out.shape))


@dtypes
@shapes
def test_nan_in_a_value_reaches_who_sees_it(seq_q, seq_kv, dim, dtype, forward_backend):
    q, k, v = inputs(seq_q, seq_kv, dim, dtype)
    v[1, 1, seq_kv // 2, 3] = torch.nan
    out, lse = flash_ext.attn(q, k, v, return_lse=True, backend=forward_backend)
    expected = torch.zeros(out.shape, dtype=torch.bool)
    expected[1, 2:, :, 3] = True
    assert torch.equal(out.isnan(), expected)
    assert not lse.isnan().any()


@dtypes
def test_infinite_scores(dtype, forward_backend):
    """inf - inf is NaN in a softmax, and stays one; -inf is a key that is not seen."""
    q, k, v = inputs(5, 7, 8, dtype)
    q[0, 0, 0, 0], k[0, 0, :, 0] = torch.inf, 1.0
    k[1, 1, 3] = -torch.inf
    q[1, 2:] = q[1, 2:].abs() + 0.1
    out, lse = flash_ext.attn(q, k, v, return_lse=True, backend=forward_backend)
    assert out[0, 0, 0].isnan().all() and lse[0, 0, 0].isnan()
    assert not out[0, 0, 1:].isnan().any() and not out[0, 1:].isnan().any()
    others = [j for j in range(7) if j != 3]
    without = flash_ext.math(q[1:, 2:], k[1:, 1:, others], v[1:, 1:, others])
    torch.testing.assert_close(out[1:, 2:].double(), without.double(), atol=0.02, rtol=0.02)


@dtypes
def test_nan_in_the_options(dtype):
    q, k, v = inputs(5, 7, 8, dtype)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    sinks, slopes, mask = torch.zeros(4, dtype=acc), torch.zeros(4, dtype=acc), torch.zeros(1, 1, 5, 7)
    sinks[1] = slopes[2] = mask[:, :, 3, 2] = torch.nan
    out = flash_ext.attn(q, k, v, mask, sinks=sinks, alibi_slopes=slopes)
    expected = torch.zeros(2, 4, 5, dtype=torch.bool)
    expected[:, 1] = expected[:, 2] = expected[:, :, 3] = True
    assert torch.equal(out.isnan().all(-1), expected)
    assert torch.equal(out.isnan().any(-1), expected)


@dtypes
@shapes
def test_nan_in_grad_out_is_in_the_gradients_it_feeds(seq_q, seq_kv, dim, dtype):
    q, k, v = (x.requires_grad_() for x in inputs(seq_q, seq_kv, dim, dtype))
    grad_out = torch.ones(2, 4, seq_q, dim, dtype=dtype)
    grad_out[1, 2, 0, 0] = torch.nan
    out = flash_ext.attn(q, k, v)
    dq, dk, dv = torch.autograd.grad(out, [q, k, v], grad_out)
    assert dq[1, 2, 0].isnan().all() and dq.isnan().sum() == dim
    assert dk[1, 1].isnan().all() and not dk[0].isnan().any() and not dk[1, 0].isnan().any()
    assert dv[1, 1, :, 0].isnan().all() and dv.isnan().sum() == seq_kv
