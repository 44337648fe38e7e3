"""Dropout: one mask for every backend, a pure function of the generator's draw and the position."""

import pytest
import torch

import flash_ext
from flash_ext.math import dropout_mask, dropout_threshold

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def state(*values):
    return torch.tensor(values, dtype=torch.int64)


def kept_by(run, batch, heads, seq_q, seq_kv, dtype):
    """Which weights a call keeps: with v the identity, the output is the weights."""
    q = torch.zeros(batch, heads, seq_q, 1, dtype=dtype)
    v = torch.eye(seq_kv, dtype=dtype).expand(batch, heads, seq_kv, seq_kv)
    return run(q, torch.zeros(batch, heads, seq_kv, 1, dtype=dtype), v)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seq_q, seq_kv", [(1, 1), (5, 7), (33, 65), (1, 700), (130, 40)])
def test_mask_is_the_formula_bit_for_bit(seq_q, seq_kv, dtype, forward_backend):
    if forward_backend == "gpu" and seq_kv > 256:
        pytest.skip("v, the identity, has a larger head_dim than the gpu backend knows")
    for p, rng_state in [(0.5, state(1, 2)), (0.1, state(-(2**60) - 3, 2**33 + 5)), (0.93, state(2**63 - 1, -1))]:
        out = kept_by(
            lambda q, k, v, p=p, s=rng_state: torch.ops.flash_ext.attn_fwd(q, k, v, 1.0, dropout_p=p, rng_state=s)[0],
            2, 3, seq_q, seq_kv, dtype,
        )  # fmt: skip
        expected = dropout_mask(rng_state, 2, 3, seq_q, seq_kv, p)
        assert torch.equal(out != 0, expected)
        factor = 65536 / (65536 - dropout_threshold(p))
        torch.testing.assert_close(out, (expected * factor / seq_kv).to(dtype))


def test_packed_sequences_count_from_their_own_start():
    lengths_q, lengths_kv = (3, 0, 9), (17, 4, 9)
    cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (lengths_q, lengths_kv))
    q, k = torch.zeros(12, 2, 1), torch.zeros(30, 2, 1)
    v = torch.cat([torch.eye(length, 17) for length in lengths_kv])[:, None].expand(30, 2, 17)
    out, _ = torch.ops.flash_ext.attn_varlen_fwd(
        q, k, v, cu_q, cu_k, 9, 17, 1.0, dropout_p=0.4, rng_state=state(11, 22)
    )
    expected = dropout_mask(state(11, 22), 3, 2, 9, 17, 0.4)
    assert torch.equal(out[:3] != 0, expected[0, :, :3].transpose(0, 1))
    assert torch.equal(out[3:, :, :9] != 0, expected[2, :, :9, :9].transpose(0, 1))
    assert not out[3:, :, 9:].any()


def test_the_generator_decides():
    q = torch.randn(1, 2, 16, 8)

    def call(seed, backend):
        torch.manual_seed(seed)
        return flash_ext.attn(q, q, q, dropout_p=0.5, backend=backend)

    for backend in ("cpu", "math"):
        assert torch.equal(call(1, backend), call(1, backend))
        assert not torch.equal(call(1, backend), call(2, backend))
    torch.manual_seed(1)
    first = flash_ext.attn(q, q, q, dropout_p=0.5)
    assert not torch.equal(first, flash_ext.attn(q, q, q, dropout_p=0.5))
    torch.testing.assert_close(call(1, "cpu"), call(1, "math"))


def test_no_dropout_draws_nothing():
    q = torch.randn(1, 2, 16, 8)
    torch.manual_seed(5)
    flash_ext.attn(q, q, q)
    drawn = torch.randint(1000, (4,))
    torch.manual_seed(5)
    assert torch.equal(torch.randint(1000, (4,)), drawn)


@pytest.mark.parametrize("p", [0.02, 0.25, 0.5, 0.9])
def test_as_many_are_dropped_as_said(p):
    keep = dropout_mask(state(123, 0), 4, 8, 64, 512, p)
    n = keep.numel()
    sigma = (p * (1 - p) / n) ** 0.5
    assert abs((~keep).double().mean().item() - p) < 5 * sigma + 2**-17
    # Neither heads nor rows nor keys are alike: each pair agrees as often as chance has it.
    chance = p**2 + (1 - p) ** 2
    for left, right in [(keep[0], keep[1]), (keep[:, 0], keep[:, 1]), (keep[:, :, 1:], keep[:, :, :-1])]:
        agree = (left == right).double().mean().item()
        assert abs(agree - chance) < 6 * (0.25 / left.numel()) ** 0.5
    for shift in (1, 2, 8):
        agree = (keep[..., shift:] == keep[..., :-shift]).double().mean().item()
        assert abs(agree - chance) < 6 * (0.25 / n) ** 0.5


def test_the_mean_is_kept():
    q, k, v = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 20, 8), torch.randn(1, 1, 20, 8) + 1
    expected = flash_ext.attn(q, k, v)
    torch.manual_seed(0)
    many = 4000
    total = sum(flash_ext.attn(q, k, v, dropout_p=0.3) for _ in range(many))
    torch.testing.assert_close(total / many, expected, atol=0.05, rtol=0)


def test_a_probability_below_the_resolution_drops_nothing():
    q = torch.randn(1, 2, 16, 8)
    for backend in ("cpu", "math"):
        expected = flash_ext.attn(q, q, q, backend=backend)
        assert torch.equal(flash_ext.attn(q, q, q, dropout_p=1e-6, backend=backend), expected)
