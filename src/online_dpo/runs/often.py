"""Events that may come by the thousand, such as failed requests: the first is told at once, others are counted."""

from __future__ import annotations

import threading
import time
from typing import Any

from online_dpo.runs.events import Kind, emit

PAUSE = 10.0
"""Seconds between two events of the same source, at least."""


class OftenTold:
    """Tells events of the same source at intervals, each with the number of ``times`` since the one before.

    Args:
        pause: seconds between two of them.
    """

    def __init__(self, pause: float = PAUSE) -> None:
        self._pause, self._lock = pause, threading.Lock()
        self._told: dict[tuple[Kind, str], float] = {}
        self._waiting: dict[tuple[Kind, str], tuple[int, str, dict[str, Any]]] = {}

    def tell(self, kind: Kind, source: str, message: str, **facts: Any) -> None:
        """Says that something has happened, or counts it."""
        key: tuple[Kind, str] = (kind, source)
        now = time.monotonic()
        with self._lock:
            times = 1 + (self._waiting.pop(key)[0] if key in self._waiting else 0)
            waits = key in self._told and now - self._told[key] < self._pause
            if waits:
                self._waiting[key] = (times, message, facts)
            else:
                self._told[key] = now
        if not waits:
            emit(kind, message, source=source, times=times, **facts)

    def flush(self) -> None:
        """Tells what has only been counted: the last one of each source stands for all."""
        with self._lock:
            waiting, self._waiting = self._waiting, {}
        for (kind, source), (times, message, facts) in waiting.items():
            emit(kind, message, source=source, times=times, **facts)


OFTEN = OftenTold()
"""Those of this process. Whoever writes events down flushes them at times."""
