"""What a GPU does where torch is asked for deterministic algorithms, on any device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

REFUSED = {
    *("kthvalue", "histc", "put", "put_", "nll_loss2d_forward", "_ctc_loss_backward", "_embedding_bag_dense_backward"),
    *("grid_sampler_2d_backward", "grid_sampler_3d_backward", "upsample_linear1d_backward", "max_unpool2d"),
    *("upsample_bilinear2d_backward", "upsample_bicubic2d_backward", "upsample_trilinear3d_backward", "max_unpool3d"),
    *("reflection_pad1d_backward", "reflection_pad2d_backward", "reflection_pad3d_backward", "avg_pool3d_backward"),
    *("_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward", "adaptive_max_pool2d_backward"),
    *("max_pool3d_with_indices_backward", "fractional_max_pool2d_backward", "fractional_max_pool3d_backward"),
}
"""What torch's documentation lists for a GPU, whatever the arguments are; the rest is in `_is_refused`."""


class RefusingAsOnGpus(TorchDispatchMode):
    """Raises for operations that have no deterministic form on a GPU, in forward and backward passes."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if _is_refused(func, args, kwargs or {}):
            raise RuntimeError(f"{func} does not have a deterministic implementation")
        return func(*args, **(kwargs or {}))


def _is_refused(func, args, kwargs) -> bool:
    name = func.name().removeprefix("aten::").partition(".")[0]
    if name in ("cumsum", "cumsum_"):
        return (kwargs.get("dtype") or args[0].dtype).is_floating_point
    if name == "bincount":
        return kwargs.get("weights") is not None or (len(args) > 1 and args[1] is not None)
    if name in ("median", "nanmedian"):  # with indices, along a dimension
        return len(args) > 1
    if name in ("scatter_reduce", "scatter_reduce_"):
        return args[4] == "prod"
    return name in REFUSED


@contextmanager
def asked_for() -> Iterator[None]:
    """Inside, torch is asked for deterministic algorithms."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
