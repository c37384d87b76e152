"""The page of all runs."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from online_dpo.dashboard.context import dashboard_of, render


def show_runs(request: Request) -> Response:
    """All runs, in a table."""
    return render(request, "runs.html", page="runs", runs=dashboard_of(request).catalog.runs())


ROUTES = [Route("/runs", show_runs)]
