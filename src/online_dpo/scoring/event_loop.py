"""One event loop in its own thread, shared by all scorers that wait on a network."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future, wait
from typing import Any, TypeVar
from weakref import WeakSet

from online_dpo.distributed.waiting import WAITS
from online_dpo.errors import ScoringError
from online_dpo.scoring.time_limit import current_limit

T = TypeVar("T")

LOOP_SECONDS = 1.0
"""How long the loop may take to begin a coroutine before something in it is said to block."""


def submit(coroutine: Coroutine[Any, Any, T]) -> Future[T]:
    """Start a coroutine on the shared event loop. The caller passes the future to `wait_for`, or cancels it."""
    with _lock:
        future = asyncio.run_coroutine_threadsafe(coroutine, _event_loop())
        _waiting.add(future)
    return future


def wait_for(future: Future[T]) -> T:
    """Wait for the result of a submitted coroutine. An interruption (Ctrl-C) cancels the coroutine too.

    Raises:
        ScoringError: code that runs on the loop has closed it; or, with a time limit, something has kept the loop from
            running for longer than that.
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


_lock = threading.Lock()
_loop_thread: tuple[asyncio.AbstractEventLoop, threading.Thread] | None = None
_waiting: WeakSet[Future[Any]] = WeakSet()


def _event_loop() -> asyncio.AbstractEventLoop:
    """The shared event loop, started on first use."""
    global _loop_thread
    # A forked process inherits the loop but not its thread.
    if _loop_thread is None or not _loop_thread[1].is_alive() or _loop_thread[0].is_closed():
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=_run, args=(loop,), name="online-dpo-async-scoring", daemon=True)
        thread.start()
        _loop_thread = (loop, thread)
    return _loop_thread[0]


def _run(loop: asyncio.AbstractEventLoop) -> None:
    """Run a loop for as long as the process lives, also where code that runs on it stops it or ends the program.

    If that code closes it, nothing that was submitted can end any more, and those who wait are told.
    """
    while not loop.is_closed():
        try:
            loop.run_forever()
        except (KeyboardInterrupt, SystemExit):  # raised by a task, and by those who wait for it
            continue
        except RuntimeError:  # closed by another thread between two rounds
            if not loop.is_closed():
                raise
    with _lock:
        lost = [future for future in _waiting if not future.done()]
    for future in lost:
        future.set_exception(
            ScoringError("The event loop of async rewards and judges was closed by code that ran on it")
        )
