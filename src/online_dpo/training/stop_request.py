"""`StopRequest`: what signals ask of a run, to stop after its step or, if they insist, at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from online_dpo.distributed.processes import started_together
from online_dpo.distributed.signals import StoppedBySignal, name_of

NOTICE = "Stopping after this step, with a checkpoint. Press Ctrl-C again to stop at once."
SAVING = (
    "A checkpoint is being saved; the run stops when it is written. Press Ctrl-C again to stop at once, without it."
)
SAME_PRESS = 2.0
"""Seconds in which a launcher such as torchrun may send a second time what a terminal has sent to all processes."""


class StopRequest:
    """The signals that a run has received. The first asks it to stop after its step; ``signal`` is that one.

    A second Ctrl-C stops it at once, but during a save only a third one does. Other signals never insist: schedulers
    and launchers send them more than once. If the step is not over some time after them, it is dropped instead.

    Args:
        tell: shows a notice.
        at_once: returns the error that stops the run at once.
        may_drop_step: whether the run can be stopped in the middle of a step, with a checkpoint of the steps done.
    """

    def __init__(
        self, tell: Callable[[str], None], at_once: Callable[[], BaseException], may_drop_step: Callable[[], bool]
    ) -> None:
        self._tell, self._at_once, self._may_drop_step = tell, at_once, may_drop_step
        self.begin(0.0)

    def begin(self, timeout: float) -> None:
        """Forget the signals of an earlier run. ``timeout``: seconds that a step has to end (see `close` as well)."""
        self.signal: signal.Signals | None = None
        self._timeout, self._since = timeout, 0.0
        self._saving = self._told_of_save = self._overdue = False
        self._timer: threading.Timer | None = None

    def close(self) -> None:
        """Stop waiting for the step."""
        if self._timer is not None:
            self._timer.cancel()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Inside, a checkpoint is saved: a second Ctrl-C lets it finish."""
        self._saving = True
        try:
            yield
        finally:
            self._saving = False

    def receive(self, number: signal.Signals) -> None:
        """Handle a signal.

        Raises:
            TrainingInterrupted: it stops the run at once.
            StoppedBySignal: the step takes too long after a signal, and is dropped.
        """
        if self.signal is None:
            self._begin_to_stop(number)
        elif self._overdue:
            self._drop_step()
        elif number is signal.SIGINT and not self._is_same_press():
            self._insist()

    def _begin_to_stop(self, number: signal.Signals) -> None:
        self.signal, self._since = number, time.monotonic()
        if number is signal.SIGINT:
            self._tell(NOTICE)
            return
        self._tell(f"{name_of(number)}: stopping after this step, with a checkpoint.")
        self._timer = threading.Timer(self._timeout, self._interrupt_step, (number,))
        self._timer.daemon = True
        self._timer.start()

    def _interrupt_step(self, number: signal.Signals) -> None:
        """Run by the timer's thread: what the main thread waits for is interrupted by a signal only."""
        main = threading.main_thread().ident
        assert main is not None
        self._overdue = True
        signal.pthread_kill(main, number)

    def _drop_step(self) -> None:
        assert self.signal is not None
        if not self._saving and self._may_drop_step():
            self._overdue = False
            raise StoppedBySignal(self.signal)

    def _is_same_press(self) -> bool:
        launched = started_together() is not None or "TORCHELASTIC_RUN_ID" in os.environ
        return launched and self.signal is signal.SIGINT and time.monotonic() - self._since < SAME_PRESS

    def _insist(self) -> None:
        if self._saving and not self._told_of_save:
            self._told_of_save = True
            self._tell(SAVING)
            return
        raise self._at_once()
