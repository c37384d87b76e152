"""Calls into torch's process groups, which may hang: each runs in a thread of its own, and is waited for with a limit.

With NCCL much happens on the host, without a limit and where Python cannot stop it: the communicator is made in the
first operation, and connections in the first of each kind. An operation whose members do not all come never returns.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from contextlib import nullcontext
from datetime import timedelta
from threading import Thread
from typing import Any, TypeVar

import torch
from torch.distributed import BroadcastOptions

from online_dpo.errors import error_text

logger = logging.getLogger(__name__)

T = TypeVar("T")

POLL_SECONDS = 0.0005
ABORT_SECONDS = 10.0
"""How long the end of a group is waited for; it hangs itself where a driver or a network does."""


def in_thread(function: Callable[[], T]) -> Future[T]:
    """Runs a function in a daemon thread. At exit, Python waits for a pool's threads, but not for daemon threads: what
    hangs must not keep the process alive.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True, name="weights").start()
    return future


def run_bounded(
    function: Callable[[], T],
    device: torch.device,
    wait: Callable[[Callable[[], bool]], None],
    discard: Callable[[T], None] = lambda result: None,
) -> T:
    """Runs a function that may hang, and returns its result.

    Args:
        device: where it computes: on a GPU, it uses the caller's stream.
        wait: waits until what it is given returns true. If it raises instead, the function is left to itself.
        discard: frees a result that comes too late.
    """
    future = in_thread(_as_here(function, device))
    try:
        wait(future.done)
    except BaseException:
        future.add_done_callback(lambda late: None if late.exception() else discard(late.result()))
        raise
    return future.result()


def broadcast(group: Any, flat: torch.Tensor, seconds: float, is_given_up: Callable[[], bool]) -> None:
    """Broadcasts a tensor from rank 0 of a process group of torch, in place, and waits until it is there.

    Args:
        seconds: the limit that torch is given; of a failed operation it says so only if it has one.
        is_given_up: whether nobody waits for this any more.

    Raises:
        RuntimeError: the operation failed.
    """
    options = BroadcastOptions()
    options.rootRank = 0
    work = group.broadcast([flat], options)
    while not work.is_completed():
        if is_given_up():
            return
        time.sleep(POLL_SECONDS)
    # `is_completed` is also true of an operation that failed. NCCL's `wait` without a limit lets the current stream
    # wait and returns at once, whatever happened; with one it raises the error. It does not wait any more here.
    work.wait(timedelta(seconds=max(seconds, 1.0)))


def abort(group: Any) -> None:
    """Ends the operations of a process group of torch and frees it, also while one hangs."""
    ended = in_thread(group.abort)
    wait_for([ended], timeout=ABORT_SECONDS)
    if not ended.done():
        logger.warning(
            "A process group for weights could not be ended within %g s: it keeps its memory until the process ends.",
            ABORT_SECONDS,
        )
    elif (error := ended.exception()) is not None:
        logger.warning("A process group for weights could not be ended: %s.", error_text(error, first_line=True))


def _as_here(function: Callable[[], T], device: torch.device) -> Callable[[], T]:
    """The function, with what belongs to the calling thread alone: the GPU, its current stream, the inference mode."""
    inference = torch.is_inference_mode_enabled()
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def run() -> T:
        on_stream = nullcontext() if stream is None else torch.cuda.stream(stream)  # its GPU is the current one, too
        with torch.inference_mode(inference), on_stream:
            return function()

    return run
