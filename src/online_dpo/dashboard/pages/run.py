"""The charts of a run, and of others over it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from online_dpo.dashboard.catalog import Run
from online_dpo.dashboard.context import dashboard_of, render, run_of
from online_dpo.dashboard.index.points import decimated, in_order, points_of, smoothed
from online_dpo.dashboard.metric_groups import grouped

MOST_OVERLAID = 8
MOST_SERIES = 200
DIGITS = 6
PATIENCE = 0.1
"""Seconds that a page waits for the index."""


def show_charts(request: Request) -> Response:
    """All charts of a run, by group; those of the runs in ``with`` are drawn over them."""
    return _charts(request, "run.html")


def show_chart_list(request: Request) -> Response:
    """The charts alone: a live run may have got new ones."""
    return _charts(request, "charts.html")


def _charts(request: Request, template: str) -> Response:
    runs = _overlaid(request)
    last: dict[str, dict[str, float]] = {}
    for run in runs:
        run.index.refresh_metrics(PATIENCE / len(runs))
        with run.index.reading() as db:
            for row in db.execute("SELECT metric, value FROM metric"):
                last.setdefault(row["metric"], {})[run.id] = row["value"]
    others = [run for run in dashboard_of(request).catalog.runs() if run not in runs]
    return render(
        request,
        template,
        page="run",
        run=runs[0],
        overlaid=runs,
        others=others if len(runs) < MOST_OVERLAID else [],
        groups=grouped(last),
        last=last,
        summary=runs[0].summarizer.summary(),
        cursors=[f"{run.id}:{run.index.generation}:{run.index.rows}" for run in runs],
    )


def _overlaid(request: Request) -> list[Run]:
    """The run of the path, and those of the query."""
    dashboard = dashboard_of(request)
    ids = dict.fromkeys([request.path_params["run"], *request.query_params.getlist("with")])
    return [dashboard.run(run_id) for run_id in list(ids)[:MOST_OVERLAID]]


def overlay(request: Request) -> Response:
    """Lead from chosen runs to the charts of the first with the others over it."""
    chosen = list(dict.fromkeys(request.query_params.getlist("run")))
    if not chosen:
        raise HTTPException(400, "Choose one run or more in the table first.")
    for run_id in chosen:
        dashboard_of(request).run(run_id)
    rest = "&".join(f"with={run_id}" for run_id in chosen[1:])
    return RedirectResponse(f"/runs/{chosen[0]}" + (f"?{rest}" if rest else ""), status_code=303)


def send_series(request: Request) -> Response:
    """The points of some metrics of a run, as few as a chart of some width needs."""
    run, query = run_of(request), request.query_params
    run.index.refresh_metrics(PATIENCE)
    wanted = Wanted(
        first=_number(query.get("from"), -math.inf),
        last=_number(query.get("to"), math.inf),
        buckets=int(min(2000, max(10, _number(query.get("points"), 300)))),
        smoothing=min(0.999, max(0.0, _number(query.get("smoothing"), 0))),
    )
    generation, rows = run.index.generation, run.index.rows
    with run.index.reading() as db:
        series = {metric: wanted.of(points_of(db, metric)) for metric in query.getlist("metric")[:MOST_SERIES]}
    return JSONResponse({"run": run.id, "cursor": f"{run.id}:{generation}:{rows}", "series": series})


class Wanted:
    """The part of a metric that a chart shows.

    Args:
        first: the first step.
        last: the last step.
        buckets: how many pixels there are.
        smoothing: as for `smoothed`.
    """

    def __init__(self, first: float, last: float, buckets: int, smoothing: float) -> None:
        self._first, self._last, self._buckets, self._smoothing = first, last, buckets, smoothing

    def of(self, points: np.ndarray) -> dict[str, Any]:
        """The metric's points in that part."""
        points = in_order(points)
        found = {"raw": columns(self._cut(points))}
        if self._smoothing and len(points):
            averages = smoothed(points, self._smoothing)
            found |= {"smooth": columns(self._cut(averages)), "average": float(averages[-1, 2])}
        return found

    def _cut(self, points: np.ndarray) -> np.ndarray:
        """The points in the range and one on each side, so that lines lead out of the picture."""
        steps = points[:, 1]
        start = max(0, int(np.searchsorted(steps, self._first)) - 1)
        return decimated(points[start : int(np.searchsorted(steps, self._last, side="right")) + 1], self._buckets)


def columns(points: np.ndarray) -> list[list[float]]:
    """Steps and values of points, rounded to what a chart shows."""
    values = points[:, 2]
    with np.errstate(all="ignore"):
        scale = 10.0 ** (DIGITS - 1 - np.floor(np.log10(np.abs(values))))
        rounded = np.where(np.isfinite(scale) & (scale > 0), np.round(values * scale) / scale, values)
    rounded = np.where(np.isfinite(rounded), rounded, values)  # the largest numbers would overflow
    return [points[:, 1].astype(np.int64).tolist(), rounded.tolist()]


def _number(text: str | None, default: float) -> float:
    try:
        value = float(text or default)
    except ValueError:
        return default
    return default if math.isnan(value) else value


ROUTES = [
    Route("/overlay", overlay),
    Route("/runs/{run}", show_charts),
    Route("/runs/{run}/charts", show_chart_list),
    Route("/runs/{run}/series", send_series),
]
