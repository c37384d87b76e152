"""`Agreement` in one process; several processes are in tests/distributed/test_memory.py."""

from datetime import timedelta

import pytest
import torch

from online_dpo.distributed.agreement import Agreement
from online_dpo.errors import error_text

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory."),
    MemoryError(),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
]


@pytest.fixture
def agreement():
    return Agreement(timedelta(seconds=9))


def test_a_pass_that_ends_has_fitted(agreement):
    with agreement.one_pass() as attempt:
        agreement.check()
    assert attempt.fits and not attempt.failed_here


@pytest.mark.parametrize("error", ERRORS)
def test_memory_that_runs_out_ends_a_pass_and_is_no_error(agreement, error):
    with agreement.one_pass() as attempt:
        raise error
    assert not attempt.fits and attempt.failed_here and attempt.reason == error_text(error)
    with agreement.one_pass() as attempt:
        pass
    assert attempt.fits


def test_any_other_error_stays_one(agreement):
    with pytest.raises(RuntimeError, match="shapes differ"), agreement.one_pass():
        raise RuntimeError("shapes differ")


def test_a_check_outside_of_a_pass_does_nothing(agreement):
    agreement.check()
