"""`reward_timeout`: calls of rewards and judges that take too long end with an error.

Python cannot stop a plain function. So with a limit it is called in another thread, and the calling one gives up
waiting. The other thread is a daemon: it does not keep the process alive. Without a limit, calls are made directly.
"""

from __future__ import annotations

import asyncio
import contextvars
import queue
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, TypeVar

import torch

from online_dpo.errors import ScoringError

T = TypeVar("T")

Rows = str | Callable[[], str]

_limit: ContextVar[float | None] = ContextVar("reward_timeout", default=None)
"""Seconds that one call may take, in the running code. Coroutines that it submits inherit it."""


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Inside, each call by `call_in_time` and `await_in_time` may take this many seconds; ``None``: any time."""
    token = _limit.set(seconds)
    try:
        yield
    finally:
        _limit.reset(token)


def current_limit() -> float | None:
    """Returns the seconds that one call may take; ``None`` without a limit."""
    return _limit.get()


def call_in_time(function: Callable[[], T], who: str, rows: Rows = "") -> T:
    """Calls a function; with a limit in another thread, which is the same one for all calls of this thread.

    Gradient mode, autocast, context variables and the current GPU are those of the calling thread. A function called
    inside of another one that has the limit has none of its own.

    Args:
        who: the name of what is called, for the message.
        rows: the rows that are processed, for the message.

    Raises:
        ScoringError: it took too long.
    """
    seconds = _limit.get()
    if seconds is None:
        return function()
    future = _companion().start(_as_here(function))
    done = threading.Event()
    future.add_done_callback(lambda _: done.set())
    if not done.wait(seconds):
        _local.companion = None  # that thread is lost; the next call gets another one
        raise too_late(who, seconds, rows)
    return future.result()


async def await_in_time(awaitable: Awaitable[T], who: str, rows: Rows = "") -> T:
    """Awaits something, with a limit at most for so long; then it is cancelled.

    Raises:
        ScoringError: it took too long.
    """
    seconds = _limit.get()
    try:
        async with asyncio.timeout(seconds) as limit:
            return await awaitable
    except TimeoutError as error:
        if not limit.expired() or seconds is None:  # an error of its own
            raise
        raise too_late(who, seconds, rows) from error


def too_late(who: str, seconds: float, rows: Rows) -> ScoringError:
    """Returns the error for a call that took too long."""
    among = rows if isinstance(rows, str) else rows()
    return ScoringError(
        f"{who} took longer than `reward_timeout` allows, {seconds:g} seconds{among and ' '}{among}. It was given up."
    )


class _Companion:
    """A daemon thread that makes the calls of another thread, one after the other."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        name = f"{threading.current_thread().name}-rewards"
        threading.Thread(target=_make_calls, args=[self._calls], name=name, daemon=True).start()

    def start(self, function: Callable[[], T]) -> Future[T]:
        """Starts a call."""
        future: Future[T] = Future()
        self._calls.put((function, future))
        return future

    def __del__(self) -> None:
        self._calls.put(None)  # its thread ends with the calling one, or after the call that was given up


def _make_calls(calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None]) -> None:
    while (call := calls.get()) is not None:
        function, future = call
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)
        del call, function, future  # what they hold must not live on until the next call


_local = threading.local()


def _companion() -> _Companion:
    companion: _Companion | None = getattr(_local, "companion", None)
    if companion is None:
        companion = _local.companion = _Companion()
    return companion


def _as_here(function: Callable[[], T]) -> Callable[[], T]:
    """A function that does the same in another thread, with the state of this one that torch keeps by thread."""
    context = contextvars.copy_context()
    context.run(_limit.set, None)
    gradients, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    autocasts = [_autocast(kind) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]

    def run() -> T:
        on_device = nullcontext() if device is None else torch.cuda.device(device)
        with torch.inference_mode(inference), torch.set_grad_enabled(gradients), on_device:
            return _inside(autocasts, function)

    return lambda: context.run(run)


def _autocast(kind: str) -> Callable[[], AbstractContextManager[Any]]:
    dtype = torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype=dtype)


def _inside(contexts: list[Callable[[], AbstractContextManager[Any]]], function: Callable[[], T]) -> T:
    if not contexts:
        return function()
    with contexts[0]():
        return _inside(contexts[1:], function)
