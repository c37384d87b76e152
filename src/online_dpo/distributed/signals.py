"""The signals that ask a process to stop, and what is called while they are handled here.

Heavy packages must not be imported here: the command line handles signals before it loads anything.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from online_dpo.errors import TrainingInterrupted

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
STOP_SIGNALS = tuple(signal.Signals[name] for name in NAMES if name in signal.Signals.__members__)
"""Ctrl-C, and what schedulers and terminals send before they end a process. Not SIGQUIT, which stays the way to end a
process at once, nor SIGPIPE, which Python turns into an error of the write.
"""


class StoppedBySignal(KeyboardInterrupt):
    """A signal ended what was going on. ``signal`` says which."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(f"Stopped by {name_of(number)}.")
        self.signal = number


class StopHandler:
    """A handler of this package. ``received`` is the last signal that it was called with.

    Args:
        on_signal: called with each signal. It may raise.
    """

    def __init__(self, on_signal: Callable[[signal.Signals], None]) -> None:
        self._on_signal, self._process = on_signal, os.getpid()
        self.received: signal.Signals | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Call the function; in a forked process, such as a worker that loads data, do what happens by default."""
        if os.getpid() != self._process:
            signal.signal(number, _default(number))
            signal.raise_signal(number)
            return
        self.received = signal.Signals(number)
        self._on_signal(self.received)


class Handled:
    """The signals that are handled inside `handling`. ``inside_another``: they were handled here before as well."""

    def __init__(self, handler: StopHandler) -> None:
        self.handler = handler
        self.previous: dict[signal.Signals, Any] = {}

    @property
    def inside_another(self) -> bool:
        """Whether an outer `handling` has these signals afterwards."""
        return any(isinstance(previous, StopHandler) for previous in self.previous.values())

    def taken_away(self) -> list[signal.Signals]:
        """The signals that other code has given another handler meanwhile."""
        return [number for number in self.previous if signal.getsignal(number) is not self.handler]


@contextmanager
def handling(on_signal: Callable[[signal.Signals], None]) -> Iterator[Handled]:
    """Inside, signals that ask to stop call ``on_signal``. The previous handlers are restored afterwards.

    Only those are handled that Python's defaults, or an outer `handling`, would handle: a handler of the user's own
    stays, and so does an ignored signal (as with nohup, or Ctrl-C in a background process). Outside of the main thread,
    where Python allows no handlers, nothing is handled. A signal that came before to the outer one counts again.
    """
    handler = StopHandler(on_signal)
    handled = Handled(handler)
    if threading.current_thread() is not threading.main_thread():
        yield handled
        return
    for number in STOP_SIGNALS:
        now = signal.getsignal(number)
        if now is _default(number) or isinstance(now, StopHandler):
            handled.previous[number] = signal.signal(number, handler)
    try:
        for outer in dict.fromkeys(handled.previous.values()):
            if isinstance(outer, StopHandler) and outer.received is not None:
                handler.received = outer.received
                on_signal(outer.received)
        yield handled
    finally:
        for number, previous in handled.previous.items():
            if signal.getsignal(number) is handler:  # else it was replaced by other code, whose handler stays
                signal.signal(number, previous)


def stop_asked() -> signal.Signals | None:
    """The signal that has asked the running code to stop and is handled here; ``None`` if there was none.

    What waits for long, and could go on waiting after a signal, looks at it.
    """
    handlers = (signal.getsignal(number) for number in STOP_SIGNALS)
    return next((one.received for one in handlers if isinstance(one, StopHandler) and one.received), None)


def raise_stopped(number: signal.Signals) -> None:
    """A handler that ends what is going on.

    Raises:
        StoppedBySignal: always.
    """
    raise StoppedBySignal(number)


def is_interruption(error: BaseException) -> bool:
    """Whether a signal caused an error. A `KeyboardInterrupt` that other code raises by itself is an error like others;
    it can be told from Ctrl-C while the signal is handled here, and outside of the main thread.
    """
    if isinstance(error, (StoppedBySignal, TrainingInterrupted)):
        return True
    is_main = threading.current_thread() is threading.main_thread()
    return (
        isinstance(error, KeyboardInterrupt)
        and is_main
        and not isinstance(signal.getsignal(signal.SIGINT), StopHandler)
    )


def name_of(number: signal.Signals) -> str:
    """The name of a signal in messages.

    >>> name_of(signal.SIGINT), name_of(signal.SIGTERM)
    ('Ctrl-C', 'SIGTERM')
    """
    return "Ctrl-C" if number is signal.SIGINT else number.name


def write_now(text: str) -> None:
    """Write to standard error inside a signal handler, which may have interrupted a `print` to the same stream. What
    cannot be written, since the terminal is gone, is dropped.
    """
    with suppress(OSError):
        os.write(2, text.encode())


def _default(number: int) -> Any:
    return signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
