"""A cache of judges' answers on disk, so that no question is paid for twice."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from online_dpo.errors import error_text

TABLE = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, p_first REAL, final INTEGER NOT NULL, reply TEXT NOT NULL, model TEXT NOT NULL,
    input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL, created REAL NOT NULL
) WITHOUT ROWID
"""
BUSY_SECONDS = 60.0
"""Seconds to wait while another process has locked the file."""


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

    Args:
        path: the file; it and its folder are created if they do not exist. ``None`` keeps answers in memory.

    Raises:
        ValueError: the file cannot be opened, or is not a cache.
    """

    def __init__(self, path: str | None) -> None:
        self._path = ":memory:" if path is None else os.path.abspath(os.path.expanduser(path))
        self._lock = threading.Lock()
        self._owner = 0  # the process that opened the connection
        try:
            if path is not None:
                Path(self._path).parent.mkdir(parents=True, exist_ok=True)
            with self._lock:
                self._connection()
        except (OSError, sqlite3.Error) as error:
            raise ValueError(
                f"`cache`: {self._path} cannot be used: {error_text(error)}. Give another file, or no cache."
            ) from error

    def get(self, key: str) -> Answer | None:
        """Return the answer stored under a key, or ``None``."""
        with self._lock:
            row = (
                self._connection()
                .execute("SELECT p_first, final, reply, input_tokens, output_tokens FROM answers WHERE key = ?", (key,))
                .fetchone()
            )
        return None if row is None else Answer(row[0], bool(row[1]), *row[2:])

    def put(self, key: str, model: str, answer: Answer) -> None:
        """Store an answer. If the key exists, because another process was faster, the stored answer stays."""
        row = (key, answer.p_first, int(answer.final), answer.reply, model)
        with self._lock:
            self._connection().execute(
                "INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (*row, answer.input_tokens, answer.output_tokens, time.time()),
            )

    def _connection(self) -> sqlite3.Connection:
        """This process's connection, opened on first use: a forked process must not use its parent's."""
        if self._owner != os.getpid():
            # Without an isolation level, each statement is its own transaction: a stored answer is on disk at once.
            connection = sqlite3.connect(self._path, BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute(TABLE)
            self._opened, self._owner = connection, os.getpid()
        return self._opened


def cache_key(
    template: str, rubric: str, model: str, sampling: dict[str, Any], prompt: str, first: str, second: str, vote: int
) -> str:
    """The key of an answer: a hash of everything it depends on. ``first`` and ``second`` are in the order shown."""
    parts = [template, rubric, model, sampling, prompt, first, second, vote]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
