"""What only the gpu backend can get wrong: tiles, packed heads, splits, grids, streams, graphs, several GPUs."""

import pytest
import torch

import flash_ext
from flash_ext import backends
from flash_ext.testing import CASES, Case, check, make_inputs, run

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and backends.GPU_KERNELS), reason="needs a GPU, and flash_ext built for it"
)
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["float16", "bfloat16", "float32"]
)


def normal(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device="cuda", dtype=dtype)


def reference(q, k, v, **options):
    return flash_ext.math(q.double(), k.double(), v.double(), **options)


def assert_near(out, exact):
    torch.testing.assert_close(out.double(), exact.double(), atol=2e-2, rtol=2e-2)


def test_gpu_is_chosen_and_explains():
    q = normal(1, 2, 3, 8)
    assert flash_ext.explain(q, q, q).backend == "gpu"
    for reason, tensors in {
        "float64": [q.double()] * 3,
        "head_dim": [normal(1, 2, 3, 257)] * 3,
    }.items():
        explanation = flash_ext.explain(*tensors)
        assert explanation.backend == "math" and reason in explanation.reasons["gpu"]
        with pytest.raises(RuntimeError, match=reason):
            flash_ext.attn(*tensors, backend="gpu")
    assert flash_ext.explain(*[q.float()] * 3).backend == "gpu"
    mask = normal(1, 1, 3, 3).requires_grad_()
    assert flash_ext.explain(q, q, q, mask).backend == "gpu"
    explanation = flash_ext.explain(q, q, q, mask, deterministic=True)
    assert explanation.backend == "math" and "broadcast" in explanation.reasons["gpu"]


@pytest.mark.parametrize("backend", ["gpu", None])
@pytest.mark.parametrize("seq_kv", [2048, 1999])  # read 16 keys at a time, and one by one
def test_blocks_that_a_bool_mask_hides_are_passed_over(seq_kv, backend):
    """Beside the same mask as numbers, which nobody looks through beforehand."""
    q, k, v = normal(4, 8, 2048, 64), normal(4, 2, seq_kv, 64), normal(4, 2, seq_kv, 64)
    key, query = torch.arange(seq_kv, device="cuda"), torch.arange(2048, device="cuda")[:, None]
    lengths = torch.tensor([seq_kv, 1000, 1, 0], device="cuda").view(4, 1, 1, 1)
    bands = (key <= query) & (key > query - torch.tensor([100, 5000] * 4, device="cuda").view(1, 8, 1, 1))
    bands[:, :, 200:700] = False  # tiles that see nothing
    for mask in (key < lengths, key >= seq_kv - lengths, bands, (key <= query) & (key >= seq_kv - lengths)):
        assert 4 * 4 * 8 * 2048 * seq_kv * 64 > 3e10  # else it is not worth it
        out, lse = flash_ext.attn(q, k, v, mask, return_lse=True, backend=backend)
        numbers = torch.zeros(mask.shape, device="cuda", dtype=torch.bfloat16).masked_fill_(~mask, -torch.inf)
        other, other_lse = flash_ext.attn(q, k, v, numbers, return_lse=True, backend=backend)
        torch.testing.assert_close(out, other, atol=1e-2, rtol=1e-2)
        torch.testing.assert_close(lse, other_lse, atol=1e-4, rtol=1e-5)


@dtypes
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("head_dim", [8, 32, 40, 64, 72, 80, 96, 128, 136, 192, 200, 256])
@pytest.mark.parametrize("seq_q, seq_kv", [(300, 300), (129, 515), (515, 129), (5, 1000)])
def test_tiles(seq_q, seq_kv, head_dim, is_causal, dtype):
    check(Case("tiles", 1, 4, 2, seq_q, seq_kv, head_dim, is_causal=is_causal), dtype, "cuda", "gpu")


@dtypes
@pytest.mark.parametrize("head_dim, head_dim_v", [(64, 128), (192, 128), (128, 64), (8, 256), (24, 20), (6, 34)])
def test_value_head_dim(head_dim, head_dim_v, dtype):
    check(Case("value", 2, 4, 2, 200, 300, head_dim, head_dim_v), dtype, "cuda", "gpu")


@pytest.mark.parametrize("options", [{}, dict(is_causal=True), dict(softcap=20.0), dict(window=(100, 20))], ids=str)
def test_enough_tiles_to_fill_the_device(options):  # nothing is split then
    q, k, v = normal(4, 32, 600, 64), normal(4, 32, 600, 64), normal(4, 32, 600, 64)
    out, lse = flash_ext.attn(q, k, v, **options, return_lse=True, backend="gpu")
    exact, exact_lse = reference(q, k, v, **options, return_lse=True)
    assert_near(out, exact)
    torch.testing.assert_close(lse, exact_lse.float(), atol=1e-4, rtol=1e-5)


@dtypes
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 192, 256])
def test_tiles_without_a_key(head_dim, dtype):
    """What is loaded for them in the background must not arrive after their zeros."""
    q, k = normal(8, 16, 900, head_dim, dtype=dtype), normal(8, 16, 100, head_dim, dtype=dtype)
    out, lse = flash_ext.attn(q, k, k, is_causal=True, return_lse=True, backend="gpu")
    assert not out[:, :, :800].any() and (lse[:, :, :800] == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("seq_q", [1, 2, 3, 4, 7, 17, 33, 64])
@pytest.mark.parametrize("heads_q, heads_kv", [(8, 8), (8, 2), (15, 3), (32, 1)])
def test_few_queries(seq_q, heads_q, heads_kv, dtype):
    for seq_kv in (1, 100, 5000):
        case = Case("few", 2, heads_q, heads_kv, seq_q, seq_kv, 128, is_causal=True, sinks=True)
        check(case, dtype, "cuda", "gpu")


@dtypes
@pytest.mark.parametrize("seq_kv", [300, 301])  # with an even number, neighbouring keys are read together
@pytest.mark.parametrize("mask", ["bool:bhqk", "bool:b11k", "half:1hqk", "same:qk", "float:BHqk"])
def test_masks(mask, seq_kv, dtype):
    for head_dim, seq_q, is_causal in ((64, 130, True), (128, 70, False), (256, 3, False)):
        case = Case("masks", 2, 4, 2, seq_q, seq_kv, head_dim, mask=mask, is_causal=is_causal)
        check(case, dtype, "cuda", "gpu", grads=False)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_windows_of_many_blocks(head_dim):
    """Blocks that no mask touches lie between others, and warps see different numbers of blocks."""
    for window in ((-1, 100), (700, -1), (500, 40), (0, 300)):
        check(Case("window", 1, 2, 1, 700, 900, head_dim, window=window), torch.bfloat16, "cuda", "gpu", grads=False)


def test_results_repeat_bit_for_bit():
    q, k, v = normal(2, 32, 1, 128), normal(2, 8, 9000, 128), normal(2, 8, 9000, 128)
    first = flash_ext.attn(q, k, v, backend="gpu")
    assert all(torch.equal(flash_ext.attn(q, k, v, backend="gpu"), first) for _ in range(20))


def test_more_heads_than_a_grid_dimension_holds():
    q, k, v = normal(2, 40_000, 3, 8), normal(2, 20_000, 5, 8), normal(2, 20_000, 5, 16)
    assert_near(flash_ext.attn(q, k, v, backend="gpu"), reference(q, k, v))


def test_tensors_of_more_than_2_to_the_31_elements():
    rows = 2**31 // (8 * 128) + 100
    q = normal(1, 8, 40, 128)
    big = torch.zeros(1, 8, rows, 128, device="cuda", dtype=torch.bfloat16)
    k, v = big[:, :, -300:].normal_(), big[:, :, :300].normal_()
    assert_near(flash_ext.attn(q, k, v, backend="gpu"), reference(q, k, v))
    by_token = big.view(1, rows, 8, 128).transpose(1, 2)[:, :, -300:].normal_()
    out = flash_ext.attn(by_token, by_token, by_token, is_causal=True, backend="gpu")
    assert_near(out, reference(by_token, by_token, by_token, is_causal=True))


def test_many_rows_of_queries_and_outputs():
    rows = 2**31 // 128 + 64
    q = torch.randn(1, 1, rows, 128, device="cuda", dtype=torch.bfloat16)
    k, v = normal(1, 1, 5, 128), normal(1, 1, 5, 128)
    out, lse = flash_ext.attn(q, k, v, return_lse=True, backend="gpu")
    for part in (slice(0, 1000), slice(rows // 2, rows // 2 + 1000), slice(-1000, None)):
        exact, exact_lse = reference(q[:, :, part], k, v, return_lse=True)
        assert_near(out[:, :, part], exact)
        torch.testing.assert_close(lse[:, :, part], exact_lse.float(), atol=1e-4, rtol=1e-5)


@dtypes
@pytest.mark.parametrize("offset", [0, 1, 2, 4])
def test_storage_offsets(offset, dtype):
    storage = normal(4 * 130 * 64 + offset, dtype=dtype)
    q = storage[offset:].view(1, 4, 130, 64)
    assert_near(flash_ext.attn(q, q, q, backend="gpu"), reference(q, q, q))


def on_another_stream(q, function):
    """function of a copy of q that arrives late, on a stream of its own."""
    stream = torch.cuda.Stream()
    late = torch.zeros_like(q)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(q)
        result = function(late)
    stream.synchronize()
    return result


def test_every_stream_is_followed():
    q = normal(8, 32, 2048, 64)
    expected = flash_ext.attn(q, q, q, backend="gpu")
    assert torch.equal(on_another_stream(q, lambda late: flash_ext.attn(late, late, late, backend="gpu")), expected)


@pytest.mark.parametrize("id", ["plain", "decode", "dropout", "packed", "everything"])
def test_cuda_graphs(id):
    inputs = make_inputs(next(case for case in CASES if case.id == id), torch.bfloat16, "cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run(inputs, "gpu", grads=False)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    function = flash_ext.attn_varlen if inputs.case.packed else flash_ext.attn
    with torch.no_grad(), torch.cuda.graph(graph):
        out = function(*inputs.args, **inputs.options, backend="gpu")
    graph.replay()
    first = out.clone()
    graph.replay()
    assert torch.equal(first, out) == (inputs.case.dropout_p == 0)  # each replay draws its own mask
    with torch.no_grad():
        for x in inputs.args[:3]:
            x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.isfinite(out).all() and not torch.equal(first, out)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_gpu():
    def results(q):
        q = q.detach().requires_grad_()
        out = flash_ext.attn(q, q, q, is_causal=True, deterministic=True, backend="gpu")
        return out, *torch.autograd.grad(out, q, torch.ones_like(out))

    q = normal(2, 4, 300, 64)
    expected = results(q)
    for _ in range(2):
        for device in ("cuda:1", "cuda:0"):
            for result, known in zip(results(q.to(device)), expected, strict=True):
                assert result.device == torch.device(device) and torch.equal(result.to("cuda:0"), known)
    assert torch.cuda.current_device() == 0


def gradients(q, k, v, grad_out, **options):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(flash_ext.attn(*leaves, **options), leaves, grad_out)


# More blocks of keys, and rows, than run at once, so that turns at one sum are waited for.
@pytest.mark.parametrize("options", [{}, dict(is_causal=True), dict(window=(900, 300))], ids=str)
@pytest.mark.parametrize(
    "head_dim, dtype",
    [(32, "bfloat16"), (64, "float16"), (96, "bfloat16"), (128, "bfloat16"), (192, "float16"), (256, "bfloat16")]
    + [(64, "float32"), (128, "float32"), (256, "float32")],
)
def test_deterministic_gradients_repeat_bit_for_bit(head_dim, dtype, options):
    q, k, v, grad_out = (normal(2, heads, 2500, head_dim, dtype=getattr(torch, dtype)) for heads in (6, 2, 2, 6))
    first = gradients(q, k, v, grad_out, **options, deterministic=True, backend="gpu")
    for _ in range(10):
        again = gradients(q, k, v, grad_out, **options, deterministic=True, backend="gpu")
        assert all(torch.equal(x, y) for x, y in zip(again, first, strict=True))
    default = gradients(q, k, v, grad_out, **options, deterministic=False, backend="gpu")
    for x, y in zip(default, first, strict=True):  # but for the order of float32 sums
        torch.testing.assert_close(x.float(), y.float(), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("deterministic", [False, True])
def test_cuda_graph_of_a_training_step(deterministic):
    q, k, v, grad_out = normal(2, 4, 500, 64), normal(2, 2, 700, 64), normal(2, 2, 700, 64), normal(2, 4, 500, 64)
    options = dict(is_causal=True, deterministic=deterministic, backend="gpu")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        gradients(q, k, v, grad_out, **options)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(q, k, v, grad_out, **options)
    for _ in range(3):
        for x in (q, k, v, grad_out):
            x.normal_()
        graph.replay()
        for x, y in zip(captured, gradients(q, k, v, grad_out, **options), strict=True):
            torch.testing.assert_close(x, y, atol=0 if deterministic else 1e-2, rtol=0 if deterministic else 1e-2)


def test_gradients_on_every_stream():
    def results(q):
        return gradients(q, q, q, q, deterministic=True, backend="gpu")

    q = normal(4, 16, 1024, 64)
    expected = results(q)
    assert all(torch.equal(x, y) for x, y in zip(on_another_stream(q, results), expected, strict=True))


def exact_gradients(q, k, v, grad_out, out, lse):
    """Of some queries and some keys, from the formula; lse and out are of all keys."""
    q, k, v, grad_out, out = (x.double() for x in (q, k, v, grad_out, out))
    scale = q.shape[-1] ** -0.5
    weights = (q @ k.mT * scale - lse.double()[..., None]).exp()
    ds = weights * (grad_out @ v.mT - (grad_out * out).sum(-1, keepdim=True)) * scale
    return ds @ k, ds.mT @ q, weights.mT @ grad_out


def assert_alike(x, exact, error=2e-2):
    assert (x.double() - exact).norm() < error * exact.norm()


def test_gradients_of_more_than_2_to_the_31_elements_of_queries():
    rows = 2**31 // 128 + 64
    q = torch.randn(1, 1, rows, 128, device="cuda", dtype=torch.bfloat16)
    k, v = normal(1, 1, 5, 128), normal(1, 1, 5, 128)
    grad_out = torch.randn_like(q)
    dq, dk, dv = gradients(q, k, v, grad_out, backend="gpu")
    exact_dk = exact_dv = 0
    for start in range(0, rows, 2**21):
        part = slice(start, start + 2**21)
        out, lse = flash_ext.attn(q[:, :, part], k, v, return_lse=True)
        exact_dq, dk_part, dv_part = exact_gradients(q[:, :, part], k, v, grad_out[:, :, part], out, lse)
        exact_dk, exact_dv = exact_dk + dk_part, exact_dv + dv_part
        assert_alike(dq[:, :, part], exact_dq)
    assert_alike(dk, exact_dk)
    assert_alike(dv, exact_dv)


def test_gradients_of_more_than_2_to_the_31_elements_of_keys():
    rows = 2**31 // 128 + 64
    q, grad_out = normal(1, 1, 5, 128), normal(1, 1, 5, 128)
    k = torch.randn(1, 1, rows, 128, device="cuda", dtype=torch.bfloat16)
    v = torch.randn_like(k)
    out, lse = flash_ext.attn(q, k, v, return_lse=True, backend="gpu")
    _, dk, dv = gradients(q, k, v, grad_out, backend="gpu")
    for part in (slice(0, 10_000), slice(rows // 2, rows // 2 + 10_000), slice(-10_000, None)):
        _, exact_dk, exact_dv = exact_gradients(q, k[:, :, part], v[:, :, part], grad_out, out, lse)
        assert_alike(dk[:, :, part], exact_dk)
        assert_alike(dv[:, :, part], exact_dv)


@pytest.mark.parametrize("deterministic", [False, True])
def test_memory_of_gradients(deterministic):
    """What docs/design.md, section 9, says: nothing is copied or expanded."""
    q, k, v, grad_out = (normal(4, heads, 2048, 64) for heads in (16, 2, 2, 16))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = flash_ext.attn(*leaves, deterministic=deterministic, backend="gpu")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(out, leaves, grad_out)
    rows = 4 * 16 * 2048
    results = 2 * (q.numel() + k.numel() + v.numel())
    turns = rows / 64 * 4 if deterministic else 0
    assert torch.cuda.max_memory_allocated() - before <= results + rows * (4 * 64 + 8) + turns + 2**16


@dtypes
def test_dropout_is_the_same_on_every_backend(dtype):
    q, k, v = (normal(2, 4, n, 32, dtype=dtype) for n in (70, 200, 200))
    torch.manual_seed(3)
    out = flash_ext.attn(q, k, v, dropout_p=0.4, backend="gpu")
    torch.manual_seed(3)
    assert_near(out, flash_ext.attn(q.double(), k.double(), v.double(), dropout_p=0.4, backend="math"))


def test_compiled():
    q = normal(2, 4, 300, 64)
    compiled = torch.compile(lambda q: flash_ext.attn(q, q, q, is_causal=True), fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(q), flash_ext.attn(q, q, q, is_causal=True))


def test_autocast():
    q = normal(1, 2, 30, 64, dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        assert flash_ext.explain(q, q, q).backend == "gpu"
        out = flash_ext.attn(q, q, q, backend="gpu")
    assert out.dtype == torch.bfloat16
    assert_near(out, reference(q, q, q))


def test_float32_keeps_all_bits_of_values():
    """One visible key has the weight 1: its value comes back bit for bit, however large or small."""
    v = normal(2, 4, 70, 72, dtype=torch.float32) * 2.0 ** torch.randint(-90, 126, (2, 4, 70, 72), device="cuda")
    q = torch.zeros_like(v)
    assert torch.equal(flash_ext.attn(q, q, v, window=(0, 0), backend="gpu"), v)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_float32_sums_do_not_drift(head_dim):
    """Matrix units round towards zero. Over many keys that must not add up."""
    q, k, v = (normal(1, 2, n, head_dim, dtype=torch.float32) for n in (200, 30_000, 30_000))
    v = v.abs() + 1
    out, lse = flash_ext.attn(q, k, v, return_lse=True, backend="gpu")
    exact, exact_lse = reference(q, k, v, return_lse=True)
    assert (out / exact - 1).mean().abs() < 2e-7
    torch.testing.assert_close(out.double(), exact, atol=0, rtol=2e-6)
    torch.testing.assert_close(lse.double(), exact_lse, atol=2e-6, rtol=0)


def test_float32_infinite_values():
    """An infinity times a weight is an infinity, although both are multiplied in parts."""
    q, k, v = (normal(1, 2, 100, 64, dtype=torch.float32) for _ in range(3))
    v[0, 0, 3, 5], v[0, 1, 4, 6] = torch.inf, -torch.inf
    out = flash_ext.attn(q, k, v, backend="gpu")
    assert (out[0, 0, :, 5] == torch.inf).all() and (out[0, 1, :, 6] == -torch.inf).all()
    assert torch.isfinite(out).sum() == out.numel() - 200
