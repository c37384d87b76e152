"""The tables of a run's index, in a SQLite file of this launch of the dashboard."""

from __future__ import annotations

import sqlite3
from pathlib import Path

SCHEMA = """
CREATE TABLE chunk (metric TEXT, last INTEGER, points BLOB);
CREATE INDEX chunk_of_metric ON chunk (metric, last);
CREATE TABLE metric (metric TEXT PRIMARY KEY, step INTEGER, value REAL);
CREATE TABLE event (number INTEGER PRIMARY KEY, step INTEGER, time REAL, rank INTEGER, kind TEXT, message TEXT,
    facts TEXT);
CREATE TABLE frame (id INTEGER PRIMARY KEY, rank INTEGER, number INTEGER, start INTEGER, end INTEGER);
CREATE TABLE sample (
    id INTEGER PRIMARY KEY,
    frame INTEGER, place INTEGER,
    step INTEGER, rank INTEGER, idx INTEGER, round INTEGER,
    prompt_row INTEGER, prompt_key TEXT,
    completions INTEGER, pairs INTEGER, reason TEXT,
    margin REAL, probability REAL, length_ratio REAL, surprise REAL, disagreement REAL,
    mean_length REAL, mean_score REAL, best_score REAL,
    scorers TEXT, comparisons INTEGER,
    text TEXT, prompt TEXT, chosen TEXT, rejected TEXT
);
CREATE INDEX sample_of_step ON sample (step, rank, idx, round);
CREATE INDEX sample_of_prompt ON sample (prompt_key, step);
CREATE INDEX sample_of_frame ON sample (frame);
CREATE TABLE reward (sample INTEGER, scorer TEXT, lowest REAL, highest REAL);
CREATE INDEX reward_of_sample ON reward (sample);
CREATE TABLE judged (
    sample INTEGER, step INTEGER, comparison INTEGER, place INTEGER,
    first INTEGER, second INTEGER, shown_first INTEGER,
    probability REAL, combined REAL, disagreement REAL,
    seconds REAL, tokens REAL, cost REAL, failed INTEGER, cached INTEGER,
    words TEXT
);
CREATE INDEX judged_of_sample ON judged (sample);
CREATE INDEX judged_of_step ON judged (step, sample, comparison);
"""
"""``chunk``: points of a metric (number of its row, step, value), as float64, in ascending order; ``last`` is the
number of the last row. ``metric``: the last value of each. ``sample``: one row a group; ``prompt``, ``chosen`` and
``rejected`` are the beginnings of its texts. ``reward``: the range of each scorer's numbers in a group. ``judged``: one
row a question to a judge; ``probability`` is that the completion shown first is better, ``combined`` that of the whole
comparison for its ``first``; ``words`` is what it said, to be searched.
"""


def create(database: Path) -> sqlite3.Connection:
    """Make a new database, and return the connection that writes into it. It may be used in any thread, by one at a
    time.
    """
    connection = sqlite3.connect(database, check_same_thread=False)
    # the index of a killed dashboard is of no use to the next one, so it need not survive
    connection.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = OFF;" + SCHEMA)
    return connection


def connect(database: Path) -> sqlite3.Connection:
    """A connection that reads, whose rows have names. All that it reads is of one moment, also while more is added."""
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True, check_same_thread=False, isolation_level=None)
    connection.row_factory = sqlite3.Row
    connection.execute("BEGIN")
    return connection
