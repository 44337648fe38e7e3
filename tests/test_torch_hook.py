"""flash_ext.integrations.torch_hook: torch's own FlashAttention ops, run by flash_ext."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_ext import backends
from flash_ext.integrations import torch_hook

aten = torch.ops.aten
HAS_HOOK = hasattr(torch.nn.attention, "register_flash_attention_impl")
needs_gpu = pytest.mark.skipif(
    not (torch.cuda.is_available() and backends.GPU_KERNELS and HAS_HOOK),
    reason="needs a GPU, flash_ext built for it, and torch 2.11",
)


@pytest.fixture
def on_cpu():
    """torch has no such kernels on CPUs: there the whole way through the dispatcher can be seen."""
    handle = torch_hook.put_kernels("CPU")
    yield
    handle.remove()


def normal(*shape, **options):
    return torch.randn(shape, **options).requires_grad_()


def math(q, k, v, is_causal=False, scale=None):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale, enable_gqa=True)


@pytest.mark.parametrize("name", torch_hook.KERNELS)
def test_parameters_are_torchs(name):
    if not hasattr(aten, name):
        pytest.skip("this torch does not have it")
    arguments = getattr(aten, name).default._schema.arguments
    positional = [None for a in arguments if not a.kwarg_only]
    options = {a.name: None for a in arguments if a.kwarg_only}
    function = inspect.signature(torch_hook.KERNELS[name])
    bound = function.bind(*positional, **options)
    if "inplace" not in name:
        names = [a.name for a in arguments if not a.kwarg_only]
        assert [name for name, p in function.parameters.items() if p.kind == p.POSITIONAL_OR_KEYWORD] == names
    assert bound


@pytest.mark.parametrize("layout", ["bhsd", "bshd", "fused"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_dense(on_cpu, is_causal, layout):
    if layout == "bhsd":
        q, k, v = normal(2, 4, 9, 16), normal(2, 4, 9, 16), normal(2, 4, 9, 16)
    elif layout == "bshd":
        q, k, v = (normal(2, 9, 4, 16).transpose(1, 2) for _ in range(3))
    else:
        q, k, v = normal(2, 9, 3, 4, 16).permute(2, 0, 3, 1, 4).unbind()
    out, lse, *rest = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=0.3)
    expected = math(q, k, v, is_causal, 0.3)
    assert out.stride() == torch.empty_like(q).stride()
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    scores = 0.3 * q @ k.transpose(-1, -2)
    if is_causal:
        scores = scores.masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), -torch.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1), atol=1e-5, rtol=1e-5)
    fakes = aten._scaled_dot_product_flash_attention(*(x.detach().to("meta") for x in (q, k, v)), 0.0, is_causal)
    for result, fake in zip((out, lse, *rest), fakes, strict=True):
        if isinstance(fake, torch.Tensor):
            assert result.shape == fake.shape and result.dtype == fake.dtype
    grad = torch.randn_like(out)
    for found, exact in zip(
        torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(expected, (q, k, v), grad), strict=True
    ):
        torch.testing.assert_close(found, exact, atol=1e-5, rtol=1e-5)


def test_dropout_is_the_same_in_the_backward(on_cpu):
    """out is linear in v: its gradient has the dropped weights."""
    q, k, v = normal(1, 2, 6, 8), normal(1, 2, 6, 8), torch.eye(6, 8).expand(1, 2, 6, 8).contiguous().requires_grad_()
    torch.manual_seed(0)
    out = aten._scaled_dot_product_flash_attention(q, k, v, 0.5)[0]
    weights = out[..., :6]
    assert (weights == 0).any()
    grad = torch.randn_like(out)
    torch.testing.assert_close(torch.autograd.grad(out, v, grad)[0], weights.transpose(-1, -2) @ grad)


def test_packed(on_cpu):
    q, k, v = normal(11, 4, 16), normal(13, 2, 16), normal(13, 2, 16)
    starts_q, starts_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 4, 11], [0, 6, 13]))
    out, lse, state, _, _ = aten._flash_attention_forward(q, k, v, starts_q, starts_k, 7, 7, 0.0, False, False)
    assert lse.shape == (4, 11)
    parts = []
    for (a, b), (c, d) in zip(((0, 4), (4, 11)), ((0, 6), (6, 13)), strict=True):
        one = [x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d])]
        parts.append(math(*one)[0].transpose(0, 1))
    expected = torch.cat(parts)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    grad = torch.randn_like(out)
    found = aten._flash_attention_backward(
        grad, q, k, v, out, lse, starts_q, starts_k, 7, 7, 0.0, False, state, torch.empty(0)
    )
    for x, exact in zip(found, torch.autograd.grad(expected, (q, k, v), grad), strict=True):
        torch.testing.assert_close(x, exact, atol=1e-5, rtol=1e-5)
    if hasattr(aten, "_flash_attention_forward_no_dropout_inplace"):
        room = torch.empty_like(out)
        args = (starts_q, starts_k, 7, 7, 0.0, False, False)
        aten._flash_attention_forward_no_dropout_inplace(room, q, k, v, *args)
        assert torch.equal(room, out)


def test_dense_by_token(on_cpu):
    q, k, v = normal(2, 9, 4, 16), normal(2, 12, 4, 16), normal(2, 12, 4, 16)
    args = (None, None, 9, 12, 0.0, True, False)
    out, lse, state, _, _ = aten._flash_attention_forward(q, k, v, *args, window_size_left=5)
    mask = torch.ones(9, 12, dtype=torch.bool).tril(3).triu(3 - 5)
    by_head = [x.transpose(1, 2) for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*by_head, mask).transpose(1, 2)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    grad = torch.randn_like(out)
    found = aten._flash_attention_backward(
        grad, q, k, v, out, lse, *args[:6], state, torch.empty(0), window_size_left=5
    )
    for x, exact in zip(found, torch.autograd.grad(expected, (q, k, v), grad), strict=True):
        torch.testing.assert_close(x, exact, atol=1e-5, rtol=1e-5)


def test_what_it_does_not_have_is_refused(on_cpu):
    q = normal(1, 2, 5, 8)
    with pytest.raises(RuntimeError, match="return_debug_mask"):
        aten._scaled_dot_product_flash_attention(q, q, q, 0.0, False, True)
    x = q.transpose(1, 2)
    with pytest.raises(RuntimeError, match="alibi_slopes"):
        aten._flash_attention_forward(x, x, x, None, None, 5, 5, 0.0, False, False, alibi_slopes=torch.ones(2))


@pytest.mark.skipif(not HAS_HOOK, reason="needs torch 2.11")
def test_torch_knows_the_name():
    assert torch_hook.register() in torch.nn.attention.list_flash_attention_impls()
    if not backends.GPU_KERNELS:
        with pytest.raises(RuntimeError, match="built without GPU kernels"):
            torch_hook.activate()


def test_removed_kernels_are_gone():
    handle = torch_hook.put_kernels("CPU")
    handle.remove()
    handle.remove()
    q = normal(1, 2, 5, 8)
    with pytest.raises(NotImplementedError):
        aten._scaled_dot_product_flash_attention(q, q, q)


@needs_gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_on_the_gpu(compiled):
    q, k, v = (normal(2, 4, 300, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))

    def step(q, k, v):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    expected = step(q, k, v)
    torch_hook.activate()
    try:
        assert torch.nn.attention.current_flash_attention_impl() == "flash_ext"
        call = torch.compile(step, fullgraph=True) if compiled else step
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            out = call(q, k, v)
            gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
            torch.cuda.synchronize()
        assert any("flash_ext" in event.name for event in profile.events())
    finally:
        torch.nn.attention.restore_flash_attention_impl()
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)
    for x, exact in zip(gradients, torch.autograd.grad(expected.square().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(x, exact, atol=5e-2, rtol=5e-2)
