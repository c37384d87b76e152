"""What this process waits for at present: a reward function, a judge, a server, the other processes.

After a minute a notice says so. With several processes, the others read it when they miss this one (see `rank_watch`).
Nothing heavy is imported here.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)

NOTICE_SECONDS = 60.0
SHOWN = 3


@dataclass(eq=False)
class Wait:
    """One thing that is waited for: who, since when, and whether it is the other processes.

    >>> Wait("Reward function `f`", time.monotonic())
    """

    who: str
    since: float
    on_ranks: bool = False
    thread: int = field(default_factory=threading.get_ident, repr=False)
    parts: set[Wait] = field(default_factory=set, repr=False)
    """What is waited for inside of it: then that is to be named."""

    @property
    def seconds(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.since


class Waits:
    """Everything that this process waits for, in any thread or coroutine, with a notice about what takes long.

    Args:
        after: seconds after which a notice tells of it; also the time between two notices.
        tell: shows a notice.
    """

    def __init__(self, after: float, tell: Callable[[str], None]) -> None:
        self.after, self._tell = after, tell
        self.details: Callable[[], str] = lambda: ""
        """What is known of the other processes, for a notice that they are waited for."""
        self.forget()

    def forget(self) -> None:
        """Starts anew: in a forked process, the waiting threads of its parent do not exist."""
        self._lock = threading.Lock()
        self._waits: set[Wait] = set()
        self._thread: threading.Thread | None = None
        self._told = 0.0

    @contextmanager
    def waiting_for(self, who: str, *, on_ranks: bool = False) -> Iterator[None]:
        """Inside, ``who`` is waited for."""
        wait, around = Wait(who, time.monotonic(), on_ranks), _around.get()
        with self._lock:
            self._waits.add(wait)
            if around is not None:
                around.parts.add(wait)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._watch, name="online-dpo-notices", daemon=True)
                self._thread.start()
        token = _around.set(wait)
        try:
            yield
        finally:
            _around.reset(token)
            with self._lock:
                self._waits.discard(wait)
                if around is not None:
                    around.parts.discard(wait)

    def innermost(self) -> list[Wait]:
        """Returns what is waited for at present, the longest first: of nested waits, the inner ones."""
        with self._lock:
            return sorted((wait for wait in self._waits if not wait.parts), key=lambda wait: wait.since)

    def notice(self) -> str | None:
        """Returns what has been waited for longer than ``after``, in one line; ``None`` if nothing has."""
        late = [wait for wait in self.innermost() if wait.seconds >= self.after]
        if not late:
            return None
        names = list(dict.fromkeys(wait.who for wait in late))
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        details = self.details() if late[0].on_ranks else ""
        return f"Waiting for {late[0].seconds:.0f} s: {', '.join(names[:SHOWN])}{more}{details and f' ({details})'}."

    def _watch(self) -> None:
        while True:
            time.sleep(min(1.0, self.after / 4))
            if time.monotonic() - self._told >= self.after and (notice := self.notice()) is not None:
                self._told = time.monotonic()
                self._tell(notice)


_around: ContextVar[Wait | None] = ContextVar("waiting", default=None)
"""The wait that surrounds the running code. Coroutines, and threads with a copied context, inherit it."""


def show(notice: str) -> None:
    """Shows a notice on a line of its own, above a progress bar of tqdm if there is one."""
    from tqdm import tqdm

    with tqdm.external_write_mode(file=sys.stderr):
        logger.warning("%s", notice)


WAITS = Waits(NOTICE_SECONDS, show)
"""What this process waits for."""

if sys.platform != "win32":  # which has no fork
    os.register_at_fork(after_in_child=WAITS.forget)

waiting_for = WAITS.waiting_for
