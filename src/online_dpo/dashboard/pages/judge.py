"""The page of a run's judge: bias for a place, disagreement of the orders, failures, cost, and what it said."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import reduce
from operator import add
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
SELECT sample, comparison, step, count(*) AS orders,
    min(CASE WHEN shown_first = first THEN probability ELSE 1 - probability END) AS low,
    max(CASE WHEN shown_first = first THEN probability ELSE 1 - probability END) AS high,
    max(disagreement) AS disagreement
FROM judged {where} GROUP BY step, sample, comparison
"""
_ANY_ORDER = """
EXISTS (SELECT 1 FROM judged o WHERE o.sample = judged.sample AND o.comparison = judged.comparison AND {condition})
"""
"""Whole comparisons pass a filter or do not: what both orders say is counted of both."""

_ASKED = """
SELECT (step - ?) / ? AS part, count(*) AS questions, total(probability > 0.5) AS first,
    total(probability < 0.5) AS second, total(failed) AS failed, total(cached) AS cached, count(seconds) AS timed,
    total(seconds) AS seconds, sum(tokens) AS tokens, sum(cost) AS cost
FROM judged GROUP BY part ORDER BY part
"""
_COMPARED = """
SELECT (step - ?) / ? AS part, count(*) AS comparisons, total(disagreement IS NOT NULL) AS both,
    total(disagreement IS NOT NULL AND low < 0.5 AND high > 0.5) AS contradictions, total(disagreement) AS apart
FROM ({by_comparison}) GROUP BY part ORDER BY part
""".format(by_comparison=_BY_COMPARISON.format(where=""))  # nosec B608


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
    """What a judge did in some steps, as counts and sums.

    ``first`` answers prefer the completion shown first, ``second`` the other one; ``contradictions`` are comparisons
    whose two orders have different winners, ``both`` those with both orders, which lie ``apart`` by that much in sum;
    ``timed`` questions took ``seconds``. ``tokens`` and ``cost`` are ``None`` where they are not known.
    """

    steps: tuple[int, int]
    questions: int
    first: int
    second: int
    failed: int
    cached: int
    timed: int
    seconds: float
    tokens: float | None
    cost: float | None
    comparisons: int
    both: int
    contradictions: int
    apart: float

    def __add__(self, other: Figures) -> Figures:
        steps = (min(self.steps[0], other.steps[0]), max(self.steps[1], other.steps[1]))
        names = [field.name for field in fields(self) if field.name != "steps"]
        return Figures(steps, **{name: _sum(getattr(self, name), getattr(other, name)) for name in names})

    @property
    def first_share(self) -> Share:
        """Of the answers that prefer one: those that prefer what is shown first."""
        return Share(self.first, self.first + self.second)

    @property
    def contradiction_share(self) -> Share:
        """Of the comparisons with both orders: those whose orders have different winners."""
        return Share(self.contradictions, self.both)

    @property
    def failure_share(self) -> Share:
        """Of the questions: those without an answer."""
        return Share(self.failed, self.questions)

    @property
    def mean_apart(self) -> float | None:
        """How far both orders lie apart on average."""
        return self.apart / self.both if self.both else None

    @property
    def mean_seconds(self) -> float | None:
        """Seconds of a question."""
        return self.seconds / self.timed if self.timed else None


def _sum(one: float | None, other: float | None) -> Any:
    return other if one is None else one if other is None else one + other


def figures(db: sqlite3.Connection) -> list[Figures]:
    """The figures of a run, in at most `PARTS` parts of equally many steps; those without a question are left out."""
    low, high = db.execute("SELECT min(step), max(step) FROM judged").fetchone()
    if low is None:
        return []
    size = -(-(high - low + 1) // PARTS)
    compared = {row["part"]: dict(row) for row in db.execute(_COMPARED, [low, size])}
    parts = []
    for row in db.execute(_ASKED, [low, size]):
        both = {**row, **compared[row["part"]]}
        start = low + both.pop("part") * size
        floats = ("seconds", "tokens", "cost", "apart")
        numbers = {name: value if name in floats else int(value) for name, value in both.items()}
        parts.append(Figures((start, min(start + size - 1, high)), **numbers))
    return parts


@dataclass(frozen=True)
class Said:
    """A comparison of a judge, with the group it belongs to."""

    group: Group
    comparison: Comparison


def show_judge(request: Request) -> Response:
    """The judge's figures, and what it said."""
    run = run_of(request)
    run.index.refresh_samples(PATIENCE)
    progress = run.index.progress
    text, shown = request.query_params.get("q", "").strip(), request.query_params.get("shown", "")
    given = request.query_params.get("page", "1")
    page = max(1, int(given)) if given.isascii() and given.isdigit() and len(given) < 9 else 1
    with run.index.reading() as db:
        parts = figures(db)
        whole = reduce(add, parts) if parts else None
        count, found = _found(db, text, shown, page, whole.comparisons if whole else 0)
    said = _said(run, found)
    return render(
        *(request, "judge.html"),
        page="judge",
        **{"run": run, "whole": whole, "parts": parts, "said": said},
        **{"text": text, "shown": shown if shown in SHOWN else "", "choices": SHOWN, "count": count},
        **{"number": page, "pages": -(-count // PAGE), "progress": progress},
        link=lambda number: urlencode({"q": text, "shown": shown, "page": number}),
    )


def _found(db: sqlite3.Connection, text: str, shown: str, page: int, all_of_them: int) -> tuple[int, list[sqlite3.Row]]:
    """How many comparisons pass the filters, and those of a page, the latest first."""
    conditions: list[str] = []
    values: list[Any] = []
    if text:
        conditions, values = [_ANY_ORDER.format(condition="instr(o.words, ?) > 0")], [search_text(text)]
    if shown == "failed":
        conditions.append(_ANY_ORDER.format(condition="o.failed"))
    inner = _BY_COMPARISON.format(where=f"WHERE {' AND '.join(conditions)}" if conditions else "")
    having = "WHERE disagreement IS NOT NULL AND low < 0.5 AND high > 0.5" if shown == "disagree" else ""
    filtered = f"SELECT step, sample, comparison FROM ({inner}) {having}"  # nosec B608
    if not conditions and not having:
        count, filtered = all_of_them, "SELECT DISTINCT step, sample, comparison FROM judged"
    else:
        count = db.execute(f"SELECT count(*) FROM ({filtered})", values).fetchone()[0]  # nosec B608
    order = "ORDER BY step DESC, sample DESC, comparison DESC LIMIT ? OFFSET ?"
    return count, db.execute(f"{filtered} {order}", [*values, PAGE, PAGE * (page - 1)]).fetchall()


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
