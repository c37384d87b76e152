"""Collective operations: every rank must call them, in the same order, or all wait forever.

Without a process group, or with one process, they return their input. Ranks are those of `torch.distributed`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from online_dpo.distributed.rank_watch import explained
from online_dpo.distributed.signals import is_interruption
from online_dpo.distributed.waiting import waiting_for
from online_dpo.errors import FeedbackLostError, ForeignCodeError

T = TypeVar("T")

SHOWN = 3

_alone_of: int | None = None
"""While this process acts as the only one, since others are lost: the number that there were; see `without_others`."""


def world_size() -> int:
    """Returns the number of processes. Not a collective operation."""
    return processes_of_run() if _alone_of is None else 1


def processes_of_run() -> int:
    """Returns the number of processes that the run was started with. Not a collective operation."""
    if _alone_of is not None:
        return _alone_of
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def without_others() -> Iterator[None]:
    """Inside, collective operations have one process, which is the first: the others are lost.

    For torch there is no process group: transformers asks torch for the rank when it saves a model.
    """
    global _alone_of
    _alone_of, group = processes_of_run(), dist.group.WORLD
    dist.group.WORLD = None
    try:
        yield
    finally:
        dist.group.WORLD, _alone_of = group, None


@contextmanager
def _together() -> Iterator[None]:
    """Inside, the other processes are waited for.

    Raises:
        RankLostError: one of them does not come.
    """
    with waiting_for("the other processes", on_ranks=True):
        try:
            yield
        except RuntimeError as error:
            raise explained(error) from error


def _arrived(values: torch.Tensor) -> None:
    """Waits for what other processes send. NCCL's operations only queue that on the device: without this, whoever reads
    the values would wait, where nothing says for whom, and where an error is not known for one of a lost process.
    """
    if values.is_cuda:
        torch.cuda.current_stream(values.device).synchronize()


def is_first_rank() -> bool:
    """Returns whether this process has rank 0. Not a collective operation."""
    return world_size() == 1 or dist.get_rank() == 0


class HostGroup:
    """All ranks once more, for values in memory of the host. Making one is a collective operation.

    Args:
        timeout: how long another rank is waited for.
    """

    def __init__(self, timeout: timedelta) -> None:
        self.of_torch: Any = None
        if world_size() > 1:
            with _together():
                self.of_torch = dist.new_group(backend="gloo", timeout=timeout)


def any_rank(holds: bool, device: torch.device, group: HostGroup | None = None) -> bool:
    """Returns whether ``holds`` is true on any rank."""
    return holds if world_size() == 1 else bool(sum_over_ranks(torch.tensor(int(holds), device=device), group))


def sum_over_ranks(values: torch.Tensor, group: HostGroup | None = None) -> torch.Tensor:
    """Returns the sum over ranks of each element (all-reduce); ``values`` is not changed."""
    if world_size() == 1:
        return values
    total = values.clone()
    with _together():
        dist.all_reduce(total, op=dist.ReduceOp.SUM, group=None if group is None else group.of_torch)
        _arrived(total)
    return total


def begin_mean_over_ranks(values: torch.Tensor, group: Any) -> torch.futures.Future[torch.Tensor]:
    """Begins to replace each element by its mean over the ranks of a group of torch, as DDP does it."""
    values.mul_(1 / dist.get_world_size(group))
    work = dist.all_reduce(values, group=group, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])  # pyright: ignore[reportOptionalMemberAccess]


def max_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Returns the maximum over ranks of each element; nan if any rank has nan."""
    if world_size() == 1:
        return values
    gathered = [torch.empty_like(values) for _ in range(world_size())]
    with _together():
        # not a MAX all-reduce: its result with nan depends on the backend
        dist.all_gather(gathered, values.contiguous())
        _arrived(gathered[-1])
    return torch.stack(gathered).amax(dim=0)


def from_every_rank(item: T, group: HostGroup | None = None) -> list[T]:
    """Returns the items of all ranks, in the order of ranks (all-gather). Items must be picklable."""
    if world_size() == 1:
        return [item]
    items: list[Any] = [None] * world_size()
    with _together():
        dist.all_gather_object(items, item, group=None if group is None else group.of_torch)
    return items


def from_first_rank(item: T) -> T:
    """Returns the item of rank 0 (broadcast). It must be picklable."""
    if world_size() == 1:
        return item
    box = [item]
    with _together():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def check_same(facts: Mapping[str, Any], what: str) -> None:
    """Ends all ranks with the same error unless the facts, such as the settings of a run, are equal on all of them.

    Args:
        facts: their values by their names; picklable, and with a short text.
        what: what they are, for the message.

    Raises:
        ValueError: some differ.
    """
    if world_size() == 1:
        return
    first, *others = from_every_rank(dict(facts))
    for rank, other in enumerate(others, start=1):
        names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        if names:
            shown = ", ".join(f"`{name}` ({first.get(name)!r} and {other.get(name)!r})" for name in names[:SHOWN])
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            raise ValueError(
                f"Rank 0 and rank {rank} do not have the same {what}: {shown}{more}. Start all processes with the same "
                "program, options, data and models."
            )


def samples_of_every_rank(accelerator: Any, samples: Sequence[T]) -> list[T]:
    """Returns the samples of all ranks, without those that a data loader repeats to give each rank the same number."""
    with _together():
        return accelerator.gather_for_metrics(samples, use_gather_object=True)


def raise_first_ranks(error: Exception | None) -> None:
    """Ends all ranks with the error of rank 0, if there is one, so that no rank waits for one that has stopped."""
    error = from_first_rank(error)
    if error is not None:
        raise error


AGREED = "agreed_over_ranks"
"""The attribute of an error with which all ranks have ended together."""


def _ended_together(error: BaseException | None) -> bool:
    """Returns whether all ranks have agreed on an error, or on one that it was made from."""
    while error is not None and AGREED not in vars(error):
        error = error.__cause__
    return error is not None


class RankErrors:
    """Ends all ranks if any of them fails, so that no rank waits for one that has stopped.

    A rank that fails inside `run` says so at once, where the others may be in the midst of it. So what is run may make
    other collective operations only right after a `raise_if_any` or another `run`: there the others learn of it, and
    the failure is agreed on once, however many of them are around it.

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

    def raise_if_any(self, problem: BaseException | None = None) -> None:
        """Ends all ranks if any of them has a problem.

        Raises:
            BaseException: ``problem``; on ranks without one a `FeedbackLostError`.
        """
        problem = self._deferred or problem
        if any_rank(problem is not None, self._device):
            self.raised = True
            problem = problem or FeedbackLostError("Another process of this run failed; its error says why.")
            vars(problem)[AGREED] = True
            raise problem

    def check_same(self, facts: Mapping[str, Any], what: str) -> None:
        """Ends all ranks together unless the facts are equal on all of them; see `check_same`.

        Raises:
            ForeignCodeError: some differ.
        """
        try:
            check_same(facts, what)
        except ValueError as error:
            self.raised = True
            problem = ForeignCodeError(str(error))
            vars(problem)[AGREED] = True
            raise problem from None

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
            if _ended_together(error):
                self.raised = True
                raise
            problem = error
        self.raise_if_any(problem)
        return result  # pyright: ignore[reportReturnType]
