"""Running out of memory: work is tried with less at once, and an error that is left says what to lower."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from online_dpo.distributed.device_memory import free_kept_memory
from online_dpo.errors import OnlineDPOError, error_text, is_out_of_memory
from online_dpo.runs import events

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

WHAT_TO_LOWER = (
    "Lower `per_device_train_batch_size`, `max_tokens_per_pass`, `rollout_batch_size`, `reward_batch_size`, "
    "`max_length` or `max_new_tokens`, train an adapter (`use_peft`), take an optimizer that keeps less "
    "(`optim: adafactor`), or a smaller model."
)


class DoesNotFit(OnlineDPOError, torch.OutOfMemoryError):
    """Memory ran out, and nothing is left to divide. The message says what to lower."""


class Attempt:
    """Whether what was tried has fitted in memory; if not, ``reason`` is what the error said."""

    fits = False
    reason = ""


@contextmanager
def in_memory() -> Iterator[Attempt]:
    """Inside, running out of memory is no error. Afterwards ``fits`` of the attempt says whether it happened.

    >>> with in_memory() as attempt:
    ...     loss = one_pass(rows)
    >>> if not attempt.fits: ...  # here, and not in an `except`, whose traceback would keep tensors alive
    """
    attempt = Attempt()
    try:
        yield attempt
        attempt.fits = True
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        attempt.reason = error_text(error, first_line=True)


class Halving:
    """Calls a function with as many items at once as fit in memory: with half as many from each time on that it does
    not fit.

    Args:
        what: subject of the messages, such as "Reward model `rm`".
        remedy: what to lower where a single item does not fit.
        splits: whether items may be divided; not where other processes wait in the same call.
    """

    def __init__(self, what: str, remedy: str = WHAT_TO_LOWER, splits: bool = True) -> None:
        self._what, self._remedy, self._splits = what, remedy, splits
        self.most = sys.maxsize
        """Most items that are given at once."""

    def __call__(self, items: Sequence[Item], compute: Callable[[Sequence[Item]], Iterable[Result]]) -> list[Result]:
        """Return the results of all items, in their order.

        Raises:
            DoesNotFit: a single item does not fit.
        """
        results: list[Result] = []
        done = 0
        while done < len(items):
            part = items[done : done + self.most]
            with in_memory() as attempt:
                results += compute(part)
            if attempt.fits:
                done += len(part)
            else:
                self._lower(len(part), attempt.reason)
        return results

    def _lower(self, size: int, reason: str) -> None:
        free_kept_memory()
        if size == 1 or not self._splits:
            raise DoesNotFit(f"{self._what} ran out of memory with {size} at a time ({reason}). {self._remedy}")
        self.most = size // 2
        text = f"{self._what} ran out of memory ({reason}); it goes on with {self.most} at a time."
        events.warn(logger, "out_of_memory", text, items=size)


def forget_tensors(error: BaseException) -> None:
    """Frees what the frames hold that an error, or one that led to it, has passed through: its traceback would keep the
    tensors of a forward pass alive.
    """
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            traceback.clear_frames(one.__traceback__)
            waiting += [one.__cause__, one.__context__]


def named_memory_error(error: BaseException, where: str) -> DoesNotFit:
    """The error to raise in place of a library's, with where memory ran out and what to lower, in one line."""
    named = DoesNotFit(f"Memory ran out {where}: {error_text(error, first_line=True).rstrip('.')}. {WHAT_TO_LOWER}")
    named.__cause__ = error
    return named
