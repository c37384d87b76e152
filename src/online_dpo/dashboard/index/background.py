"""Goes on with indices that a page could not wait for, in one thread, the one asked for last first."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

Job = Callable[[float], bool]
TURN, PAUSE = 0.1, 0.01
"""Seconds of work on an index, and between them, in which pages have the processor."""


class Background:
    """A thread that calls jobs again and again until they are done.

    A job works for at most the seconds that it is given, and returns whether nothing is left to do.
    """

    def __init__(self) -> None:
        self._jobs: list[Job] = []
        self._changed = threading.Condition()
        self._is_ending = False
        self._thread: threading.Thread | None = None

    def want(self, job: Job) -> None:
        """Go on with a job, before the others."""
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)
            self._jobs.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="index", daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._is_ending = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        while job := self._next():
            done = job(TURN)
            with self._changed:
                if done and job in self._jobs:
                    self._jobs.remove(job)
            time.sleep(PAUSE)

    def _next(self) -> Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._is_ending)
            return None if self._is_ending else self._jobs[-1]
