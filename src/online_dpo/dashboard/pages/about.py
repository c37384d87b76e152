"""Settings, environment and events of a run."""

from __future__ import annotations

import json
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from online_dpo.dashboard.context import render, run_of
from online_dpo.dashboard.formats import clock
from online_dpo.dashboard.group import objects
from online_dpo.dashboard.settings import flat
from online_dpo.runs.layout import SETTINGS, SETTINGS_BESIDE
from online_dpo.runs.plain_json import number

EVENTS_A_PAGE = 200
MARKS = 1000
"""Events that are drawn in charts."""

NOT_MARKED = ("evaluation", "idle", "end", "sync")
PATIENCE = 0.1


def show_settings(request: Request) -> Response:
    """The run's settings as it resolved them."""
    run = run_of(request)
    name = next((name for name in (SETTINGS_BESIDE, SETTINGS) if (run.folder.path / name).is_file()), None)
    return render(request, "settings.html", page="settings", run=run, entries=flat(run.folder.settings), name=name)


def show_environment(request: Request) -> Response:
    """Versions and devices of the run's sessions, the last one first."""
    run = run_of(request)
    rows = objects(run.folder.environment.get("sessions"))[-50:]
    sessions = [flat(row | {"started": clock(number(row.get("started")))}) for row in rows]
    return render(request, "environment.html", page="environment", run=run, sessions=sessions[::-1])


def show_events(request: Request) -> Response:
    """The run's events, the last ones first, perhaps of one kind only."""
    run = run_of(request)
    run.index.refresh_metrics(PATIENCE)
    kind, before = request.query_params.get("kind", "")[:100], request.query_params.get("before", "")
    limit = int(before) if before.isascii() and before.isdigit() and len(before) < 16 else 1 << 60
    with run.index.reading() as db:
        kinds = db.execute("SELECT kind, count(*) AS count FROM event GROUP BY kind ORDER BY kind").fetchall()
        rows = db.execute(
            "SELECT * FROM event WHERE number < ? AND (? = '' OR kind = ?) ORDER BY number DESC LIMIT ?",
            (limit, kind, kind, EVENTS_A_PAGE + 1),
        ).fetchall()
    more = rows[EVENTS_A_PAGE - 1]["number"] if len(rows) > EVENTS_A_PAGE else None
    events = [{**dict(row), "facts": _facts(row["facts"])} for row in rows[:EVENTS_A_PAGE]]
    return render(request, "events.html", page="events", run=run, kinds=kinds, kind=kind, events=events, more=more)


def _facts(text: str) -> dict[str, str]:
    try:
        return flat(json.loads(text))
    except ValueError:  # it was nested too deeply
        return {}


def send_marks(request: Request) -> Response:
    """Events for charts: step, kind and message, the rarer kinds before all others."""
    run = run_of(request)
    run.index.refresh_metrics(PATIENCE)
    with run.index.reading() as db:
        rows = db.execute("SELECT step, kind, message FROM event WHERE step > 0 ORDER BY number DESC").fetchall()
    return JSONResponse({"run": run.id, "marks": _marks([dict(row) for row in rows if row["kind"] not in NOT_MARKED])})


def _marks(rows: list[dict[str, Any]]) -> list[list[Any]]:
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["kind"]] = counts.get(row["kind"], 0) + 1
    rarest = sorted(rows, key=lambda row: counts[row["kind"]])[:MARKS]
    return [[row["step"], row["kind"], row["message"][:200]] for row in rarest]


ROUTES = [
    Route("/runs/{run}/settings", show_settings),
    Route("/runs/{run}/environment", show_environment),
    Route("/runs/{run}/events", show_events),
    Route("/runs/{run}/marks", send_marks),
]
