"""`RunDirectory`: what a process writes into the folder of its run while it trains.

Nothing here ends a run: what cannot be written waits, a warning says so, and another when it has been made up for.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from online_dpo.errors import error_text
from online_dpo.runs import events
from online_dpo.runs.appending import GrowingFile
from online_dpo.runs.completions import CompletionsWriter
from online_dpo.runs.layout import EVENTS, METRICS
from online_dpo.runs.plain_json import plain_or_named
from online_dpo.runs.reading import read_lines

logger = logging.getLogger(__name__)


class RunDirectory:
    """The files of a run folder that grow. All methods may be called in any thread.

    Args:
        folder: the run folder, which has been prepared (see `online_dpo.runs.beginning`).
        rank: this process, of ``processes``. The first one alone writes metrics.
        limit: the most bytes that all files of completions may take.

    Raises:
        OSError: a file cannot be opened.
    """

    def __init__(self, folder: Path, rank: int, processes: int, limit: int) -> None:
        self.folder, self._rank = folder, rank
        self._lock = threading.RLock()
        self._in_trouble = False
        self._events = GrowingFile(folder / EVENTS, shared=True)
        self._metrics = GrowingFile(folder / METRICS) if rank == 0 else None
        self._completions = CompletionsWriter(folder, rank, processes, limit)

    def add_metrics(self, row: Mapping[str, Any]) -> None:
        """Writes a row of metrics."""
        assert self._metrics is not None
        metrics, line = self._metrics, json_line(row)
        self._try(lambda: metrics.add(line))

    def add_event(self, event: events.Event, step: int) -> None:
        """Writes an event."""
        row = {"time": time.time(), "step": step, "rank": self._rank, "kind": event.kind, "message": event.message}
        line = json_line({**row, **event.facts})
        self._try(lambda: self._events.add(line))

    def add_groups(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes the groups of a step."""
        if rows:
            self._try(lambda: self._completions.add(rows))

    def sync(self) -> None:
        """Brings everything to the disk."""
        with self._lock:
            for file in self._files():
                self._try(file.sync)

    def close(self) -> None:
        """Closes the files."""
        with self._lock:
            for file in self._files():
                file.close()

    @property
    def waiting(self) -> int:
        """How many rows and frames could not be written yet."""
        return sum(len(file.backlog) for file in self._files())

    @property
    def dropped(self) -> int:
        """How many rows and frames had to go, because too much was waiting."""
        return sum(file.dropped for file in self._files())

    def _files(self) -> list[GrowingFile]:
        of_first = [] if self._metrics is None else [self._metrics]
        return [self._completions.file, *of_first, self._events]

    def _try(self, action: Callable[[], None]) -> None:
        """Writes, and tells when that begins to fail and when nothing is left that waits."""
        with self._lock:
            try:
                action()
            except OSError as error:
                self._tell_trouble(error)
                return
            if self._in_trouble and not self._still_waits():
                self._in_trouble = False
                lost = f" {self.dropped} rows and frames had to go meanwhile." if self.dropped else ""
                events.warn(logger, "record", f"The run folder {self.folder} can be written again.{lost}")

    def _still_waits(self) -> bool:
        try:
            for file in self._files():
                file.flush()
        except OSError:
            return True
        return False

    def _tell_trouble(self, error: OSError) -> None:
        if not self._in_trouble:
            self._in_trouble = True  # before it is told, which is an event to write
            events.warn(
                logger,
                "record",
                f"The record of the run in {self.folder} could not be written: {error_text(error)}. It waits in memory "
                "and is written as soon as that is possible; training goes on.",
            )


def append_event(folder: Path, event: events.Event) -> None:
    """Writes an event into the record of a run that other processes write, if there is one. Its rank is ``null``.

    Raises:
        OSError: it could not be written.
    """
    if not (folder / EVENTS).is_file():
        return
    last = next((row["step"] for row in reversed(read_lines(folder / EVENTS).rows) if row.get("step")), 0)
    file = GrowingFile(folder / EVENTS, shared=True)
    try:
        row = {"time": time.time(), "step": last, "rank": None, "kind": event.kind, "message": event.message}
        file.add(json_line({**row, **event.facts}))
    finally:
        file.close()


def json_line(row: Mapping[str, Any]) -> bytes:
    """A row as a line of strict JSON; a number that is not finite is ``null``.

    >>> json_line({"step": 1, "loss": float("nan")})
    b'{"step":1,"loss":null}\\n'
    """
    text = json.dumps(plain_or_named(row), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace") + b"\n"
