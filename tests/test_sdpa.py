"""flash_ext.integrations.sdpa: calls of torch's scaled_dot_product_attention, and modules that make them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import flash_ext
from flash_ext.integrations import sdpa

original = sdpa.original


@pytest.fixture(autouse=True)
def torchs_own():
    assert F.scaled_dot_product_attention is original
    yield
    assert F.scaled_dot_product_attention is original and torch.backends.mha.get_fastpath_enabled()


@pytest.fixture
def ours(monkeypatch):
    """The calls that flash_ext has run."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return flash_ext.attn(*args, **kwargs)

    monkeypatch.setattr(sdpa, "attn", counted)
    return calls


def normal(*shape, device="cpu", dtype=torch.float32):
    return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)


def compare(q, k, v, *args, **options):
    """Output and gradients beside torch's, in float64."""

    def results(function, *leaves):
        out = function(*leaves, *args, **options)
        return out, *torch.autograd.grad(out, leaves, torch.ones_like(out).cumsum(-1))

    exact = results(original, *(x.detach().double().requires_grad_() for x in (q, k, v)))
    with sdpa.patch():
        found = results(F.scaled_dot_product_attention, q, k, v)
    for x, y in zip(found, exact, strict=True):
        torch.testing.assert_close(x.double(), y, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("leading", [(), (3,), (2, 4), (2, 3, 4), (2, 1, 3, 4)], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("seq_q, seq_kv", [(9, 9), (5, 12), (12, 5)])
def test_shapes(ours, device, leading, is_causal, seq_q, seq_kv):
    q, k, v = (normal(*leading, n, d, device=device) for n, d in ((seq_q, 8), (seq_kv, 8), (seq_kv, 6)))
    compare(q, k, v, is_causal=is_causal)  # from the top left
    assert len(ours) == 1


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize(
    "leading, mask",
    [
        ((2, 4), (7, 9)),
        ((2, 4), (4, 7, 9)),
        ((2, 4), (2, 1, 1, 9)),
        ((3,), (3, 7, 9)),
        ((), (7, 9)),
        ((2, 3, 4), (7, 9)),
    ]
    + [((2, 3, 4), (3, 1, 7, 9)), ((2, 3, 4), (2, 1, 1, 7, 1)), ((2, 3, 4), (4, 1, 9))],
    ids=str,
)
def test_masks(ours, leading, mask, kind):
    q, k, v = normal(*leading, 7, 8), normal(*leading, 9, 8), normal(*leading, 9, 8)
    attn_mask = torch.rand(mask) < 0.7
    attn_mask[..., 0] = True  # every query sees a key
    with sdpa.patch():
        out = F.scaled_dot_product_attention(q, k, v, attn_mask if kind == "bool" else attn_mask.float())
    exact = original(*(x.double() for x in (q, k, v)), attn_mask if kind == "bool" else attn_mask.double())
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5)
    assert len(ours) == 1


def test_float_masks_get_gradients(ours):
    q, mask = normal(2, 3, 7, 8), normal(3, 7, 7)
    with sdpa.patch():
        F.scaled_dot_product_attention(q, q, q, mask).square().sum().backward()
    found, mask.grad = mask.grad, None
    original(q, q, q, mask).square().sum().backward()
    torch.testing.assert_close(found, mask.grad, atol=1e-4, rtol=1e-4)
    assert len(ours) == 1


def test_scale_and_grouped_heads(ours, device):
    q, k, v = (normal(2, heads, 7, 8, device=device) for heads in (6, 2, 2))
    compare(q, k, v, None, 0.0, False, scale=0.3, enable_gqa=True)
    compare(q, k, v, scale=0.1, is_causal=True, enable_gqa=True)
    assert len(ours) == 2


@pytest.mark.parametrize("bias", [causal_upper_left, causal_lower_right])
def test_causal_biases(ours, bias):
    q, k = normal(2, 3, 5, 8), normal(2, 3, 9, 8)
    visible = torch.ones(5, 9, dtype=torch.bool).tril(0 if bias is causal_upper_left else 4)
    with sdpa.patch():
        out = F.scaled_dot_product_attention(q, k, k, bias(5, 9))
    torch.testing.assert_close(out, original(q, k, k, visible), atol=1e-5, rtol=1e-5)
    assert len(ours) == 1


def test_dropout_is_drawn_anew(ours):
    q = normal(1, 4, 50, 8)
    v = torch.ones_like(q)
    with sdpa.patch():
        torch.manual_seed(0)
        first, second = (F.scaled_dot_product_attention(q, q, v, dropout_p=0.5) for _ in range(2))
        torch.manual_seed(0)
        assert torch.equal(F.scaled_dot_product_attention(q, q, v, dropout_p=0.5), first)
    assert not torch.equal(first, second) and abs(first.mean() - 1) < 0.1


def test_what_torch_refuses_is_still_refused(ours):
    q, mask = normal(1, 2, 5, 8), torch.ones(5, 5, dtype=torch.int32)
    for args in ((q, q, q, mask), (q, q[..., :4], q), (q, q.double(), q), (normal(8),) * 3):
        with pytest.raises(RuntimeError):
            original(*args)
        with sdpa.patch(), pytest.raises((RuntimeError, ValueError)):
            F.scaled_dot_product_attention(*args)


def test_what_is_not_for_us_goes_to_torch(ours):
    ragged = torch.nested.nested_tensor([torch.randn(n, 4, 8) for n in (3, 5)], layout=torch.jagged).transpose(1, 2)
    one_head = normal(2, 1, 5, 8)  # broadcast, without enable_gqa
    q, mask = normal(2, 4, 5, 8), torch.ones(5, 5, dtype=torch.bool)
    with sdpa.patch():
        out = F.scaled_dot_product_attention(ragged, ragged, ragged)
        F.scaled_dot_product_attention(q, one_head, one_head)
        F.scaled_dot_product_attention(q, q, q, mask, is_causal=True)  # what that means is torch's to say
    assert not ours and out.is_nested


def test_blocks_nest_and_install_lasts(ours):
    q = normal(1, 2, 5, 8)
    with sdpa.patch():
        with sdpa.patch():
            pass
        F.scaled_dot_product_attention(q, q, q)
        assert not torch.backends.mha.get_fastpath_enabled()
    assert F.scaled_dot_product_attention is original
    sdpa.install()
    sdpa.install()
    F.scaled_dot_product_attention(q, q, q)
    with pytest.raises(KeyError), sdpa.patch():
        raise KeyError
    F.scaled_dot_product_attention(q, q, q)
    sdpa.uninstall()
    sdpa.uninstall()
    F.scaled_dot_product_attention(q, q, q)
    assert len(ours) == 3


@pytest.mark.parametrize("training", [False, True])
def test_multihead_attention(ours, training):
    module = nn.MultiheadAttention(16, 4, batch_first=True).train(training)
    x, padding = normal(2, 7, 16), torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 4:] = True
    mask = nn.Transformer.generate_square_subsequent_mask(7)
    for options in ({}, dict(key_padding_mask=padding), dict(attn_mask=mask, is_causal=True)):
        expected, _ = module(x, x, x, need_weights=False, **options)
        with sdpa.patch(), torch.set_grad_enabled(training):
            out, _ = module(x, x, x, need_weights=False, **options)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert len(ours) == 3


@pytest.mark.parametrize("training", [False, True])
def test_transformer_encoder_layer(ours, training):
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True).train(training)
    x = normal(2, 7, 16)
    expected = layer(x)
    expected_grad = torch.autograd.grad(expected.square().sum(), x)[0] if training else None
    with sdpa.patch(), torch.set_grad_enabled(training):
        out = layer(x)  # in eval mode torch's fused path would not call the function
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    if training:
        grad = torch.autograd.grad(out.square().sum(), x)[0]
        torch.testing.assert_close(grad, expected_grad, atol=1e-4, rtol=1e-4)
    assert len(ours) == 1


class CausalSelfAttention(nn.Module):
    """As nanoGPT has it."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def test_compiled_without_a_graph_break():
    module, x = CausalSelfAttention(16, 4), normal(2, 7, 16)
    expected = module(x)
    torch._dynamo.reset()
    with sdpa.patch():
        explanation = torch._dynamo.explain(module)(x)
        assert explanation.graph_break_count == 0
        assert any("flash_ext" in str(op) for op in explanation.ops_per_graph[0])
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        out = compiled(x)
        grad = torch.autograd.grad(out.square().sum(), x)[0]
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.square().sum(), x)[0], atol=1e-4, rtol=1e-4)


def test_autocast(ours):
    q = normal(1, 2, 30, 16)
    with sdpa.patch(), torch.autocast("cpu", torch.bfloat16):
        assert F.scaled_dot_product_attention(q, q, q).dtype == torch.bfloat16
    assert len(ours) == 1


def test_a_forced_backend_is_the_one(ours):
    q = normal(1, 2, 5, 8)
    with sdpa.patch(), flash_ext.use_backend("math"):
        out = F.scaled_dot_product_attention(q, q, q)
    torch.testing.assert_close(out, original(q, q, q))
    assert len(ours) == 1


def test_timm(ours):
    """Vision transformers; the second has an additive mask, its relative positions."""
    timm = pytest.importorskip("timm", exc_type=ImportError)
    for name, blocks in (("vit_tiny_patch16_224", 12), ("beit_base_patch16_224", 12)):
        model = timm.create_model(name, pretrained=False).eval()
        x = torch.randn(1, 3, 224, 224)
        with torch.no_grad():
            expected, before = model(x), len(ours)
            with sdpa.patch():
                out = model(x)
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
        assert len(ours) == before + blocks


def test_diffusers(ours):
    """Attention to itself and to a text, of a U-Net."""
    diffusers = pytest.importorskip("diffusers", exc_type=ImportError)
    model = diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, attention_head_dim=8,
        norm_num_groups=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    args = torch.randn(2, 4, 16, 16), 3, torch.randn(2, 7, 32)
    with torch.no_grad():
        expected = model(*args).sample
        with sdpa.patch():
            out = model(*args).sample
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    assert len(ours) == 8


def fused(batch, tokens, heads, dim):
    """q, k and v as vision transformers make them, all three from one product."""
    return torch.randn(batch, tokens, 3, heads, dim).permute(2, 0, 3, 1, 4).unbind(0)


def projected(batch, tokens, others, heads, dim):
    """q from one sequence, k and v from another, as in the cross-attention of diffusion models."""
    return [torch.randn(batch, n, heads * dim).view(batch, -1, heads, dim).transpose(1, 2) for n in (tokens, *others)]


@pytest.mark.parametrize(
    "tensors, options",
    [
        (fused(2, 197, 3, 64), dict(attn_mask=None, dropout_p=0.0, is_causal=False)),  # timm: Attention
        (fused(1, 50, 4, 32), dict(attn_mask=torch.randn(1, 4, 50, 50), dropout_p=0.0)),  # timm: relative positions
        (projected(2, 64, (64, 64), 8, 40), dict(attn_mask=None, dropout_p=0.0, is_causal=False)),  # diffusers
        (projected(2, 64, (77, 77), 8, 40), dict(attn_mask=None, dropout_p=0.0, is_causal=False)),
        (
            projected(2, 64, (77, 77), 8, 40),
            dict(attn_mask=torch.zeros(2, 1, 77).index_fill(2, torch.tensor([70]), -1e4).repeat_interleave(8, 0))
            | dict(dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False),
        ),
    ],
    ids=["timm", "timm-positions", "diffusers", "diffusers-text", "diffusers-padding"],
)
def test_calls_as_timm_and_diffusers_make_them(ours, tensors, options):
    """Their shapes, strides and keywords, for where they are not installed."""
    q, k, v = tensors
    if options["attn_mask"] is not None and options["attn_mask"].dim() == 3:  # [batch * heads, 1, keys]
        options = options | dict(attn_mask=options["attn_mask"].view(q.shape[0], q.shape[1], -1, k.shape[2]))
    expected = original(q, k, v, **options)
    with sdpa.patch():
        out = F.scaled_dot_product_attention(query=q, key=k, value=v, **options)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert len(ours) == 1
    assert out.transpose(1, 2).flatten(2).shape == (q.shape[0], q.shape[2], q.shape[1] * v.shape[3])
