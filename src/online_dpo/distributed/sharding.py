"""How the weights of a model lie on the ranks, and what training has to do differently for it: the one seam.

Nothing else asks whether FSDP2 or DeepSpeed is on. The first half of this module is about the weights of any model, and
finds out by the model; the second, `Sharding`, is about training the policy, and is chosen once for a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakSet

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor

from online_dpo.distributed.collectives import world_size

# --- the weights of a model -------------------------------------------------------------------------------------------


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


# --- training the policy ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """Numbers of a parameter that lie in a tensor of the optimizer: those from ``start`` on, of the parameter as one
    row; in the tensor, also as one row, they begin at ``offset``.

    >>> Span("lm_head.weight", start=1024, offset=0, numel=512)
    """

    name: str
    start: int
    offset: int
    numel: int


@dataclass(frozen=True)
class Updated:
    """What this rank's optimizer updates: its tensors, which are the keys of its state, and what lies in each.

    All of it may be changed in place, also ``scaling``: the state of a loss scaling that the optimizer does itself.
    """

    optimizer: torch.optim.Optimizer
    tensors: list[tuple[torch.Tensor, list[Span]]]
    scaling: dict[str, Any] = field(default_factory=dict)


class Sharding(Protocol):
    """What the trainer does differently by how weights, gradients and optimizer lie on the ranks.

    ``name`` is for messages: ``fsdp2``, ``zero2``, or what :class:`NoSharding` says. ``partial``: the policy's weights
    will lie in parts on several ranks once training begins. ``copies``: the optimizer holds copies of weights, not the
    model's parameters. ``splits_state``: the optimizer's state lies in parts on several ranks.
    """

    name: str
    partial: bool
    copies: bool
    splits_state: bool

    def attach(self, model: nn.Module, optimizer: Any) -> Any:
        """Takes the wrapped policy and the wrapped optimizer when training begins. Returns the optimizer whose ``step``
        updates the weights, and does nothing after `drop_gradients`.
        """
        ...

    def one_pass(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Around a forward and backward pass of an optimizer step. Its gradient adds up; in the ``last`` one, ranks
        exchange gradients.
        """
        ...

    def drop_gradients(self, model: nn.Module) -> None:
        """Removes the gradients of the step, so that `optimizer.step()` changes no weight and no state."""
        ...

    def shard_frozen(self, model: nn.Module) -> None:
        """Shards a whole frozen model in place, as the policy will be."""
        ...

    def updated(self, model: nn.Module, optimizer: Any) -> Updated:
        """Returns what the optimizer of this rank updates, to be read or written in place."""
        ...

    def take_written(self) -> None:
        """Makes the weights of the model those that were written into the optimizer's copies; a collective operation
        if the optimizer holds copies.
        """
        ...

    def full_trained(self, parameter: torch.Tensor) -> torch.Tensor:
        """Returns the whole of a parameter as the optimizer has it: in fp32 where it holds copies. A collective
        operation if weights or copies are sharded.
        """
        ...


class NoSharding:
    """One process, or several with whole models each (DDP)."""

    partial = copies = splits_state = False

    def __init__(self, accelerator: Accelerator) -> None:
        self.name = "ddp" if world_size() > 1 else "none"
        self._accelerator = accelerator

    def attach(self, model: nn.Module, optimizer: Any) -> Any:
        """Returns the optimizer as it is."""
        return optimizer

    @contextmanager
    def one_pass(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Inside, ranks exchange gradients in the ``last`` pass alone."""
        exchanges = last and self._accelerator.gradient_state.sync_gradients
        with nullcontext() if exchanges else self._accelerator.no_sync(model):
            yield

    def drop_gradients(self, model: nn.Module) -> None:
        """Sets all gradients to ``None``: an optimizer leaves parameters without a gradient as they are."""
        for parameter in model.parameters():
            parameter.grad = None

    def shard_frozen(self, model: nn.Module) -> None:
        """Leaves the model whole."""

    def updated(self, model: nn.Module, optimizer: Any) -> Updated:
        """Returns the model's parameters, whole."""
        return updated_parameters(model, optimizer, lambda parameter: (0, parameter.numel()))

    def take_written(self) -> None:
        """Does nothing: the optimizer updates the weights themselves."""

    def full_trained(self, parameter: torch.Tensor) -> torch.Tensor:
        """Returns the parameter."""
        return full(parameter)


def updated_parameters(model: nn.Module, optimizer: Any, place: Callable[[torch.Tensor], tuple[int, int]]) -> Updated:
    """Returns what an optimizer of the model's own parameters updates.

    Args:
        place: where the part of a parameter that this rank holds begins, and how many numbers it has.
    """
    inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors = []
    for parameter in (parameter for group in inner.param_groups for parameter in group["params"]):
        start, numel = place(parameter)
        tensors.append((parameter, [Span(names[id(parameter)], start, 0, numel)]))
    return Updated(inner, tensors)


def sharding_for(accelerator: Accelerator) -> Sharding:
    """Returns how this run shards its policy."""
    builders: dict[DistributedType, Callable[[Accelerator], Sharding]] = {
        DistributedType.FSDP: _fsdp2,
        DistributedType.DEEPSPEED: _deepspeed,
    }
    return builders.get(accelerator.distributed_type, NoSharding)(accelerator)


def _fsdp2(accelerator: Accelerator) -> Sharding:
    from online_dpo.distributed.fsdp import FSDP2Sharding

    return FSDP2Sharding(accelerator)


def _deepspeed(accelerator: Accelerator) -> Sharding:
    from online_dpo.distributed.deepspeed import ZeROSharding

    return ZeROSharding(accelerator)
