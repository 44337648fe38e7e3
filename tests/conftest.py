import os

import hypothesis
import pytest
import torch

import flash_ext
from flash_ext import backends

# The same examples in every run: a failure belongs to the change that made it. More: HYPOTHESIS_PROFILE=long.
hypothesis.settings.register_profile("default", deadline=None, derandomize=True, max_examples=120)
hypothesis.settings.register_profile("long", deadline=None, max_examples=5000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# Small cases on many threads measure the scheduler; test_threads.py is where several are used.
torch.set_num_threads(1)


def pytest_report_header():
    native = f"native on {backends.native.cpu_isa()}" if backends.native else f"no native: {backends.native_error}"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU, whose tests are skipped"
    return f"flash_ext {flash_ext.__version__}, torch {torch.__version__}, {native}, {gpu}"


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_cuda)])
def device(request):
    return request.param


@pytest.fixture(params=["cpu", "math", "gpu"] if torch.cuda.is_available() else ["cpu", "math"])
def forward_backend(request):
    """A backend with a forward. New tensors are made on its device; a test of a dtype it has not is left out."""
    dtype = request.node.callspec.params.get("dtype")
    if request.param == "gpu" and dtype == torch.float64:
        pytest.skip("the gpu backend has no such dtype")
    with torch.device("cuda" if request.param == "gpu" else "cpu"):
        yield request.param


@pytest.fixture
def threads():
    """Sets torch's number of threads, and puts back what it was."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def isa():
    """Sets the CPU backend's instruction set, and puts back what it was."""
    before = backends.native.cpu_isa()
    yield backends.native.set_cpu_isa
    backends.native.set_cpu_isa(before)
