"""How the weights of a model lie on the ranks: whole on each, or in parts (FSDP2, ZeRO-3), found out by the model.

Nothing else asks which it is. What is done differently in training stands in `sharding`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from weakref import WeakSet

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def part(parameter: torch.Tensor) -> torch.Tensor:
    """Returns what this rank holds of a parameter, to be read or written in place; all of it if it is not sharded."""
    if is_partitioned(parameter):
        return parameter.ds_tensor.data  # pyright: ignore[reportAttributeAccessIssue]
    parameter = parameter.detach()
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def full(parameter: torch.Tensor) -> torch.Tensor:
    """Returns the whole of a parameter, a gradient or a norm, or its own tensor if it is whole; a collective operation
    if it is sharded.
    """
    return full_of_part(parameter, part(parameter))


def own_part(parameter: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Returns of a whole tensor what this rank holds of a parameter; every rank has the same whole tensor."""
    if is_partitioned(parameter):
        from online_dpo.distributed.deepspeed import slice_of

        return slice_of(parameter, whole)
    if isinstance(parameter, DTensor):
        from online_dpo.distributed.fsdp import slice_of

        return slice_of(parameter, whole)
    return whole


def full_of_part(parameter: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Returns the whole tensor of which ``own`` is what this rank has, as it has `part` of a parameter; a collective
    operation if the parameter is sharded.
    """
    if is_partitioned(parameter):
        from online_dpo.distributed.deepspeed import joined

        return joined(parameter, own)
    if isinstance(parameter, DTensor):
        from online_dpo.distributed.fsdp import joined

        return joined(parameter, own)
    return own


def shape_of(parameter: torch.Tensor) -> torch.Size:
    """Returns the shape of the whole parameter."""
    return parameter.ds_shape if is_partitioned(parameter) else parameter.shape  # pyright: ignore


def is_partitioned(parameter: torch.Tensor) -> bool:
    """Returns whether this is a parameter under ZeRO-3, whose own data may be empty."""
    return hasattr(parameter, "ds_id")


def is_whole(parameter: torch.Tensor) -> bool:
    """Returns whether this rank holds the whole parameter at present."""
    return not isinstance(parameter, DTensor) and shape_of(parameter) == parameter.shape


def holds_all(model: nn.Module) -> bool:
    """Returns whether this rank holds all weights of a model at present."""
    return all(is_whole(parameter) for parameter in model.parameters())


def make_whole(model: nn.Module) -> None:
    """Gives a model that the caller has loaded in parts its whole weights, on every rank; a collective operation."""
    if any(is_partitioned(parameter) for parameter in model.parameters()):
        from online_dpo.distributed.deepspeed import make_whole as gather

        gather(model)


def is_sharded(model: nn.Module) -> bool:
    """Returns whether the ranks hold different parts of this model's weights (FSDP2, ZeRO-3)."""
    return _is_fsdp(model) or any(is_partitioned(parameter) for parameter in model.parameters())


def gathered(*models: nn.Module) -> AbstractContextManager[None]:
    """Inside, every rank holds the whole weights of these models and may call them without the others: to sample, to
    evaluate, to copy. Without gradients; re-entrant. A collective operation where a model is sharded.
    """
    sharded = [model for model in dict.fromkeys(models) if is_sharded(model) and model not in _whole_now]
    return _gathered(sharded) if sharded else nullcontext()


_whole_now: WeakSet[nn.Module] = WeakSet()
"""Sharded models of which every rank holds the whole weights at present."""


@contextmanager
def _gathered(models: list[nn.Module]) -> Iterator[None]:
    with ExitStack() as stack:
        for model in models:
            if _is_fsdp(model):
                from online_dpo.distributed.fsdp import unsharded

                stack.enter_context(unsharded(model))
            else:
                from online_dpo.distributed.deepspeed import unpartitioned

                stack.enter_context(unpartitioned(model))
            _whole_now.add(model)
            stack.callback(_whole_now.remove, model)
        yield


@contextmanager
def forward_only(model: nn.Module) -> Iterator[None]:
    """Around forward passes without gradients, on all ranks together: afterwards no rank holds more than its part."""
    try:
        yield
    finally:
        if _is_fsdp(model) and model not in _whole_now:
            from online_dpo.distributed.fsdp import reshard

            reshard(model)


def _is_fsdp(model: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())
