"""The page of a run's judge: bias for a place, disagreement of the orders, failures, cost, and what it said."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from online_dpo.dashboard.catalog import Run
from online_dpo.dashboard.context import render, run_of
from online_dpo.dashboard.group import Comparison, Group
from online_dpo.dashboard.index.samples import search_text
from online_dpo.dashboard.pages.pairs import PATIENCE
from online_dpo.stats.intervals import wilson_interval

PAGE = 25
PARTS = 10
"""Parts of a run for which figures are shown one by one."""

SHOWN = {"": "all", "disagree": "the orders disagree", "failed": "without an answer"}

_BY_COMPARISON = """
SELECT sample, comparison, min(step) AS step, count(*) AS orders,
    min(CASE WHEN shown_first = first THEN probability ELSE 1 - probability END) AS low,
    max(CASE WHEN shown_first = first THEN probability ELSE 1 - probability END) AS high,
    max(disagreement) AS disagreement
FROM judged {where} GROUP BY sample, comparison
"""


@dataclass(frozen=True)
class Share:
    """A share of a count, and its 95 % Wilson interval.

    >>> Share(part=31, whole=40).value
    0.775
    """

    part: int
    whole: int

    @property
    def value(self) -> float | None:
        """The share; ``None`` of nothing."""
        return self.part / self.whole if self.whole else None

    @property
    def interval(self) -> tuple[float, float]:
        """Its bounds: everything is possible where nothing was counted."""
        return wilson_interval(self.part / self.whole, self.whole) if self.whole else (0.0, 1.0)


@dataclass(frozen=True)
class Figures:
    """What a judge did in some steps.

    ``first`` counts answers that prefer the completion shown first, among those that prefer one; ``contradictions``
    comparisons whose two orders have different winners, among those with both.
    """

    steps: tuple[int, int]
    questions: int
    comparisons: int
    first: Share
    contradictions: Share
    failures: Share
    cached: int
    mean_disagreement: float | None
    seconds: float | None
    tokens: float | None
    cost: float | None


def figures(db: sqlite3.Connection, low: int, high: int) -> Figures:
    """The figures of the steps from ``low`` to ``high``."""
    where, bounds = "WHERE step BETWEEN ? AND ?", [low, high]
    asked = db.execute(
        "SELECT count(*) AS questions, total(probability > 0.5) AS first, total(probability < 0.5) AS second,"
        " total(failed) AS failed, total(cached) AS cached, avg(seconds) AS seconds, sum(tokens) AS tokens,"
        f" sum(cost) AS cost FROM judged {where}",  # nosec B608
        bounds,
    ).fetchone()
    compared = db.execute(
        "SELECT count(*) AS comparisons, total(orders > 1 AND disagreement IS NOT NULL) AS both,"
        " total(disagreement IS NOT NULL AND low < 0.5 AND high > 0.5) AS contradictions,"
        f" avg(disagreement) AS disagreement FROM ({_BY_COMPARISON.format(where=where)})",  # nosec B608
        bounds,
    ).fetchone()
    return Figures(
        steps=(low, high),
        questions=asked["questions"],
        comparisons=compared["comparisons"],
        first=Share(int(asked["first"]), int(asked["first"] + asked["second"])),
        contradictions=Share(int(compared["contradictions"]), int(compared["both"])),
        failures=Share(int(asked["failed"]), asked["questions"]),
        cached=int(asked["cached"]),
        mean_disagreement=compared["disagreement"],
        **{"seconds": asked["seconds"], "tokens": asked["tokens"], "cost": asked["cost"]},
    )


@dataclass(frozen=True)
class Said:
    """A comparison of a judge, with the group it belongs to."""

    group: Group
    comparison: Comparison


def show_judge(request: Request) -> Response:
    """The judge's figures, and what it said."""
    run = run_of(request)
    run.index.refresh_samples(PATIENCE)
    text, shown = request.query_params.get("q", "").strip(), request.query_params.get("shown", "")
    given = request.query_params.get("page", "1")
    page = max(1, int(given)) if given.isascii() and given.isdigit() and len(given) < 9 else 1
    with run.index.reading() as db:
        low, high = db.execute("SELECT min(step), max(step) FROM judged").fetchone()
        whole = None if low is None else figures(db, low, high)
        parts = [] if low is None else [figures(db, *part) for part in _parts(low, high)]
        count, found = _found(db, text, shown, page)
    said = _said(run, found)
    return render(
        *(request, "judge.html"),
        page="judge",
        **{"run": run, "whole": whole, "parts": [part for part in parts if part.questions], "said": said},
        **{"text": text, "shown": shown if shown in SHOWN else "", "choices": SHOWN, "count": count},
        **{"number": page, "pages": -(-count // PAGE), "progress": run.index.progress},
        link=lambda number: urlencode({"q": text, "shown": shown, "page": number}),
    )


def _parts(low: int, high: int) -> Sequence[tuple[int, int]]:
    """The steps from ``low`` to ``high`` in at most `PARTS` ranges."""
    size = -(-(high - low + 1) // PARTS)
    return [(start, min(start + size - 1, high)) for start in range(low, high + 1, size)]


def _found(db: sqlite3.Connection, text: str, shown: str, page: int) -> tuple[int, list[sqlite3.Row]]:
    """How many comparisons pass the filters, and those of a page, the latest first."""
    conditions: list[str] = []
    values: list[Any] = []
    if text:
        conditions, values = ["instr(words, ?) > 0"], [search_text(text)]
    if shown == "failed":
        conditions.append("failed")
    where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
    inner = _BY_COMPARISON.format(where=where)
    having = "WHERE disagreement IS NOT NULL AND low < 0.5 AND high > 0.5" if shown == "disagree" else ""
    count = db.execute(f"SELECT count(*) FROM ({inner}) {having}", values).fetchone()[0]  # nosec B608
    rows = db.execute(
        f"SELECT * FROM ({inner}) {having} ORDER BY step DESC, sample, comparison LIMIT ? OFFSET ?",  # nosec B608
        [*values, PAGE, PAGE * (page - 1)],
    ).fetchall()
    return count, rows


def _said(run: Run, rows: Sequence[sqlite3.Row]) -> list[Said]:
    groups: dict[int, Group | None] = {}
    said = []
    for row in rows:
        if row["sample"] not in groups:
            groups[row["sample"]] = run.index.group(row["sample"])
        group = groups[row["sample"]]
        if group is not None and row["comparison"] < len(group.comparisons):
            said.append(Said(group, group.comparisons[row["comparison"]]))
    return said


ROUTES = [Route("/runs/{run}/judge", show_judge)]
