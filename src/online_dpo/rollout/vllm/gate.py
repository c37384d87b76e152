"""A lock between weight updates and sampling."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition


class Gate:
    """A lock that any number of sampling threads share, and that a weight update has alone."""

    def __init__(self) -> None:
        self._condition = Condition()
        self._sampling = 0

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Inside, the weights do not change; waits for an update that is in progress."""
        with self._condition:
            self._sampling += 1
        try:
            yield
        finally:
            with self._condition:
                self._sampling -= 1
                self._condition.notify_all()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Inside, nothing is sampled; waits until all that are sampling have finished."""
        with self._condition:
            self._condition.wait_for(lambda: self._sampling == 0)
            yield
