"""Metrics in the index: from rows of ``metrics.jsonl`` to points, and to the few that a chart of some width needs."""

from __future__ import annotations

import sqlite3
from array import array
from collections import defaultdict
from typing import Any

import numpy as np

from online_dpo.dashboard.group import integer, text_of
from online_dpo.runs.plain_json import number

MOST_METRICS = 2000
LONGEST_NAME = 200
SMALL_CHUNK = 12_000
"""Bytes of a chunk to which more points are added."""

BLOCK = 100
"""Values that are averaged at once."""

NOT_METRICS = ("step", "kind")


def add_rows(db: sqlite3.Connection, rows: list[dict[str, Any]], first: int, known: set[str]) -> None:
    """Add rows of metrics to the index.

    Args:
        db: the connection that writes.
        rows: the rows.
        first: the number of the first one.
        known: the metrics that are in the index; those that are new are added.
    """
    points: defaultdict[str, array[float]] = defaultdict(lambda: array("d"))
    for place, row in enumerate(rows, first):
        step = integer(row.get("step"))
        if step is None or step < 0:
            continue
        for name, entry in row.items():
            if name not in known:
                if (
                    name in NOT_METRICS
                    or len(known) >= MOST_METRICS
                    or text_of(name) != name
                    or len(name) > LONGEST_NAME
                ):
                    continue
                known.add(name)
            if (value := number(entry)) is not None:
                points[name].extend((place, step, value))
    for name, new in points.items():
        _append(db, name, new)


def _append(db: sqlite3.Connection, name: str, new: array[float]) -> None:
    db.execute("REPLACE INTO metric VALUES (?, ?, ?)", (name, int(new[-2]), new[-1]))
    last = db.execute("SELECT rowid, points FROM chunk WHERE metric = ? ORDER BY last DESC LIMIT 1", (name,)).fetchone()
    if last is not None and len(last[1]) < SMALL_CHUNK:
        joined = last[1] + new.tobytes()
        db.execute("UPDATE chunk SET last = ?, points = ? WHERE rowid = ?", (int(new[-3]), joined, last[0]))
    else:
        db.execute("INSERT INTO chunk VALUES (?, ?, ?)", (name, int(new[-3]), new.tobytes()))


def points_of(db: sqlite3.Connection, name: str, after: int = -1) -> np.ndarray:
    """The points of a metric from rows after a number on: an array of (row, step, value)."""
    found = db.execute("SELECT points FROM chunk WHERE metric = ? AND last > ? ORDER BY last", (name, after))
    points = np.frombuffer(b"".join(chunk[0] for chunk in found), dtype=np.float64).reshape(-1, 3)
    return points if after < 0 else points[points[:, 0] > after]


def decimated(points: np.ndarray, buckets: int) -> np.ndarray:
    """At most two points for each of so many equal ranges of steps: the smallest and the largest value, in their order.
    What a chart of that many pixels shows is the same as with all points, which must be in the order of their steps.
    """
    if len(points) <= 2 * buckets:
        return points
    steps, values = points[:, 1], np.ascontiguousarray(points[:, 2])
    width = max(steps[-1] - steps[0], 1) / buckets
    bucket = np.minimum((steps - steps[0]) / width, buckets - 1).astype(np.int64)
    starts = np.flatnonzero(np.diff(bucket, prepend=-1))
    counts = np.diff(starts, append=len(points))
    kept = [np.array([0, len(points) - 1])]
    for extreme in (np.minimum, np.maximum):
        places = np.flatnonzero(values == np.repeat(extreme.reduceat(values, starts), counts))
        kept.append(places[np.diff(bucket[places], prepend=-1) > 0])  # the first of each bucket
    return points[np.unique(np.concatenate(kept))]


def in_order(points: np.ndarray) -> np.ndarray:
    """The points by their steps, in which a run writes them; a damaged file may have another order."""
    steps = points[:, 1]
    return points if (steps[1:] >= steps[:-1]).all() else points[np.argsort(steps, kind="stable")]


def smoothed(points: np.ndarray, smoothing: float) -> np.ndarray:
    """The points with the exponential moving average of their values: ``smoothing`` times the last average plus the
    rest times the value.

    Args:
        points: (row, step, value).
        smoothing: from 0 (no smoothing) to below 1.
    """
    count = len(points)
    blocks = np.resize(points[:, 2], (-(-count // BLOCK), BLOCK))
    distance = np.subtract.outer(np.arange(BLOCK), np.arange(BLOCK))
    weights = np.where(distance >= 0, (1 - smoothing) * smoothing ** np.maximum(distance, 0), 0.0)
    # the average of each block alone, then what is left in it of those before
    averages = blocks @ weights.T
    before, lasts = points[0, 2], []
    for last in averages[:, -1].tolist():
        lasts.append(before)
        before = last + smoothing**BLOCK * before
    averages += np.outer(lasts, smoothing ** np.arange(1, BLOCK + 1))
    return np.column_stack([points[:, :2], averages.ravel()[:count]])
