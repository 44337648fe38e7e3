"""Runs every GPU kernel once (float16 has bfloat16's code), for NVIDIA's checker; the tests check the results.

compute-sanitizer --tool memcheck python tests/gpu_sanitizer.py
compute-sanitizer --tool racecheck python tests/gpu_sanitizer.py sm90           # Hopper's kernels alone
compute-sanitizer --tool racecheck python tests/gpu_sanitizer.py sm90 64 128    # of these head_dims alone
compute-sanitizer --tool synccheck python tests/gpu_sanitizer.py
"""

import sys

import torch

import flash_ext
from flash_ext import backends

HEAD_DIMS = (32, 64, 96, 128, 192, 256)
SM90_HEAD_DIMS = (32, 64, 80, 96, 128, 192, 256)


def tensors(head_dim, dtype, seq_q, seq_kv, heads_kv=1):
    shapes = (2, seq_q), (heads_kv, seq_kv), (heads_kv, seq_kv)
    return [torch.randn(1, *shape, head_dim, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes]


def step(q, k, v, backend="gpu", **options):
    out = flash_ext.attn(q, k, v, **options, backend=backend)
    torch.autograd.grad(out, (q, k, v), torch.ones_like(out))


def hopper(head_dims):
    for head_dim in head_dims:
        for deterministic in (False, True):
            step(*tensors(head_dim, torch.bfloat16, 300, 400), "sm90", is_causal=True, deterministic=deterministic)
        step(*tensors(head_dim, torch.bfloat16, 300, 300, heads_kv=2), "sm90", window=(60, 20))
        options = dict(softcap=3.0, alibi_slopes=torch.ones(2, device="cuda"))
        for seq_kv in (496, 500, 431):  # whose mask can be read in eights, in pairs, and not
            for dtype in (torch.bfloat16, torch.float32):
                mask = torch.randn(400, seq_kv, device="cuda", dtype=dtype, requires_grad=True)
                q, k, v = tensors(head_dim, torch.bfloat16, 400, seq_kv)
                for dropout_p in (0.0, 0.2):
                    step(q, k, v, "sm90", attn_mask=mask, dropout_p=dropout_p, **options)
            step(q, k, v, "sm90", attn_mask=mask > 0)
        with torch.no_grad():
            q, k, v = tensors(head_dim, torch.bfloat16, 400, 500)
            flash_ext.attn(q, k, v, is_causal=True, sinks=torch.zeros(2, device="cuda"), backend="sm90")
            flash_ext.attn(q, k, v, window=(100, 20), backend="sm90")
            flash_ext.attn(*tensors(head_dim - 8, torch.bfloat16, 300, 70), backend="sm90")
            q, k, v = (torch.randn(700, 2, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
            starts = torch.tensor([0, 200, 203, 700], device="cuda", dtype=torch.int32)
            flash_ext.attn_varlen(q, k, v, starts, starts, 497, 497, is_causal=True, backend="sm90")
            q, k, v = tensors(head_dim, torch.bfloat16, 4000, 4000)
            flash_ext.attn(q.repeat(1, 4, 1, 1), k, v, backend="sm90")  # tiles are taken from a counter
    torch.cuda.synchronize()
    print("sm90 done", flush=True)


def masks():
    """Those that are looked through first."""
    q, k, v = tensors(64, torch.bfloat16, 4000, 4001)
    causal = torch.ones(4000, 4001, dtype=torch.bool, device="cuda").tril()
    with torch.no_grad():
        for mask in (causal, causal[:, :4000].contiguous(), causal[3000:3001]):
            keys = [x[:, :, : mask.shape[-1]] for x in (k, v)]
            flash_ext.attn(q.repeat(1, 4, 1, 1), *keys, mask, backend="gpu")


def main():
    kind, *only = sys.argv[1:] or ("all",)
    if not only:
        masks()
    if torch.cuda.get_device_capability() == (9, 0) and "sm_90a" in backends.native.build_info()["archs"]:
        hopper([int(head_dim) for head_dim in only] or SM90_HEAD_DIMS)
    if kind == "sm90":
        return
    for dtype in (torch.bfloat16, torch.float32):
        for head_dim in HEAD_DIMS:
            for deterministic in (False, True):
                step(*tensors(head_dim, dtype, 150, 200), is_causal=True, deterministic=deterministic)
            step(*tensors(head_dim, dtype, 300, 300, heads_kv=2), window=(60, 20))
            mask = torch.randn(150, 200, device="cuda", dtype=dtype, requires_grad=True)
            q, k, v = tensors(head_dim, dtype, 150, 200)
            step(q, k, v, attn_mask=mask, softcap=3.0, dropout_p=0.2, sinks=torch.zeros(2, device="cuda"))
            step(*tensors(head_dim - 3, dtype, 70, 90), is_causal=True)  # rows that cannot be read 16 bytes at a time
            with torch.no_grad():
                for seq_q in (1, 20):  # one tile for all heads; keys are divided
                    flash_ext.attn(*tensors(head_dim, dtype, seq_q, 2000), is_causal=True, backend="gpu")
                    flash_ext.attn(*tensors(head_dim, dtype, seq_q, 500), softcap=3.0, backend="gpu")
        torch.cuda.synchronize()
        print(dtype, "done", flush=True)


if __name__ == "__main__":
    main()
