"""Data parallelism (`DistributedDataParallel`), with a check before each collective operation of its passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from online_dpo.distributed.collectives import begin_mean_over_ranks

Exchange = Callable[[Any, Any], torch.futures.Future[torch.Tensor]]
"""A communication hook of DDP: its state and a bucket of gradients, to what they are on average over ranks."""


class GuardedDDP:
    """Calls ``check`` before every collective operation of a model that accelerate has wrapped, and repairs the wrapper
    after a pass in which it raised.

    Gradients are exchanged in buckets while the backward pass goes on. A communication hook of our own, which computes
    what DDP computes without one, sees each bucket before it is sent; around a hook of the user's, it calls that.

    Args:
        model: the model to train; one that is not wrapped has no collective operation.
        check: called before each of them; what it raises ends the pass.
    """

    def __init__(self, model: nn.Module, check: Callable[[], None]) -> None:
        self.model, self._check = model, check
        self._exchange: Exchange = _mean
        self._begun: list[torch.futures.Future[torch.Tensor]] = []
        if isinstance(model, DistributedDataParallel):
            self._guard(model)

    def _guard(self, model: DistributedDataParallel) -> None:
        # DDP's forward rebuilds buckets, then broadcasts buffers. The first allocates memory, so both are preceded.
        model.register_forward_pre_hook(self._before_forward)
        broadcast = model._sync_buffers

        def checked_broadcast() -> None:
            self._check()
            broadcast()

        model._sync_buffers = checked_broadcast
        if model._comm_hooks:
            (exchange, state), *_ = model._comm_hooks
            self._exchange = lambda _, bucket: exchange(state, bucket)  # pyright: ignore[reportCallIssue]
            self._renew_reducer(model)
        else:
            self._guard_reducer(model)

    def _guard_reducer(self, model: DistributedDataParallel) -> None:
        # a lambda: DDP compares annotations, which are strings here
        model.register_comm_hook(model.process_group, lambda group, bucket: self._checked_exchange(group, bucket))
        model.reducer = _CheckedReducer(model.reducer, self._check)  # pyright: ignore[reportAttributeAccessIssue]

    def _renew_reducer(self, model: DistributedDataParallel) -> None:
        """Replaces what exchanges gradients by a new one, without a collective operation: as after a copy."""
        state = model.__getstate__()
        del model.reducer, model.logger
        model.__setstate__(state)
        model._comm_hooks.clear()
        self._guard_reducer(model)

    def _before_forward(self, model: Any, inputs: Any) -> None:
        if model.static_graph:  # DDP counts on an exchange in every backward pass: without one, later ones have none
            model.require_backward_grad_sync = True  # the trainer's `no_sync` puts it back
        self._check()

    def _checked_exchange(self, group: Any, bucket: Any) -> torch.futures.Future[torch.Tensor]:
        self._check()
        self._begun = [future for future in self._begun if not future.done()]
        self._begun.append(self._exchange(group, bucket))
        return self._begun[-1]

    def abandon(self) -> None:
        """Makes the wrapper ready for the next forward pass after one that did not end. No collective operation: what
        had begun is awaited.
        """
        for future in self._begun:
            future.wait()
        self._begun = []
        if isinstance(self.model, DistributedDataParallel):
            reducer: Any = self.model.reducer
            if self.model.static_graph and not reducer.has_recorded:
                self._renew_reducer(self.model)
            else:
                reducer._reset_state()
            self.model.require_forward_param_sync = True  # a forward pass that did not end has not said whether


class _CheckedReducer:
    """DDP's reducer; the exchange at the end of the pass that records a static graph begins with a check."""

    def __init__(self, reducer: Any, check: Callable[[], None]) -> None:
        self._reducer, self._check = reducer, check
        self.has_recorded = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)

    def _delay_all_reduce(self) -> None:
        self._check()
        self._reducer._delay_all_reduce()
        self.has_recorded = True


def _mean(group: Any, bucket: Any) -> torch.futures.Future[torch.Tensor]:
    return begin_mean_over_ranks(bucket.buffer(), group)
