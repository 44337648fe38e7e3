"""Threads: any number gives a right result, the same one in every run; and the memory that a call takes."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import flash_ext
from flash_ext.testing import CASES, errors, make_inputs, run


@pytest.mark.parametrize("count", [2, 3])
def test_all_cases_on_several_threads(count, threads):
    for case in CASES:
        inputs = make_inputs(case, seed=3)
        threads(count)
        results = run(inputs)
        threads(1)
        found = errors(inputs, results)
        assert all(error.ratio <= 1 for error in found), f"{case}: {found}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_in_every_run(dtype, threads):
    threads(2)
    by_id = {case.id: case for case in CASES}
    for name in ("long-both", "heads-mqa", "decode-causal", "mask-float-one", "everything-long", "packed-everything"):
        inputs = make_inputs(by_id[name], dtype)
        first = run(inputs)
        for _ in range(5):
            again = run(inputs)
            assert all(torch.equal(first[key].nan_to_num(), again[key].nan_to_num()) for key in first), name


def test_calls_from_several_python_threads():
    inputs = [make_inputs(case) for case in CASES[:24]]
    expected = [run(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, [x for x in inputs for _ in range(4)]))
    for i, result in enumerate(found):
        for name, value in expected[i // 4].items():
            assert torch.equal(result[name], value)


def test_backward_on_autograds_own_threads():
    q = torch.randn(2, 4, 33, 16, requires_grad=True)
    with torch.autograd.set_multithreading_enabled(True):
        losses = [flash_ext.attn(q, q, q, is_causal=causal).sum() for causal in (False, True)]
        with ThreadPoolExecutor(2) as pool:
            native = list(pool.map(lambda loss: torch.autograd.grad(loss, q)[0], losses))
    for gradient, causal in zip(native, (False, True), strict=True):
        expected = torch.autograd.grad(flash_ext.math(q, q, q, is_causal=causal).sum(), q)[0]
        torch.testing.assert_close(gradient, expected)


MEMORY = """
import resource, sys, torch, flash_ext
torch.set_num_threads(2)
seq, dtype, mode, causal = int(sys.argv[1]), getattr(torch, sys.argv[2]), sys.argv[3], sys.argv[4] == "causal"

def call(seq):
    q, k, v = (torch.ones(1, 2, seq, 64, dtype=dtype).requires_grad_(mode == "backward") for _ in range(3))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = flash_ext.attn(q, k, v, is_causal=causal)
    if mode == "backward":
        out.sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before

call(64)  # what is loaded and allocated once
print(call(seq) / 1024)
"""


@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_does_not_grow_with_the_square(dtype, mode):
    """The scores of this call would be 256 MiB in float32; the tensors that it makes are 2 to 10 MiB."""
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, "4096", dtype, mode, "causal"], capture_output=True, text=True, check=True
    )
    grown = float(result.stdout)
    assert grown < 40, f"peak memory grew by {grown:.0f} MiB"
