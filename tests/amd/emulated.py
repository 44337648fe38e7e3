"""The GPU kernels, compiled for the CPU: the real hipify, then clang with emulator/hip in the place of HIP.

build("gfx9") gives a library whose attn_fwd works on numpy arrays; installed() puts one behind torch's CPU ops, so that
flash_ext.attn and all of flash_ext.testing run on the emulated kernels.
"""

import fcntl
import hashlib
import importlib.util
import math
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pybind11
import torch
from torch.utils.hipify import hipify_python

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
EMULATOR = HERE / "emulator"
BUILD = ROOT / "build/amd"
AMD = {f"gfx{n}": ["-D__HIP__", f"-D__GFX{n}__"] for n in (9, 11, 12)}
NVIDIA = {f"sm{n}": [f"-DFX_EMULATE_SM{n}", f"-I{EMULATOR}/nvidia"] for n in (86, 90)}
FAMILIES = AMD | NVIDIA
PTX = [("tile/nvidia/ptx.h", EMULATOR / "nvidia/ptx.h")]
OLDEST_CLANG = 18  # _Float16, __bf16 and vectors of them on x86

COMMON = ("-std=c++20 -O2 -g0 -march=x86-64-v3 -fPIC -fno-strict-aliasing -w -DUSE_ROCM").split()
CHECKED = (
    "-O1 -fsanitize=thread -mllvm -tsan-instrument-func-entry-exit=0 -mllvm -tsan-instrument-atomics=0 -x c++"
).split()


@cache
def clang():
    """clang++ that can compile the emulator, or None."""
    names = [os.environ.get("CLANG", "")] + [f"clang++-{n}" for n in range(30, OLDEST_CLANG - 1, -1)] + ["clang++"]
    for name in filter(shutil.which, names):
        text = subprocess.run([name, "--version"], capture_output=True, text=True).stdout
        match = re.search(r"clang version (\d+)", text)
        if match and int(match[1]) >= OLDEST_CLANG:
            return name
    return None


def missing():
    """Why the emulator cannot be built here, or None."""
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        return "the lane emulator needs Linux on x86-64"
    return None if clang() else f"the lane emulator needs clang++ {OLDEST_CLANG} or newer (or CLANG=...)"


def sources():
    """What libraries are made of, but for the instruction sets of CPUs."""
    folders = ROOT / "csrc/attn", ROOT / "csrc/tile", EMULATOR
    return sorted([path for folder in folders for path in folder.rglob("*.*")] + list((ROOT / "csrc").glob("*.h")))


@cache
def hipified():
    """A copy of the GPU sources in build/amd, as torch's hipify rewrites it for a ROCm build."""
    copy = BUILD / "csrc"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(ROOT / "csrc", copy, ignore=shutil.ignore_patterns("cpu", "sm90", "*.cpp"))
    hipify_python.hipify(
        project_directory=str(copy),
        output_directory=str(copy),
        header_include_dirs=[str(copy)],
        includes=[f"{copy}/*"],
        extra_files=sorted(map(str, copy.rglob("*.cu"))),
        show_progress=False,
        is_pytorch_extension=True,
        hipify_extra_files_only=True,
    )
    return copy


def edited(copy, edits):
    """A copy of hipified sources; edits are (file, text, other text), or (file, path of what takes its place)."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(hipified(), copy)
    for file, *change in edits:
        path = copy / file
        renamed = path.with_name(f"{path.stem}_hip{path.suffix}") if path.suffix == ".h" else path.with_suffix(".hip")
        path = renamed if renamed.is_file() else path
        if len(change) == 1:
            shutil.copy(change[0], path)
            continue
        text, (old, new) = path.read_text(), change
        assert text.count(old) == 1, f"{path} has {text.count(old)} times: {old}"
        path.write_text(text.replace(old, new))
    return copy


@contextmanager
def alone():
    """One process or thread at a time: pytest -n."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def compile(source, flags):
    """The object file of a source; kept under the digest of what the preprocessor makes of it."""
    command = [clang(), *flags, str(source)]
    text = subprocess.run([*command, "-E", "-P"], check=True, capture_output=True).stdout
    kept = BUILD / "objects" / f"{source.stem}-{digest(*flags_of(source), text)}.o"
    if not kept.is_file():
        kept.parent.mkdir(exist_ok=True)
        unfinished = kept.with_suffix(".unfinished")
        subprocess.run([*command, "-c", "-o", str(unfinished)], check=True)
        unfinished.rename(kept)
    return kept


def flags_of(source):
    return [*COMMON, *CHECKED] if source.suffix == ".hip" else COMMON


def build(family, edits=(), only=""):
    """A Library (emulator/binding.cpp) of one family's kernels; only: of those in *_hd*.hip, whose name it finds."""
    name = digest(family, repr(edits), only, *COMMON, *CHECKED, *(path.read_bytes() for path in sources()))
    edits = [*edits, *(PTX if family in NVIDIA else ())]
    library = BUILD / f"kernels_{name}.so"
    with alone():
        if not library.is_file():
            copy = edited(BUILD / name, edits) if edits else hipified()
            link(library, family, copy, only)
            if edits:
                shutil.rmtree(copy)
        return binding().Library(str(library))


def link(library, family, copy, only):
    kernels = [path for path in sorted(copy.rglob("*.hip")) if "_hd" not in path.name or re.search(only, path.name)]
    own = ("nvidia/mma", "nvidia/async") if family in NVIDIA else ("matrix",)
    host = [EMULATOR / f"{name}.cpp" for name in ("kernels", "simt", *own)]
    flags = [*FAMILIES[family], f"-I{EMULATOR}", f"-I{copy}"]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        objects = list(pool.map(lambda path: compile(path, [*flags_of(path), *flags]), [*host, *kernels]))
    # Its own symbols come first: several of these libraries are loaded. Lazily: some kernels may be left out.
    command = [clang(), "-shared", "-Wl,-z,lazy", "-Wl,-Bsymbolic", f"-Wl,-soname,{library.name}"]
    unfinished = library.with_suffix(".unfinished")
    subprocess.run([*command, "-o", unfinished, *objects], check=True)
    unfinished.rename(library)


@cache
def binding():
    """The Python module; apart from the kernels, because what is thread_local beside them is their shared memory."""
    includes = EMULATOR, ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")
    compiled = compile(EMULATOR / "binding.cpp", [*COMMON, "-fvisibility=hidden", *(f"-I{path}" for path in includes)])
    library = BUILD / f"binding_{compiled.stem.split('-')[-1]}.so"
    if not library.is_file():
        subprocess.run([clang(), "-shared", "-o", library, compiled], check=True)
    spec = importlib.util.spec_from_file_location("binding", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def digest(*parts):
    hash = hashlib.sha256()
    for part in parts:
        hash.update(part if isinstance(part, bytes) else part.encode())
    return hash.hexdigest()[:16]


class Ops:
    """torch's ops on an emulated GPU with this many multiprocessors; they decide into how many parts keys are split."""

    def __init__(self, library, multiprocessors):
        self.library, self.multiprocessors = library, multiprocessors

    def attn_fwd(
        self, q, k, v, scale, window_left=-1, window_right=-1, top_left=False, out_bshd=False, softcap=0.0,
        dropout_p=0.0, attn_mask=None, alibi_slopes=None, sinks=None, rng_state=None, deterministic=False, kernels=0,
    ):  # fmt: skip
        batch, heads_q, seq_q, _ = q.shape
        out = guarded((batch, heads_q, seq_q, v.shape[3]), q.dtype, bshd=out_bshd)
        lse = guarded((batch, heads_q, seq_q), torch.float32)
        options = options_of(
            scale, window_left, window_right, top_left, softcap, dropout_p, attn_mask, alibi_slopes, sinks, rng_state
        )
        return self.forward(q, k, v, out, lse, options)

    def attn_varlen_fwd(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, window_left=-1, window_right=-1,
        top_left=False, softcap=0.0, dropout_p=0.0, attn_mask=None, alibi_slopes=None, sinks=None, rng_state=None,
        deterministic=False, kernels=0,
    ):  # fmt: skip
        total_q, heads_q, _ = q.shape
        out, lse = guarded((total_q, heads_q, v.shape[2]), q.dtype), guarded((heads_q, total_q), torch.float32)
        options = options_of(
            scale, window_left, window_right, top_left, softcap, dropout_p, attn_mask, alibi_slopes, sinks, rng_state
        )
        return self.forward(
            q, k, v, out, lse, options | packing_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        )

    def attn_bwd(
        self, grad_out, grad_lse, q, k, v, out, lse, scale, window_left, window_right, top_left, softcap, dropout_p,
        attn_mask, alibi_slopes, sinks, rng_state, need_mask_grad, deterministic, kernels=0,
    ):  # fmt: skip
        options = options_of(
            scale, window_left, window_right, top_left, softcap, dropout_p, attn_mask, alibi_slopes, sinks, rng_state
        )
        return self.backward(
            grad_out, grad_lse, q, k, v, out, lse, options, attn_mask if need_mask_grad else None, sinks, deterministic
        )

    def attn_varlen_bwd(
        self, grad_out, grad_lse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale,
        window_left, window_right, top_left, softcap, dropout_p, attn_mask, alibi_slopes, sinks, rng_state,
        need_mask_grad, deterministic, kernels=0,
    ):  # fmt: skip
        options = options_of(
            scale, window_left, window_right, top_left, softcap, dropout_p, attn_mask, alibi_slopes, sinks, rng_state
        ) | packing_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return self.backward(
            grad_out, grad_lse, q, k, v, out, lse, options, attn_mask if need_mask_grad else None, sinks, deterministic
        )

    def forward(self, q, k, v, out, lse, options):
        arrays = [to_numpy(with_contiguous_rows(x)) for x in (q, k, v)] + [to_numpy(out), to_numpy(lse)]
        self.library.attn_fwd(*arrays, self.multiprocessors, options)
        check_guards(out, lse)
        return out, lse

    def backward(self, grad_out, grad_lse, q, k, v, out, lse, options, mask, sinks, deterministic):
        dq, dk, dv = (guarded_like(x) for x in (q, k, v))
        nothing = torch.empty(0)
        dmask = nothing if mask is None else guarded(mask.shape, torch.float32).zero_()
        dsinks = nothing if sinks is None else guarded(sinks.shape, torch.float32)
        grads = dict(out=with_contiguous_rows(grad_out), q=dq, k=dk, v=dv)
        if grad_lse is not None:
            grads["lse"] = grad_lse.contiguous()
        if dmask.numel():
            grads["attn_mask"] = dmask
        if sinks is not None:
            grads["sinks"] = dsinks
        arrays = [to_numpy(with_contiguous_rows(x)) for x in (q, k, v, out)] + [to_numpy(lse)]
        grads = {name: to_numpy(x) for name, x in grads.items()} | dict(deterministic=deterministic)
        self.library.attn_bwd(*arrays, self.multiprocessors, options, grads)
        check_guards(dq, dk, dv, *([] if mask is None else [dmask]), *([] if sinks is None else [dsinks]))
        return dq, dk, dv, dmask if mask is None else dmask.to(mask.dtype), dsinks


def options_of(
    scale, window_left, window_right, top_left, softcap, dropout_p, attn_mask, alibi_slopes, sinks, rng_state
):
    tensors = dict(attn_mask=attn_mask, alibi_slopes=alibi_slopes, sinks=sinks, rng_state=rng_state)
    return dict(
        scale=scale, window_left=window_left, window_right=window_right, top_left=top_left, softcap=softcap,
        dropout_threshold=min(round(dropout_p * 65536), 65535),
        **{name: to_numpy(x) for name, x in tensors.items() if x is not None},
    )  # fmt: skip


def packing_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    lengths = dict(cu_seqlens_q=to_numpy(cu_seqlens_q), cu_seqlens_k=to_numpy(cu_seqlens_k))
    return lengths | dict(max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k)


def to_numpy(tensor):
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def with_contiguous_rows(tensor):
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


GUARD = 64


def guarded(shape, dtype, bshd=False):
    """A tensor of NaNs between NaNs; bshd: with heads and rows exchanged in memory."""
    if bshd:
        return guarded([shape[i] for i in (0, 2, 1, 3)], dtype).transpose(1, 2)
    storage = torch.full((GUARD + math.prod(shape) + GUARD,), torch.nan, dtype=dtype)
    return storage[GUARD:-GUARD].view(shape)


def guarded_like(tensor):
    like = with_contiguous_rows(torch.empty_like(tensor))
    return guarded((like.numel(),), like.dtype).as_strided(like.shape, like.stride())


def check_guards(*tensors):
    for tensor in tensors:
        storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        assert storage[:GUARD].isnan().all() and storage[-GUARD:].isnan().all(), "a kernel wrote beyond its output"


@contextmanager
def installed(library, multiprocessors=1, order=0):
    """flash_ext.attn(..., backend="cpu") runs on the library's kernels; order: see emulator/simt.h."""
    ops, registration = Ops(library, multiprocessors), torch.library.Library("flash_ext", "IMPL")
    library.set_order(order)
    for name in ("attn_fwd", "attn_varlen_fwd", "attn_bwd", "attn_varlen_bwd"):
        registration.impl(name, getattr(ops, name), "CPU", allow_override=True)
    try:
        yield
    finally:
        registration._destroy()
