"""The ops as torch sees them: compilation, export, transforms, autocast, counting; and the package itself."""

import copy
import inspect
import os
import pickle
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
import torch.utils.checkpoint
from torch.func import grad, jacrev, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import flash_ext
from flash_ext.testing import CASES, Case, make_inputs, run

by_id = {case.id: case for case in CASES}
ops = torch.ops.flash_ext


def tensors(dtype=torch.float64):
    """q, k, v, mask, sinks, slopes of a small call with grouped heads."""
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 6)
    mask, sinks, slopes = torch.randn(1, 4, 5, 7), torch.randn(4), torch.rand(4)
    return [x.to(dtype) for x in (q, k, v, mask, sinks, slopes)]


def loss(attn, q, k, v, mask=None, sinks=None, **options):
    out, lse = attn(q, k, v, mask, sinks=sinks, return_lse=True, **options)
    return (out * out).sum() + lse.sin().sum()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


# ---- the contract of a torch op

OPCHECK = ["plain", "everything", "packed", "packed-everything", "bshd-options", "strides-last", "empty-kv-options"]


def op_calls(inputs):
    """The ops that a case calls, and with what."""
    found = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "flash_ext":
                found.append((function, args))
            return function(*args, **(kwargs or {}))

    with Record():
        run(inputs)
    return [
        (op, [x.detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for x in args])
        for op, args in found
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPCHECK)
def test_opcheck(name, dtype):
    calls = op_calls(make_inputs(by_id[name], dtype))
    assert [str(op).split(".")[1].split("_")[-1] for op, _ in calls] == ["fwd", "bwd"]
    for op, args in calls:
        floating = [x for x in args if isinstance(x, torch.Tensor) and x.is_floating_point()]
        for x in floating[:3]:
            x.requires_grad_(op is not ops.attn_bwd.default and op is not ops.attn_varlen_bwd.default)
        with torch.no_grad() if "bwd" in str(op) else torch.enable_grad():
            checks = torch.library.opcheck(op, args, atol=1e-2, rtol=1e-2)
        assert set(checks.values()) == {"SUCCESS"}


def test_plain_op():
    """attn_fwd without options and lse: the same numbers, every contract of an op, and what autograd needs."""
    q, k, v = tensors(torch.float32)[:3]
    place = 0.3, 4, 0, True, False
    expected = ops.attn_fwd(q, k, v, *place)[0]
    assert torch.equal(ops.attn_plain(q, k, v, *place), expected)
    assert set(torch.library.opcheck(ops.attn_plain.default, (q, k, v, *place)).values()) == {"SUCCESS"}
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    assert set(torch.library.opcheck(ops.attn_plain.default, (*leaves, *place)).values()) == {"SUCCESS"}
    out = ops.attn_plain(*leaves, *place)
    for x, y in zip(
        torch.autograd.grad(out.sum(), leaves),
        torch.autograd.grad(ops.attn_fwd(*leaves, *place)[0].sum(), leaves),
        strict=True,
    ):
        assert torch.equal(x, y)
    many = torch.stack([q, q + 1])
    close(vmap(lambda q: ops.attn_plain(q, k, v, *place))(many)[1], ops.attn_plain(q + 1, k, v, *place))
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.attn_plain(q, k, v, *place).dtype == torch.bfloat16


def test_plain_bwd_op():
    q, k, v, *_ = tensors(torch.float32)
    place = 0.3, 4, 0, True
    out, lse = ops.attn_fwd(q, k, v, *place)
    grad = torch.randn_like(out)
    args = grad, q, k, v, out, lse, *place, False
    expected = ops.attn_bwd(grad, None, q, k, v, out, lse, *place, 0.0, 0.0, None, None, None, None, False, False)
    for x, y in zip(ops.attn_plain_bwd(*args), expected, strict=False):
        assert torch.equal(x, y)
    assert set(torch.library.opcheck(ops.attn_plain_bwd.default, args).values()) == {"SUCCESS"}
    many = torch.stack([grad, grad + 1])
    found = vmap(lambda grad: ops.attn_plain_bwd(grad, *args[1:]))(many)
    for x, y in zip(found, ops.attn_plain_bwd(grad + 1, *args[1:]), strict=True):
        close(x[1], y)
    with pytest.raises(RuntimeError, match="second derivative"):
        leaf = grad.clone().requires_grad_()
        ops.attn_plain_bwd(leaf, *args[1:])[0].sum().backward()
    # Gradients of one call for many results' gradients at once.
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = flash_ext.attn(*leaves)
    batched = torch.autograd.grad(out, leaves, many, is_grads_batched=True, retain_graph=True)
    for x, y in zip(batched, torch.autograd.grad(out, leaves, many[1]), strict=True):
        close(x[1], y)


def test_the_usual_call_runs_the_plain_op():
    q, k, v = tensors(torch.float32)[:3]

    def ran(**options):
        found = []

        class Record(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                found.append(str(function))
                return function(*args, **(kwargs or {}))

        with Record():
            out = flash_ext.attn(q, k, v, **options)
        return found, out

    for is_causal in (False, True):
        names, out = ran(is_causal=is_causal)
        assert names == ["flash_ext.attn_plain.default"]
        close(out, flash_ext.math(q, k, v, is_causal=is_causal))
        by_token = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
        out = flash_ext.attn(*by_token, is_causal=is_causal)
        assert out.transpose(1, 2).is_contiguous()
        close(out, flash_ext.math(q, k, v, is_causal=is_causal))
    for options in (dict(window=(2, 2)), dict(causal_align="top_left"), dict(scale=0.5)):
        assert "flash_ext.attn_plain.default" in ran(**options)[0]
    for options in (
        dict(softcap=2.0), dict(backend="cpu"), dict(return_lse=True), dict(dropout_p=0.1),
        dict(sinks=torch.zeros(q.shape[1])),
    ):  # fmt: skip
        assert "flash_ext.attn_fwd.default" in ran(**options)[0]
    q.requires_grad_()
    with torch.no_grad():
        assert ran()[0] == ["flash_ext.attn_plain.default"]
    assert "flash_ext.attn_fwd.default" in ran()[0]


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_usual_call_with_gradients(is_causal):
    """To autograd's node without the dispatcher; the long way gives the same, and is taken where more is asked."""
    leaves = [x.requires_grad_() for x in tensors(torch.float32)[:3]]
    grad = torch.randn_like(flash_ext.math(*leaves))
    out = flash_ext.attn(*leaves, is_causal=is_causal)
    assert out.grad_fn.name() == "AttnPlainBackward"
    found = torch.autograd.grad(out, leaves, grad)
    long = ops.attn_fwd(*leaves, leaves[0].shape[-1] ** -0.5, -1, 0 if is_causal else -1)[0]
    assert torch.equal(out, long)
    for x, y in zip(found, torch.autograd.grad(long, leaves, grad), strict=True):
        assert torch.equal(x, y)

    q, k, v = leaves
    only_v = flash_ext.attn(q.detach(), k.detach(), v, is_causal=is_causal)
    assert torch.equal(torch.autograd.grad(only_v, v, grad)[0], found[2])
    with torch.autocast("cpu", torch.bfloat16):
        out = flash_ext.attn(*leaves, is_causal=is_causal)
    assert out.dtype == torch.bfloat16
    assert all(x.dtype == torch.float32 for x in torch.autograd.grad(out.sum(), leaves))
    of_q = torch.func.grad(lambda q: (flash_ext.attn(q, k, v, is_causal=is_causal) * grad).sum())(q.detach())
    close(of_q, found[0])
    with pytest.raises(RuntimeError, match="forward-mode"), torch.autograd.forward_ad.dual_level():
        flash_ext.attn(torch.autograd.forward_ad.make_dual(q, q), k, v)
    with pytest.raises(RuntimeError, match="second derivative"):
        first = torch.autograd.grad(flash_ext.attn(*leaves).sum(), q, create_graph=True)[0]
        torch.autograd.grad(first.sum(), q)


# ---- torch.compile and torch.export


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "math"])
def test_compile(backend, dynamic, compiler, dynamo):
    def f(q, k, v, mask, sinks):
        options = dict(is_causal=True, window=(3, 2), softcap=5.0, backend=backend)
        return loss(flash_ext.attn, q, k, v, mask, sinks, **options)

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend=compiler)
    args = tensors()[:5]
    close(compiled(*args), f(*args))
    leaves = [x.clone().requires_grad_() for x in args]
    close(torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(f(*leaves), leaves))


def test_compile_with_inductor(dynamo):
    """One graph for several lengths, default scale, dropout and a layout that is a view."""

    def f(q, k, v):
        out = flash_ext.attn(q * 2, k, v, dropout_p=0.5, is_causal=True, layout="bshd")
        return out.flatten(2).sum(1)

    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(f, fullgraph=True, dynamic=True)
    for seq in (5, 9, 17):
        q = torch.randn(2, seq, 4, 8, requires_grad=True)
        out = compiled(q, q, q)
        assert out.shape == (2, 32)
        (gradient,) = torch.autograd.grad(out.sum(), q)
        assert gradient.isfinite().all() and gradient.any()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.manual_seed(1)
    first = compiled(q, q, q)
    torch.manual_seed(1)
    assert torch.equal(compiled(q, q, q), first)
    assert not torch.equal(compiled(q, q, q), first)


@pytest.mark.parametrize("backend, dynamic", [("cpu", True), ("math", False)])
def test_compile_packed(backend, dynamic, dynamo):
    def f(q, k, v, cu_q, cu_k, max_q, max_k):
        return flash_ext.attn_varlen(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=True, backend=backend)

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for name in ("packed", "packed-long") if dynamic else ("packed",):
        inputs = make_inputs(by_id[name])
        out = compiled(*inputs.args)
        close(out, f(*inputs.args))
        leaves = list(inputs.leaves.values())
        close(torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(f(*inputs.args).sum(), leaves))


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, dynamo):
    class Model(torch.nn.Module):
        def forward(self, q, k, v, mask, sinks):
            return flash_ext.attn(q, k, v, mask, is_causal=True, sinks=sinks)

    args = tuple(tensors()[:5])
    seq = torch.export.Dim("seq", min=2, max=100)
    shapes = ({2: seq}, None, None, {2: seq}, None)
    program = torch.export.export(Model(), args, dynamic_shapes=shapes, strict=strict)
    assert any(node.target is ops.attn_fwd.default for node in program.graph.nodes)
    for length in (5, 11):
        q, mask = torch.randn(2, 4, length, 8).double(), torch.randn(1, 4, length, 7).double()
        close(program.module()(q, *args[1:3], mask, args[4]), Model()(q, *args[1:3], mask, args[4]))


def test_use_backend_in_and_round_compiled_code(dynamo):
    q = torch.randn(1, 2, 3, 8)
    targets = []

    def look(graph, _):
        targets.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    def f(q):
        return flash_ext.attn(q, q, q)

    def g(q):
        with flash_ext.use_backend("math"):
            return flash_ext.attn(q, q, q) + 1

    compiled = torch.compile(f, fullgraph=True, backend=look)
    expected = compiled(q)
    with flash_ext.use_backend("math"):
        close(compiled(q), expected)
    close(compiled(q), expected)
    assert ["flash_ext.attn_fwd" in " ".join(graph) for graph in targets] == [True, False]
    close(torch.compile(g, fullgraph=True, backend=look)(q), expected + 1)
    assert "flash_ext.attn_fwd" not in " ".join(targets[-1])
    assert flash_ext.explain(q, q, q).backend == "cpu"


# ---- torch.func


def test_func_grad():
    args = tensors()[:5]

    def f(attn):
        return lambda *args: loss(attn, *args, is_causal=True, softcap=4.0)

    argnums = tuple(range(5))
    close(grad(f(flash_ext.attn), argnums)(*args), grad(f(flash_ext.math), argnums)(*args))
    close(
        jacrev(lambda q: flash_ext.attn(q, *args[1:3]))(args[0]),
        jacrev(lambda q: flash_ext.math(q, *args[1:3]))(args[0]),
    )


MAPPED = [
    (0, 0, 0, 0, 0),
    (0, 0, 0, None, None),
    (0, None, None, None, None),
    (None, 0, None, None, None),
    (None, None, 1, 0, None),
    (None, None, None, 0, None),
    (None, None, None, None, 0),
    (1, 2, 0, None, 0),
]


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("in_dims", MAPPED, ids=str)
def test_vmap_and_vmap_of_grad(in_dims, sinks):
    if not sinks and in_dims[4] is not None:
        in_dims = (0, *in_dims[1:4])
    args = tensors()[: 5 if sinks else 4]
    in_dims = in_dims[: len(args)]
    args = [x if d is None else torch.stack([x, x + 1, -x], d) for x, d in zip(args, in_dims, strict=True)]

    def f(attn):
        return lambda *args: loss(attn, *args, is_causal=True)

    argnums = tuple(range(len(args)))
    close(vmap(f(flash_ext.attn), in_dims)(*args), vmap(f(flash_ext.math), in_dims)(*args))
    gradients = vmap(grad(f(flash_ext.attn), argnums), in_dims)(*args)
    close(gradients, vmap(grad(f(flash_ext.math), argnums), in_dims)(*args))


@pytest.mark.parametrize("slopes_shape", [(4,), (2, 4)], ids=str)
@pytest.mark.parametrize("mask_shape", [(1, 1, 5, 7), (2, 1, 1, 7), (5, 7)], ids=str)
@pytest.mark.parametrize("in_dims", [(None, 0, None), (0, None, 0), (None, None, 1), (0, 0, None)], ids=str)
def test_vmap_of_mask_and_slopes(in_dims, mask_shape, slopes_shape):
    q, k, v = tensors()[:3]
    mask, slopes = torch.randn(mask_shape, dtype=torch.float64), torch.rand(slopes_shape, dtype=torch.float64)
    args = [x if d is None else torch.stack([x, x + 0.5], d) for x, d in zip((q, mask, slopes), in_dims, strict=True)]

    def f(attn):
        return lambda q, mask, slopes: loss(attn, q, k, v, mask, alibi_slopes=slopes)

    close(vmap(f(flash_ext.attn), in_dims)(*args), vmap(f(flash_ext.math), in_dims)(*args))
    gradients = vmap(grad(f(flash_ext.attn), (0, 1)), in_dims)(*args)
    close(gradients, vmap(grad(f(flash_ext.math), (0, 1)), in_dims)(*args))


def test_vmap_of_bool_mask_and_packed():
    q, k, v = tensors()[:3]
    masks = torch.rand(3, 2, 1, 5, 7) > 0.4
    expected = torch.stack([flash_ext.math(q, k, v, mask) for mask in masks])
    close(vmap(lambda mask: flash_ext.attn(q, k, v, mask))(masks), expected)

    inputs = make_inputs(by_id["packed-causal"], torch.float64)
    q, k, v, *rest = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs.args]

    def f(attn):
        return lambda q: attn(q, k, v, *rest, is_causal=True).square().sum()

    many = torch.stack([q, -q])
    close(vmap(grad(f(flash_ext.attn_varlen)))(many), torch.stack([grad(f(flash_ext.math_varlen))(x) for x in many]))


def test_vmap_with_dropout():
    q = torch.randn(1, 2, 9, 8)
    many = torch.stack([q, q, q])
    with pytest.raises(RuntimeError, match="random"):
        vmap(lambda q: flash_ext.attn(q, q, q, dropout_p=0.5))(many)
    out = vmap(lambda q: flash_ext.attn(q, q, q, dropout_p=0.5), randomness="same")(many)
    assert torch.equal(out[0], out[1]) and torch.equal(out[0], out[2])
    out = vmap(lambda q: flash_ext.attn(q, q, q, dropout_p=0.5), randomness="different")(many)
    assert not torch.equal(out[0], out[1])


def test_autograd_outside_vmap():
    q, k, v = tensors()[:3]
    q.requires_grad_()
    many = torch.stack([k, k * 2])
    native = vmap(lambda k: loss(flash_ext.attn, q, k, v))(many).sum()
    math = sum(loss(flash_ext.math, q, x, v) for x in many)
    close(torch.autograd.grad(native, q), torch.autograd.grad(math, q))


# ---- what is not there raises: never zeros, never half a derivative


def second_derivatives(attn):
    q, k, v = tensors()[:3]

    def first(q):
        return grad(lambda q: loss(attn, q, k, v))(q).square().sum()

    def by_autograd(q):
        q = q.clone().requires_grad_()
        (first,) = torch.autograd.grad(loss(attn, q, k, v), q, create_graph=True)
        return torch.autograd.grad(first.square().sum(), q)[0]

    def outer_autograd_over_grad(q):
        q = q.clone().requires_grad_()
        return torch.autograd.grad(grad(lambda k: loss(attn, q, k, v))(k).square().sum(), q)[0]

    return {
        "autograd": lambda: by_autograd(q),
        "grad of grad": lambda: grad(first)(q),
        "grad of vmap of grad": lambda: grad(lambda q: vmap(first)(q).sum())(torch.stack([q, q])),
        "vmap of grad of grad": lambda: vmap(grad(first))(torch.stack([q, q])),
        "autograd of grad": lambda: outer_autograd_over_grad(q),
    }


def forward_derivatives(attn):
    q, k, v = tensors()[:3]

    def f(q):
        return attn(q, k, v)

    def dual():
        with torch.autograd.forward_ad.dual_level():
            return torch.autograd.forward_ad.unpack_dual(f(torch.autograd.forward_ad.make_dual(q, q))).tangent

    many = torch.stack([q, q])
    return {
        "dual": dual,
        "jvp": lambda: jvp(f, (q,), (q,))[1],
        "jvp of vmap": lambda: jvp(vmap(f), (many,), (many,))[1],
        "vmap of jvp": lambda: vmap(lambda q: jvp(f, (q,), (q,))[1])(many),
        "jvp of grad": lambda: jvp(grad(lambda q: f(q).square().sum()), (q,), (q,))[1],
        "grad of jvp": lambda: grad(lambda q: jvp(f, (q,), (q,))[1].sum())(q),
    }


@pytest.mark.parametrize("kind", second_derivatives(None))
def test_second_derivative_raises(kind):
    with pytest.raises(RuntimeError, match="no second derivative.*backend='math'"):
        second_derivatives(flash_ext.attn)[kind]()
    assert second_derivatives(flash_ext.math)[kind]().any()


@pytest.mark.parametrize("kind", forward_derivatives(None))
def test_forward_mode_raises(kind):
    with pytest.raises(RuntimeError, match="no forward-mode derivative.*backend='math'"):
        forward_derivatives(flash_ext.attn)[kind]()
    assert forward_derivatives(flash_ext.math)[kind]().any()


def test_forward_mode_raises_in_the_ops_themselves():
    q = torch.randn(1, 2, 3, 8)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, q)
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            ops.attn_fwd(dual, q, q, 0.3)
        out, lse = ops.attn_fwd(q, q, q, 0.3)
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            ops.attn_bwd(
                dual, None, q, q, q, out, lse, 0.3, -1, -1, False, 0.0, 0.0, None, None, None, None, False, False
            )
        q_leaf = q.clone().requires_grad_()
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            torch.autograd.grad(flash_ext.attn(q_leaf, q, q), q_leaf, dual)
        # A level without a tangent in the call is no obstacle.
        close(flash_ext.attn(q, q, q, scale=0.3), out)


def test_forward_mode_raises_in_compiled_code(dynamo):
    q, k, v = tensors()[:3]
    compiled = torch.compile(lambda q: jvp(lambda q: flash_ext.attn(q, k, v), (q,), (q,))[1], backend="aot_eager")
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        compiled(q)


# ---- autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", [None, "math"])
def test_autocast(backend, dtype, device):
    q, k, v, mask, sinks, slopes = (x.to(device) for x in tensors(torch.float32))
    options = dict(sinks=sinks, alibi_slopes=slopes, backend=backend)
    low = [x.to(dtype) for x in (q, k, v)]
    expected, expected_lse = flash_ext.attn(*low, mask, **options, return_lse=True)
    leaves = [x.clone().requires_grad_() for x in (q, k, v, mask)]
    with torch.autocast(device, dtype=dtype):
        out, lse = flash_ext.attn(q, k, v, mask, **options, return_lse=True)
        mixed = flash_ext.attn(q, low[1], v.bfloat16(), mask, **options)
        with_grad = flash_ext.attn(*leaves, **options)
        exact = flash_ext.attn(q.double(), k.double(), v.double(), backend=backend)
    assert out.dtype == dtype and lse.dtype == torch.float32 and exact.dtype == torch.float64
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    if device == "cpu":
        assert torch.equal(with_grad, expected)
    else:  # gradients still run on another backend
        torch.testing.assert_close(with_grad, expected, atol=0.02, rtol=0.02)
    torch.testing.assert_close(mixed, expected, atol=0.05, rtol=0.05)
    gradients = torch.autograd.grad(with_grad.sum(), leaves)
    assert all(gradient.dtype == torch.float32 for gradient in gradients)


def test_autocast_casts_what_scaled_dot_product_attention_casts():
    q = torch.randn(1, 2, 5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for x in (q, q.double(), q.half()):
            theirs = torch.nn.functional.scaled_dot_product_attention(x, x, x)
            assert flash_ext.attn(x, x, x).dtype == theirs.dtype
            assert flash_ext.math(x, x, x).dtype == theirs.dtype


def test_autocast_in_compiled_code(dynamo):
    q, k, v = tensors(torch.float32)[:3]

    def f(q, k, v):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return flash_ext.attn(q, k, v)

    out = torch.compile(f, fullgraph=True, backend="aot_eager")(q, k, v)
    assert out.dtype == torch.bfloat16 and torch.equal(out, f(q, k, v))


# ---- deterministic


@pytest.mark.parametrize("name", ["causal", "packed-causal"])
def test_deterministic_reaches_the_backward(name):
    def asked_of_backward(deterministic):
        inputs = make_inputs(by_id[name])
        inputs.options["deterministic"] = deterministic
        return [args[-1] for op, args in op_calls(inputs) if "bwd" in str(op)]  # kernels, a default, is left out

    assert asked_of_backward(True) == [True]
    assert asked_of_backward(False) == [False]
    assert asked_of_backward(None) == [False]
    torch.use_deterministic_algorithms(True)
    try:
        assert asked_of_backward(None) == [True]
        assert asked_of_backward(False) == [False]
    finally:
        torch.use_deterministic_algorithms(False)


# ---- FLOP counts


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return {str(op).split(".")[-1]: count for op, count in counter.get_flop_counts()["Global"].items()}


def test_flops_by_torchs_convention():
    q, k, v = tensors(torch.float32)[:3]
    q.requires_grad_()
    pairs = 2 * 4 * 5 * 7
    counts = flops(lambda: flash_ext.attn(q, k, v, is_causal=True).sum().backward())
    assert counts == {"attn_fwd": 2 * pairs * (8 + 6), "attn_plain_bwd": 2 * pairs * (3 * 8 + 2 * 6)}
    assert flops(lambda: flash_ext.attn(q.detach(), k, v)) == {"attn_plain": 2 * pairs * (8 + 6)}
    shapes = (2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)  # older torch counts no grouped heads
    assert counts["attn_fwd"] == sdpa_flop_count(*shapes)
    assert counts["attn_plain_bwd"] == sdpa_backward_flop_count((2, 4, 5, 6), *shapes)


def test_flops_of_packed_sequences():
    inputs = make_inputs(Case("", lengths_q=(3, 5), lengths_kv=(10, 2), heads_q=4, head_dim=8, head_dim_v=6))
    pairs = 4 * (3 * 10 + 5 * 2)
    counts = flops(lambda: run(inputs))
    assert counts == {"attn_varlen_fwd": 2 * pairs * (8 + 6), "attn_varlen_bwd": 2 * pairs * (3 * 8 + 2 * 6)}
    with torch._subclasses.FakeTensorMode() as mode:  # lengths unknown: all as long as the longest
        fake = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in inputs.args]
        counts = flops(lambda: flash_ext.attn_varlen(*fake))
    assert counts["attn_varlen_fwd"] == 2 * 4 * 2 * 5 * 10 * (8 + 6)


COUNT = """
import torch
FIRST
import sys, flash_ext
assert ("torch.utils.flop_counter" in sys.modules) == COUNTED_BEFORE
from torch.utils.flop_counter import FlopCounterMode
q = torch.ones(1, 1, 3, 8)
with FlopCounterMode(display=False) as counter:
    flash_ext.attn(q, q, q)
assert counter.get_total_flops() == 2 * 9 * 16
assert not any(type(finder).__module__.startswith("flash_ext") for finder in sys.meta_path)
"""


@pytest.mark.parametrize("first", [True, False])
def test_flops_whichever_is_imported_first(first):
    program = COUNT.replace("FIRST", "import torch.utils.flop_counter" if first else "")
    python(program.replace("COUNTED_BEFORE", str(first)))


# ---- backends


def test_explain():
    q = torch.randn(1, 2, 3, 8)
    report = flash_ext.explain(q, q, q, is_causal=True)
    assert report.backend == "cpu" and set(report.reasons) == {"sm90", "gpu", "math"}
    lines = str(report).splitlines()
    assert lines[0] == "q [1, 2, 3, 8], k [1, 2, 3, 8], v [1, 2, 3, 8], float32 on cpu"
    assert [line.split()[0] for line in lines[1:]] == ["sm90", "gpu", "->", "math"]
    assert "'math' is asked for" in flash_ext.explain(q, q, q, backend="math").reasons["cpu"]
    with flash_ext.use_backend("math"):
        assert flash_ext.explain(q, q, q).backend == "math"
    nothing = flash_ext.explain(q, q, q, backend="sm90")
    assert nothing.backend is None and "needs a GPU" in nothing.reasons["sm90"]
    low = q.to(torch.float8_e4m3fn)
    assert "no float8_e4m3fn" in flash_ext.explain(low, low, low).reasons["cpu"]
    assert flash_ext.explain(q.to("meta"), q.to("meta"), q.to("meta")).backend == "math"


def test_use_backend():
    q = torch.randn(1, 2, 3, 8)
    with flash_ext.use_backend("math"):
        with flash_ext.use_backend("cpu"):
            assert flash_ext.explain(q, q, q).backend == "cpu"
        assert flash_ext.explain(q, q, q).backend == "math"
        assert flash_ext.explain(q, q, q, backend="cpu").backend == "cpu"
    with pytest.raises(ZeroDivisionError), flash_ext.use_backend("math"):
        raise ZeroDivisionError
    assert flash_ext.explain(q, q, q).backend == "cpu"
    with flash_ext.use_backend("gpu"), pytest.raises(RuntimeError, match="backend: 'gpu' cannot run.*needs a GPU"):
        flash_ext.attn(q, q, q)
    with pytest.raises(ValueError, match="backend: expected one of 'sm90', 'gpu', 'cpu', 'math', got 'tpu'"):
        flash_ext.use_backend("tpu")
    with pytest.raises(ValueError, match="backend: expected one of"):
        flash_ext.attn(q, q, q, backend="tpu")


def test_build_info():
    info = flash_ext.build_info()
    assert info["flash_ext"] == flash_ext.__version__ and info["torch"] == torch.__version__
    assert (
        info["extension"] == "loaded" and info["build_torch"] and all(isinstance(value, str) for value in info.values())
    )


WITHOUT_EXTENSION = """
import sys
sys.modules["flash_ext._C"] = None  # as if it had not been built
import torch, flash_ext
q = torch.randn(1, 2, 3, 8, requires_grad=True)
flash_ext.attn(q, q, q, is_causal=True).sum().backward()
report = flash_ext.explain(q, q, q)
assert report.backend == "math" and "did not load" in report.reasons["cpu"], report
assert "not loaded" in flash_ext.build_info()["extension"]
try:
    flash_ext.attn(q, q, q, backend="cpu")
except RuntimeError as error:
    assert "did not load" in str(error)
else:
    raise AssertionError
cu = torch.tensor([0, 3], dtype=torch.int32)
flash_ext.attn_varlen(q[0].transpose(0, 1), q[0].transpose(0, 1), q[0].transpose(0, 1), cu, cu, 3, 3).sum().backward()
torch.compile(flash_ext.attn, fullgraph=True, backend="eager")(q, q, q)
"""

IMPORT = """
import sys, torch
before = set(sys.modules)
import flash_ext
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""


def python(program):
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


def test_works_without_the_extension():
    python(WITHOUT_EXTENSION)


def test_import_is_cheap():
    # How many milliseconds it takes is measured by bench/overhead.py; here, that nothing large comes along.
    new = set(python(IMPORT).split()) - {"torch"}
    assert not new & {"numpy", "transformers", "matplotlib", "tqdm", "sympy", "hypothesis", "pytest"}


def call_in_another_process(q):
    return flash_ext.attn(q, q, q, is_causal=True)


@pytest.mark.parametrize("start", ["spawn", "fork"])
def test_other_processes(start, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    q = torch.randn(1, 2, 3, 8)
    with ProcessPoolExecutor(1, mp_context=get_context(start)) as pool:
        out = pool.submit(call_in_another_process, q.clone()).result()
    close(out, flash_ext.attn(q, q, q, is_causal=True))


def test_pickle_and_copy():
    for name in ("attn", "attn_varlen", "math", "math_varlen", "explain"):
        function = getattr(flash_ext, name)
        assert pickle.loads(pickle.dumps(function)) is function
        assert copy.deepcopy(function) is function
    case = by_id["everything"]
    assert pickle.loads(pickle.dumps(case)) == case


def test_public_names():
    assert sorted(flash_ext.__all__) == sorted(
        ["__version__", "attn", "attn_varlen", "build_info", "explain", "math", "math_varlen", "use_backend"]
    )
    for name in flash_ext.__all__:
        thing = getattr(flash_ext, name)
        assert thing is flash_ext.__version__ or thing.__doc__


@pytest.mark.parametrize("name, definition", [("attn", "math"), ("attn_varlen", "math_varlen")])
def test_the_definition_takes_the_same_arguments(name, definition):
    native = inspect.signature(getattr(flash_ext, name)).parameters
    math = dict(inspect.signature(getattr(flash_ext, definition)).parameters)
    assert math.pop("compute_dtype").default is None
    assert math.pop("backend").default == "math"
    assert list(math.values()) == [parameter for key, parameter in native.items() if key != "backend"]


def test_the_first_parameters_are_those_of_scaled_dot_product_attention():
    schema = torch.ops.aten.scaled_dot_product_attention.default._schema
    theirs = [argument.name for argument in schema.arguments]
    assert list(inspect.signature(flash_ext.attn).parameters)[: len(theirs)] == theirs


def test_tensor_subclass_and_modes():
    class Mine(torch.Tensor):
        pass

    q = torch.randn(1, 2, 3, 8)
    out = flash_ext.attn(q.as_subclass(Mine), q, q)
    assert type(out) is Mine and torch.equal(out.as_subclass(torch.Tensor), flash_ext.attn(q, q, q))
    with torch.inference_mode():
        assert flash_ext.attn(q, q, q).is_inference()
    with torch.device("cpu"):
        flash_ext.attn(q, q, q)
    parameter = torch.nn.Parameter(q)
    assert flash_ext.attn(parameter, q, q).requires_grad
    with torch.no_grad():
        assert not flash_ext.attn(parameter, q, q).requires_grad


def test_activation_checkpointing():
    q, k, v = (x.requires_grad_() for x in tensors()[:3])

    def f(q, k, v):
        return flash_ext.attn(q, k, v, dropout_p=0.3, is_causal=True)

    for reentrant in (False, True):
        torch.manual_seed(0)
        expected = torch.autograd.grad(f(q, k, v).sum(), [q, k, v])
        torch.manual_seed(0)
        out = torch.utils.checkpoint.checkpoint(f, q, k, v, use_reentrant=reentrant)
        for x in (q, k, v):
            x.grad = None
        out.sum().backward()
        close(tuple(x.grad for x in (q, k, v)), expected)
