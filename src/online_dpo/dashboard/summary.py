"""What the table of all runs says of each, read from a few places of its files, however long they are."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from online_dpo.dashboard.group import integer
from online_dpo.dashboard.index.follow import FollowedFile, size_of
from online_dpo.runs.layout import EVENTS, METRICS
from online_dpo.runs.opening import open_regular
from online_dpo.runs.plain_json import number
from online_dpo.runs.reading import RunFolder
from online_dpo.runs.state import state_from

TAIL = 1 << 19
"""Bytes at the end of the metrics in which the last evaluation is looked for."""

LAST_ROWS = 12
"""Rows at the end in which the last value of each metric is looked for."""

SPARKS = 24
"""Rows elsewhere, for the trend."""

LONGEST_ROW = 1 << 16
MOST_SESSIONS = 200


@dataclass(frozen=True)
class Summary:
    """A run in a row of the table.

    ``trend`` are (step, value) of ``trend_metric`` at some steps. Times are seconds since 1970.

    >>> Summary(state="running", step=120, steps=1000, last={"loss": 0.5}, trend=[(1, 0.7), (120, 0.5)], ...)
    """

    state: str
    step: int | None = None
    steps: int | None = None
    model: str = ""
    last: dict[str, float] = field(default_factory=dict)
    trend_metric: str = ""
    trend: list[tuple[int, float]] = field(default_factory=list)
    began: float | None = None
    updated: float | None = None

    @property
    def seconds(self) -> float | None:
        """How long the run has taken, from its first row to its last."""
        return self.updated - self.began if self.began is not None and self.updated is not None else None


class Summarizer:
    """Makes a run's summary, again only when its files have changed.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._summary, self._of = Summary(""), (-1, -1)
        self._events = FollowedFile(folder.path / EVENTS)
        self._turns: list[dict[str, Any]] = []

    @property
    def signature(self) -> tuple[int, int]:
        """Other than before when the files have changed."""
        return size_of(self._folder.path / METRICS), size_of(self._folder.path / EVENTS)

    def summary(self) -> Summary:
        """What the table says of the run now."""
        with self._lock:
            signature = self.signature
            if signature != self._of:
                self._summary, self._of = self._read(), signature
            # a process may end without a last word
            state = state_from(self._turns, self._folder.path) if self._summary.state == "running" else None
            return self._summary if state is None else self._with_state(state)

    def _with_state(self, state: str) -> Summary:
        return Summary(**{**vars(self._summary), "state": state})

    def _read(self) -> Summary:
        self._read_turns()
        settings = self._folder.settings
        rows = list(_some_rows(self._folder))
        steps = [step for row in rows if (step := integer(row.get("step"))) is not None]
        times = [moment for row in rows if (moment := number(row.get("time"))) is not None]
        merged = {name: entry for row in rows for name, entry in row.items()}
        last = {name: value for name, entry in merged.items() if (value := number(entry)) is not None}
        metric = next((name for name in ("objective/scores", "rewards/margins", "loss") if name in last), "")
        return Summary(
            state=state_from(self._turns, self._folder.path),
            step=max(steps, default=None),
            steps=_positive(settings.get("max_steps")) or self._planned(),
            model=str(settings.get("model_name_or_path") or settings.get("model") or "")[:200],
            last=last,
            trend_metric=metric,
            trend=_trend(rows, metric),
            began=min(times, default=None),
            updated=max(times, default=None),
        )

    def _planned(self) -> int | None:
        return next((steps for row in reversed(self._turns) if (steps := _positive(row.get("max_steps")))), None)

    def _read_turns(self) -> None:
        """Read how the run began and ended each time."""
        while True:
            rows = self._events.read()
            if rows is None:
                self._events, self._turns = FollowedFile(self._folder.path / EVENTS), []
                continue
            self._turns += [row for row in rows if row.get("kind") in ("start", "resume", "end")]
            del self._turns[:-MOST_SESSIONS]
            if self._events.is_whole:
                return


def _positive(value: Any) -> int | None:
    whole = integer(value)
    return whole if whole is not None and whole > 0 else None


def _trend(rows: list[dict[str, Any]], metric: str) -> list[tuple[int, float]]:
    points = [(integer(row.get("step")), number(row.get(metric))) for row in rows]
    there = sorted((step, value) for step, value in points if step is not None and value is not None)
    kept = there[:1]
    for point in there:  # the rows at the end of the file are nearer to each other than the others
        if point[0] - kept[-1][0] >= (there[-1][0] - there[0][0]) / SPARKS:
            kept.append(point)
    return kept if kept[-1:] == there[-1:] else [*kept, there[-1]]


def _some_rows(folder: RunFolder) -> Iterator[dict[str, Any]]:
    """Rows at equal distances in the file, the last evaluation, then the last rows: all of a short file."""
    try:
        with open_regular(folder.path / METRICS) as file:
            size = file.seek(0, 2)
            for place in range(SPARKS if size > LONGEST_ROW else 0):
                file.seek(size * place // SPARKS)
                if place:
                    file.readline(LONGEST_ROW)  # the rest of a row
                yield from _parsed([file.readline(LONGEST_ROW)])
            file.seek(max(0, size - TAIL))
            tail = file.read(TAIL)
    except OSError:
        return
    whole = tail[: tail.rfind(b"\n") + 1]
    if size <= LONGEST_ROW:
        yield from _parsed(whole.splitlines(keepends=True))
        return
    evaluated = whole.rfind(b'"eval_')
    if evaluated >= 0:
        yield from _parsed([whole[whole.rfind(b"\n", 0, evaluated) + 1 : whole.find(b"\n", evaluated) + 1]])
    yield from _parsed(whole[-LAST_ROWS * LONGEST_ROW :].splitlines(keepends=True)[-LAST_ROWS:])


def _parsed(lines: list[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            row = json.loads(line) if line.endswith(b"\n") and len(line) <= LONGEST_ROW else None
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            yield row
