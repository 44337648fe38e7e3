"""The gradients of what `attn` and `attn_varlen` choose to run, against those of the definition in float64."""

import pytest
import torch

import flash_ext
from flash_ext.testing import CASES, DTYPES, Case, check, make_inputs, run

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
by_id = {case.id: case for case in CASES}


@dtypes
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward(case, dtype, device):
    check(case, dtype, device)


@pytest.mark.sanitize
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward_float32_in_strange_memory(case):
    check(case, torch.float32, seed=1)


@pytest.mark.parametrize("name", ["everything", "bshd-options", "packed-everything", "decode-options", "sinks"])
def test_gradcheck(name):
    """Against finite differences: no formula of ours on either side."""
    inputs = make_inputs(by_id[name], torch.float64)
    case = inputs.case
    size = dict(heads_q=2, heads_kv=1, head_dim=3, head_dim_v=2)
    if case.packed:
        size |= dict(lengths_q=(2, 0, 3), lengths_kv=(4, 2, 2))
    else:
        size |= dict(seq_q=3, seq_kv=5)
    inputs = make_inputs(Case(**(vars(case) | size | dict(window=(2, 1)))), torch.float64)
    function = flash_ext.attn_varlen if case.packed else flash_ext.attn

    def call(*leaves):
        given = dict(zip(inputs.leaves, leaves, strict=True))
        args = [given[name] for name in "qkv"] + inputs.args[3:]
        options = inputs.options | {name: given[name] for name in ("attn_mask", "sinks") if name in given}
        torch.manual_seed(0)
        return function(*args, **options, return_lse=True)[: 2 if case.grad_lse else 1]

    mask = inputs.leaves.get("attn_mask")
    if mask is not None:  # finite differences of infinity are none
        with torch.no_grad():
            mask.masked_fill_(mask == -torch.inf, -0.5)
    # lse is -inf in a row that sees nothing; make every row see its sink
    assert inputs.options["sinks"] is not None
    assert torch.autograd.gradcheck(call, list(inputs.leaves.values()))


def test_only_what_is_asked_for_gets_a_gradient():
    for wanted in ("q", "k", "v", "attn_mask", "sinks"):
        inputs = make_inputs(by_id["everything"])
        everything = run(inputs)
        for name, leaf in inputs.leaves.items():
            leaf.requires_grad_(name == wanted)
        torch.manual_seed(0)
        out, lse = flash_ext.attn(*inputs.args, **inputs.options, return_lse=True)
        torch.autograd.backward([out, lse], [inputs.grad_out, inputs.grad_lse])
        for name, leaf in inputs.leaves.items():
            assert (leaf.grad is not None) == (name == wanted)
        torch.testing.assert_close(inputs.leaves[wanted].grad, everything[f"d{wanted}"])


@pytest.mark.parametrize("name", ["causal", "packed-causal"])
def test_gradient_through_lse_alone(name):
    inputs = make_inputs(by_id[name])
    gradients = {}
    for backend in ("cpu", "math"):
        function = flash_ext.attn_varlen if inputs.case.packed else flash_ext.attn
        _, lse = function(*inputs.args, **inputs.options, return_lse=True, backend=backend)
        loss = lse[torch.isfinite(lse)].sin().sum()
        gradients[backend] = torch.autograd.grad(loss, list(inputs.leaves.values()), allow_unused=True)
    for native, math in zip(gradients["cpu"][:2], gradients["math"][:2], strict=True):
        torch.testing.assert_close(native, math)
    assert not gradients["cpu"][2].any()  # lse does not depend on v


def test_grad_out_of_any_strides():
    q = torch.randn(2, 3, 5, 8, requires_grad=True)
    expected = torch.autograd.grad(flash_ext.attn(q, q, q), q, torch.ones(2, 3, 5, 8))[0]
    assert torch.equal(torch.autograd.grad(flash_ext.attn(q, q, q).sum(), q)[0], expected)  # stride 0
    transposed = torch.ones(2, 3, 8, 5).transpose(2, 3)
    assert torch.equal(torch.autograd.grad(flash_ext.attn(q, q, q), q, transposed)[0], expected)
    by_seq = torch.ones(2, 5, 3, 8).transpose(1, 2)
    assert torch.equal(torch.autograd.grad(flash_ext.attn(q, q, q), q, by_seq)[0], expected)


def test_one_tensor_as_query_key_and_value():
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64, requires_grad=True)
    native = torch.autograd.grad((flash_ext.attn(x, x, x, is_causal=True) ** 2).sum(), x)
    math = torch.autograd.grad((flash_ext.math(x, x, x, is_causal=True) ** 2).sum(), x)
    torch.testing.assert_close(native, math)


def test_gradients_are_zero_where_nothing_is_seen():
    q, k, v = (torch.randn(1, 2, 4, 8, requires_grad=True) for _ in range(3))
    mask = torch.zeros(4, 4, dtype=torch.bool)
    for backend in ("cpu", "math"):
        out, lse = flash_ext.attn(q, k, v, mask, return_lse=True, backend=backend)
        assert not out.any() and torch.equal(lse, torch.full_like(lse, -torch.inf))
        gradients = torch.autograd.grad([out, lse], [q, k, v], [torch.ones_like(out), torch.ones_like(lse)])
        assert all(not gradient.any() and torch.isfinite(gradient).all() for gradient in gradients)


def test_slopes_that_want_a_gradient_run_on_math():
    q = torch.randn(1, 2, 4, 8)
    slopes = torch.rand(2, requires_grad=True)
    flash_ext.attn(q, q, q, alibi_slopes=slopes).sum().backward()
    expected = torch.autograd.grad(flash_ext.math(q, q, q, alibi_slopes=slopes).sum(), slopes)[0]
    assert torch.equal(slopes.grad, expected) and slopes.grad.any()
    with pytest.raises(RuntimeError, match="alibi_slopes"):
        flash_ext.attn(q, q, q, alibi_slopes=slopes, backend="cpu")
    with pytest.raises(RuntimeError, match="alibi_slopes"):
        torch.ops.flash_ext.attn_fwd(q, q, q, 0.3, alibi_slopes=slopes)
    with torch.no_grad():
        flash_ext.attn(q, q, q, alibi_slopes=slopes, backend="cpu")
