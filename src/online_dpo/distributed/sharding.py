"""What training does differently by how weights, gradients and optimizer lie on the ranks: the one seam.

Nothing else asks whether FSDP2 or DeepSpeed is on. How the weights of any model lie is asked of `weights`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from online_dpo.distributed.ddp import GuardedDDP
from online_dpo.distributed.updated import Updated, updated_parameters
from online_dpo.distributed.weights import full

Check = Callable[[], None]


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

    def abandon_pass(self, model: nn.Module) -> None:
        """Makes the policy ready for another pass after one that ended in the middle, at the same check on all ranks,
        and removes what gradients the step has so far. No collective operation.
        """
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

    def __init__(self, accelerator: Accelerator, check: Check = lambda: None) -> None:
        self.name = "ddp" if accelerator.num_processes > 1 else "none"
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

    def updated(self, model: nn.Module, optimizer: Any) -> Updated:
        """Returns the model's parameters, whole."""
        return updated_parameters(model, optimizer, lambda parameter: (0, parameter.numel()))

    def take_written(self) -> None:
        """Does nothing: the optimizer updates the weights themselves."""

    def full_trained(self, parameter: torch.Tensor) -> torch.Tensor:
        """Returns the parameter."""
        return full(parameter)


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
