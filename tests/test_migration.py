"""docs/migration.md: what its tables say is the same is the same."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import flash_ext
from flash_ext.compat import bert_padding, flash_attn

PAGE = Path(__file__).parents[1] / "docs" / "migration.md"
BATCH, HEADS, SEQ_Q, SEQ_KV, DIM = 2, 4, 6, 9, 8
OFFSET = SEQ_KV - SEQ_Q
QUERY, KEY = torch.arange(SEQ_Q)[:, None] + OFFSET, torch.arange(SEQ_KV)  # aligned to the bottom right

# ---- xFormers' masks, by what its documentation says of them: whether query i of n sees key j of m


def mask_class(sees):
    class Mask:
        def __init__(self, *options):
            self.options = options

        def visible(self, n, m):
            return sees(torch.arange(n)[:, None], torch.arange(m), m - n, *self.options)

        bias = 0.0

    return Mask


def block_class(sees):
    class Blocks:
        bias = 0.0

        @classmethod
        def from_seqlens(cls, lengths_q, lengths_kv):
            self = cls()
            blocks = [sees(n, m) for n, m in zip(lengths_q, lengths_kv, strict=True)]
            self.visible = lambda n, m: torch.block_diag(*blocks).bool()
            return self

    return Blocks


def full(n, m):
    return torch.ones(n, m)


XFORMERS = {
    "LowerTriangularMask": mask_class(lambda i, j, shift: j <= i),
    "LowerTriangularFromBottomRightMask": mask_class(lambda i, j, shift: j <= i + shift),
    "LowerTriangularFromBottomRightLocalAttentionMask": mask_class(
        lambda i, j, shift, window: (j <= i + shift) & (j > i + shift - window)
    ),
    "LocalAttentionFromBottomRightMask": mask_class(
        lambda i, j, shift, left, right: (j >= i + shift - left) & (j <= i + shift + right)
    ),
    "BlockDiagonalMask": block_class(full),
    "BlockDiagonalCausalMask": block_class(lambda n, m: full(n, m).tril()),
    "BlockDiagonalCausalFromBottomRightMask": block_class(lambda n, m: full(n, m).tril(m - n)),
}


class LowerTriangularMaskWithTensorBias(XFORMERS["LowerTriangularMask"]):
    def __init__(self, bias):
        super().__init__()
        self.bias = bias


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None):
    """[batch, seq, (groups,) (heads,) head_dim]"""
    scores = torch.einsum("bm...k,bn...k->b...mn", query, key) * (scale or query.shape[-1] ** -0.5)
    if isinstance(attn_bias, torch.Tensor):
        scores = scores + attn_bias
    elif attn_bias is not None:
        visible = attn_bias.visible(*scores.shape[-2:])
        scores = (scores + attn_bias.bias).masked_fill(~visible, -torch.inf)
    return torch.einsum("b...mn,bn...k->bm...k", scores.softmax(-1), value)


def forward_requires_grad(q, k, v):
    scores = torch.einsum("bmhk,bnhk->bhmn", q, k) * q.shape[-1] ** -0.5
    return memory_efficient_attention(q, k, v), scores.logsumexp(-1)


# ---- the names that the tables use


def common_names():
    torch.manual_seed(0)
    return {
        "attn": flash_ext.attn,
        "attn_varlen": flash_ext.attn_varlen,
        "flash_ext": flash_ext,
        "bias": torch.randn(BATCH, HEADS, SEQ_Q, SEQ_KV),
        "slopes": torch.rand(HEADS),
        "module": SimpleNamespace(training=False),
        "pq": torch.randn(6, HEADS, DIM),
        "pk": torch.randn(9, HEADS, DIM),
        "pv": torch.randn(9, HEADS, DIM),
        "cu_q": torch.tensor([0, 4, 6], dtype=torch.int32),
        "cu_k": torch.tensor([0, 5, 9], dtype=torch.int32),
        "max_q": 4,
        "max_k": 5,
    }


def torch_names():
    keep = torch.rand(SEQ_Q, SEQ_KV) < 0.7
    keep[:, 0] = True  # every query sees a key
    return {
        "F": F,
        "q": torch.randn(BATCH, HEADS, SEQ_Q, DIM),
        "k": torch.randn(BATCH, HEADS, SEQ_KV, DIM),
        "v": torch.randn(BATCH, HEADS, SEQ_KV, DIM),
        "k2": torch.randn(BATCH, 2, SEQ_KV, DIM),
        "v2": torch.randn(BATCH, 2, SEQ_KV, DIM),
        "keep": keep,
        "causal": torch.ones(SEQ_Q, SEQ_KV, dtype=torch.bool).tril(OFFSET),
        "band": (KEY >= QUERY - 3) & (KEY <= QUERY + 1),
        "distance": (QUERY - KEY).abs(),
        "lower_right": causal_lower_right(SEQ_Q, SEQ_KV),
        "upper_left": causal_upper_left(SEQ_Q, SEQ_KV),
    }


def by_token():
    return {
        "q": torch.randn(BATCH, SEQ_Q, HEADS, DIM),
        "k": torch.randn(BATCH, SEQ_KV, HEADS, DIM),
        "v": torch.randn(BATCH, SEQ_KV, HEADS, DIM),
    }


def flash_attn_names():
    return by_token() | {
        **{name: getattr(flash_attn, name) for name in flash_attn.__all__},
        "bert_padding": bert_padding,
        "kv": torch.randn(BATCH, SEQ_KV, 2, HEADS, DIM),
        "qkv": torch.randn(BATCH, SEQ_Q, 3, HEADS, DIM),
        "k_cache": torch.randn(BATCH, SEQ_KV, HEADS, DIM),
        "v_cache": torch.randn(BATCH, SEQ_KV, HEADS, DIM),
        "x": torch.randn(BATCH, SEQ_Q, DIM),
        "attention_mask": torch.rand(BATCH, SEQ_Q) < 0.5,
    }


def xformers_names():
    k5, v5 = (torch.randn(BATCH, SEQ_KV, 2, 1, DIM).expand(-1, -1, -1, 2, -1) for _ in range(2))
    return by_token() | XFORMERS | {
        "LowerTriangularMaskWithTensorBias": LowerTriangularMaskWithTensorBias,
        "memory_efficient_attention": memory_efficient_attention,
        "fmha": SimpleNamespace(memory_efficient_attention_forward_requires_grad=forward_requires_grad),
        "q5": torch.randn(BATCH, SEQ_Q, 2, 2, DIM),
        "k5": k5,
        "v5": v5,
        "q3": torch.randn(BATCH, SEQ_Q, DIM),
        "k3": torch.randn(BATCH, SEQ_KV, DIM),
        "v3": torch.randn(BATCH, SEQ_KV, DIM),
    }  # fmt: skip


TABLES = {"torch": torch_names, "flash-attn": flash_attn_names, "xFormers": xformers_names}


def rows():
    """(section, their call, our call) of every line; a `with` statement has a test of its own."""
    section = None
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = next(name for name in TABLES if f"From {name}" in line)
        elif section and (match := re.match(r"\| `([^`]+)` \| `([^`]+)` \|", line)):
            if not match[1].startswith("with "):
                yield pytest.param(section, match[1], match[2], id=f"{section}: {match[1]}")


ROWS = list(rows())


def test_rows_are_found():
    counts = {name: sum(row.values[0] == name for row in ROWS) for name in TABLES}
    assert counts == {"torch": 14, "flash-attn": 15, "xFormers": 14}


@pytest.mark.parametrize("section, theirs, ours", ROWS)
def test_row(section, theirs, ours):
    names = common_names() | TABLES[section]()
    found = eval(ours, names)
    if "with_kvcache" in theirs:
        with pytest.raises(NotImplementedError):
            eval(theirs, names)
        theirs = "flash_attn_func(q, k_cache[:, :7], v_cache[:, :7], causal=True)"
    expected = eval(theirs, names)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-5)


def test_backend_by_name():
    q = torch.randn(1, 1, 4, 8)
    with sdpa_kernel(SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(q, q, q)
    with flash_ext.use_backend("math"):
        assert "-> math" in str(flash_ext.explain(q, q, q))
        torch.testing.assert_close(flash_ext.attn(q, q, q), expected)


def test_dropout_has_no_training_flag():
    q = torch.randn(1, 1, 4, 64)
    assert not torch.equal(flash_ext.attn(q, q, q, dropout_p=0.5), flash_ext.attn(q, q, q))
    with torch.no_grad():
        assert not torch.equal(F.scaled_dot_product_attention(q, q, q, dropout_p=0.5), flash_ext.attn(q, q, q))


def test_mask_and_causal_together():
    """The page says that PyTorch does not take them together."""
    q, keep = torch.randn(1, 1, 4, 8), torch.ones(4, 4, dtype=torch.bool)
    with sdpa_kernel(SDPBackend.MATH), pytest.raises(RuntimeError, match="is_causal"):
        F.scaled_dot_product_attention(q, q, q, keep, is_causal=True)
