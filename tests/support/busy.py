"""Tests with a real clock on a machine that is busy, or stopped for some seconds."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any


def soon(holds: Callable[[], Any], seconds: float = 60.0) -> None:
    """Waits until it holds. How long that takes says nothing; that it never does is a fault."""
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


def tries(number: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """For a test of short times: it passes if it does so once in ``number`` times. What is wrong fails each time."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def tried(*args: Any, **kwargs: Any) -> None:
            for _ in range(number - 1):
                try:
                    return test(*args, **kwargs)
                except AssertionError:
                    time.sleep(1.0)  # what keeps the machine busy may have passed by then
            return test(*args, **kwargs)

        return tried

    return decorate
