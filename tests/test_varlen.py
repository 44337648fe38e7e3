"""Packed sequences: each is what `attn` makes of it alone."""

import pytest
import torch

import flash_ext
from flash_ext.testing import CASES, make_inputs, run

PACKED = [case for case in CASES if case.packed and not case.dropout_p]  # dropout counts batch, see test_dropout


@pytest.mark.parametrize("backend", ["cpu", "math"])
@pytest.mark.parametrize("case", PACKED, ids=str)
def test_each_sequence_as_if_alone(case, backend):
    inputs = make_inputs(case, torch.float64)
    packed = run(inputs, backend)
    q, k, v = (x.detach() for x in inputs.args[:3])
    begin_q = begin_k = 0
    for b, (seq_q, seq_kv) in enumerate(zip(case.lengths_q, case.lengths_kv, strict=True)):
        rows_q, rows_k = slice(begin_q, begin_q + seq_q), slice(begin_k, begin_k + seq_kv)
        begin_q, begin_k = begin_q + seq_q, begin_k + seq_kv
        alone = [x.transpose(0, 1)[None].requires_grad_() for x in (q[rows_q], k[rows_k], v[rows_k])]
        options = dict(inputs.options)
        mask, slopes = options["attn_mask"], options["alibi_slopes"]
        if mask is not None:
            own = mask.detach()[b : b + 1] if mask.shape[0] > 1 else mask.detach()
            own = own[:, :, :seq_q] if mask.shape[2] > 1 else own
            options["attn_mask"] = own[..., :seq_kv] if mask.shape[3] > 1 else own
        if slopes is not None and slopes.dim() == 2:
            options["alibi_slopes"] = slopes[b]
        out, lse = flash_ext.attn(*alone, **options, return_lse=True, backend=backend)
        torch.testing.assert_close(out[0].transpose(0, 1), packed["out"][rows_q])
        torch.testing.assert_close(lse[0], packed["lse"][:, rows_q])
        outputs, grad_outputs = [out], [inputs.grad_out[rows_q].transpose(0, 1)[None]]
        if case.grad_lse:
            outputs, grad_outputs = outputs + [lse], grad_outputs + [inputs.grad_lse[None, :, rows_q]]
        for name, rows, gradient in zip(
            "qkv", (rows_q, rows_k, rows_k), torch.autograd.grad(outputs, alone, grad_outputs), strict=True
        ):
            torch.testing.assert_close(gradient[0].transpose(0, 1), packed[f"d{name}"][rows])


def test_max_seqlen_may_be_more_than_the_longest(forward_backend):
    case = next(case for case in CASES if case.id == "packed-causal")
    with torch.device("cpu"):  # of the generator that make_inputs uses
        inputs = make_inputs(case, *((torch.float16, "cuda") if forward_backend == "gpu" else ()))
    *args, max_q, max_k = inputs.args
    with torch.no_grad():
        exact = flash_ext.attn_varlen(*args, max_q, max_k, is_causal=True, backend=forward_backend)
        as_tensors = [torch.tensor(length, device="cpu") for length in (max_q, max_k)]
        same = flash_ext.attn_varlen(*args, *as_tensors, is_causal=True, backend=forward_backend)
        assert torch.equal(same, exact)
        roomy = flash_ext.attn_varlen(*args, max_q + 100, max_k + 1, is_causal=True, backend=forward_backend)
    torch.testing.assert_close(roomy, exact)


def test_cu_seqlens_of_any_strides():
    inputs = make_inputs(next(case for case in CASES if case.id == "packed-causal"))
    q, k, v, cu_q, cu_k, *rest = inputs.args
    spread_q, spread_k = (torch.stack([cu, cu + 1], dim=1)[:, 0] for cu in (cu_q, cu_k))
    assert not spread_q.is_contiguous()
    expected = flash_ext.attn_varlen(q, k, v, cu_q, cu_k, *rest)
    assert torch.equal(flash_ext.attn_varlen(q, k, v, spread_q, spread_k, *rest), expected)


def test_neighbours_are_not_read():
    """A sequence full of NaN beside another one, on both sides."""
    lengths = (3, 5, 4)
    cu = torch.tensor([0, 3, 8, 12], dtype=torch.int32)
    q, k, v = (torch.randn(12, 2, 8) for _ in range(3))
    expected = flash_ext.attn_varlen(q, k, v, cu, cu, 5, 5)
    for x in (q, k, v):
        x[:3] = torch.nan
        x[8:] = torch.inf
        x.requires_grad_()
    for backend in ("cpu", "math"):
        out, lse = flash_ext.attn_varlen(q, k, v, cu, cu, max(lengths), 5, return_lse=True, backend=backend)
        torch.testing.assert_close(out[3:8], expected[3:8])
        grads = torch.autograd.grad([out[3:8].sum(), lse[:, 3:8].sum()], [q, k, v])
        assert all(torch.isfinite(grad[3:8]).all() for grad in grads)
