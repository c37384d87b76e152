"""The dashboard as an ASGI application: its pages, its files and what guards them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio.to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

from online_dpo.dashboard.context import HERE, Dashboard, render
from online_dpo.dashboard.pages import about, compare, judge, live, pairs, run, runs, vote
from online_dpo.dashboard.security import Guard

THREADS = 8
"""Pages that are made at the same time."""


def create_app(dashboard: Dashboard) -> Starlette:
    """The application of a dashboard."""
    app = Starlette(
        routes=[
            *runs.ROUTES,
            *pairs.ROUTES,
            *judge.ROUTES,
            *vote.ROUTES,
            *run.ROUTES,
            *about.ROUTES,
            *compare.ROUTES,
            *live.ROUTES,
            Mount("/static", CachedFiles(directory=HERE / "static"), name="static"),
        ],
        middleware=[Middleware(Guard, access=dashboard.access)],
        exception_handlers={HTTPException: _told, 500: _failed},  # pyright: ignore[reportArgumentType]
        lifespan=_lifespan,
    )
    app.state.dashboard = dashboard
    app.state.is_ending = lambda: False
    return app


class CachedFiles(StaticFiles):
    """Files that come with the dashboard, which a browser asks about again before it uses its copy."""

    def file_response(self, *args: object, **options: object) -> Response:
        """The file."""
        response = super().file_response(*args, **options)  # pyright: ignore[reportArgumentType]
        response.headers["cache-control"] = "no-cache"
        return response


@asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS
    yield
    app.state.dashboard.catalog.close()


def _told(request: Request, error: HTTPException) -> Response:
    """An error as a page of one sentence."""
    sentence = "There is no such page." if error.detail == "Not Found" else error.detail
    return render(request, "error.html", error.status_code, sentence=sentence)


def _failed(request: Request, error: Exception) -> Response:
    sentence = f"The dashboard has failed here: {type(error).__name__}. The terminal has the details."
    return render(request, "error.html", 500, sentence=sentence)
