"""The usual call's two ways to its gradients: autograd's node in C++ (csrc/autograd), and the one in Python."""

import threading
import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import flash_ext
from flash_ext import usual

IN_CPP = usual.call
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

pytestmark = pytest.mark.skipif(IN_CPP is None, reason=f"no node in C++: {usual.obstacle}")


@pytest.fixture(params=["C++", "Python"])
def way(request, monkeypatch):
    if request.param == "Python":
        monkeypatch.setattr(usual, "call", None)
    return request.param


def each_way(f):
    """What f gives in C++ and in Python."""
    in_cpp = f()
    try:
        usual.call = None
        return in_cpp, f()
    finally:
        usual.call = IN_CPP


def leaves(seq=9, head_dim=8, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, seq, head_dim), (2, 2, seq + 3, head_dim), (2, 2, seq + 3, head_dim)
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]


def same(x, y):
    assert type(x) is type(y)
    if x is not None:
        assert x.dtype == y.dtype and x.stride() == y.stride() and torch.equal(x, y)


def packed(layout, device="cpu"):
    """q, k, v as a model has them: parts of one tensor. Also that tensor."""
    qkv = torch.randn(2, 9, 3, 4, 8, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    q, k, v = qkv.unbind(2)
    return (qkv, q, k, v) if layout == "bshd" else (qkv, *(x.transpose(1, 2) for x in (q, k, v)))


# ---- the same results


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"scale": 0.3}, {"deterministic": True}, {"window": (40, 5)}, {"window": (40, 5), "causal_align": "top_left"}],
    ids=str,
)
def test_bit_for_bit(options, is_causal, dtype, device):
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("the gpu backend has no such dtype")
    inputs = leaves(100, 64, dtype, device)  # one block of keys: nothing is added in another order

    def run():
        out = flash_ext.attn(*inputs, is_causal=is_causal, **options)
        assert out.grad_fn.name() == "AttnPlainBackward"
        return out, *torch.autograd.grad(out, inputs, torch.cos(out.detach()))

    for x, y in zip(*each_way(run), strict=True):
        same(x, y)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_parts_of_one_tensor(layout, is_causal, device):
    def run():
        qkv, q, k, v = packed(layout, device)
        out = flash_ext.attn(q, k, v, is_causal=is_causal, layout=layout)
        by_token = out if layout == "bshd" else out.transpose(1, 2)
        assert by_token.is_contiguous()
        with torch.no_grad():
            same(out.detach(), flash_ext.attn(q, k, v, is_causal=is_causal, layout=layout))
        gradients = torch.autograd.grad(out, (q, k, v), torch.cos(out.detach()), retain_graph=True)
        return out.detach(), *gradients, *torch.autograd.grad(out.sum(), qkv)

    for x, y in zip(*each_way(run), strict=True):
        same(x, y)


@pytest.mark.parametrize("shape", [(2, 5, 3, 8), (2, 1, 3, 8), (2, 5, 1, 8)])
def test_the_output_is_contiguous(shape, way):
    """With layout="bshd" always, with layout="bhsd" as q lies in memory."""
    batch, seq, heads, head_dim = shape
    by_token = torch.randn(shape)
    by_head = torch.randn(batch, heads, seq, head_dim)
    for wanted in (False, True):
        by_token.requires_grad_(wanted)
        by_head.requires_grad_(wanted)
        for x in (by_token, by_head.transpose(1, 2)):
            assert flash_ext.attn(x, x, x, layout="bshd").is_contiguous()
        assert flash_ext.attn(by_head, by_head, by_head).is_contiguous()
        x = by_token.transpose(1, 2)
        assert flash_ext.attn(x, x, x).transpose(1, 2).is_contiguous()


def test_only_one_layer_of_views():
    """With layout="bshd" autograd sees one node, not one for each transposition besides."""
    qkv, q, k, v = packed("bshd")
    assert flash_ext.attn(q, k, v, layout="bshd").grad_fn.name() == "AttnPlainBackward"


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("wanted", range(1, 8))
def test_some_require_gradients(wanted, layout):
    inputs = [x.detach() for x in packed(layout)[1:]]
    chosen = [x.requires_grad_() for i, x in enumerate(inputs) if wanted >> i & 1]

    def run():
        out = flash_ext.attn(*inputs, layout=layout)
        for x in inputs:
            x.grad = None
        torch.autograd.backward(out, torch.cos(out.detach()), inputs=chosen[:1], retain_graph=True)
        some = [x.grad for x in inputs]
        return *some, *torch.autograd.grad(out.sum(), chosen)

    for x, y in zip(*each_way(run), strict=True):
        same(x, y)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_autocast(layout, way, device):
    qkv, q, k, v = packed(layout, device)
    with torch.autocast(device, torch.bfloat16):
        out = flash_ext.attn(q, k, v, is_causal=True, layout=layout)
        (gradient,) = torch.autograd.grad(out.float().sum(), qkv)  # also under autocast
        with torch.no_grad():
            assert torch.equal(flash_ext.attn(q, k, v, is_causal=True, layout=layout), out)
        wide = flash_ext.attn(q.double(), k.double(), v.double(), layout=layout)
        assert wide.dtype == torch.float64
    assert out.dtype == torch.bfloat16 and gradient.dtype == torch.float32
    with torch.autocast(device, enabled=False):
        q, k, v = (x.bfloat16() for x in (q, k, v))
        expected = flash_ext.attn(q, k, v, is_causal=True, layout=layout)
    assert torch.equal(out, expected)
    assert torch.equal(gradient, torch.autograd.grad(expected.float().sum(), qkv)[0])


def test_undefined_gradient(way, device):
    class PassesNothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, gradient):
            return None

    inputs = leaves(device=device)
    PassesNothing.apply(flash_ext.attn(*inputs)).sum().backward()
    for x in inputs:
        assert torch.equal(x.grad, torch.zeros_like(x))


def test_overlapping_gradient(way):
    inputs = leaves()
    expected = torch.autograd.grad(flash_ext.attn(*inputs), inputs, torch.ones(2, 4, 9, 8))
    found = torch.autograd.grad(flash_ext.attn(*inputs).sum(), inputs)  # an expanded scalar
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


# ---- what autograd offers


@pytest.mark.sanitize
def test_retain_graph_and_a_freed_graph(way, device):
    inputs = leaves(device=device)
    out = flash_ext.attn(*inputs).sum()
    first = torch.autograd.grad(out, inputs, retain_graph=True)
    for x, y in zip(first, torch.autograd.grad(out, inputs), strict=True):
        assert torch.equal(x, y)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, inputs)


def test_changed_in_place(way):
    for changed in range(4):
        inputs = [x.detach().clone().requires_grad_() for x in leaves()]
        copies = [x * 1 for x in inputs]
        out = flash_ext.attn(*copies)
        with torch.no_grad():
            (*copies, out)[changed].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_second_derivative(way, device):
    inputs = leaves(device=device)
    out = flash_ext.attn(*inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # create_graph makes a cycle of references
        first = torch.autograd.grad(out.sum(), inputs, create_graph=True)
    for x, y in zip(first, torch.autograd.grad(out.sum(), inputs), strict=True):
        assert torch.equal(x, y)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(first[0].sum(), inputs)


def test_tangents(way):
    forward_ad = torch.autograd.forward_ad
    q, k, v = leaves()
    out = flash_ext.attn(q, k, v)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        with pytest.raises(RuntimeError, match="forward-mode"):
            torch.autograd.grad(out, q, dual)
        with pytest.raises(RuntimeError, match="forward-mode"):
            flash_ext.attn(forward_ad.make_dual(q, q), k, v)
        with pytest.raises(RuntimeError, match="forward-mode"), torch.no_grad():
            flash_ext.attn(q, k, forward_ad.make_dual(v, v))


def test_many_gradients_at_once(way):
    inputs = leaves()
    out = flash_ext.attn(*inputs)
    grads = torch.stack([torch.ones_like(out), torch.cos(out.detach())])
    batched = torch.autograd.grad(out, inputs, grads, is_grads_batched=True, retain_graph=True)
    for i in range(2):
        for x, y in zip(batched, torch.autograd.grad(out, inputs, grads[i], retain_graph=True), strict=True):
            torch.testing.assert_close(x[i], y)


def test_functorch(way):
    q, k, v = (x.detach() for x in leaves())
    of_q = torch.func.grad(lambda q: flash_ext.attn(q, k, v).sum())
    expected = torch.autograd.grad(flash_ext.attn(q.requires_grad_(), k, v).sum(), q)[0]
    torch.testing.assert_close(of_q(q.detach()), expected)
    many = torch.stack([q.detach(), q.detach() + 1])
    torch.testing.assert_close(torch.vmap(of_q, out_dims=0)(many)[0], expected)


@pytest.mark.sanitize
def test_saved_tensors(way, device):
    """Hooks see q, k, v, the output and lse, and the gradients come from what they give back."""
    inputs = leaves(device=device)
    saved, restored = [], []

    def pack(x):
        saved.append(tuple(x.shape))
        return x.detach().clone()

    def unpack(x):
        restored.append(tuple(x.shape))
        return x

    out = flash_ext.attn(*inputs)
    expected = torch.autograd.grad(out.sum(), inputs)
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        out = flash_ext.attn(*inputs)
    assert saved == [(2, 4, 9, 8), (2, 2, 12, 8), (2, 2, 12, 8), (2, 4, 9, 8), (2, 4, 9)]
    found = torch.autograd.grad(out.sum(), inputs)
    assert restored == saved
    with torch.autograd.graph.save_on_cpu():
        out = flash_ext.attn(*inputs)
    for others in (found, torch.autograd.grad(out.sum(), inputs)):
        for x, y in zip(others, expected, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant, way, device):
    inputs = leaves(device=device)

    def block(q, k, v):
        return flash_ext.attn(q * 2, k, v, is_causal=True) * 3

    expected = torch.autograd.grad(block(*inputs).sum(), inputs)
    checkpoint(block, *inputs, use_reentrant=use_reentrant).sum().backward()
    for x, y in zip(inputs, expected, strict=True):
        assert torch.equal(x.grad, y)


@pytest.mark.parametrize("asked, globally, expected", [(None, False, False), (None, True, True), (True, False, True)])
def test_deterministic(asked, globally, expected, way, device):
    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found.append((str(function), args))
            return function(*args, **(kwargs or {}))

    found, inputs = [], leaves(device=device)
    torch.use_deterministic_algorithms(globally)
    try:
        out = flash_ext.attn(*inputs, deterministic=asked).sum()
    finally:
        torch.use_deterministic_algorithms(False)
    with Record():
        torch.autograd.grad(out, inputs)
    assert [args[-1] for name, args in found if name == "flash_ext.attn_plain_bwd.default"] == [expected]


@pytest.mark.sanitize
def test_threads(way, device):
    """Forward in one thread, backward in another, of many graphs at once."""
    inputs = leaves(seq=33, device=device)
    expected = torch.autograd.grad(flash_ext.attn(*inputs).sum(), inputs)
    found = [None] * 4

    def run(i, out):
        for _ in range(20):
            found[i] = torch.autograd.grad(out, inputs, retain_graph=True)
            flash_ext.attn(*inputs).sum()

    shared = flash_ext.attn(*inputs).sum()
    outs = [shared, shared, flash_ext.attn(*inputs).sum(), flash_ext.attn(*inputs).sum()]
    threads = [threading.Thread(target=run, args=(i, out)) for i, out in enumerate(outs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for gradients in found:
        for x, y in zip(gradients, expected, strict=True):
            assert torch.equal(x, y)


def test_nothing_is_kept(way):
    """What the node saved goes when the graph does, and after a backward that does not keep it."""
    import gc
    import weakref

    inputs = leaves()
    for free in (lambda out: out.sum().backward(), lambda out: None):
        copies = [x * 1 for x in inputs]
        out = flash_ext.attn(*copies)
        kept = [weakref.ref(x) for x in copies]
        free(out)
        del out, copies
        assert not any(x() is not None for x in kept) or not gc.collect() or not any(x() is not None for x in kept)


# ---- around it


def test_compile(way):
    """Not a word of it in a graph, and no graph break."""
    names = []

    def record(graph, inputs):
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch._dynamo.reset()
    inputs = leaves()
    f = torch.compile(lambda q, k, v: flash_ext.attn(q, k, v, is_causal=True), fullgraph=True, backend=record)
    assert torch.equal(f(*inputs), flash_ext.attn(*inputs, is_causal=True))
    assert "flash_ext.attn_usual" not in " ".join(names) and "flash_ext.attn" in " ".join(names)
    torch._dynamo.reset()


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_compiled_autograd(layout):
    """Backward as one compiled graph."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(compiled_autograd=True):
        for factor in (1, 2):
            qkv, q, k, v = packed(layout)
            out = flash_ext.attn(q, k, v * factor, window=(3, 1), causal_align="top_left", layout=layout).sum()
            (expected,) = torch.autograd.grad(out, qkv, retain_graph=True)
            with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
                out.backward()
            torch.testing.assert_close(qkv.grad, expected)
    torch._dynamo.reset()


def test_trace(way):
    """A trace holds the op that every installation has."""
    q, k, v = (x.detach() for x in leaves())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(lambda q: flash_ext.attn(q, k, v), (q,))
    assert "flash_ext::attn_plain" in str(traced.graph)
    assert torch.equal(traced(q), flash_ext.attn(q, k, v))


# ---- which of the two


def test_another_torch(monkeypatch, tmp_path):
    """A library that is for another torch is not loaded, one that does not load is passed over."""
    assert usual.file_name(torch).startswith(f"_usual-{torch.__version__}-")
    monkeypatch.setattr(torch, "__version__", "2.10.1+cpu")
    call, why = usual.load()
    assert call is None and why == "flash_ext was not built for torch 2.10.1+cpu"
    monkeypatch.setattr(usual, "__file__", str(tmp_path / "usual.py"))
    (tmp_path / usual.file_name(torch)).write_bytes(b"not a library")
    call, why = usual.load()
    assert call is None and "did not load" in why


def test_turned_off(monkeypatch):
    monkeypatch.setenv("FLASH_EXT_AUTOGRAD", "python")
    assert usual.load() == (None, "FLASH_EXT_AUTOGRAD=python")


def test_info(way, monkeypatch):
    monkeypatch.setattr(usual, "obstacle", "a reason")
    assert flash_ext.build_info()["autograd"] == ("C++" if way == "C++" else "Python: a reason")
