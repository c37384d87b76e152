"""What reward functions note beside their scores, through the ``log_metric`` and ``log_extra`` of TRL's GRPO."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from online_dpo.scoring.protocols import as_number
from online_dpo.types import Notes

_current: ContextVar[Notes | None] = ContextVar("notes", default=None)
"""Where the functions that run now note. A thread that scores has its own, and what it submits to the event loop for
asynchronous functions takes it along."""


@contextmanager
def noting() -> Iterator[Notes]:
    """Collects what reward functions note inside."""
    notes = Notes()
    token = _current.set(notes)
    try:
        yield notes
    finally:
        _current.reset(token)


@contextmanager
def nothing_noted() -> Iterator[None]:
    """Forgets what reward functions note inside: they score what the policy has not written."""
    token = _current.set(None)
    try:
        yield
    finally:
        _current.reset(token)


def log_functions(count: int) -> tuple[Callable[[str, Sequence[Any]], None], Callable[[str, Any], None]]:
    """``log_extra(column, values)`` and ``log_metric(name, value)`` for a function that scores ``count`` completions.

    Called where nobody collects notes, they do nothing.
    """
    notes = _current.get() or Notes()

    def log_extra(column: str, values: Sequence[Any]) -> None:
        values = list(values)
        if len(values) != count:
            raise ValueError(
                f"log_extra({column!r}, ...) got {len(values)} values for {count} completions; give one for each"
            )
        notes.columns[column] = values

    def log_metric(name: str, value: Any) -> None:
        number = as_number(value)
        if number is None:
            raise TypeError(f"log_metric({name!r}, ...) got {value!r}; give a number")
        notes.metrics.setdefault(name, []).append(number)

    return log_extra, log_metric
