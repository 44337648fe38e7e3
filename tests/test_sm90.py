"""The Hopper kernels: the shared cases, what is at the edge of tiles, and what only they can get wrong."""

import pytest
import torch

import flash_ext
from flash_ext import backends
from flash_ext.testing import CASES, Case, check, make_inputs, run

pytestmark = pytest.mark.skipif(
    not (
        torch.cuda.is_available()
        and torch.cuda.get_device_capability() == (9, 0)
        and backends.GPU_KERNELS
        and "sm_90a" in backends.native.build_info()["archs"]
    ),
    reason="needs a Hopper GPU, and flash_ext built for it",
)
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])


def normal(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device="cuda", dtype=dtype)


def assert_near(out, exact):
    torch.testing.assert_close(out.double(), exact.double(), atol=2e-2, rtol=2e-2)


def supported(case, dtype):
    inputs = make_inputs(case, dtype, "cuda")
    return backends.obstacle("sm90", backends.call_of(*inputs.args, **inputs.options)) is None


@dtypes
@pytest.mark.parametrize("case", CASES, ids=str)
def test_shared_cases(case, dtype):
    if not supported(case, dtype):
        with pytest.raises(RuntimeError, match="'sm90' cannot run this call"):
            run(make_inputs(case, dtype, "cuda"), "sm90", grads=False)
        pytest.skip("the portable kernels run it")
    check(case, dtype, "cuda", "sm90")


def test_enough_shared_cases_are_supported():
    assert sum(supported(case, torch.bfloat16) for case in CASES) >= 10


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_gradients_repeat_a_thousand_times(head_dim):
    leaves = [normal(2, heads, 700, head_dim).requires_grad_() for heads in (8, 2, 2)]
    out = flash_ext.attn(*leaves, is_causal=True, deterministic=True, backend="sm90")
    grad_out = torch.randn_like(out)

    def gradients():
        return torch.autograd.grad(out, leaves, grad_out, retain_graph=True)

    first = gradients()
    assert all(all(map(torch.equal, gradients(), first)) for _ in range(1000))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("deterministic", [False, True])
def test_memory_of_gradients(head_dim, deterministic):
    """What docs/design.md, sections 9 and 10, say: nothing is copied or expanded."""
    leaves = [normal(4, heads, 2048, head_dim).requires_grad_() for heads in (16, 2, 2)]
    out = flash_ext.attn(*leaves, is_causal=True, deterministic=deterministic, backend="sm90")
    grad_out = torch.randn_like(out)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(out, leaves, grad_out)
    rows, wide = 4 * 16 * 2048, head_dim > 128
    results = 2 * sum(x.numel() for x in leaves)
    sums = 0 if wide else 4 * head_dim
    turns = rows / 64 * 8 if deterministic and not wide else 0
    rounding = 2**21  # of each of the allocator's large blocks, of which the sums are one, and gradients three
    assert torch.cuda.max_memory_allocated() - before <= results + rows * (sums + 8) + turns + 4 * rounding


@dtypes
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("head_dim", [8, 24, 32, 40, 64, 72, 80, 96, 104, 128, 136, 192, 200, 256])
@pytest.mark.parametrize("seq_q, seq_kv", [(300, 300), (129, 515), (515, 129), (64, 1000), (1, 96), (193, 1)])
def test_tiles(seq_q, seq_kv, head_dim, is_causal, dtype):
    check(Case("tiles", 1, 4, 2, seq_q, seq_kv, head_dim, is_causal=is_causal), dtype, "cuda", "sm90", grads=False)


@dtypes
@pytest.mark.parametrize(
    "head_dim, head_dim_v", [(64, 128), (192, 128), (128, 64), (8, 256), (24, 80), (96, 40), (8, 32)]
)
def test_value_head_dim(head_dim, head_dim_v, dtype):
    check(Case("value", 2, 4, 2, 200, 300, head_dim, head_dim_v), dtype, "cuda", "sm90", grads=False)


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 192, 256])
def test_windows_of_many_blocks(head_dim):
    for window in ((-1, 100), (700, -1), (500, 40), (0, 300), (0, 0)):
        for causal_align in ("bottom_right", "top_left"):
            case = Case("window", 1, 2, 1, 700, 900, head_dim, window=window, causal_align=causal_align, sinks=True)
            check(case, torch.bfloat16, "cuda", "sm90", grads=False)


OPTIONS = {
    "softcap": dict(softcap=5.0),
    "alibi": dict(alibi="bh"),
    "bool mask": dict(mask="bool:bhqk"),
    "padding": dict(mask="bool:b11k"),
    "float mask": dict(mask="half:qk"),
    "float32 mask": dict(mask="float:1h1k"),
    "dropout": dict(dropout_p=0.3),
    "all": dict(softcap=5.0, alibi="h", mask="half:bhqk", dropout_p=0.3, sinks=True, window=(100, 50)),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("head_dim", [32, 64, 72, 80, 96, 128, 136, 192, 256])
@dtypes
def test_options(head_dim, options, dtype):
    for seq_kv in (431, 800):
        case = Case("options", 2, 4, 2, 300, seq_kv, head_dim, is_causal=seq_kv == 800, **options)
        check(case, dtype, "cuda", "sm90")


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 192, 256])
def test_packed(head_dim):
    for is_causal in (False, True):
        case = Case(
            "packed", heads_q=4, heads_kv=2, head_dim=head_dim, is_causal=is_causal,
            lengths_q=(500, 0, 3, 130, 64), lengths_kv=(300, 7, 0, 1000, 64),
        )  # fmt: skip
        check(case, torch.bfloat16, "cuda", "sm90", grads=False)


@dtypes
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("scores", [(-300, 0, 5), (0, -300, 5), (300, 0, -5), (-9, -9, 12), (-80, -200, -80)], ids=str)
def test_scores_far_from_zero(scores, is_causal, dtype):
    """Weights are relative to 0 at first, and to a maximum where that will not do."""
    for head_dim in (32, 128):
        q, k, v = normal(1, 2, 300, head_dim, dtype=dtype), *(normal(1, 2, 450, head_dim, dtype=dtype) for _ in "kv")
        q[..., 0] = 1
        for part, score in zip(k.split(150, dim=2), scores, strict=True):
            part[..., 0] = score * head_dim**0.5
        out, lse = flash_ext.attn(q, k, v, is_causal=is_causal, return_lse=True, backend="sm90")
        exact, exact_lse = flash_ext.math(*(x.double() for x in (q, k, v)), is_causal=is_causal, return_lse=True)
        assert_near(out, exact)
        torch.testing.assert_close(lse.double(), exact_lse, atol=1e-3, rtol=1e-4)


def test_what_follows_a_packed_sequence_is_not_read():
    q, k, v = normal(400, 2, 64), normal(400, 2, 64), normal(400, 2, 64)
    starts = torch.tensor([0, 90, 400], dtype=torch.int32, device="cuda")
    for x in (k, v):
        x[90:] = torch.nan
    out = flash_ext.attn_varlen(q, k, v, starts, starts, 310, 310, backend="sm90")
    alone = [x[:90].transpose(0, 1)[None].double() for x in (q, k, v)]
    assert_near(out[:90], flash_ext.math(*alone)[0].transpose(0, 1))
    assert out[90:].isnan().all()


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_nan_reaches_who_sees_it(head_dim):
    q, k, v = normal(2, 4, 200, head_dim), normal(2, 2, 300, head_dim), normal(2, 2, 300, head_dim)
    q[1, 2, 100, 5] = torch.nan
    k[0, 1, 250, 3] = torch.nan
    out, lse = flash_ext.attn(q, k, v, is_causal=True, return_lse=True, backend="sm90")
    expected = torch.zeros(2, 4, 200, dtype=torch.bool, device="cuda")
    expected[1, 2, 100] = True
    expected[0, 2:, 150:] = True
    assert torch.equal(lse.isnan(), expected)
    assert torch.equal(out.isnan(), expected[..., None].expand(out.shape))


def test_scores_that_keep_growing():
    """Each block of keys raises the maximum by far, in another row more than in its neighbours."""
    q, k, v = normal(1, 2, 200, 64), normal(1, 2, 2000, 64), normal(1, 2, 2000, 64)
    k *= torch.linspace(0.1, 12, 2000, device="cuda")[:, None]
    for dtype in (torch.bfloat16, torch.float16):
        tensors = [x.to(dtype) for x in (q, k, v)]
        out, lse = flash_ext.attn(*tensors, return_lse=True, backend="sm90")
        exact, exact_lse = flash_ext.math(*(x.double() for x in tensors), return_lse=True)
        assert_near(out, exact)
        torch.testing.assert_close(lse.double(), exact_lse, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 192, 256])
def test_more_tiles_than_multiprocessors(head_dim, is_causal):
    """Tiles that are dealt out, and tiles that are taken from a counter."""
    for batch, heads, seq in ((4, 16, 900), (2, 32, 2500)):
        q, k, v = (normal(batch, n, seq, head_dim) for n in (heads, heads // 4, heads // 4))
        out, lse = flash_ext.attn(q, k, v, is_causal=is_causal, return_lse=True, backend="sm90")
        other, other_lse = flash_ext.attn(q, k, v, is_causal=is_causal, return_lse=True, backend="gpu")
        assert_near(out, other)
        torch.testing.assert_close(lse, other_lse, atol=1e-4, rtol=1e-5)


# Rows that fit tiles of 192 and of 128 or 256, and what warpgroups of a tile leave out on both sides, from one tile to
# the next one of a thread block.
@dtypes
@pytest.mark.parametrize("window", [(-1, 0), (100, 0), (70, 60), (300, -1)], ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 192, 256])
def test_bands_over_many_tiles(head_dim, window, dtype):
    for seq in (200, 390):
        case = Case("bands", 1, 160, 80, seq, seq + 150, head_dim, window=window)
        check(case, dtype, "cuda", "sm90", grads=False)


def test_results_repeat_bit_for_bit():
    q, k, v = normal(1, 16, 3000, 128), normal(1, 4, 3000, 128), normal(1, 4, 3000, 128)
    first = flash_ext.attn(q, k, v, is_causal=True, backend="sm90")
    assert all(torch.equal(flash_ext.attn(q, k, v, is_causal=True, backend="sm90"), first) for _ in range(1000))


def test_cuda_graph():
    q, k, v = normal(2, 16, 3000, 128), normal(2, 4, 3000, 128), normal(2, 4, 3000, 128)
    expected = flash_ext.attn(q, k, v, is_causal=True, backend="sm90")
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = flash_ext.attn(q, k, v, is_causal=True, backend="sm90")
    for _ in range(3):
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)


# ---- gradients


def backward_kernels(q, k, v, **options):
    """The names of the kernels that compute the gradients of a call."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = flash_ext.attn(*leaves, **options)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        out.backward(torch.randn_like(out))
        torch.cuda.synchronize()
    return " ".join(event.key for event in profile.key_averages())


def test_which_kernels_compute_gradients():
    q, k = normal(2, 8, 512, 128), normal(2, 2, 512, 128)
    assert "sm90::bwd_kernel" in backward_kernels(q, k, k)
    assert "sm90::bwd_kernel" in backward_kernels(q, k, k, is_causal=True, deterministic=True)
    for options in (dict(softcap=20.0), dict(dropout_p=0.1), dict(attn_mask=normal(512, 512).requires_grad_())):
        assert "sm90::bwd_kernel" in backward_kernels(q, k, k, **options)
        kernels = backward_kernels(*[normal(2, 2, 512, 256)] * 3, **options)
        assert "sm90::dkv_kernel" in kernels and "sm90::dq_kernel" in kernels
    assert "sm90" not in backward_kernels(q, k, k, backend="gpu")
    few = normal(2, 8, 4, 128)
    assert "sm90" not in backward_kernels(few, k, k)
    assert "sm90::bwd_kernel" in backward_kernels(few, k, k, backend="sm90")
    for head_dim in (136, 256):
        kernels = backward_kernels(*[normal(2, 2, 512, head_dim)] * 3)
        assert "sm90::dkv_kernel" in kernels and "sm90::dq_kernel" in kernels


@dtypes
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("head_dim", [8, 24, 32, 40, 64, 72, 80, 96, 104, 128, 136, 192, 200, 256])
def test_gradients(head_dim, is_causal, dtype):
    for seq_q, seq_kv in ((300, 400), (515, 129), (64, 1000), (1, 96), (193, 1)):
        case = Case("train", 2, 4, 2, seq_q, seq_kv, head_dim, is_causal=is_causal, sinks=True)
        check(case, dtype, "cuda", "sm90")


@pytest.mark.parametrize(
    "head_dim, head_dim_v", [(64, 128), (128, 64), (24, 80), (96, 40), (192, 128), (136, 256), (8, 200)]
)
def test_gradients_of_value_head_dim(head_dim, head_dim_v):
    for options in ({}, dict(mask="half:qk", softcap=5.0, dropout_p=0.3)):
        check(Case("value", 2, 4, 2, 200, 300, head_dim, head_dim_v, **options), torch.bfloat16, "cuda", "sm90")


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_gradients_of_windows(head_dim):
    for window in ((-1, 100), (300, -1), (200, 40), (0, 300), (0, 0)):
        for causal_align in ("bottom_right", "top_left"):
            case = Case("window", 1, 2, 1, 500, 700, head_dim, window=window, causal_align=causal_align, sinks=True)
            check(case, torch.bfloat16, "cuda", "sm90")


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_gradients_of_packed_sequences(head_dim):
    for is_causal in (False, True):
        case = Case(
            "packed", heads_q=4, heads_kv=2, head_dim=head_dim, is_causal=is_causal,
            lengths_q=(500, 0, 3, 130, 64), lengths_kv=(300, 7, 0, 1000, 64),
        )  # fmt: skip
        check(case, torch.bfloat16, "cuda", "sm90")


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_of_many_blocks(head_dim, is_causal):
    """Against the portable kernels, and in deterministic mode bit for bit the same."""
    q, k, v = (normal(2, n, 2500, head_dim) for n in (16, 4, 4))
    grad = torch.randn_like(q)

    def gradients(backend, deterministic=False):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = flash_ext.attn(*leaves, is_causal=is_causal, backend=backend, deterministic=deterministic)
        return torch.autograd.grad(out, leaves, grad)

    for mine, other in zip(gradients("sm90"), gradients("gpu"), strict=True):
        assert_near(mine, other)
    first = gradients("sm90", deterministic=True)
    for _ in range(20):
        assert all(map(torch.equal, gradients("sm90", deterministic=True), first))


# Masks that can be read eight keys at a time, and those that cannot: too few keys, another stride.
@dtypes
@pytest.mark.parametrize("mask", "bool:b1qk same:1hqk half:qk float:bhqk bool:1h1k half:b1q1 same:BHqk".split())
@pytest.mark.parametrize("head_dim", [64, 96, 128, 136, 192, 256])
def test_gradients_of_masks(head_dim, mask, dtype):
    for seq_q, seq_kv in ((300, 440), (129, 515), (515, 136), (1, 96), (193, 1)):
        case = Case("masks", 2, 4, 2, seq_q, seq_kv, head_dim, mask=mask, window=(400, 30), softcap=4.0, grad_lse=True)
        check(case, dtype, "cuda", "sm90")


@pytest.mark.parametrize("head_dim", [64, 96, 128, 136, 192, 256])
@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_of_packed_sequences_with_options(head_dim, is_causal):
    for mask, dropout_p in (("half:b1qk", 0.0), ("bool:b11k", 0.2)):
        case = Case(
            "packed", heads_q=4, heads_kv=2, head_dim=head_dim, is_causal=is_causal, mask=mask, dropout_p=dropout_p,
            alibi="bh", softcap=5.0, lengths_q=(500, 0, 3, 130, 64), lengths_kv=(300, 7, 0, 1000, 64),
        )  # fmt: skip
        check(case, torch.bfloat16, "cuda", "sm90")


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradients_of_options_over_many_blocks(head_dim, options):
    """Against the portable kernels, and in deterministic mode bit for bit the same."""
    case = Case("many", 2, 8, 4, 1500, 1600, head_dim, is_causal=True, **options)
    inputs = make_inputs(case, torch.bfloat16, "cuda")
    mine, other = run(inputs, "sm90"), run(inputs, "gpu")
    for name, x in mine.items():
        scale = other[name].double().abs().clamp(max=1e3).max().clamp(min=1)
        assert_near(x.clamp(-1e3, 1e3) / scale, other[name].clamp(-1e3, 1e3) / scale)
    if case.mask in (None, "bool:bhqk", "bool:b11k"):
        inputs.options["deterministic"] = True
        first = run(inputs, "sm90")
        for _ in range(5):
            again = run(inputs, "sm90")
            assert all(torch.equal(again[name], first[name]) for name in first if name[0] == "d")


@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
def test_gradients_where_masks_are_looked_through(head_dim):
    """Masks that hide whole blocks of rows from a block of keys: in front, behind, everywhere, of one head only."""
    seq = 2048
    position = torch.arange(seq, device="cuda")
    padding = position < torch.tensor([900, 0], device="cuda").view(-1, 1, 1, 1)
    causal = position <= position[:, None]
    of_heads = causal.repeat(1, 16, 1, 1)
    of_heads[:, 3] = causal.T
    of_heads[:, 8:] = False
    q, k, v = (normal(2, n, seq, head_dim) for n in (16, 4, 4))
    grad = torch.randn_like(q)
    for mask in (padding, causal, of_heads, torch.zeros_like(causal)):
        gradients = []
        for options in (dict(backend="sm90"), dict(backend="gpu"), dict(backend="sm90", deterministic=True)):
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            out = flash_ext.attn(*leaves, mask, **options)
            gradients.append(torch.autograd.grad(out, leaves, grad))
        for mine, other, deterministic in zip(*gradients, strict=True):
            assert_near(mine, other)
            assert_near(deterministic, other)


@pytest.mark.parametrize("head_dim", [64, 256])
def test_nan_does_not_reach_the_gradient_of_what_is_hidden(head_dim):
    """grad_out of NaN: the mask's gradient of other rows, and of keys that are not there, stays as it is."""
    q, k, v = (normal(1, 1, rows, head_dim) for rows in (100, 70, 70))
    storage = torch.zeros(100 * 70 + 500, device="cuda", dtype=torch.bfloat16)
    mask = storage[: 100 * 70].view(100, 70).requires_grad_()
    out = flash_ext.attn(q, k, v, mask, backend="sm90")
    grad = torch.randn_like(out)
    grad[0, 0, 99] = torch.nan
    (dmask,) = torch.autograd.grad(out, mask, grad)
    assert not dmask[:99].isnan().any()


def test_strides():
    storage = normal(2, 300, 3, 4, 64)  # as a fused projection leaves them
    q, k, v = storage.unbind(2)
    out = flash_ext.attn(q, k, v, layout="bshd", backend="sm90")
    exact = flash_ext.math(*(x.double() for x in (q, k, v)), layout="bshd")
    assert_near(out, exact)
    with pytest.raises(RuntimeError, match="'sm90' cannot run this call.*aligned"):
        odd = normal(4 * 130 * 64 + 1)[1:].view(1, 4, 130, 64)
        flash_ext.attn(odd, odd, odd, backend="sm90")
    with pytest.raises(RuntimeError, match="'sm90' cannot run this call.*stand for several"):
        one = normal(1, 1, 130, 64).expand(1, 4, 130, 64)
        flash_ext.attn(one, one, one, backend="sm90")
    assert_near(flash_ext.attn(one, one, one), flash_ext.math(*[one.double()] * 3))


@pytest.mark.parametrize("heads", [1, 2, 16, 63, 64])
def test_explain_knows_which_kernel_runs(heads):
    """Its rule is written twice, in Python and in csrc/sm90/fwd.cu."""
    for seq_q in (1, 64, 65, 128, 129, 1023, 1024):
        for seq_kv in (100, 1024, 1025):
            for head_dim in (32, 40):
                q, k = normal(1, heads, seq_q, head_dim), normal(1, heads, seq_kv, head_dim)
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                    flash_ext.attn(q, k, k)
                    torch.cuda.synchronize()
                runs_hopper = any("sm90" in event.name for event in profile.events())
                backend = flash_ext.explain(q, k, k).backend
                assert backend == ("sm90" if runs_hopper else "gpu"), (heads, seq_q, seq_kv, head_dim)


def test_explain():
    q = normal(2, 16, 512, 128)
    few = normal(2, 16, 4, 128)
    assert flash_ext.explain(q, q, q, is_causal=True).backend == "sm90"
    assert flash_ext.explain(q, q, q).reasons["gpu"] == "'sm90' is faster"
    assert flash_ext.explain(q, q, q, backend="gpu").backend == "gpu"
    assert "few queries" in flash_ext.explain(few, q, q).reasons["sm90"]
    assert flash_ext.explain(few, q, q, backend="sm90").backend == "sm90"
    assert "not float32" in flash_ext.explain(q.float(), q.float(), q.float()).reasons["sm90"]
