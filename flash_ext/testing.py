"""The cases that tests, benchmarks and every backend share, their inputs, and how exact a result must be."""

import math as std_math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .attn import attn, attn_varlen
from .checks import acc_dtype
from .math import math, math_varlen

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Case:
    """One call, but for its dtype and device. With lengths_q it is packed; batch, seq_q, seq_kv do not count then."""

    id: str
    batch: int = 2
    heads_q: int = 4
    heads_kv: int = 2
    seq_q: int = 33
    seq_kv: int = 47
    head_dim: int = 16
    head_dim_v: int | None = None  # None: head_dim
    lengths_q: tuple[int, ...] | None = None
    lengths_kv: tuple[int, ...] | None = None
    mask: str | None = None  # dtype and shape, see make_mask: "bool:bhqk", "float:1h1k", "half:qk", "float:BHqk"
    is_causal: bool = False
    causal_align: str = "bottom_right"
    window: tuple[int, int] | None = None
    scale: float | None = None
    softcap: float = 0.0
    alibi: str | None = None  # "h": [heads_q], "bh": [batch, heads_q]
    sinks: bool = False
    dropout_p: float = 0.0
    layout: str = "bhsd"
    strides: str = "contiguous"  # see lay_out
    grad_lse: bool = False

    def __str__(self):
        return self.id

    @property
    def packed(self):
        return self.lengths_q is not None


def _cases():
    def causal(id, **kwargs):
        return Case(id, is_causal=True, **kwargs)

    everything = dict(
        mask="float:bhqk", window=(20, 5), softcap=3.0, alibi="bh", sinks=True, dropout_p=0.2, grad_lse=True, scale=0.3
    )
    one_row = dict(batch=3, heads_q=8, heads_kv=2, seq_q=1)
    packed = dict(lengths_q=(5, 0, 33, 1, 17), lengths_kv=(9, 4, 70, 0, 17))
    return (
        Case("plain"),
        causal("causal"),
        causal("causal-top-left", causal_align="top_left"),
        causal("causal-square", seq_kv=33),
        causal("causal-long-q", seq_q=70, seq_kv=31),  # the first 39 queries see nothing
        causal("causal-long-q-top-left", seq_q=70, seq_kv=31, causal_align="top_left"),
        # Sizes round the blocks of the kernels.
        Case("one-by-one", seq_q=1, seq_kv=1, head_dim=1),
        Case("blocks-64", seq_q=64, seq_kv=64, head_dim=64),
        causal("blocks-65", seq_q=65, seq_kv=129, head_dim=64),
        causal("blocks-127", batch=1, seq_q=127, seq_kv=127, head_dim=32),
        Case("long-kv", batch=1, heads_q=2, heads_kv=1, seq_q=19, seq_kv=1200, head_dim=32),
        causal("long-both", batch=1, heads_q=2, heads_kv=1, seq_q=200, seq_kv=700, head_dim=64, head_dim_v=48),
        causal("long-window", batch=1, heads_q=2, heads_kv=2, seq_q=600, seq_kv=600, head_dim=16, window=(100, 0)),
        Case("head-dim-3", head_dim=3, head_dim_v=5),
        Case("head-dim-7", head_dim=7, head_dim_v=33, grad_lse=True),
        Case("head-dim-40", head_dim=40),
        causal("head-dim-80", head_dim=80, head_dim_v=24),
        causal("head-dim-128", head_dim=128, seq_q=50, seq_kv=50),
        Case("head-dim-192", head_dim=192, head_dim_v=128),
        causal("head-dim-256", head_dim=256),
        Case("head-dim-300", head_dim=300, head_dim_v=520, seq_q=9, seq_kv=20),
        # Several tiles of every size that the GPU kernels are compiled for.
        *(Case(f"tiles-{dim}", batch=1, seq_q=150, seq_kv=270, head_dim=dim) for dim in (32, 64, 80, 96, 160, 256)),
        *(causal(f"tiles-{dim}-causal", batch=1, seq_q=270, seq_kv=330, head_dim=dim) for dim in (48, 64, 128, 192)),
        Case("tiles-window", batch=1, seq_q=400, seq_kv=400, head_dim=64, window=(70, 9), sinks=True),
        causal("tiles-gqa", batch=1, heads_q=8, heads_kv=1, seq_q=40, seq_kv=300, head_dim=64, sinks=True),
        Case("tiles-general", batch=1, seq_q=150, seq_kv=270, head_dim=64, mask="bool:11qk", alibi="h", softcap=5.0),
        Case("tiles-strides", batch=1, seq_q=150, seq_kv=270, head_dim=72, head_dim_v=56),
        # Decoding: few queries over many keys, split over the keys.
        Case("decode", **one_row, seq_kv=300, head_dim=64),
        causal("decode-causal", **one_row, seq_kv=2500, head_dim=32),
        causal("decode-window", **one_row, seq_kv=900, head_dim=32, window=(128, 0), sinks=True),
        causal("decode-options", **one_row, seq_kv=1030, head_dim=24, head_dim_v=40, **everything),
        causal("decode-4", batch=1, heads_q=2, heads_kv=1, seq_q=4, seq_kv=1500, head_dim=128),
        Case("decode-mqa", batch=2, heads_q=16, heads_kv=1, seq_q=1, seq_kv=600, head_dim=128, mask="bool:b11k"),
        # Heads.
        Case("heads-equal", heads_q=3, heads_kv=3),
        causal("heads-mqa", heads_q=5, heads_kv=1),
        # Windows.
        Case("window", window=(7, 3)),
        Case("window-left", window=(9, -1)),
        Case("window-right", window=(-1, 4), grad_lse=True),
        Case("window-0", window=(0, 0)),
        causal("window-causal", window=(11, 50)),
        Case("window-top-left", window=(5, 2), causal_align="top_left", seq_q=60, seq_kv=40),
        Case("window-outside", window=(3, 0), seq_q=40, seq_kv=12),  # the first queries see nothing
        # Masks.
        Case("mask-bool", mask="bool:bhqk"),
        Case("mask-bool-qk", mask="bool:qk", sinks=True),
        Case("mask-bool-padding", mask="bool:b11k"),
        Case("mask-bool-heads", mask="bool:1h11"),
        causal("mask-bool-causal", mask="bool:b1qk"),
        Case("mask-bool-expanded", mask="bool:BHqk"),
        Case("mask-float", mask="float:bhqk"),
        Case("mask-float-qk", mask="float:qk"),
        Case("mask-float-hqk", mask="float:hqk", seq_q=70),
        causal("mask-float-keys", mask="float:b11k", grad_lse=True),
        Case("mask-float-rows", mask="float:1hq1"),
        Case("mask-float-one", mask="float:1111"),
        Case("mask-float-expanded", mask="float:BHqk"),
        Case("mask-same-dtype", mask="same:b1qk", dropout_p=0.3),
        Case("mask-half", mask="half:1hqk"),
        Case("mask-long-kv", mask="float:11qk", batch=1, heads_q=2, heads_kv=1, seq_q=5, seq_kv=800),
        # The other options, alone and together.
        Case("softcap", softcap=2.0, grad_lse=True),
        Case("alibi", alibi="h"),
        causal("alibi-batch", alibi="bh", seq_q=65, seq_kv=40),
        Case("sinks", sinks=True, grad_lse=True),
        causal("sinks-empty-rows", sinks=True, seq_q=40, seq_kv=20, grad_lse=True),
        Case("scale-0", scale=0.0),
        Case("scale-large", scale=4.0),
        Case("lse", grad_lse=True),
        Case("dropout", dropout_p=0.25),
        causal("dropout-high", dropout_p=0.9, seq_q=65, seq_kv=65, grad_lse=True),
        causal("everything", **everything),
        causal("everything-long", **everything, seq_q=130, seq_kv=600, head_dim=40, head_dim_v=24, heads_q=2),
        causal("everything-bool", **(everything | dict(mask="bool:b1qk", alibi="h", causal_align="top_left"))),
        # Layouts and strides.
        Case("bshd", layout="bshd"),
        causal("bshd-options", **everything, layout="bshd", strides="gaps"),
        Case("strides-transposed", strides="transposed"),
        causal("strides-gaps", strides="gaps", head_dim_v=9),
        Case("strides-qkv", strides="qkv", heads_kv=4, seq_kv=33),
        Case("strides-last", strides="last"),
        causal("strides-expanded", strides="expanded"),
        # Nothing to do, in every way.
        Case("empty-batch", batch=0, mask="float:bhqk", sinks=True),
        Case("empty-q", seq_q=0, sinks=True, grad_lse=True),
        Case("empty-kv", seq_kv=0, grad_lse=True),
        Case("empty-kv-options", seq_kv=0, mask="float:bhqk", sinks=True, alibi="h", softcap=1.0, grad_lse=True),
        Case("empty-q-mask", seq_q=0, mask="float:11qk"),
        # Packed.
        Case("packed", **packed),
        causal("packed-causal", **packed, head_dim=64, grad_lse=True),
        causal("packed-top-left", **packed, causal_align="top_left", window=(6, 0)),
        causal("packed-everything", **(packed | everything), head_dim_v=24),
        Case("packed-mask", **packed, mask="float:b1qk", strides="gaps"),
        Case("packed-mask-keys", **packed, mask="bool:b11k", alibi="bh"),
        causal("packed-decode", lengths_q=(1, 1, 1), lengths_kv=(900, 3, 130), heads_q=8, grad_lse=True),
        Case("packed-dropout", **packed, dropout_p=0.4, strides="qkv-packed"),
        Case("packed-empty", lengths_q=(0, 0), lengths_kv=(0, 3), grad_lse=True),
        Case("packed-empty-kv", lengths_q=(2, 3), lengths_kv=(0, 0), sinks=True),
        Case("packed-no-sequence", lengths_q=(), lengths_kv=()),
        causal("packed-long", lengths_q=(130, 7, 64), lengths_kv=(130, 600, 64), heads_q=2, head_dim=40),
    )


CASES = _cases()

# What the benchmarks time; the tests do not run them.
BENCH_CASES = (
    Case("1k", 1, 32, 32, 1024, 1024, 128),
    Case("1k-causal", 1, 32, 32, 1024, 1024, 128, is_causal=True),
    Case("4k-causal", 1, 32, 32, 4096, 4096, 128, is_causal=True),
    Case("512-d64", 2, 16, 16, 512, 512, 64),
    Case("512-d64-causal", 2, 16, 16, 512, 512, 64, is_causal=True),
    Case("gqa-1k-causal", 1, 32, 8, 1024, 1024, 128, is_causal=True),
    Case("chunk-256-2k-causal", 1, 32, 32, 256, 2048, 128, is_causal=True),
    Case("decode-4k-gqa", 4, 32, 8, 1, 4096, 128),
    Case("train-1k-d64", 1, 16, 16, 1024, 1024, 64),
    Case("train-1k-d64-causal", 1, 16, 16, 1024, 1024, 64, is_causal=True),
)


@dataclass
class Inputs:
    """The arguments of one call: `leaves` get gradients, in the order of `args` and `options`."""

    case: Case
    args: list
    options: dict
    grad_out: Tensor
    grad_lse: Tensor | None
    seed: int = 0
    leaves: dict[str, Tensor] = field(default_factory=dict)

    def cast(self, dtype):
        """The same values in another dtype (slopes and sinks: its accumulation dtype), in tensors of its own."""

        def cast(tensor, dtype):
            return tensor.detach().to(dtype, copy=True)

        args = [cast(x, dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in self.args]
        options = dict(self.options)
        for name in ("alibi_slopes", "sinks"):
            if options[name] is not None:
                options[name] = cast(options[name], acc_dtype(dtype))
        if options["attn_mask"] is not None and options["attn_mask"].is_floating_point():
            options["attn_mask"] = cast(options["attn_mask"], dtype)
        grad_lse = None if self.grad_lse is None else cast(self.grad_lse, acc_dtype(dtype))
        return replace(self, args=args, options=options, grad_out=cast(self.grad_out, dtype), grad_lse=grad_lse).track()

    def track(self):
        leaves = dict(zip("qkv", self.args, strict=False)) | {
            "attn_mask": self.options["attn_mask"],
            "sinks": self.options["sinks"],
        }
        floating = {name: x for name, x in leaves.items() if x is not None and x.is_floating_point()}
        self.leaves = {name: x.requires_grad_() for name, x in floating.items()}
        return self


def make_inputs(case, dtype=torch.float32, device="cpu", seed=0):
    """Fresh random inputs. v is shifted by 1, so that its mean says something. Round every tensor, memory holds NaN."""
    generator = torch.Generator().manual_seed(seed)
    acc = acc_dtype(dtype)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    dim_v = case.head_dim_v or case.head_dim
    batch, seq_q, seq_kv = case.batch, case.seq_q, case.seq_kv
    if case.packed:
        batch = len(case.lengths_q)
        seq_q, seq_kv = max(case.lengths_q, default=0), max(case.lengths_kv, default=0)
        total_q, total_kv = sum(case.lengths_q), sum(case.lengths_kv)
        shapes = [
            (total_q, case.heads_q, case.head_dim),
            *((total_kv, case.heads_kv, d) for d in (case.head_dim, dim_v)),
        ]
        out_shape, lse_shape = (total_q, case.heads_q, dim_v), (case.heads_q, total_q)
    else:
        shapes = [(batch, case.heads_q, seq_q, case.head_dim)]
        shapes += [(batch, case.heads_kv, seq_kv, d) for d in (case.head_dim, dim_v)]
        out_shape, lse_shape = (batch, case.heads_q, seq_q, dim_v), (batch, case.heads_q, seq_q)
    q, k, v = (normal(*shape) for shape in shapes)
    tensors = lay_out([q, k, v + 1], case.strides, case.layout)

    alibi_shape = {None: None, "h": (case.heads_q,), "bh": (batch, case.heads_q)}[case.alibi]
    options = dict(
        attn_mask=make_mask(case.mask, (batch, case.heads_q, seq_q, seq_kv), normal, dtype),
        dropout_p=case.dropout_p,
        is_causal=case.is_causal,
        causal_align=case.causal_align,
        scale=case.scale,
        window=case.window,
        softcap=case.softcap,
        alibi_slopes=None if alibi_shape is None else poisoned(normal(*alibi_shape, dtype=acc).abs() / 4),
        sinks=poisoned(normal(case.heads_q, dtype=acc)) if case.sinks else None,
    )
    args = tensors
    grad_out = normal(*out_shape)
    if case.packed:
        for lengths in (case.lengths_q, case.lengths_kv):
            args.append(torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32))
        args += [seq_q, seq_kv]
    else:
        options["layout"] = case.layout
        if case.layout == "bshd":
            grad_out = grad_out.transpose(1, 2)
    grad_lse = normal(*lse_shape, dtype=acc) if case.grad_lse else None
    return Inputs(case, args, options, grad_out, grad_lse, seed).track()


def poisoned(tensor, gaps=None):
    """A copy of tensor whose storage goes on before and after it (gaps: and after each dimension's end) with NaN."""
    gaps = gaps or [0] * tensor.dim()
    shape = [size + gap for size, gap in zip(tensor.shape, gaps, strict=True)]
    poison = torch.nan if tensor.is_floating_point() else True
    front = 5 if any(gaps) else 8  # 8: rows may be aligned to 16 bytes, as torch's own are
    storage = torch.full((std_math.prod(shape) + 2 * 64,), poison, dtype=tensor.dtype, device=tensor.device)
    view = storage[front : front + std_math.prod(shape)].view(shape)
    for d, size in enumerate(tensor.shape):
        view = view.narrow(d, 0, size)
    return view.copy_(tensor)


def lay_out(tensors, strides, layout):
    """q, k, v, given [batch, heads, seq, head_dim] or packed, laid out in memory, in the layout's order of dimensions.

    "contiguous"; "transposed": bshd in memory where bhsd is said, and the other way round; "gaps": room after every
    dimension's end; "qkv": slices of one tensor; "last": the last dimension is not contiguous; "expanded": k and v
    share one batch by stride 0.
    """

    def heads_next_to_dim(x):
        return x.transpose(1, 2)

    if strides == "qkv-packed":
        width = [x.shape[-1] for x in tensors]
        rows = max(x.shape[0] for x in tensors)
        heads = sum(x.shape[1] for x in tensors)
        both = poisoned(tensors[0].new_full((rows, heads, max(width)), torch.nan))
        first, out = 0, []
        for x in tensors:
            out.append(both[: x.shape[0], first : first + x.shape[1], : x.shape[2]].copy_(x))
            first += x.shape[1]
        return [x.detach() for x in out]
    if strides == "qkv":
        qkv = poisoned(torch.stack([heads_next_to_dim(x) for x in tensors], dim=2))
        tensors = [heads_next_to_dim(x) for x in qkv.unbind(2)]
    elif strides == "transposed":
        tensors = [heads_next_to_dim(poisoned(heads_next_to_dim(x))) for x in tensors]
    elif strides == "last":
        tensors = [poisoned(x.transpose(-1, -2).contiguous()).transpose(-1, -2) for x in tensors]
    elif strides == "expanded":
        k, v = (poisoned(x[:1]).expand(x.shape) for x in tensors[1:])
        tensors = [poisoned(tensors[0]), k, v]
    elif strides == "gaps":
        tensors = [poisoned(x, [1, 2, 3, 5][-x.dim() :]) for x in tensors]
    elif layout == "bhsd":
        tensors = [poisoned(x) for x in tensors]
    else:
        tensors = [heads_next_to_dim(poisoned(heads_next_to_dim(x))) for x in tensors]
    if layout == "bshd":
        tensors = [heads_next_to_dim(x) for x in tensors]
    return [x.detach() for x in tensors]


def make_mask(spec, full, normal, dtype):
    """A random mask; spec is "dtype:shape".

    dtype: "bool", "float" (float32; float64 with float64 inputs), "half" (float16) or "same" (as the inputs). shape:
    one letter of "bhqk" a dimension, in full size; "1" for a size of 1; a capital for one value expanded by stride 0.
    Some entries, and some whole rows, are masked out.
    """
    if spec is None:
        return None
    dtype_name, shape_name = spec.split(":")
    sizes = dict(zip("bhqk", full, strict=True))
    own = [sizes.get(letter, 1) for letter in shape_name]  # capitals: 1 for now
    values = normal(*own, dtype=torch.float64)
    hidden = values > 0.8
    if "q" in shape_name and "k" in shape_name:
        hidden[..., 3::11, :] = True
    if dtype_name == "bool":
        mask = ~hidden
    else:
        mask = values.masked_fill(hidden, -torch.inf)
        mask = mask.to({"float": acc_dtype(dtype), "half": torch.float16, "same": dtype}[dtype_name])
    mask = poisoned(mask)
    return mask.expand([sizes.get(letter.lower(), 1) for letter in shape_name]).detach()


def run(inputs, backend=None, grads=True, compute_dtype=None, function=None):
    """{"out", "lse", and with grads "dq", "dk", "dv", "dattn_mask", "dsinks"} of one call.

    compute_dtype: on `math`, with this dtype for the arithmetic. function: in place of attn or attn_varlen.
    """
    options = inputs.options | dict(return_lse=True)
    if compute_dtype is not None:
        function = math_varlen if inputs.case.packed else math
        options["compute_dtype"] = compute_dtype
    elif backend is not None:
        options["backend"] = backend
    function = function or (attn_varlen if inputs.case.packed else attn)
    torch.manual_seed(inputs.seed)
    with torch.set_grad_enabled(grads):
        out, lse = function(*inputs.args, **options)
    results = dict(out=out.detach(), lse=lse.detach())
    if grads:
        outputs, grad_outputs = [out], [inputs.grad_out]
        if inputs.grad_lse is not None:
            outputs, grad_outputs = [out, lse], [inputs.grad_out, inputs.grad_lse]
        gradients = torch.autograd.grad(outputs, list(inputs.leaves.values()), grad_outputs)
        results |= {f"d{name}": gradient for name, gradient in zip(inputs.leaves, gradients, strict=True)}
    return results


@dataclass(frozen=True)
class Error:
    """One result against the definition in float64: the largest error, and what the rule allows."""

    name: str
    worst: float
    allowed: float

    @property
    def ratio(self):
        return self.worst / self.allowed if self.allowed > 0 else (std_math.inf if self.worst > 0 else 0.0)

    def __str__(self):
        return f"{self.name}: error {self.worst:.3g}, allowed {self.allowed:.3g} (ratio {self.ratio:.2f})"


def errors(inputs, results):
    """An Error for each of the results of `run`, by the rule of FlashAttention's tests.

    Allowed is 2 times (gradients: 3 times) the error of plain torch operations in the same dtype, plus a few units in
    the last place of the largest value. Sums in the accumulation dtype may also be taken in another order than torch's:
    sqrt(n) roundings for n terms. And what cancels leaves the roundings of its terms: in a gradient those of
    grad_out . out, which has the inputs' dtype, and in exp(score - lse) that of lse.
    """
    dtype, acc = inputs.args[0].dtype, acc_dtype(inputs.args[0].dtype)
    grads = "dq" in results
    exact = run(inputs.cast(torch.float64), "math", grads)
    # float64 has nothing more exact to be measured against: its plain error is float32's, scaled.
    plain_dtype, unit = (torch.float32, 2.0**-29) if dtype == torch.float64 else (dtype, 1.0)
    plain_inputs = inputs.cast(plain_dtype)
    plain = run(plain_inputs, grads=grads, compute_dtype=plain_dtype)
    if plain_dtype != torch.float32:  # lse is of the accumulation dtype, and so are its errors
        plain["lse"] = run(plain_inputs, grads=False, compute_dtype=torch.float32)["lse"]

    eps = torch.finfo(acc).eps
    q, k, v = (x.detach() for x in inputs.args[:3])
    rows = max(max(x.numel() // x.shape[-1] for x in (q, k, v)), 1)
    mask = inputs.options["attn_mask"]
    scale = inputs.case.scale if inputs.case.scale is not None else q.shape[-1] ** -0.5
    gradients = max((largest(x) for name, x in exact.items() if name.startswith("d")), default=0.0)
    products = torch.finfo(dtype).eps * rms(inputs.grad_out) * rms(v) * v.shape[-1] ** 0.5
    leverage = {"dq": scale * largest(k), "dk": scale * largest(q), "dsinks": rows**0.5}
    found = []
    for name, result in results.items():
        factor, terms, size, slack = 2, rows, largest(v), 0.0
        if name == "lse":
            size, slack = max(1.0, largest(exact[name])), 8 * eps  # exp and tanh may be units in the last place off
        elif name != "out":
            factor, size = 3, gradients
            slack = products * max(1.0, leverage.get(name, 0.0)) + eps * largest(exact["lse"]) * gradients
        if name == "dattn_mask" and mask.numel():
            terms = max(rows**2 / mask.numel(), rows)
            slack += torch.finfo(result.dtype).eps * largest(exact[name])  # a mask may be coarser than q
        allowed = factor * distance(plain[name], exact[name]) * unit + rounding(exact[name], result.dtype)
        found.append(Error(name, distance(result, exact[name]), allowed + terms**0.5 * eps * size + slack))
    return found


def largest(tensor):
    finite = tensor[torch.isfinite(tensor)]
    return finite.abs().max().item() if finite.numel() else 0.0


def rms(tensor):
    return tensor.double().square().mean().sqrt().item() if tensor.numel() else 0.0


def distance(result, exact):
    """The largest difference; infinite where one has a NaN or an infinity that the other has not."""
    assert result.shape == exact.shape, f"expected shape {list(exact.shape)}, got {list(result.shape)}"
    result = result.double()
    finite = torch.isfinite(exact)
    if not torch.equal(result[~finite].nan_to_num(0.5), exact[~finite].nan_to_num(0.5)):
        return std_math.inf
    difference = (result[finite] - exact[finite]).abs()
    return difference.nan_to_num(std_math.inf).max().item() if difference.numel() else 0.0


def rounding(exact, dtype):
    """Twice the error of adding and subtracting 0.3 in dtype."""
    exact = exact[torch.isfinite(exact)].to(dtype)
    return 2 * ((exact + 0.3 - 0.3) - exact).abs().max().item() if exact.numel() else 0.0


def check(case, dtype=torch.float32, device="cpu", backend=None, grads=True, seed=0, limit=1.0) -> Mapping[str, Error]:
    """Runs the case and raises AssertionError where a result is less exact than the rule asks (limit times that)."""
    inputs = make_inputs(case, dtype, device, seed)
    found = errors(inputs, run(inputs, backend, grads))
    assert all(error.ratio <= limit for error in found), f"{case}, {dtype}:\n" + "\n".join(map(str, found))
    return {error.name: error for error in found}
