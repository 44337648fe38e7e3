"""The forward of what `attn` and `attn_varlen` choose to run, against the definition in float64."""

import pytest
import torch

import flash_ext
from flash_ext.testing import CASES, DTYPES, check, make_inputs, run

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@dtypes
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case, dtype, device):
    check(case, dtype, device, grads=False)


@pytest.mark.sanitize
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_bfloat16_in_strange_memory(case):
    check(case, torch.bfloat16, grads=False, seed=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and it is tested")
def test_without_a_gpu_explain_says_so():
    q = torch.randn(1, 2, 3, 8)
    assert "needs a GPU" in flash_ext.explain(q, q, q).reasons["gpu"]


@dtypes
def test_cpu_runs_native(dtype):
    q = torch.randn(1, 2, 3, 8).to(dtype)
    assert flash_ext.explain(q, q, q).backend == "cpu"


def test_no_grad_and_grad_give_the_same():
    inputs = make_inputs(next(case for case in CASES if case.id == "everything"))
    without, with_grad = run(inputs, grads=False), run(inputs)
    assert torch.equal(without["out"], with_grad["out"])
    assert torch.equal(without["lse"], with_grad["lse"])


@pytest.mark.parametrize("backend", ["cpu", "math"])
def test_output_lies_as_the_layout_says(backend):
    q = torch.randn(2, 4, 5, 8)
    assert flash_ext.attn(q, q, q, backend=backend).is_contiguous()
    assert flash_ext.attn(q, q, q, backend=backend, layout="bshd").is_contiguous()
    # A model's [batch, seq, heads, head_dim], seen as torch wants it, comes back ready for `reshape`.
    q = torch.randn(2, 5, 4, 8).transpose(1, 2)
    assert flash_ext.attn(q, q, q, backend=backend).transpose(1, 2).is_contiguous()
    qkv = torch.randn(2, 5, 3, 4, 8)
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    assert flash_ext.attn(q, k, v, backend=backend).transpose(1, 2).is_contiguous()
    turned = q.contiguous()  # as by a rotary embedding
    assert flash_ext.attn(turned, turned, v, backend=backend).transpose(1, 2).is_contiguous()
    assert flash_ext.attn(turned, turned, turned, backend=backend).is_contiguous()


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"window": (2, 1)}, {"window": (2, 2), "is_causal": True}]
)
@pytest.mark.parametrize("causal_align", ["bottom_right", "top_left"])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("needs_gradients", [False, True])
def test_usual_calls_are_the_long_way_made_short(options, causal_align, layout, needs_gradients):
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 6)
    if layout == "bshd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    tensors = [x.requires_grad_(needs_gradients) for x in (q, k, v)]
    options |= {"causal_align": causal_align, "layout": layout}
    short = flash_ext.attn(*tensors, **options)
    long, _ = flash_ext.attn(*tensors, **options, return_lse=True)
    assert torch.equal(short, long) and short.stride() == long.stride()
    if needs_gradients:
        grad_out = torch.randn_like(short)
        grads, others = (torch.autograd.grad(out, tensors, grad_out) for out in (short, long))
        assert all(map(torch.equal, grads, others))


def test_layouts_agree():
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 6)
    out, lse = flash_ext.attn(q, k, v, is_causal=True, return_lse=True)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out_bshd, lse_bshd = flash_ext.attn(q, k, v, is_causal=True, layout="bshd", return_lse=True)
    assert torch.equal(out_bshd.transpose(1, 2), out)
    assert torch.equal(lse_bshd, lse)


def test_more_heads_than_a_grid_dimension_holds():
    q, k, v = torch.randn(2, 40_000, 1, 2), torch.randn(2, 20_000, 3, 2), torch.randn(2, 20_000, 3, 1)
    torch.testing.assert_close(flash_ext.attn(q, k, v), flash_ext.math(q, k, v))


def test_strides_beyond_32_bits(tmp_path):
    stride = 2**31 + 64  # elements, in a sparse file: what lies between the rows takes no memory
    storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2 * stride + 8, dtype=torch.bfloat16)
    q = storage.as_strided((1, 1, 3, 8), (0, 0, stride, 1))
    q.copy_(torch.randn(1, 1, 3, 8))
    small = q.clone()
    torch.testing.assert_close(flash_ext.attn(q, q, q), flash_ext.attn(small, small, small))
    by_head = q.transpose(1, 2)
    torch.testing.assert_close(flash_ext.attn(by_head, by_head, by_head), small.transpose(1, 2))
