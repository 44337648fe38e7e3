"""The GPU kernels, AMD's and NVIDIA's, in the lane emulator, against the definition in float64."""

import pytest
import torch
from emulated import FAMILIES, build, installed, missing

from flash_ext.backends import GPU_HEAD_DIM, HIP_HEAD_DIM_FLOAT32
from flash_ext.testing import CASES, Case, check, make_inputs, run

pytestmark = [
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
    pytest.mark.filterwarnings("ignore:Warning only once for all operators:UserWarning"),  # that is the point
]
libraries = {}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def fits(case, dtype):
    return max(case.head_dim, case.head_dim_v or 0) <= (
        HIP_HEAD_DIM_FLOAT32 if dtype == torch.float32 else GPU_HEAD_DIM
    )


all_cases = pytest.mark.parametrize("case", [case for case in CASES if fits(case, torch.float16)], ids=str)


@pytest.fixture(params=FAMILIES)
def library(request):
    if request.param not in libraries:
        libraries[request.param] = build(request.param)
    return libraries[request.param]


@dtypes
@all_cases
def test_cases(request, library, case, dtype):
    """Forward and backward."""
    if not fits(case, dtype):
        pytest.skip("such a call goes to another backend")
    if request.node.callspec.params["library"] == "sm86" and dtype != torch.bfloat16:
        pytest.skip("sm86 has other tiles than sm90; one dtype shows them")
    with installed(library):
        check(case, dtype, backend="cpu")


@all_cases
def test_keys_split(library, case):
    """As on a GPU so large that the keys are divided among thread blocks; lanes and waves in another order."""
    with installed(library, multiprocessors=300, order=1):
        check(case, torch.bfloat16, backend="cpu", grads=False)


@dtypes
@pytest.mark.parametrize("order", [1, 2], ids=["reversed", "shuffled"])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("options", [{}, dict(mask="bool:bhqk", dropout_p=0.2)], ids=["plain", "general"])
def test_order_of_lanes_does_not_matter(library, head_dim, options, order, dtype):
    case = Case("order", 1, 2, 1, 70, 150, head_dim, is_causal=True, **options)
    if not fits(case, dtype):
        pytest.skip("such a call goes to another backend")
    inputs = make_inputs(case, dtype)
    inputs.options["deterministic"] = True
    results = []
    for each in (0, order):
        with installed(library, multiprocessors=5, order=each):
            results.append(run(inputs, "cpu"))
    for name, result in results[0].items():
        assert torch.equal(result, results[1][name]), name


def test_few_rows_and_splits_are_reached(library):
    """The cases above mean what they say."""
    q = torch.randn(1, 1, 1, 64, dtype=torch.float16).numpy()
    k = torch.randn(1, 1, 700, 64, dtype=torch.float16).numpy()
    out, lse = q.copy(), torch.empty(1, 1, 1).numpy()
    splits = [library.attn_fwd(q, k, k, out, lse, multiprocessors, {}) for multiprocessors in (1, 300)]
    assert splits[0] < splits[1]
