"""The emulator's own tests: each of these mistakes in the AMD kernels makes a case fail, and nothing else does."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from emulated import ROOT, binding, build, hipified, installed, missing

from flash_ext.testing import Case, check

pytestmark = [
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
    pytest.mark.filterwarnings("ignore:Warning only once for all operators:UserWarning"),
]
ATOM, KERNEL = "tile/amd/mma_atom.h", "attn/fwd_kernel.h"


def barriers(file):
    return re.findall(r"\n *__syncthreads\(\);  // .*", (ROOT / "csrc" / file).read_text())


MUTATIONS = {
    "nothing": ("gfx9",),
    "acc-columns": ("gfx9", ATOM, "kAccRegs * (lane_id() / 16) + i;", "kAccRegs * (lane_id() / 16) + (i ^ 1);"),
    "acc-columns-gfx11": ("gfx11", ATOM, "return 2 * i + lane_id() / 16;", "return i + 8 * (lane_id() / 16);"),
    "operand-columns": ("gfx12", ATOM, ": kOperandRegs * (lane_id() / 16);", ": kOperandRegs * (lane_id() % 2);"),
    "halves-differ": ("gfx11", ATOM, "odd ? other : c.reg[i]", "c.reg[i]"),
    "shared-rows": ("gfx9", ATOM, "for (int mask = 16;", "for (int mask = 32;"),
    "mask-row": ("gfx9", KERNEL, "task.query(row0 + s.row(m, r)) - kv0;", "task.query(row0 + s.row(m, r)) + 1 - kv0;"),
    "swizzle": ("gfx9", "tile/shared_tile.h", "return data + (row0 * kCols", "return data + (col0 % 32 + row0 * kCols"),
} | {
    f"no-barrier: {barrier.split('// ')[1]}": ("gfx9", file, barrier, "")
    for file in (KERNEL, "attn/combine.cu")
    for barrier in barriers(file)
}
CASES = [
    Case("some-keys", 1, 2, 1, 70, 150, 32, is_causal=True),
    Case("split", 1, 2, 1, 1, 1500, 32),
]
# Only where q stays in shared memory and there is no key does this barrier matter.
OTHER_CASES = {
    "no-barrier: nobody reads q any more": [Case("no-keys", 1, 2, 1, 70, 3, 192, is_causal=True)],
}


@pytest.fixture(scope="session")
def libraries():
    def make(name):
        family, *edit = MUTATIONS[name]
        head_dim = OTHER_CASES.get(name, CASES)[0].head_dim
        return build(family, [edit] if edit else [], f"fwd_hd{head_dim}_bf16")

    hipified(), binding()
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(MUTATIONS, pool.map(make, MUTATIONS), strict=True))


@pytest.mark.parametrize("name", MUTATIONS)
def test_mistakes_are_found(libraries, name):
    found = []
    for case in OTHER_CASES.get(name, CASES):
        try:
            with installed(libraries[name], multiprocessors=300):
                check(case, torch.bfloat16, backend="cpu", grads=False)
        except (AssertionError, RuntimeError) as error:
            found.append(error)
    assert bool(found) == (name != "nothing"), found
