"""One event loop in its own thread, shared by all scorers that wait on a network."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


def submit(coroutine: Coroutine[Any, Any, T]) -> Future[T]:
    """Start a coroutine on the shared event loop. The caller passes the future to `wait_for`, or cancels it."""
    return asyncio.run_coroutine_threadsafe(coroutine, _event_loop())


def wait_for(future: Future[T]) -> T:
    """Wait for the result of a submitted coroutine. An interruption (Ctrl-C) cancels the coroutine too."""
    try:
        return future.result()
    finally:
        future.cancel()


_loop_lock = threading.Lock()
_loop_thread: tuple[asyncio.AbstractEventLoop, threading.Thread] | None = None


def _event_loop() -> asyncio.AbstractEventLoop:
    """The shared event loop, started on first use."""
    global _loop_thread
    with _loop_lock:
        # A forked process inherits the loop but not its thread.
        if _loop_thread is None or not _loop_thread[1].is_alive():
            loop = asyncio.new_event_loop()
            thread = threading.Thread(target=loop.run_forever, name="online-dpo-async-scoring", daemon=True)
            thread.start()
            _loop_thread = (loop, thread)
        return _loop_thread[0]
