"""Products of half-precision numbers with a result in fp32, on a CPU: torch has them on CUDA only."""

from contextlib import contextmanager

import torch


def _mm(a, b, out_dtype, *, out):
    return torch.mm(a.float(), b.float(), out=out)


def _addmm(given, a, b, out_dtype, *, beta=1, alpha=1, out):
    return torch.addmm(given, a.float(), b.float(), beta=beta, alpha=alpha, out=out)


@contextmanager
def half_products_on_cpu():
    """Inside, ``mm`` and ``addmm`` with ``out_dtype`` compute on a CPU what they compute on CUDA."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("mm.dtype_out", _mm, "CPU")
        library.impl("addmm.dtype_out", _addmm, "CPU")
        yield
