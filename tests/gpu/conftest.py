"""Tests of what only a GPU can show. `make gpu` runs them there; elsewhere they are skipped, or with ``--rehearse`` run
on a CPU as far as it can: so that what is wrong in a test itself is known before there is a GPU.

Models are tiny, with random weights, but with heads of 64 numbers, for which the fast kernels are made. Values are
compared with those of fp64.
"""

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--rehearse", action="store_true", help="run tests of tests/gpu on a CPU, as far as it can")


@pytest.fixture
def device(request):
    """The GPU, or in a rehearsal the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if request.config.getoption("rehearse", default=False):
        return torch.device("cpu")
    return pytest.skip("needs a CUDA device; --rehearse runs on a CPU what can run there")


@pytest.fixture
def card(device):
    """The GPU. What needs one for its first line is skipped in a rehearsal too."""
    if device.type != "cuda":
        pytest.skip("needs a CUDA device, in a rehearsal too")
    return device
