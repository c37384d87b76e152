"""What is known as memory that has run out: real classes with the texts that torch and its libraries raise."""

import errno

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch.distributed import DistBackendError

from online_dpo.errors import RolloutServerError, ScoringError, WholeModelDoesNotFit, is_out_of_memory
from online_dpo.foreign import foreign
from online_dpo.modeling.memory import DoesNotFit

HINT = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be "
    "incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\nCompile with `TORCH_USE_CUDA_DSA` to enable "
    "device-side assertions.\n"
)
NCCL = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:77, unhandled cuda error (run with "
    "NCCL_DEBUG=INFO for details), NCCL version 2.28.9\nncclUnhandledCudaError: Call to CUDA function failed.\n"
    "Last error:\n"
)


def because_of(cause, error):
    """The error as it is after ``raise error from cause``."""
    try:
        raise error from cause
    except type(error) as caught:
        return caught


def in_backward(error):
    """The error as it comes out of autograd's engine."""

    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise error

    with pytest.raises(Exception) as caught:
        Failing.apply(torch.ones(1, requires_grad=True)).sum().backward()
    return caught.value


def compiling(error):
    """The error of torch.compile around another one."""
    return because_of(error, BackendCompilerFailed("inductor", error, None))


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB"),
    torch.OutOfMemoryError("HIP out of memory. Tried to allocate 2.00 GiB."),
    torch.OutOfMemoryError("XPU out of memory. Tried to allocate 2.00 GiB."),
    torch.OutOfMemoryError(),
    torch.AcceleratorError("CUDA error: out of memory" + HINT),  # of cudaGraphInstantiate, cudaGraphLaunch, streams
    torch.AcceleratorError("HIP error: out of memory"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasLtCreate(handle)`"),
    RuntimeError("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_NOT_INITIALIZED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("CUDA error: insufficient resources when calling `x`: CUSPARSE_STATUS_ALLOC_FAILED"),
    RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
    RuntimeError("miopenStatusAllocFailed"),
    RuntimeError("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
    RuntimeError("UR backend failed. UR backend returns:40 (UR_RESULT_ERROR_OUT_OF_RESOURCES)"),
    RuntimeError(
        "MPS backend out of memory (MPS allocated: 15.05 GiB, other allocations: 11.91 GiB, max allowed: 27.20 GiB). "
        "Tried to allocate 1.16 GiB on private pool."
    ),
    RuntimeError("Invalid buffer size: 20.00 GiB"),
    DistBackendError(NCCL + "Cuda failure 2 'out of memory'"),
    DistBackendError(NCCL + "Failed to CUDA calloc 6291456 bytes"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 400 bytes. Error code 12 (Cannot allocate memory)"
    ),
    RuntimeError("[enforce fail at alloc_cpu.cpp:93] data. DefaultCPUAllocator: not enough memory: you tried to ..."),
    RuntimeError("std::bad_alloc"),
    RuntimeError("unable to mmap 4096 bytes from file <w.bin>: Cannot allocate memory (12)"),
    RuntimeError("Caught OutOfMemoryError in replica 0 on device 0.\nOriginal Traceback:\nCUDA out of memory."),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    MemoryError(),
    DoesNotFit("Two completions do not fit."),
    WholeModelDoesNotFit("It does not fit."),
    because_of(torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("The engine step failed")),
    because_of(RuntimeError("std::bad_alloc"), ValueError("Loading failed")),
    because_of(because_of(MemoryError(), KeyError("x")), RuntimeError("y")),
    in_backward(torch.OutOfMemoryError("CUDA out of memory.")),
    in_backward(torch.AcceleratorError("CUDA error: out of memory")),
    in_backward(MemoryError()),
    compiling(torch.OutOfMemoryError("CUDA out of memory.")),
    ExceptionGroup("unhandled errors in a TaskGroup", [ValueError("x"), torch.OutOfMemoryError("CUDA out of memory.")]),
]
ANYTHING_ELSE = [
    torch.AcceleratorError("CUDA error: device-side assert triggered" + HINT),
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered" + HINT),
    torch.AcceleratorError("CUDA error: misaligned address" + HINT),
    torch.AcceleratorError("CUDA error: unspecified launch failure" + HINT),
    torch.AcceleratorError("CUDA error: too many resources requested for launch" + HINT),
    torch.AcceleratorError("CUDA error: operation failed due to a previous error during capture" + HINT),
    torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing" + HINT),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle, opa, opb, m, n, k)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasSgemm( handle, opa, opb, m, n, k)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("No valid triton configs. OutOfMemoryError: out of resource: triton_red_fused_0 Required: 264192"),
    RuntimeError("out of resource: shared memory, Required: 264192, Hardware limit: 232448. Reducing block sizes"),
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers "
                 "are out of shared memory."),
    DistBackendError(NCCL + "Cuda failure 1 'invalid argument'"),
    RuntimeError("shapes differ"),
    ValueError("out of memory"),
    KeyError("out of memory"),
    OSError(errno.ENOSPC, "No space left on device"),
    KeyboardInterrupt(),
    because_of(MemoryError(), SystemExit(1)),
    RolloutServerError("http://other:8000 answered 500: CUDA out of memory. Tried to allocate 2 GiB."),
    ScoringError("The service answered 500: CUDA out of memory."),
    because_of(ValueError("x"), RuntimeError("y")),
    ExceptionGroup("unhandled errors in a TaskGroup", [ValueError("x")]),
]  # fmt: skip


def short(error):
    return f"{type(error).__name__}: {str(error)[:60]}"


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=short)
def test_memory_that_has_run_out_is_known(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", ANYTHING_ELSE, ids=short)
def test_no_other_error_is_taken_for_it(error):
    assert not is_out_of_memory(error)


def test_of_triton_only_the_device_s_memory_counts():
    errors = pytest.importorskip("triton.runtime.errors")
    shared = errors.OutOfResources(264192, 232448, "shared memory")
    assert not is_out_of_memory(shared) and not is_out_of_memory(compiling(shared))


def test_an_error_within_an_error_keeps_its_place():
    """A reward of the user's that wraps it is passed on, so that whoever called it can try with less."""
    error = because_of(torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("my model failed"))
    with pytest.raises(RuntimeError) as caught, foreign("Reward function `r`"):
        raise error
    assert caught.value is error
