"""Which backend runs a call, and why."""

import importlib
from functools import cache
from typing import Any

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


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    attn_mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    deterministic: bool | None = None,
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
    if attn_mask is None:  # the only floating-point tensor that may come by position
        attn_mask = next((x for x in args if isinstance(x, Tensor) and x.is_floating_point()), None)
    for name in BACKENDS:
        reason = obstacle(name, query, value, attn_mask, alibi_slopes, deterministic)
        if reason is None and wanted not in (None, name):
            reason = f"{wanted!r} is asked for"
        elif reason is None and chosen is not None:
            reason = f"{chosen!r} is faster"
        if reason is None:
            chosen = name
        else:
            reasons[name] = reason
    shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in (("q", query), ("k", key), ("v", value)))
    return Explanation(chosen, reasons, f"{shapes}, {str(query.dtype).removeprefix('torch.')} on {query.device}")


def select(query, value, attn_mask, alibi_slopes, deterministic, backend):
    """The name of the backend to run: the wanted one, else the fastest that can."""
    wanted = backend or forced
    call = query, value, attn_mask, alibi_slopes, deterministic
    if wanted is None:
        return next(name for name in BACKENDS if obstacle(name, *call) is None)
    check_name(wanted)
    reason = obstacle(wanted, *call)
    if reason is not None:
        raise RuntimeError(f"backend: {wanted!r} cannot run this call: {reason}")
    return wanted


def obstacle(name, query, value, attn_mask, alibi_slopes, deterministic):
    """Why this backend cannot run the call; None if it can."""
    device = query.device.type
    if name == "math":
        return None
    if name != "cpu" and device != "cuda":
        return f"it needs a GPU, the tensors are on {device}"
    if name == "sm90":
        return "it is not in this version"
    if name == "cpu" and device != "cpu":
        return f"the tensors are on {device}"
    if native is None:
        return f"the extension flash_ext._C did not load ({native_error})"
    if torch.is_grad_enabled() and alibi_slopes is not None and alibi_slopes.requires_grad:
        return "alibi_slopes requires a gradient, which only 'math' computes"
    if name == "cpu":
        return None if query.dtype in CPU_DTYPES else f"it has no {str(query.dtype).removeprefix('torch.')}"
    return gpu_obstacle(query, value, attn_mask, deterministic)


def gpu_obstacle(query, value, attn_mask, deterministic):
    if not GPU_KERNELS:
        return "the extension was built without GPU kernels (FLASH_EXT_DEVICE=cuda builds them)"
    dtype = query.dtype
    if dtype != torch.float64 and torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
    if dtype not in GPU_DTYPES:
        return f"it has float16, bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"
    head_dim = max(query.shape[-1], value.shape[-1])
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
    built = native.build_info()
    return info | {"extension": "loaded", "build_torch": built.pop("torch")} | built
