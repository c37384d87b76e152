"""Metrics and columns that reward functions log beside their scores, with ``log_metric`` and ``log_extra`` as in TRL's
GRPO trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from online_dpo.scoring.protocols import as_number, describe
from online_dpo.types import Notes

_current: ContextVar[Notes | None] = ContextVar("notes", default=None)
"""The notes that running functions write to. Each scoring thread has its own, and a coroutine that it submits to the
event loop inherits them."""


@contextmanager
def noting() -> Iterator[Notes]:
    """Collect what reward functions log inside this context."""
    notes = Notes()
    token = _current.set(notes)
    try:
        yield notes
    finally:
        _current.reset(token)


@contextmanager
def nothing_noted() -> Iterator[None]:
    """Discard what reward functions log inside this context, where they score completions of another model."""
    token = _current.set(None)
    try:
        yield
    finally:
        _current.reset(token)


def log_functions(count: int) -> tuple[Callable[[str, Sequence[Any]], None], Callable[[str, Any], None]]:
    """Return ``log_extra(column, values)`` and ``log_metric(name, value)`` for a function that scores ``count``
    completions.

    Outside :func:`noting` they have no effect. They raise ``ValueError`` for a wrong number of values, and
    ``TypeError`` for a metric that is not a number.
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
            raise TypeError(f"log_metric({name!r}, ...) got {describe(value)}; give a number")
        notes.metrics.setdefault(name, []).append(number)

    return log_extra, log_metric
