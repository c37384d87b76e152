"""Either weights change or completions are sampled, never both at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition


class Gate:
    """Either weights change, or completions are sampled, by any number of threads. Who came first goes first."""

    def __init__(self) -> None:
        self._condition = Condition()
        self._sampling = 0

    @contextmanager
    def sampling(self) -> Iterator[None]:
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
        with self._condition:
            self._condition.wait_for(lambda: self._sampling == 0)
            yield
