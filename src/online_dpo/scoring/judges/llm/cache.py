"""A cache of judges' answers on disk, so that no question is paid for twice.

A cache is a convenience: one that cannot be used costs a warning, never a run and never a wrong answer.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import math
import os
import sqlite3
import stat
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from online_dpo.errors import error_text

logger = logging.getLogger(__name__)

TABLE = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, p_first REAL, final INTEGER NOT NULL, reply TEXT NOT NULL, model TEXT NOT NULL,
    input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL, created REAL NOT NULL
) WITHOUT ROWID
"""
COLUMNS = ("key", "p_first", "final", "reply", "model", "input_tokens", "output_tokens", "created")
VERSION = 0
"""``user_version`` of the file. A later form of the table gets another number, and is left alone by this version."""

BUSY_SECONDS = 5.0
"""Seconds to wait while another process has locked the file."""

FOR_THE_OWNER, FOLDER_FOR_THE_OWNER = 0o600, 0o700
FAILURES = (OSError, ValueError, sqlite3.Error)
"""What a file system or SQLite raises; `ValueError` is for a path that no file can have."""


@dataclass(frozen=True)
class Answer:
    """A model's reply to one question, and the verdict that was read from it.

    >>> Answer(p_first=0.93, final=True, reply="A", input_tokens=212, output_tokens=1)

    ``p_first`` is ``None`` if the reply contains no verdict. ``final`` is that of :class:`Verdict`.
    """

    p_first: float | None
    final: bool
    reply: str
    input_tokens: int
    output_tokens: int


class AnswerCache:
    """A table of answers in a SQLite file. Any number of threads and processes of one machine may use it.

    If the file cannot be used, from the beginning or from some moment on, there is one warning. What can no longer be
    written is kept in memory, and what was read before can still be read, if the file allows that.

    Args:
        path: the file; it and its folder are created if they do not exist, for their owner alone. ``None`` keeps
            answers in memory.
    """

    def __init__(self, path: str | None) -> None:
        self._path = Path(os.path.abspath(os.path.expanduser(path or "")))
        self._lock = threading.Lock()
        self._owner = 0  # the process that opened the connection
        self._memory: dict[str, Answer] = {}
        self._reads = self._writes = path is not None
        self._has_warned = False
        if path is not None:
            with self._lock:
                try:
                    self._connection()
                except FAILURES as error:
                    self._give_up(error)

    def get(self, key: str) -> Answer | None:
        """Return the answer stored under a key, or ``None``."""
        with self._lock:
            if key in self._memory or not self._reads:
                return self._memory.get(key)
            try:
                row = self._read(key)
                if row is None or (answer := _checked(row)) is not None:
                    return None if row is None else answer
                self._warn("it holds entries that are no answers; they are asked for again")
                self._connection().execute("DELETE FROM answers WHERE key = ?", (key,))
            except FAILURES as error:
                self._give_up(error)
            return None

    def put(self, key: str, model: str, answer: Answer) -> None:
        """Store an answer. If the key exists, because another process was faster, the stored answer stays."""
        row = (key, answer.p_first, int(answer.final), answer.reply, model)
        with self._lock:
            if self._writes:
                try:
                    self._check_in_place()
                    self._connection().execute(
                        "INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                        (*row, answer.input_tokens, answer.output_tokens, time.time()),
                    )
                    return
                except FAILURES as error:
                    self._writes = False
                    self._warn(f"nothing more can be written to it: {error_text(error)}")
            self._memory[key] = answer

    def _read(self, key: str) -> tuple[Any, ...] | None:
        query = "SELECT p_first, final, reply, input_tokens, output_tokens FROM answers WHERE key = ?"
        return self._connection().execute(query, (key,)).fetchone()

    def _connection(self) -> sqlite3.Connection:
        """This process's connection, opened on first use: a forked process must not use its parent's."""
        if self._owner != os.getpid():
            self._file = self._file_on_disk()
            # Without an isolation level, each statement is its own transaction: a stored answer is on disk at once.
            connection = sqlite3.connect(self._path, BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            try:
                _check_ours(connection)
                self._keep_private()
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("PRAGMA synchronous=NORMAL")
                connection.execute(TABLE)
            except FAILURES:
                connection.close()
                raise
            self._opened, self._owner = connection, os.getpid()
        return self._opened

    def _file_on_disk(self) -> tuple[int, int]:
        """Create the file if there is none; returns its device and number on the disk."""
        for folder in reversed([folder for folder in self._path.parents if not folder.exists()]):
            folder.mkdir(FOLDER_FOR_THE_OWNER, exist_ok=True)
        if self._path.exists() and not self._path.is_file():
            raise OSError("it is no file")
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, FOR_THE_OWNER))
        found = self._path.stat()
        if os.geteuid() not in (found.st_uid, 0):
            raise OSError("it belongs to another user, who could have written any answers into it")
        return found.st_dev, found.st_ino

    def _keep_private(self) -> None:
        """Take the rights of others from the file, before more is written.

        SQLite gives the files beside it (``-wal``, ``-shm``) the rights that it has.
        """
        if stat.S_IMODE(self._path.stat().st_mode) & ~FOR_THE_OWNER:
            for file in (self._path, *self._path.parent.glob(f"{glob.escape(self._path.name)}-*")):
                file.chmod(FOR_THE_OWNER)
            logger.warning("`cache`: others could read %s; now it is for its owner alone.", self._path)

    def _check_in_place(self) -> None:
        """Check that the file is still the one that was opened: SQLite would go on writing into one that is deleted."""
        self._connection()
        found = self._path.stat()
        if (found.st_dev, found.st_ino) != self._file:
            raise OSError("another file has taken its place")

    def _give_up(self, error: BaseException) -> None:
        """Go on without the file."""
        self._reads = self._writes = False
        self._warn(f"it cannot be used: {error_text(error)}")

    def _warn(self, problem: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "`cache`: %s: %s. The run goes on; answers that are not in the cache have to be paid for again.",
                self._path,
                problem,
            )


def _check_ours(connection: sqlite3.Connection) -> None:
    """Check that a file is empty or a cache of this version, before anything is written into it.

    Raises:
        sqlite3.DatabaseError: it is not.
    """
    [version] = connection.execute("PRAGMA user_version").fetchone()
    is_empty = connection.execute("SELECT 1 FROM sqlite_master").fetchone() is None
    columns = tuple(name for _, name, *_ in connection.execute("PRAGMA table_info(answers)"))
    if version != VERSION or not (is_empty or columns == COLUMNS):
        raise sqlite3.DatabaseError("it is a database of something else, or of another version of this package")


def _checked(row: tuple[Any, ...]) -> Answer | None:
    """The answer of a row; ``None`` if it can be none. SQLite keeps any type in any column."""
    p_first, final, reply, *tokens = row
    is_probability = isinstance(p_first, float) and math.isfinite(p_first) and 0 <= p_first <= 1
    if not (p_first is None or is_probability) or final not in (0, 1) or not isinstance(reply, str):
        return None
    if not all(isinstance(count, int) and count >= 0 for count in tokens):
        return None
    return Answer(p_first, bool(final), reply, *tokens)


def cache_key(
    template: str, rubric: str, model: str, sampling: dict[str, Any], prompt: str, first: str, second: str, vote: int
) -> str:
    """The key of an answer: a hash of everything it depends on. ``first`` and ``second`` are in the order shown."""
    parts = [template, rubric, model, sampling, prompt, first, second, vote]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
