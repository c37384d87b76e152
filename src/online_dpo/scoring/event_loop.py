"""One event loop in its own thread, shared by all scorers that wait on a network."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from online_dpo.distributed.waiting import WAITS
from online_dpo.errors import ScoringError
from online_dpo.scoring.time_limit import current_limit

T = TypeVar("T")

LOOP_SECONDS = 1.0
"""How long the loop may take to begin a coroutine before something in it is said to block."""


def submit(coroutine: Coroutine[Any, Any, T]) -> Future[T]:
    """Start a coroutine on the shared event loop. The caller passes the future to `wait_for`, or cancels it."""
    return asyncio.run_coroutine_threadsafe(coroutine, _event_loop())


def wait_for(future: Future[T]) -> T:
    """Wait for the result of a submitted coroutine. An interruption (Ctrl-C) cancels the coroutine too.

    Raises:
        ScoringError: with a time limit, something has kept the loop from running for longer than that.
    """
    seconds = current_limit()
    try:
        while True:
            try:
                return future.result(seconds)
            except TimeoutError:
                if future.done() or seconds is None:  # an error of its own
                    raise
                _check_loop_runs(seconds)
    finally:
        future.cancel()


def _check_loop_runs(seconds: float) -> None:
    """Raise if the loop does not run a coroutine in its turn, so that none of its time limits can end anything."""
    if not wait([submit(asyncio.sleep(0))], LOOP_SECONDS).done:
        assert _loop_thread is not None
        running = [one.who for one in WAITS.innermost() if one.thread == _loop_thread[1].ident]
        names = ", ".join(dict.fromkeys(running))
        raise ScoringError(
            f"Something that blocks took longer than `reward_timeout` allows, {seconds:g} seconds, in an `async` "
            f"function ({names}). An `async` function must `await`, as with `asyncio.sleep` in place of `time.sleep`."
        )


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
