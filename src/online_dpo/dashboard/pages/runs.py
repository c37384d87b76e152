"""The page of all runs: a table that can be sorted and filtered, and is kept up to date."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from online_dpo.dashboard.catalog import Run
from online_dpo.dashboard.context import dashboard_of, render
from online_dpo.dashboard.metric_groups import HEADLINES
from online_dpo.dashboard.sparkline import sparkline
from online_dpo.dashboard.summary import Summary

STATES = ("running", "stopped", "failed", "lost", "finished")
Row = tuple[Run, Summary]


def show_runs(request: Request) -> Response:
    """All runs, in a table."""
    return _render(request, "runs.html")


def show_table(request: Request) -> Response:
    """The table alone, to put into the page in place of the older one."""
    return _render(request, "runs_table.html")


def go_to_runs(request: Request) -> Response:
    """The page of one run where the dashboard was started on one, else that of all."""
    runs = dashboard_of(request).catalog.runs()
    return RedirectResponse(f"/runs/{runs[0].id}" if len(runs) == 1 else "/runs", status_code=303)


def _render(request: Request, template: str) -> Response:
    catalog = dashboard_of(request).catalog
    sort, text = request.query_params.get("sort", "-updated")[:200], request.query_params.get("q", "")[:200]
    rows = [(run, run.summarizer.summary()) for run in catalog.runs()]
    headlines = {name: title for name, title in HEADLINES.items() if any(name in s.last for _, s in rows)}
    shown = [row for row in rows if text.casefold() in f"{row[0].name} {row[1].model}".casefold()]
    return render(
        request,
        template,
        page="runs",
        rows=_sorted(shown, sort),
        headlines=headlines,
        sort=sort,
        text=text,
        total=len(rows),
        roots=catalog.roots,
        is_cut=catalog.is_cut,
        sparkline=sparkline,
    )


def _sorted(rows: list[Row], sort: str) -> list[Row]:
    """The rows in an order such as ``step`` or ``-step``. Rows without a value stand last in both."""
    key = KEYS.get(sort.lstrip("-")) or (lambda row: row[1].last.get(sort.lstrip("-")))
    there = [row for row in rows if key(row) is not None]
    there.sort(key=key, reverse=sort.startswith("-"))
    return there + [row for row in rows if key(row) is None]


KEYS: dict[str, Callable[[Row], Any]] = {
    "name": lambda row: row[0].name.casefold(),
    "state": lambda row: STATES.index(row[1].state) if row[1].state in STATES else len(STATES),
    "step": lambda row: row[1].step,
    "updated": lambda row: row[1].updated,
    "seconds": lambda row: row[1].seconds,
}

ROUTES = [Route("/", go_to_runs), Route("/runs", show_runs), Route("/runs.table", show_table)]
