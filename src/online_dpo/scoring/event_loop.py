"""One event loop in a thread of its own, for everything that is asked over a network."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


def submit(coroutine: Coroutine[Any, Any, T]) -> Future[T]:
    """Start a coroutine on the shared event loop; ``wait_for`` the future or cancel it."""
    return asyncio.run_coroutine_threadsafe(coroutine, _event_loop())


def wait_for(future: Future[T]) -> T:
    """The result of a submitted coroutine. Interrupted, it cancels the coroutine instead of leaving it running."""
    try:
        return future.result()
    finally:
        future.cancel()


_loop_lock = threading.Lock()
_loop_thread: tuple[asyncio.AbstractEventLoop, threading.Thread] | None = None


def _event_loop() -> asyncio.AbstractEventLoop:
    global _loop_thread
    with _loop_lock:
        # A forked process inherits the loop but not its thread.
        if _loop_thread is None or not _loop_thread[1].is_alive():
            loop = asyncio.new_event_loop()
            thread = threading.Thread(target=loop.run_forever, name="online-dpo-async-scoring", daemon=True)
            thread.start()
            _loop_thread = (loop, thread)
        return _loop_thread[0]
