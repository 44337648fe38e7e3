"""Which backend runs a call, and why."""

import importlib
import inspect
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._version import __version__

try:
    native = importlib.import_module("flash_ext._C")
except ImportError as error:  # the source folder, where it was not built, goes before an installed flash_ext
    native, native_error = None, f"{error}; `pip install -e .` builds it in the source folder"
else:
    native_error = None

BACKENDS = {
    "sm90": "Hopper kernels",
    "gpu": "portable GPU kernels",
    "cpu": "native C++ for CPUs",
    "math": "plain torch operations, the definition: any device and dtype, materialises the scores",
}  # fastest first
CPU_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
GPU_DTYPES = frozenset((torch.bfloat16, torch.float16, torch.float32))
GPU_HEAD_DIM = 256
HIP_HEAD_DIM_FLOAT32 = 128  # the backward of more does not fit 64 KB of shared memory
GPU_KERNELS = native is not None and native.build_info()["device"] in ("cuda", "rocm")

SM90_DTYPES = frozenset((torch.bfloat16, torch.float16))
KERNELS = {"gpu": 1, "sm90": 2}  # the ops' argument; 0: the fastest that the device has

# Set by use_backend. Process-wide, so that torch.compile guards on it and autograd's threads agree.
forced = None


class use_backend:
    """Runs every call inside the `with` block on one backend, as `torch.nn.attention.sdpa_kernel` does.

    name: "math", "cpu", "gpu" or "sm90". A call that this backend cannot run raises RuntimeError; a call's own
    `backend` argument goes first. The choice holds for the whole process, other threads included; torch.compile
    recompiles where it changes.
    """

    def __init__(self, name: str) -> None:
        check_name(name)
        self.name = name

    def __enter__(self) -> None:
        global forced
        self.previous = forced
        forced = self.name

    def __exit__(self, *exception: object) -> None:
        global forced
        forced = self.previous


class Explanation:
    """What `explain` found: the `backend` that runs the call, or None, and `reasons`, why the others do not."""

    def __init__(self, backend: str | None, reasons: dict[str, str], call: str) -> None:
        self.backend, self.reasons, self.call = backend, reasons, call

    def __str__(self) -> str:
        lines = [self.call]
        for name, what in BACKENDS.items():
            runs = name == self.backend
            lines.append(f"{'->' if runs else '  '} {name:5} {what if runs else 'no: ' + self.reasons[name]}")
        return "\n".join(lines)

    __repr__ = __str__


class Call(NamedTuple):
    """What of a call decides which backends can run it. Tensors are [batch, heads, seq, head_dim] or packed."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    alibi_slopes: Tensor | None = None
    deterministic: bool | None = None
    softcap: float = 0.0
    dropout_p: float = 0.0
    lengths: tuple[int, int, int] | None = None  # packed: sequences, the longest of the queries, of the keys


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    backend: str | None = None,
    **options: Any,
) -> Explanation:
    """Says which backend `attn` (or `attn_varlen`) would run, and in a sentence each why not the others.

    Takes the arguments of either. Returns an object to print, with `.backend` (a name, or None where the wanted backend
    cannot run the call) and `.reasons` (name -> sentence).
    """
    wanted = backend or forced
    if wanted is not None:
        check_name(wanted)
    reasons, chosen = {}, None
    call = call_of(query, key, value, *args, **options)
    for name in BACKENDS:
        reason = obstacle(name, call)
        if reason is None and wanted not in (None, name):
            reason = f"{wanted!r} is asked for"
        elif reason is None and chosen is not None:
            reason = f"{chosen!r} is faster"
        elif reason is None and wanted is None and name == "sm90" and too_few_rows(call):
            reason = "'gpu' is faster with so few queries"
        if reason is None:
            chosen = name
        else:
            reasons[name] = reason
    shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in (("q", query), ("k", key), ("v", value)))
    return Explanation(chosen, reasons, f"{shapes}, {str(query.dtype).removeprefix('torch.')} on {query.device}")


def call_of(query, key, value, *args, **options):
    from .attn import attn, attn_varlen

    packed = query.ndim == 3
    bound = inspect.signature(attn_varlen if packed else attn).bind_partial(query, key, value, *args, **options)
    given, lengths = bound.arguments, None
    if packed and {"cu_seqlens_q", "max_seqlen_q", "max_seqlen_k"} <= given.keys():
        lengths = len(given["cu_seqlens_q"]) - 1, int(given["max_seqlen_q"]), int(given["max_seqlen_k"])
    if given.get("layout") == "bshd":
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    names = ("attn_mask", "alibi_slopes", "deterministic", "softcap", "dropout_p")
    return Call(query, key, value, **{name: given[name] for name in names if name in given}, lengths=lengths)


def select(call, backend):
    """The name of the backend to run: the wanted one, else the fastest that can, where "gpu" stands for "sm90", too."""
    wanted = backend or forced
    if wanted is None:
        return next(name for name in BACKENDS if name != "sm90" and obstacle(name, call) is None)
    check_name(wanted)
    reason = obstacle(wanted, call)
    if reason is not None:
        raise RuntimeError(f"backend: {wanted!r} cannot run this call: {reason}")
    return wanted


def surely_native(query, value, attn_mask):
    """Whether "cpu" or "gpu" runs calls on such tensors, whatever else they ask. False: `select` has to look."""
    if forced is not None or native is None:
        return False
    if query.is_cpu:
        return query.dtype in CPU_DTYPES
    return (
        query.is_cuda
        and GPU_KERNELS
        and query.dtype in GPU_DTYPES
        and query.shape[-1] <= GPU_HEAD_DIM
        and value.shape[-1] <= GPU_HEAD_DIM
        and (attn_mask is None or not attn_mask.requires_grad)
        and not torch.version.hip
        and not torch.compiler.is_compiling()
        and device_obstacle(query.get_device()) is None
    )


def obstacle(name, call):
    """Why this backend cannot run the call; None if it can."""
    query = call.query
    device = query.device.type
    if name == "math":
        return None
    if name != "cpu" and device != "cuda":
        return f"it needs a GPU, the tensors are on {device}"
    if name == "cpu" and device != "cpu":
        return f"the tensors are on {device}"
    if native is None:
        return f"the extension flash_ext._C did not load ({native_error})"
    if torch.is_grad_enabled() and call.alibi_slopes is not None and call.alibi_slopes.requires_grad:
        return "alibi_slopes requires a gradient, which only 'math' computes"
    if name == "cpu":
        return None if query.dtype in CPU_DTYPES else f"it has no {str(query.dtype).removeprefix('torch.')}"
    return gpu_obstacle(call) or (sm90_obstacle(call) if name == "sm90" else None)


def dtype_on_gpu(query):
    if query.dtype != torch.float64 and torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    return query.dtype


def gpu_obstacle(call):
    if not GPU_KERNELS:
        return "the extension was built without GPU kernels (FLASH_EXT_DEVICE=cuda builds them)"
    query, attn_mask, deterministic = call.query, call.attn_mask, call.deterministic
    dtype = dtype_on_gpu(query)
    if dtype not in GPU_DTYPES:
        return f"it has float16, bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"
    head_dim = max(query.shape[-1], call.value.shape[-1])
    if head_dim > GPU_HEAD_DIM:
        return f"it has head_dim up to {GPU_HEAD_DIM}, not {head_dim}"
    if torch.version.hip and dtype == torch.float32 and head_dim > HIP_HEAD_DIM_FLOAT32:
        return f"it has head_dim up to {HIP_HEAD_DIM_FLOAT32} in float32 on AMD, not {head_dim}"
    if attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled():
        if deterministic is None:
            deterministic = torch.are_deterministic_algorithms_enabled()
        if deterministic and is_broadcast(attn_mask, query):
            return "a broadcast attn_mask requires a gradient, which it cannot sum deterministically"
    if torch.version.hip or torch.compiler.is_compiling():  # Dynamo cannot follow the cache; the op itself would raise
        return None
    return device_obstacle(query.device.index)


def sm90_obstacle(call):
    """Beyond gpu_obstacle. The op, which knows the tensors as they are at last, checks what is said of them again."""
    if "sm_90a" not in native.build_info()["archs"]:
        return "the extension was built without sm_90a (TORCH_CUDA_ARCH_LIST=9.0a)"
    dtype = dtype_on_gpu(call.query)
    if dtype not in SM90_DTYPES:
        return f"it has float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if not torch.compiler.is_compiling() and torch.cuda.get_device_capability(call.query.device.index) != (9, 0):
        return "it needs a Hopper GPU (sm_90)"
    if call.key.shape[2 if call.key.ndim == 4 else 0] == 0:
        return "there is no key"
    for name, x in (("q", call.query), ("k", call.key), ("v", call.value)):
        if x.shape[-1] % 8 or not x.shape[-1]:
            return f"{name}: it has head_dim in multiples of 8, not {x.shape[-1]}"
        if x.stride(-1) == 1 and not in_chunks(x):  # else it is copied
            return f"{name}: it needs rows aligned to 16 bytes, and none that stand for several"
    return None


def in_chunks(x):
    strides = [x.stride(d) for d in range(x.ndim - 1) if x.shape[d] > 1]
    return all(0 < stride and stride % 8 == 0 for stride in strides) and x.storage_offset() % 8 == 0


def too_few_rows(call):
    """Whether the portable kernels are faster, which share tiles among heads and divide keys; as csrc/sm90/fwd.cu."""
    batch, seq_q, seq_kv = call.lengths or (call.query.shape[0], call.query.shape[-2], call.key.shape[-2])
    heads = call.query.shape[-3] if call.lengths is None else call.query.shape[-2]
    return seq_q <= 64 or (batch * heads * -(-seq_q // 128) < 64 and seq_kv > 1024)


def is_broadcast(attn_mask, query):
    """Whether several scores may share an element of the mask; of packed tensors always."""
    rows = query.numel() // max(query.shape[-1], 1)
    return attn_mask.shape[-1] == 1 or attn_mask.numel() != rows * attn_mask.shape[-1]


@cache
def device_obstacle(index):
    major, minor = torch.cuda.get_device_capability(index)
    return None if major >= 8 else f"it needs sm_80 or newer, this GPU is sm_{major}{minor}"


def check_name(name):
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, BACKENDS))}, got {name!r}")


def build_info() -> dict[str, str]:
    """What is installed, a dict of strings: "torch" is the one that runs, "build_torch" the one it was built with."""
    info = {"flash_ext": __version__, "torch": torch.__version__}
    if native is None:
        return info | {"extension": f"not loaded: {native_error}"}
    from . import usual

    built = native.build_info()
    info |= {"extension": "loaded", "autograd": "C++" if usual.call else f"Python: {usual.obstacle}"}
    return info | {"build_torch": built.pop("torch")} | built
