"""Events of a run: anything can say that something has happened, and whoever listens writes it down.

Without a listener nothing happens, so that every stage can be used without a run.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal[
    "start",
    "resume",
    "end",
    "stop",
    "checkpoint",
    "evaluation",
    "skip",
    "learning_rate",
    "passes",
    "compilation",
    "out_of_memory",
    "retry",
    "failure",
    "sync",
    "server",
    "idle",
    "resample",
    "record",
    "warning",
]
"""What an event is about. ``stop`` is a signal, ``failure`` a scorer without an answer, ``sync`` weights that were
handed to an engine, ``record`` the files of the run folder themselves."""

IN_EVENTS = "in_events"
"""The attribute of a log record that is an event already, and must not become a second one."""


@dataclass(frozen=True)
class Event:
    """Something that has happened.

    >>> Event("skip", "Step 3 skipped: its loss or gradient is not finite.", {"step": 3, "in_a_row": 1})
    """

    kind: Kind
    message: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


Listener = Callable[[Event], None]

_listeners: tuple[Listener, ...] = ()
_lock = threading.Lock()


def emit(kind: Kind, message: str = "", **facts: Any) -> None:
    """Says that something has happened. May be called in any thread.

    Args:
        kind: what it is about.
        message: what has happened, in a sentence.
        facts: numbers and texts for programs; values of JSON.
    """
    for listener in _listeners:  # without the lock: a signal's handler may call this while the lock is held
        listener(Event(kind, message, facts))


def warn(logger: logging.Logger, kind: Kind, message: str, **facts: Any) -> None:
    """Logs a warning that is an event of this kind as well."""
    logger.warning("%s", message, extra={IN_EVENTS: True}, stacklevel=2)
    emit(kind, message, **facts)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside, ``listener`` is called with each event, in the thread in which it happens. It must not raise."""
    global _listeners
    with _lock:
        _listeners = (*_listeners, listener)
    try:
        yield
    finally:
        with _lock:
            _listeners = tuple(other for other in _listeners if other is not listener)


class WarningsAsEvents(logging.Handler):
    """Makes events of what is logged as a warning or an error, unless it has been told as an event.

    Where there is no other handler, warnings are shown as they were without this one.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def handle(self, record: logging.LogRecord) -> bool:
        """As the parent's, without its lock: a listener takes a lock of its own, under which it may log a warning, so
        that two threads would wait for each other.
        """
        passed = bool(self.filter(record))
        if passed:
            self.emit(record)
        return passed

    def emit(self, record: logging.LogRecord) -> None:
        """Emits an event of kind "warning"."""
        if logging.lastResort is not None and self._comes_alone(record.name):
            logging.lastResort.handle(record)
        if not getattr(record, IN_EVENTS, False):
            emit("warning", record.getMessage(), logger=record.name)

    def _comes_alone(self, name: str) -> bool:
        """Whether this is the first handler of its kind, and there is none of another."""
        logger, handlers = logging.getLogger(name), []
        while logger is not None:
            handlers += logger.handlers
            logger = logger.parent if logger.propagate else None
        return handlers[0] is self and all(isinstance(handler, WarningsAsEvents) for handler in handlers)


@contextmanager
def warnings_told(name: str) -> Iterator[None]:
    """Inside, warnings of the logger ``name``, and of those below it, are events as well."""
    handler, logger = WarningsAsEvents(), logging.getLogger(name)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
