"""flash_ext.compat: FlashAttention-2's functions against the definition, and the stand-in for its package."""

import importlib.util
import inspect
import subprocess
import sys
import textwrap

import pytest
import torch

import flash_ext
from flash_ext.compat import flash_attn

BATCH, HEADS_Q, HEADS_KV, HEAD_DIM = 2, 4, 2, 16
# Empty sequences on either side and on both; more queries than keys, and fewer.
LENGTHS_Q, LENGTHS_KV = (5, 0, 9, 3, 0), (7, 4, 6, 0, 0)

FA_TAIL = dict(
    dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
)  # fmt: skip
NEEDED = inspect.Parameter.empty


def needed(*names):
    return dict.fromkeys(names, NEEDED)


SIGNATURES = {
    "flash_attn_func": needed("q", "k", "v") | FA_TAIL,
    "flash_attn_kvpacked_func": needed("q", "kv") | FA_TAIL,
    "flash_attn_qkvpacked_func": needed("qkv") | FA_TAIL,
    "flash_attn_varlen_func": needed("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    | FA_TAIL
    | dict(block_table=None),
    "flash_attn_varlen_kvpacked_func": needed(
        "q", "kv", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"
    )
    | FA_TAIL,
    "flash_attn_varlen_qkvpacked_func": needed("qkv", "cu_seqlens", "max_seqlen") | FA_TAIL,
    "flash_attn_with_kvcache": needed("q", "k_cache", "v_cache")
    | dict(
        k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None,
        block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, rotary_interleaved=True,
        alibi_slopes=None, num_splits=0, return_softmax_lse=False,
    ),
    "unpad_input": needed("hidden_states", "attention_mask") | dict(unused_mask=None),
    "pad_input": needed("hidden_states", "indices", "batch", "seqlen"),
    "index_first_axis": needed("input", "indices"),
}  # fmt: skip
SIX = [name for name in SIGNATURES if name.endswith("_func")]

# FlashAttention's options, and what they are for the definition. A slopes entry is the tensor's shape.
OPTIONS = {
    "plain": (dict(), dict()),
    "causal": (dict(causal=True), dict(is_causal=True)),
    "window": (dict(window_size=(3, 1)), dict(window=(3, 1))),
    "window-left": (dict(window_size=[2, -1]), dict(window=(2, -1))),
    "window-causal": (dict(causal=True, window_size=(2, 5)), dict(is_causal=True, window=(2, 0))),
    "softcap": (dict(softcap=1.5), dict(softcap=1.5)),
    "scale": (dict(softmax_scale=0.9), dict(scale=0.9)),
    "alibi": (dict(alibi_slopes="h"), dict(alibi_slopes="h")),
    "alibi-batch": (dict(alibi_slopes="bh", causal=True), dict(alibi_slopes="bh", is_causal=True)),
    "dropout": (dict(dropout_p=0.4), dict(dropout_p=0.4)),
    "everything": (
        dict(dropout_p=0.2, softmax_scale=0.3, causal=True, window_size=(4, -1), softcap=2.0, alibi_slopes="bh"),
        dict(dropout_p=0.2, scale=0.3, is_causal=True, window=(4, 0), softcap=2.0, alibi_slopes="bh"),
    ),
}


def tensors(name, device, seed=0, dtype=torch.float32):
    """The arguments of function `name` up to the options, and q, k, v out of them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()

    def cu(lengths):
        return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)

    varlen, d = "varlen" in name, HEAD_DIM
    rows_q, rows_kv = ((sum(LENGTHS_Q),), (sum(LENGTHS_KV),)) if varlen else ((BATCH, 6), (BATCH, 9))
    if "qkvpacked" in name:
        args = [normal(*rows_q, 3, HEADS_Q, d)]
    elif "kvpacked" in name:
        args = [normal(*rows_q, HEADS_Q, d), normal(*rows_kv, 2, HEADS_KV, d)]
    else:
        args = [normal(*rows_q, HEADS_Q, d), normal(*rows_kv, HEADS_KV, d), normal(*rows_kv, HEADS_KV, d)]
    if varlen and "qkvpacked" in name:
        rest = [cu(LENGTHS_Q), max(LENGTHS_Q)]
    elif varlen:
        rest = [cu(LENGTHS_Q), cu(LENGTHS_KV), max(LENGTHS_Q), max(LENGTHS_KV)]
    else:
        rest = []
    return args, rest


def split(args):
    """q, k, v of the tensors of any of the six."""
    if len(args) == 3:
        return list(args)
    return [*args[:-1], *args[-1].unbind(-3)]


def slopes(kind, name, device):
    batch = len(LENGTHS_Q) if "varlen" in name else BATCH
    shape = {"h": (HEADS_Q,), "bh": (batch, HEADS_Q)}[kind]
    return torch.rand(shape, generator=torch.Generator().manual_seed(3)).to(device) / 2


def with_slopes(options, name, device):
    kind = options.get("alibi_slopes")
    return options if kind is None else options | dict(alibi_slopes=slopes(kind, name, device))


def definition(name, args, rest, options):
    """out and lse of flash_ext.math in float64."""
    q, k, v = (x.double() for x in split(args))
    if "varlen" not in name:
        return flash_ext.math(q, k, v, layout="bshd", return_lse=True, **options)
    if "qkvpacked" in name:
        rest = [rest[0], rest[0], rest[1], rest[1]]
    return flash_ext.math_varlen(q, k, v, *rest, return_lse=True, **options)


def close(actual, expected, what):
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=1e-4, atol=2e-5, msg=lambda text: f"{what}: {text}"
    )


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", SIX)
def test_values_and_gradients(name, options, device):
    theirs, ours = (with_slopes(x, name, device) for x in OPTIONS[options])
    args, rest = tensors(name, device)
    torch.manual_seed(7)
    out, lse, probabilities = getattr(flash_attn, name)(*args, *rest, **theirs, return_attn_probs=True)
    torch.manual_seed(7)
    expected_out, expected_lse = definition(name, args, rest, ours)
    assert probabilities is None
    assert out.dtype == lse.dtype == torch.float32 and out.is_contiguous()
    assert out.shape == split(args)[0].shape
    rows = out.shape[:-1] if "varlen" in name else out.transpose(1, 2).shape[:-1]
    assert lse.shape == (rows[::-1] if "varlen" in name else rows)
    close(out, expected_out, "out")
    close(lse, expected_lse, "lse")
    # Through both results. An lse of -inf has no gradient to give.
    generator = torch.Generator().manual_seed(1)
    d_out, d_lse = (torch.randn(x.shape, generator=generator).to(device) for x in (out, lse))
    d_lse = d_lse.where(lse.isfinite(), 0)
    found = torch.autograd.grad([out, lse], args, [d_out, d_lse])
    expected = torch.autograd.grad([expected_out, expected_lse], args, [d_out.double(), d_lse.double()])
    for i, (gradient, correct) in enumerate(zip(found, expected, strict=True)):
        assert gradient.shape == args[i].shape and gradient.abs().max() > 0
        close(gradient, correct, f"gradient {i}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SIX)
def test_sixteen_bits(name, dtype, device):
    args, rest = tensors(name, device, dtype=dtype)
    out = getattr(flash_attn, name)(*args, *rest, causal=True)
    expected, _ = definition(name, args, rest, dict(is_causal=True))
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "seq_q, seq_kv, options, expected",
    [
        (2, 5, dict(causal=True), ["11110", "11111"]),
        (5, 2, dict(causal=True), ["00", "00", "00", "10", "11"]),
        (3, 5, dict(window_size=(1, 0)), ["01100", "00110", "00011"]),
        (3, 3, dict(window_size=(0, 1)), ["110", "011", "001"]),
        (3, 3, dict(window_size=(-7, -2)), ["111", "111", "111"]),
        (3, 3, dict(causal=True, window_size=(1, 2)), ["100", "110", "011"]),
    ],
    ids=["causal-wide", "causal-tall", "window-wide", "window-right", "unbounded", "both"],
)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "varlen"])
def test_who_sees_whom(packed, seq_q, seq_kv, options, expected, device):
    """With v the identity the output is the weights."""
    q, k = torch.randn(seq_q, 1, 8, device=device), torch.randn(seq_kv, 1, 8, device=device)
    v = torch.eye(seq_kv, device=device)[:, None]
    if packed:
        cu_q, cu_k = (torch.tensor([0, n], dtype=torch.int32, device=device) for n in (seq_q, seq_kv))
        out = flash_attn.flash_attn_varlen_func(q, k, v, cu_q, cu_k, seq_q, seq_kv, **options)
    else:
        out = flash_attn.flash_attn_func(q[None], k[None], v[None], **options)[0]
    assert ["".join(str(int(weight != 0)) for weight in row) for row in out[:, 0].tolist()] == expected


def test_a_query_without_keys(device):
    q, k = torch.randn(1, 3, 2, 8, device=device, requires_grad=True), torch.randn(1, 1, 2, 8, device=device)
    out, lse, _ = flash_attn.flash_attn_func(q, k, k, causal=True, return_attn_probs=True)
    assert not out[:, :2].any() and (lse[:, :, :2] == -torch.inf).all() and lse[:, :, 2].isfinite().all()
    (gradient,) = torch.autograd.grad(lse[:, :, 2].sum(), q)
    assert not gradient[:, :2].any() and gradient[:, 2].any()


@pytest.mark.parametrize("name", SIX)
def test_dropout_follows_the_seed(name, device):
    args, rest = tensors(name, device)

    def call(seed):
        torch.manual_seed(seed)
        return getattr(flash_attn, name)(*args, *rest, 0.5)

    assert torch.equal(call(1), call(1))
    assert not torch.equal(call(1), call(2))
    assert not torch.equal(call(1), getattr(flash_attn, name)(*args, *rest))


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    found = inspect.signature(getattr(flash_attn, name)).parameters
    assert [(p.name, p.default) for p in found.values()] == list(SIGNATURES[name].items())
    assert {p.kind for p in found.values()} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


@pytest.mark.parametrize("name", SIX)
def test_positional_arguments(name, device):
    args, rest = tensors(name, device)
    alibi = slopes("h", name, device)
    values = (0.3, 0.4, True, (3, 2), 1.2, alibi, True, True)
    torch.manual_seed(0)
    found = getattr(flash_attn, name)(*args, *rest, *values)
    torch.manual_seed(0)
    expected = getattr(flash_attn, name)(*args, *rest, **dict(zip(FA_TAIL, values, strict=True)))
    assert len(found) == len(expected) == 3
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("name", SIX)
@pytest.mark.parametrize("given, passed", [(False, None), (True, True)])
def test_deterministic_is_passed_on(name, given, passed, monkeypatch):
    """None lets torch.use_deterministic_algorithms decide."""
    seen = []
    inner = "attn_varlen" if "varlen" in name else "attn"
    original = getattr(flash_ext, inner)

    def call(*args, **options):
        seen.append(options["deterministic"])
        return original(*args, **options)

    monkeypatch.setattr(flash_attn, inner, call)
    args, rest = tensors(name, "cpu")
    getattr(flash_attn, name)(*args, *rest, deterministic=given)
    assert seen == [passed]


def test_slopes_get_a_gradient(device):
    args, rest = tensors("flash_attn_func", device)
    alibi = slopes("h", "flash_attn_func", device).requires_grad_()
    out = flash_attn.flash_attn_func(*args, alibi_slopes=alibi)
    (gradient,) = torch.autograd.grad(out.square().sum(), alibi)
    assert gradient.shape == alibi.shape and gradient.any()


@pytest.mark.parametrize("name", SIX)
def test_no_graph_break(name, device):
    def step(*args):
        out, lse, _ = getattr(flash_attn, name)(*args, *rest, **theirs, return_attn_probs=True)
        return out, lse

    theirs = dict(softmax_scale=0.3, causal=True, window_size=(4, -1), softcap=2.0)
    theirs["alibi_slopes"] = slopes("h", name, device)
    args, rest = tensors(name, device)
    torch._dynamo.reset()
    try:
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        found, expected = compiled(*args), step(*args)
        gradients = [torch.autograd.grad(out.square().sum(), args) for out, _ in (found, expected)]
    finally:
        torch._dynamo.reset()
    for one, other in zip([*found, *gradients[0]], [*expected, *gradients[1]], strict=True):
        close(one, other, name)


# ---- errors


def test_kvcache_says_what_to_use(device):
    q = torch.randn(1, 1, 2, 8, device=device)
    with pytest.raises(NotImplementedError, match="^flash_attn_with_kvcache: .*flash_attn_func.*causal=True"):
        flash_attn.flash_attn_with_kvcache(q, q, q, causal=True)


def test_paged_keys_are_refused(device):
    args, rest = tensors("flash_attn_varlen_func", device)
    with pytest.raises(NotImplementedError, match="^block_table: "):
        flash_attn.flash_attn_varlen_func(*args, *rest, block_table=torch.zeros(5, 1, dtype=torch.int32))


@pytest.mark.parametrize(
    "name, shape",
    [
        ("flash_attn_qkvpacked_func", (2, 5, 2, 4, 8)),
        ("flash_attn_qkvpacked_func", (5, 3, 4, 8)),
        ("flash_attn_varlen_qkvpacked_func", (5, 2, 4, 8)),
        ("flash_attn_kvpacked_func", (2, 5, 3, 4, 8)),
        ("flash_attn_varlen_kvpacked_func", (2, 5, 2, 4, 8)),
    ],
)
def test_packed_of_another_shape(name, shape):
    q = [torch.randn(2, 5, 4, 8)] if "_kvpacked" in name else []
    cu = torch.tensor([0, 5], dtype=torch.int32)
    rest = {0: [], 1: [cu, 5], 2: [cu, cu, 5, 5]}[("varlen" in name) * (1 + len(q))]
    which = "kv" if q else "qkv"
    with pytest.raises(ValueError, match=rf"^{which}: expected \[.*, {len(which)}, .*got \[{shape[0]}, "):
        getattr(flash_attn, name)(*q, torch.randn(shape), *rest)


@pytest.mark.parametrize("window", [3, (1,), (1, 2, 3), None, ("a", 1)], ids=str)
def test_windows_that_are_none(window):
    q = torch.randn(1, 3, 2, 8)
    with pytest.raises(ValueError, match=r"^window_size: expected \(left, right\)"):
        flash_attn.flash_attn_func(q, q, q, window_size=window)


def test_errors_name_the_argument(device):
    q, k = torch.randn(1, 3, 2, 8, device=device), torch.randn(1, 3, 2, 4, device=device)
    with pytest.raises((RuntimeError, ValueError), match="^k: expected head_dim 8 as in q, got 4"):
        flash_attn.flash_attn_func(q, k, q)


# ---- padding

KEEP = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [0, 1, 0, 1]])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("rest", [(), (6,), (2, 3)], ids=str)
def test_unpad_and_pad(rest, dtype, device):
    hidden = torch.randn(3, 4, *rest, device=device, requires_grad=True)
    keep = KEEP.to(device, dtype)
    tokens, indices, cu_seqlens, longest, used = flash_attn.unpad_input(hidden, keep)
    assert torch.equal(tokens, hidden[keep.bool()]) and torch.equal(indices.cpu(), torch.tensor([0, 1, 2, 9, 11]))
    assert cu_seqlens.tolist() == [0, 3, 3, 5] and used.tolist() == [3, 0, 2]
    assert cu_seqlens.dtype == used.dtype == torch.int32 and indices.dtype == torch.int64
    assert longest == 3 and type(longest) is int
    back = flash_attn.pad_input(tokens, indices, 3, 4)
    mask = keep.bool().view(3, 4, *(1 for _ in rest)).expand_as(hidden)
    assert torch.equal(back, hidden.where(mask, 0))
    weights = torch.randn_like(hidden)
    (gradient,) = torch.autograd.grad(back, hidden, weights)
    assert torch.equal(gradient, weights.where(mask, 0))


def test_unused_tokens_get_room(device):
    hidden = torch.arange(12.0, device=device).view(3, 4, 1)
    unused = torch.tensor([[0, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]], device=device)
    tokens, indices, cu_seqlens, longest, used = flash_attn.unpad_input(hidden, KEEP.to(device), unused)
    assert tokens.flatten().tolist() == indices.tolist() == [0, 1, 2, 3, 4, 9, 11]
    assert cu_seqlens.tolist() == [0, 4, 5, 7] and longest == 4 and used.tolist() == [3, 0, 2]


def test_unpad_nothing(device):
    tokens, indices, cu_seqlens, longest, used = flash_attn.unpad_input(
        torch.randn(0, 4, 2, device=device), torch.ones(0, 4, device=device)
    )
    assert tokens.shape == (0, 2) and len(indices) == len(used) == longest == 0 and cu_seqlens.tolist() == [0]
    assert flash_attn.pad_input(tokens, indices, 0, 4).shape == (0, 4, 2)


def test_masks_of_another_shape():
    with pytest.raises(ValueError, match=r"^attention_mask: expected \[3, 4\], .* got \[4, 3\]"):
        flash_attn.unpad_input(torch.randn(3, 4, 2), KEEP.T)
    with pytest.raises(ValueError, match=r"^unused_mask: expected \[3, 4\], .* got \[3\]"):
        flash_attn.unpad_input(torch.randn(3, 4, 2), KEEP, torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_index_first_axis(dtype, device):
    rows = torch.randn(5, 2, 3, device=device, requires_grad=True)
    indices = torch.tensor([3, 0, 3], dtype=dtype, device=device)
    found = flash_attn.index_first_axis(rows, indices)
    assert torch.equal(found, rows[[3, 0, 3]])
    (gradient,) = torch.autograd.grad(found.sum(), rows)
    assert gradient[:, 0, 0].tolist() == [1, 0, 0, 2, 0]  # what is taken twice counts twice
    padded = flash_attn.pad_input(rows[:2], torch.tensor([3, 0], dtype=dtype, device=device), 2, 2)
    assert torch.equal(padded.flatten(0, 1)[[3, 0]], rows[:2]) and not padded.flatten(0, 1)[[1, 2]].any()


def test_padded_attention(device):
    """What models do with a padded batch."""
    q, k, v = torch.randn(3, 3, 4, 2, 8, device=device).unbind(0)
    keep = KEEP.to(device)
    (q_, indices, cu, longest, _), (k_, *_), (v_, *_) = (flash_attn.unpad_input(x, keep) for x in (q, k, v))
    out = flash_attn.flash_attn_varlen_func(q_, k_, v_, cu, cu, longest, longest)
    found = flash_attn.pad_input(out, indices, 3, 4)
    mask = keep.bool()[:, None, None, :]
    expected = flash_ext.math(q, k, v, mask, layout="bshd").where(keep.bool()[..., None, None], 0)
    close(found, expected, "out")


# ---- import flash_attn


needs_its_absence = pytest.mark.skipif(
    importlib.util.find_spec("flash_attn") is not None, reason="the real flash_attn is installed"
)


def python(code, *path):
    """Runs code in a process of its own, in which the names of flash_attn are nobody's."""
    code = textwrap.dedent(code)
    if path:
        code = f"import sys; sys.path[:0] = {[str(p) for p in path]}\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def real_one(tmp_path):
    """A folder with another package of that name, its metadata included."""
    package, info = tmp_path / "flash_attn", tmp_path / "flash_attn-2.1.0.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text("__version__ = '2.1.0'\n")
    (package / "layers.py").write_text("")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.1.0\n")
    return tmp_path


@needs_its_absence
def test_install():
    python("""
        import importlib.metadata, importlib.util, sys
        import flash_ext.compat
        from flash_ext.compat import bert_padding, flash_attn as ours

        torch_version = importlib.metadata.version("torch")
        flash_ext.compat.install()
        flash_ext.compat.install()

        # What looks without importing.
        for name in ("flash_attn", "flash_attn.flash_attn_interface", "flash_attn.bert_padding"):
            assert importlib.util.find_spec(name) is not None, name
        for name in ("flash_attn.cute", "flash_attn.layers", "flash_attn_interface"):
            assert importlib.util.find_spec(name) is None, name
        for name in ("flash_attn", "flash-attn"):
            assert importlib.metadata.version(name) == "2.8.3"
        assert importlib.metadata.packages_distributions()["flash_attn"] == ["flash-attn"]
        assert importlib.metadata.version("torch") == torch_version  # of others it says nothing

        import flash_attn
        assert flash_attn.__version__ == "2.8.3" and flash_attn.__spec__ and flash_attn.__file__ == ours.__file__
        assert flash_attn.flash_attn_interface.flash_attn_func is ours.flash_attn_func
        for name in ours.__all__:
            module = bert_padding if name in bert_padding.__all__ else flash_attn
            assert getattr(module, name) is getattr(ours, name), name
        from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
        from flash_attn.flash_attn_interface import flash_attn_varlen_qkvpacked_func
        from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
        assert unpad_input is ours.unpad_input
        assert not hasattr(flash_attn, "unpad_input")
        for missing in ("import flash_attn.layers.rotary", "from flash_attn import _flash_attn_forward"):
            try:
                exec(missing)
            except ImportError:
                continue
            raise AssertionError(missing)

        flash_ext.compat.uninstall()
        flash_ext.compat.uninstall()
        assert importlib.util.find_spec("flash_attn") is None
        assert not [name for name in sys.modules if name.split(".")[0] == "flash_attn"]
        try:
            importlib.metadata.version("flash_attn")
        except importlib.metadata.PackageNotFoundError:
            pass
        else:
            raise AssertionError("still there")

        flash_ext.compat.install()  # and once more
        import flash_attn.bert_padding
        assert flash_attn.bert_padding.pad_input is ours.pad_input
    """)


@needs_its_absence
def test_install_is_an_act():
    """Importing flash_ext, or its compat, leaves flash_attn alone."""
    python("""
        import importlib.util
        import flash_ext.compat.flash_attn
        assert importlib.util.find_spec("flash_attn") is None
    """)


def test_install_after_the_real_one_is_refused(real_one):
    code = """
        import flash_attn
        import flash_ext.compat
        assert flash_attn.__version__ == "2.1.0"
        try:
            flash_ext.compat.install()
        except RuntimeError as error:
            print(error)
        import flash_attn.layers
        flash_ext.compat.uninstall()
        import sys
        assert sys.modules["flash_attn"] is flash_attn
    """
    found = python(code, real_one)
    assert found.startswith("flash_attn: expected not to be imported yet, got ") and str(real_one) in found


def test_install_hides_one_that_is_not_imported(real_one):
    python(
        """
        import importlib.metadata
        import flash_ext.compat
        flash_ext.compat.install()
        import flash_attn
        assert flash_attn.__version__ == importlib.metadata.version("flash_attn") == "2.8.3"
        flash_ext.compat.uninstall()
        import flash_attn
        assert flash_attn.__version__ == importlib.metadata.version("flash_attn") == "2.1.0"
        """,
        real_one,
    )


def test_transformers_takes_it():
    """Its padded attention through the stand-in, against the definition. That there is a GPU is pretended."""
    pytest.importorskip("transformers", minversion="5.17")
    python("""
        import flash_ext.compat
        flash_ext.compat.install()
        import torch
        from transformers import modeling_flash_attention_utils as utils
        from transformers.utils import import_utils
        import_utils.is_torch_cuda_available = lambda: True
        assert import_utils.is_flash_attn_2_available() and import_utils.is_flash_attn_greater_or_equal("2.4.1")
        assert not import_utils.is_flash_attn_4_available()

        keep = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
        q, k, v = (torch.randn(2, 5, heads, 8) for heads in (4, 2, 2))
        for mask in (None, keep):
            for window in (None, 3):
                found = utils._flash_attention_forward(
                    q, k, v, mask, 5, True, sliding_window=window, softcap=2.0, deterministic=True,
                    attn_implementation="flash_attention_2",
                )
                reach = None if window is None else (window - 1, 0)
                given = None if mask is None else mask.bool()[:, None, None]
                expected = flash_ext.math(q, k, v, given, is_causal=True, window=reach, softcap=2.0, layout="bshd")
                real = keep.bool() if mask is not None else torch.ones(2, 5, dtype=torch.bool)
                torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)
        assert utils._flash_fn is flash_ext.compat.flash_attn.flash_attn_func
    """)
