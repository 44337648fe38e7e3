"""The emulator's own tests: each of these mistakes in the kernels makes a case fail, and nothing else does."""

import re

import pytest
import torch
from emulated import ROOT, build, installed, missing

from flash_ext.testing import Case, errors, make_inputs, run

pytestmark = [
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
    pytest.mark.filterwarnings("ignore:Warning only once for all operators:UserWarning"),
]
ATOM, FORWARD = "tile/amd/mma_atom.h", "attn/fwd_kernel.h"
BACKWARD, DQ = "attn/bwd_kernel.h", "attn/bwd_dq.h"


STAGED = "v is split"  # a barrier that only float32 has, where shared memory is large


def barriers(file):
    return re.findall(r"\n *__syncthreads\(\);  // .*", (ROOT / "csrc" / file).read_text())


MUTATIONS = {
    "nothing": ("gfx9",),
    "acc-columns": ("gfx9", ATOM, "kAccRegs * (lane_id() / 16) + i;", "kAccRegs * (lane_id() / 16) + (i ^ 1);"),
    "acc-columns-gfx11": ("gfx11", ATOM, "return 2 * i + lane_id() / 16;", "return i + 8 * (lane_id() / 16);"),
    "operand-columns": ("gfx12", ATOM, ": kOperandRegs * (lane_id() / 16);", ": kOperandRegs * (lane_id() % 2);"),
    "transposed-columns": ("gfx9", ATOM, "first_k() + i, lane_id() % 16)", "first_k() + i, lane_id() / 4)"),
    "halves-differ": ("gfx11", ATOM, "odd ? other : c.reg[i]", "c.reg[i]"),
    "shared-rows": ("gfx9", ATOM, "for (int mask = 16;", "for (int mask = 32;"),
    "mask-row": (
        "gfx9",
        "attn/band.h",
        "task.query(row0 + s.row(m, r)) - kv0;",
        "task.query(row0 + s.row(m, r)) + 1 - kv0;",
    ),
    "backward-mask-row": ("gfx9", "attn/bwd_scores.h", "const bool seen = key >=", "const bool seen = key + 1 >="),
    "backward-row": (
        "gfx9",
        DQ,
        "Config::kBlockQ + part_row + dq.row(",
        "Config::kBlockQ + 1 + part_row + dq.row(",
    ),
    "nvidia-rows": ("sm90", "tile/nvidia/mma_atom.h", "/ 4 + 8 * slot;", "/ 4 + 8 * (1 - slot);"),
    "nvidia-copies-not-awaited": ("sm90", "tile/nvidia/async_copy.h", "ptx::cp_async_wait_group<kNewest>();", ""),
    "nvidia-dq-overwritten": (
        "sm90",
        DQ,
        "else if (!args.turns) wait_add_async_read();",
        "else if (!args.turns) return;",
    ),
    "nvidia-turn-passed-early": ("sm90", DQ, "    wait_add_async();\n", ""),
    "swizzle": ("gfx9", "tile/shared_tile.h", "+ (in_row(row, col) ^ flipped", "+ (in_row(row + 1, col) ^ flipped"),
} | {
    f"{file}, no barrier: {barrier.split('// ')[1]}": ("sm90" if STAGED in barrier else "gfx9", file, barrier, "")
    for file in (FORWARD, "attn/combine.cu", BACKWARD)
    for barrier in barriers(file)
}
CASES = [
    Case("some-keys", 1, 2, 1, 70, 150, 32, is_causal=True, window=(60, 0)),
    Case("split", 1, 2, 1, 1, 1500, 32),
]
# A barrier that only matters where q stays in shared memory and there is no key.
OTHER_CASES = {
    "nobody reads q any more": [Case("no-keys", 1, 2, 1, 70, 3, 192, is_causal=True)],
}


def dtype_of(name):
    return torch.float32 if STAGED in name else torch.bfloat16


def cases_of(name):
    return next((cases for text, cases in OTHER_CASES.items() if text in name), CASES)


@pytest.fixture(scope="session")
def libraries():
    def make(name):
        family, *edit = MUTATIONS[name]
        return build(
            family, [edit] if edit else [], f"hd{cases_of(name)[0].head_dim}_{'f32' if STAGED in name else 'bf16'}"
        )

    return {name: make(name) for name in MUTATIONS}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mistakes_are_found(libraries, name):
    found = []
    for case in cases_of(name):
        inputs = make_inputs(case, dtype_of(name))
        inputs.options["deterministic"] = "turn" in name
        try:
            with installed(libraries[name], multiprocessors=300 if case.seq_q == 1 else 1):
                wrong = [error for error in errors(inputs, run(inputs, "cpu")) if error.ratio > 1]
        except RuntimeError as error:  # the emulator's: what it has seen happen in shared memory
            wrong = [error]
        found += wrong
    assert bool(found) == (name != "nothing"), found
