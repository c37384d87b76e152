"""`Child`: a process that a worker of Ray starts and ends, with what it prints."""

from __future__ import annotations

import os
import signal
import subprocess  # nosec B404
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from online_dpo.launch import keeper

LINES = 20_000
"""Lines that are kept until they are taken."""
LONGEST_LINE = 20_000
SECONDS_TO_END = 10.0


@dataclass(frozen=True)
class Report:
    """What a child has printed since the last report, and how it ended.

    ``lines`` have the number of their stream, 1 or 2. ``code`` is the exit code, or the negative number of a signal;
    ``None`` while it runs. ``silent_seconds`` are those since a server has last answered; ``None`` before it first did.
    """

    lines: list[tuple[int, str]] = field(default_factory=list)
    code: int | None = None
    silent_seconds: float | None = None


class Child:
    """A command that runs until it ends, is killed, or this process ends.

    Args:
        words: the words after Python.
        variables: its environment.
        folder: the folder in which it works.
    """

    def __init__(self, words: Sequence[str], variables: Mapping[str, str], folder: str) -> None:
        self._lines: deque[tuple[int, str]] = deque()
        self._lock, self._dropped, self._killed = threading.Lock(), 0, False
        self._process = subprocess.Popen(  # nosec B603
            [sys.executable, "-I", str(Path(keeper.__file__)), sys.executable, *words],
            env=dict(variables),
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        streams = ((1, self._process.stdout), (2, self._process.stderr))
        self._readers = [threading.Thread(target=self._read, args=each, daemon=True) for each in streams]
        for reader in self._readers:
            reader.start()

    def report(self) -> Report:
        """Returns what was printed since the last call. Once the process has ended, it holds the exit code, and all
        that the process has started is killed.
        """
        code = self._process.poll()
        if code is not None:
            self._kill_group()
            for reader in self._readers:
                reader.join(SECONDS_TO_END)
        with self._lock:
            lines = [(2, f"... {self._dropped} lines are not shown")] if self._dropped else []
            lines += self._lines
            self._lines.clear()
            self._dropped = 0
        return Report(lines, code)

    def send(self, number: int) -> None:
        """Sends a signal to the process, if it still runs."""
        if self._process.poll() is None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """Kills the process and all that it has started, and waits until it is gone."""
        self._kill_group()
        self._process.wait(SECONDS_TO_END)

    def _kill_group(self) -> None:
        """Kill all that is left in the session of the process, once: later its number may be in use again."""
        if not self._killed:
            self._killed = True
            with suppress(ProcessLookupError):  # none is left
                os.killpg(self._process.pid, signal.SIGKILL)

    def _read(self, number: int, stream: IO[bytes]) -> None:
        while line := stream.readline(LONGEST_LINE):
            with self._lock:
                self._lines.append((number, line.decode(errors="replace").rstrip("\n")))
                if len(self._lines) > LINES:
                    self._lines.popleft()
                    self._dropped += 1
