"""Every instruction set that this machine has gives the same results, within the rule."""

import os
import subprocess
import sys

import pytest
import torch

from flash_ext.backends import native
from flash_ext.testing import CASES, check

ISAS = native.cpu_isas() if native else []
# Sizes and head_dims round the vector and block lengths, each kind of mask, and everything at once.
SUBSET = [
    case
    for case in CASES
    if case.id.startswith(("plain", "head-dim", "blocks", "decode", "everything", "long", "packed-e", "packed-c"))
    or case.id in ("mask-half", "mask-same-dtype", "softcap", "strides-last", "dropout", "causal-long-q", "packed-mask")
]
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)


@pytest.mark.sanitize
@dtypes
@pytest.mark.parametrize("name", ISAS)
def test_instruction_set(name, dtype, isa):
    isa(name)
    assert native.cpu_isa() == name
    for case in SUBSET:
        check(case, dtype, seed=2)


def test_there_is_always_generic():
    assert ISAS[-1] == "generic"
    assert set(ISAS) <= {"avx512_bf16", "avx512", "avx2", "generic"}


def test_unknown_name(isa):
    with pytest.raises(ValueError, match="mmx"):
        isa("mmx")


@pytest.mark.parametrize("name", ISAS[-1:] + ["mmx"])
def test_environment_variable(name):
    program = "import flash_ext.backends, torch; q = torch.ones(1, 1, 1, 8); flash_ext.attn(q, q, q);"
    program += "print(flash_ext.backends.native.cpu_isa())"
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"FLASH_EXT_CPU_ISA": name},
        capture_output=True,
        text=True,
    )
    if name in ISAS:
        assert result.stdout.strip() == name, result.stderr
    else:  # never silently another one
        assert result.returncode != 0 and "got 'mmx'" in result.stderr
