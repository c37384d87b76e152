"""How the weights of a model lie on the ranks, and what training has to do differently for it: the one seam.

Nothing else asks whether FSDP2 or DeepSpeed is on. The first half of this module is about the weights of any model, and
finds out by the model; the second, `Sharding`, is about training the policy, and is chosen once for a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Protocol
from weakref import WeakSet

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor

from online_dpo.distributed.collectives import world_size
from online_dpo.distributed.ddp import GuardedDDP

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


Check = Callable[[], None]


class Sharding(Protocol):
    """What the trainer does differently by how weights, gradients and optimizer lie on the ranks.

    ``name`` is for messages: ``fsdp2``, ``zero2``, or what :class:`NoSharding` says. ``partial``: the policy's weights
    will lie in parts on several ranks once training begins. ``copies``: the optimizer holds copies of weights, not the
    model's parameters.
    """

    name: str
    partial: bool
    copies: bool

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

    def abandon_pass(self, model: nn.Module) -> None:
        """Makes the policy ready for another pass after one that ended in the middle, at the same check on all ranks,
        and removes what gradients the step has so far. No collective operation.
        """
        ...

    def shard_frozen(self, model: nn.Module) -> None:
        """Shards a whole frozen model in place, as the policy will be."""
        ...


class NoSharding:
    """One process, or several with whole models each (DDP)."""

    partial = copies = False

    def __init__(self, accelerator: Accelerator, check: Check = lambda: None) -> None:
        self.name = "ddp" if world_size() > 1 else "none"
        self._accelerator, self._check = accelerator, check
        self._guarded: GuardedDDP | None = None

    def attach(self, model: nn.Module, optimizer: Any) -> Any:
        """Returns the optimizer as it is."""
        if self._guarded is None or self._guarded.model is not model:
            self._guarded = GuardedDDP(model, self._check)
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

    def abandon_pass(self, model: nn.Module) -> None:
        """Repairs DDP's wrapper, and sets all gradients to ``None``."""
        assert self._guarded is not None
        self._guarded.abandon()
        self.drop_gradients(model)

    def shard_frozen(self, model: nn.Module) -> None:
        """Leaves the model whole."""


def sharding_for(accelerator: Accelerator, check: Check) -> Sharding:
    """Returns how this run shards its policy.

    Args:
        check: called before every collective operation of the policy and of a sharded reference; what it raises there
            ends the pass.
    """
    builders: dict[DistributedType, Callable[[Accelerator, Check], Sharding]] = {
        DistributedType.FSDP: _fsdp2,
        DistributedType.DEEPSPEED: _deepspeed,
    }
    return builders.get(accelerator.distributed_type, NoSharding)(accelerator, check)


def _fsdp2(accelerator: Accelerator, check: Check) -> Sharding:
    from online_dpo.distributed.fsdp import FSDP2Sharding

    return FSDP2Sharding(accelerator, check)


def _deepspeed(accelerator: Accelerator, check: Check) -> Sharding:
    from online_dpo.distributed.deepspeed import ZeROSharding

    return ZeROSharding(accelerator, check)
