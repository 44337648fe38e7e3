"""Runs every portable GPU kernel once (float16 has bfloat16's code), for NVIDIA's checker; the tests check the results.

compute-sanitizer --tool memcheck python tests/gpu_sanitizer.py
compute-sanitizer --tool racecheck python tests/gpu_sanitizer.py
"""

import torch

import flash_ext

HEAD_DIMS = (32, 64, 96, 128, 192, 256)


def tensors(head_dim, dtype, seq_q, seq_kv, heads_kv=1):
    shapes = (2, seq_q), (heads_kv, seq_kv), (heads_kv, seq_kv)
    return [torch.randn(1, *shape, head_dim, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes]


def step(q, k, v, **options):
    out = flash_ext.attn(q, k, v, **options, backend="gpu")
    torch.autograd.grad(out, (q, k, v), torch.ones_like(out))


def main():
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
