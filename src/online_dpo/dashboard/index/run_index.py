"""The index of one run: filled bit by bit from its folder, also while the run writes, and read by pages."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from online_dpo.dashboard.group import Group, integer, text_of
from online_dpo.dashboard.index import points
from online_dpo.dashboard.index.background import Background, Job
from online_dpo.dashboard.index.follow import FollowedFile, FollowedFrames
from online_dpo.dashboard.index.samples import add_group
from online_dpo.dashboard.index.tables import connect, create
from online_dpo.runs.frames import Frame
from online_dpo.runs.layout import EVENTS, METRICS, CompletionsFile
from online_dpo.runs.plain_json import number
from online_dpo.runs.reading import RunFolder, StepFrame

MOST_EVENTS, LONGEST_FACTS = 100_000, 100_000
SLICE = 0.03
"""Seconds of work between two moments in which others may read."""


@dataclass(frozen=True)
class Progress:
    """How much of a run's groups is in the index, in bytes of its files.

    >>> Progress(done=3_000_000, of=12_000_000).percent
    25
    """

    done: int
    of: int

    @property
    def percent(self) -> int:
        return 100 if self.done >= self.of else 100 * self.done // self.of

    @property
    def is_whole(self) -> bool:
        return self.done >= self.of


class RunIndex:
    """The index of one run.

    ``refresh_metrics`` and ``refresh_samples`` read what is new for some seconds; any thread may call them. With
    ``reading`` pages query the tables (see `tables`). ``generation`` changes when the run has cut off what was indexed,
    as a resumed run does: what was read before it is void.

    Args:
        folder: the run's folder.
        database: where the index is to lie.
        background: what goes on where `refresh_metrics` and `refresh_samples` have stopped.
    """

    def __init__(self, folder: RunFolder, database: Path, background: Background) -> None:
        self.folder = folder
        self._background = background
        self.generation = 0
        self._database = database
        self._lock = threading.Lock()
        self._is_closed = False
        self._writer: sqlite3.Connection | None = None
        self._forget_metrics()
        self._events, self._event_count = FollowedFile(folder.path / EVENTS), 0
        self._frames, self._has_looked = FollowedFrames(folder), False

    def _forget_metrics(self) -> None:
        self._metrics, self._known, self.rows = FollowedFile(self.folder.path / METRICS), set[str](), 0

    def _db(self) -> sqlite3.Connection:
        if self._writer is None:
            self._writer = create(self._database)
        return self._writer

    def refresh_metrics(self, seconds: float) -> bool:
        """Read new rows and events for some seconds at most; returns whether everything was read. What is left is read
        in the background.
        """
        return self._refreshed(self._more_metrics, seconds)

    def refresh_samples(self, seconds: float) -> bool:
        """The same for groups."""
        return self._refreshed(self._more_samples, seconds)

    def _refreshed(self, job: Job, seconds: float) -> bool:
        whole = job(seconds)
        if not whole:
            self._background.want(job)
        return whole

    def _more_metrics(self, seconds: float) -> bool:
        return self._work(seconds, lambda db, until: self._read_rows(db) & self._read_events(db))

    def _more_samples(self, seconds: float) -> bool:
        return self._work(seconds, self._read_frames)

    def _work(self, seconds: float, read: Callable[[sqlite3.Connection, float], bool]) -> bool:
        """Read slice by slice, between which others may have the lock; returns whether nothing is left."""
        until = time.monotonic() + seconds
        while self._lock.acquire(timeout=max(0.0, until - time.monotonic())):
            try:
                if self._is_closed:
                    return True
                with self._db() as db:
                    whole = read(db, min(until, time.monotonic() + SLICE))
            finally:
                self._lock.release()
            if whole or time.monotonic() > until:
                return whole
            time.sleep(0)
        return False

    def _read_rows(self, db: sqlite3.Connection) -> bool:
        rows = self._metrics.read()
        if rows is None:  # it was cut: what was read is void
            db.execute("DELETE FROM chunk")
            db.execute("DELETE FROM metric")
            self._forget_metrics()
            self.generation += 1
            return False
        points.add_rows(db, rows, self.rows, self._known)
        self.rows += len(rows)
        return self._metrics.is_whole

    def _read_events(self, db: sqlite3.Connection) -> bool:
        rows = self._events.read()
        if rows is None:
            db.execute("DELETE FROM event")
            self._events, self._event_count = FollowedFile(self.folder.path / EVENTS), 0
            return False
        for row in rows:
            if self._event_count < MOST_EVENTS:
                db.execute("INSERT INTO event VALUES (?, ?, ?, ?, ?, ?, ?)", (self._event_count, *_event(row)))
                self._event_count += 1
        return self._events.is_whole

    def _read_frames(self, db: sqlite3.Connection, until: float) -> bool:
        for file in self._frames.look():
            self._forget(db, file)
        self._has_looked = True
        for at in self._frames.new():
            self._add_frame(db, at)
            if time.monotonic() > until:
                break
        self._frames.settle()
        return self._progress.is_whole

    def _add_frame(self, db: sqlite3.Connection, at: StepFrame) -> None:
        values = (at.file.rank, at.file.number, at.frame.start, at.frame.end)
        frame = db.execute("INSERT INTO frame (rank, number, start, end) VALUES (?, ?, ?, ?)", values).lastrowid or 0
        try:
            for place, row in enumerate(self.folder.each_group(at)):
                if row is not None and (group := Group.read(row)) is not None:
                    add_group(db, frame, place, group)
        except (OSError, ValueError):  # damaged, or rotated out a moment ago: the next look at the folder sees it
            return

    def _forget(self, db: sqlite3.Connection, file: CompletionsFile) -> None:
        values = (file.rank, file.number)
        frames = db.execute("SELECT id FROM frame WHERE rank = ? AND number = ?", values).fetchall()
        db.executemany("DELETE FROM judged WHERE sample IN (SELECT id FROM sample WHERE frame = ?)", frames)
        db.executemany("DELETE FROM reward WHERE sample IN (SELECT id FROM sample WHERE frame = ?)", frames)
        db.executemany("DELETE FROM sample WHERE frame = ?", frames)
        db.executemany("DELETE FROM frame WHERE id = ?", frames)
        self.generation += 1

    @property
    def progress(self) -> Progress:
        """How much of the groups is in the index, and can be read from it.

        A page asks before it reads: what is read in the background meanwhile is then asked for again.
        """
        with self._lock:  # what has been read is not written yet, while it is held
            return self._progress

    @property
    def _progress(self) -> Progress:
        return Progress(self._frames.done, self._frames.size) if self._has_looked else Progress(0, 1)

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection that reads the tables; its rows have names."""
        if self._writer is None and not self._is_closed:
            with self._lock:
                self._db()
        with closing(connect(self._database)) as db:
            yield db

    def group(self, sample: int) -> Group | None:
        """The whole group of a row of table ``sample``; ``None`` if it is not there any more."""
        with self.reading() as db:
            row = db.execute(
                "SELECT f.*, s.place FROM sample s JOIN frame f ON f.id = s.frame WHERE s.id = ?", (sample,)
            ).fetchone()
        return None if row is None else self._read_group(row)

    def find_group(self, key: str) -> Group | None:
        """The group of a key such as ``12-0-3-0``."""
        parts = key.split("-")
        if len(parts) != 4 or not all(part.isascii() and part.isdigit() and len(part) < 18 for part in parts):
            return None
        with self.reading() as db:
            row = db.execute(
                "SELECT id FROM sample WHERE step = ? AND rank = ? AND idx = ? AND round = ?", [int(p) for p in parts]
            ).fetchone()
        return None if row is None else self.group(row["id"])

    def _read_group(self, row: sqlite3.Row) -> Group | None:
        at = StepFrame(CompletionsFile(row["rank"], row["number"]), Frame(row["start"], row["end"]))
        try:
            for place, entry in enumerate(self.folder.each_group(at)):
                if place == row["place"]:
                    return None if entry is None else Group.read(entry)
        except (OSError, ValueError):
            return None
        return None

    def close(self) -> None:
        """Close the database; nothing more is read."""
        with self._lock:
            self._is_closed = True
            if self._writer is not None:
                self._writer.close()
                self._writer = None


def _event(row: dict[str, Any]) -> tuple[object, ...]:
    facts = {name: value for name, value in row.items() if name not in ("time", "step", "rank", "kind", "message")}
    text = text_of(facts)
    return (
        *(integer(row.get("step")), number(row.get("time")), integer(row.get("rank"))),
        *(
            text_of(row.get("kind"))[:100],
            text_of(row.get("message"))[:10_000],
            text if len(text) <= LONGEST_FACTS else "{}",
        ),
    )
