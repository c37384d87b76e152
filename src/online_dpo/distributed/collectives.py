"""Collective operations: every rank must call them, in the same order, or all wait forever.

Without a process group, or with one process, they return their input. Ranks are those of `torch.distributed`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from online_dpo.distributed.signals import is_interruption
from online_dpo.errors import FeedbackLostError

T = TypeVar("T")


def world_size() -> int:
    """Returns the number of processes. Not a collective operation."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first_rank() -> bool:
    """Returns whether this process has rank 0. Not a collective operation."""
    return world_size() == 1 or dist.get_rank() == 0


def any_rank(holds: bool, device: torch.device) -> bool:
    """Returns whether ``holds`` is true on any rank."""
    return holds if world_size() == 1 else bool(sum_over_ranks(torch.tensor(int(holds), device=device)))


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Returns the sum over ranks of each element (all-reduce); ``values`` is not changed."""
    if world_size() == 1:
        return values
    total = values.clone()
    dist.all_reduce(total, op=dist.ReduceOp.SUM)
    return total


def max_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Returns the maximum over ranks of each element; nan if any rank has nan."""
    if world_size() == 1:
        return values
    gathered = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(gathered, values.contiguous())  # not a MAX all-reduce: its result with nan depends on the backend
    return torch.stack(gathered).amax(dim=0)


def from_every_rank(item: T) -> list[T]:
    """Returns the items of all ranks, in the order of ranks (all-gather). Items must be picklable."""
    if world_size() == 1:
        return [item]
    items: list[Any] = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def from_first_rank(item: T) -> T:
    """Returns the item of rank 0 (broadcast). It must be picklable."""
    if world_size() == 1:
        return item
    box = [item]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def samples_of_every_rank(accelerator: Any, samples: Sequence[T]) -> list[T]:
    """Returns the samples of all ranks, without those that a data loader repeats to give each rank the same number."""
    return accelerator.gather_for_metrics(samples, use_gather_object=True)


def raise_first_ranks(error: Exception | None) -> None:
    """Ends all ranks with the error of rank 0, if there is one, so that no rank waits for one that has stopped."""
    error = from_first_rank(error)
    if error is not None:
        raise error


class RankErrors:
    """Ends all ranks if any of them fails, so that no rank waits for one that has stopped.

    ``raised`` tells whether this has happened in this run: then all ranks have stopped, and can save together.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.begin_run()

    def begin_run(self) -> None:
        """Forgets errors of an earlier run."""
        self.raised = False
        self._deferred: BaseException | None = None

    def defer(self, problem: BaseException) -> None:
        """Takes a problem from where this rank cannot stop, because others wait for it in the same collective
        operation, to the next `raise_if_any`. With one process it is raised at once.
        """
        if world_size() == 1:
            raise problem
        self._deferred = self._deferred or problem

    def raise_if_any(self, problem: BaseException | None) -> None:
        """Ends all ranks if any of them has a problem.

        Raises:
            BaseException: ``problem``; on ranks without one a `FeedbackLostError`.
        """
        problem = self._deferred or problem
        if any_rank(problem is not None, self._device):
            self.raised = True
            raise problem or FeedbackLostError("Another process of this run failed; its error says why.")

    def run(self, action: Callable[[], T]) -> T:
        """Calls ``action`` and returns its result, unless it fails on any rank.

        Raises:
            BaseException: as in `raise_if_any`. What a signal raises ends its own rank at once.
        """
        problem, result = None, None
        try:
            result = action()
        except BaseException as error:
            if is_interruption(error):
                raise
            problem = error
        self.raise_if_any(problem)
        return result  # pyright: ignore[reportReturnType]
