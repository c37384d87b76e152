"""Answers of judges on disk, so that nothing is asked and paid for twice."""

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
BUSY_SECONDS = 60.0  # that another process may hold the file for


@dataclass(frozen=True)
class Answer:
    """What a model said to one question, and what that means.

    >>> Answer(p_first=0.93, final=True, reply="A", input_tokens=212, output_tokens=1)

    ``p_first`` is ``None`` where the reply holds no verdict; ``final`` as in :class:`Verdict`.
    """

    p_first: float | None
    final: bool
    reply: str
    input_tokens: int
    output_tokens: int


class AnswerCache:
    """A table in a SQLite file, used by any number of threads and processes on one machine.

    Args:
        path: the file, made with its folder where there is none; ``None`` keeps answers in memory.

    Raises:
        ValueError: the file cannot be opened, or is no cache.
    """

    def __init__(self, path: str | None) -> None:
        self._path = ":memory:" if path is None else os.path.abspath(os.path.expanduser(path))
        self._lock = threading.Lock()
        self._owner = 0
        try:
            if path is not None:
                Path(self._path).parent.mkdir(parents=True, exist_ok=True)
            with self._lock:
                self._connection()
        except (OSError, sqlite3.Error) as error:
            raise ValueError(f"`cache`: {self._path} cannot be used: {error_text(error)}.") from error

    def get(self, key: str) -> Answer | None:
        """The answer, if it is known."""
        with self._lock:
            row = (
                self._connection()
                .execute("SELECT p_first, final, reply, input_tokens, output_tokens FROM answers WHERE key = ?", (key,))
                .fetchone()
            )
        return None if row is None else Answer(row[0], bool(row[1]), *row[2:])

    def put(self, key: str, model: str, answer: Answer) -> None:
        """Keep an answer. One that is there already stays: another process was faster."""
        row = (key, answer.p_first, int(answer.final), answer.reply, model)
        with self._lock:
            self._connection().execute(
                "INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (*row, answer.input_tokens, answer.output_tokens, time.time()),
            )

    def _connection(self) -> sqlite3.Connection:
        """The process's own: a forked one must not use its parent's."""
        if self._owner != os.getpid():
            # Without isolation level each statement is a transaction, so that an answer is on disk once it is put.
            made = sqlite3.connect(self._path, BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            made.execute("PRAGMA journal_mode=WAL")
            made.execute("PRAGMA synchronous=NORMAL")
            made.execute(TABLE)
            self._open, self._owner = made, os.getpid()
        return self._open


def cache_key(
    template: str, rubric: str, model: str, sampling: dict[str, Any], prompt: str, first: str, second: str, vote: int
) -> str:
    """A hash over everything that an answer depends on; ``first`` and ``second`` as they are presented."""
    parts = [template, rubric, model, sampling, prompt, first, second, vote]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
