"""What runs write while pages are open, as server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from online_dpo.dashboard.catalog import Run
from online_dpo.dashboard.context import dashboard_of
from online_dpo.dashboard.index.follow import size_of
from online_dpo.dashboard.index.points import points_of
from online_dpo.dashboard.metric_groups import HIDDEN
from online_dpo.dashboard.pages.run import columns
from online_dpo.runs.layout import completions_files

EVERY = 0.25
"""Seconds between two looks at the few runs of an open page."""

EVERY_OF_ALL = 0.75
"""The same for all runs."""

MOST_ROWS = 2000
"""Rows that are sent one by one. A page that has missed more asks for all again."""

BEAT = 15.0
"""Seconds after which something is sent in any case, by which a closed connection is noticed."""

Message = tuple[str, Any]


async def follow_runs(request: Request) -> Response:
    """Says when any run has written."""
    catalog = dashboard_of(request).catalog
    seen: dict[str, Any] = await run_in_threadpool(_signatures, catalog.runs())

    def look() -> list[Message]:
        nonlocal seen
        now = _signatures(catalog.runs())
        changed = now != seen
        seen = now
        return [("changed", {})] if changed else []

    return _stream(request, look, EVERY_OF_ALL)


def _signatures(runs: list[Run]) -> dict[str, Any]:
    return {run.id: (run.summarizer.signature, run.summarizer.summary().state) for run in runs}


async def follow_run(request: Request) -> Response:
    """Sends new rows of some runs. The query's ``cursor`` says of each up to where the page has them:
    ``<run>:<generation>:<rows>``, as pages and series have it.
    """
    dashboard = dashboard_of(request)
    followers = []
    for cursor in request.query_params.getlist("cursor")[:8]:
        run_id, _, place = cursor.partition(":")
        followers.append(Follower(await run_in_threadpool(dashboard.run, run_id), place))

    def look() -> list[Message]:
        return [message for follower in followers for message in follower.news()]

    return _stream(request, look, EVERY)


class Follower:
    """What is new of a run since the last time.

    Args:
        run: the run.
        place: generation and number of rows that the page has: ``0:120``.
    """

    def __init__(self, run: Run, place: str) -> None:
        generation, _, rows = place.partition(":")
        self._run = run
        self._generation, self._rows = _whole(generation), _whole(rows)
        self._seen: tuple[int, int] | None = None
        self._samples = self._samples_size()
        self._state = ""

    def news(self) -> list[Message]:
        """Messages on what is new."""
        messages: list[Message] = []
        if (samples := self._samples_size()) != self._samples:
            self._samples = samples
            messages.append(("samples", {"run": self._run.id}))
        signature = self._run.summarizer.signature
        if signature != self._seen and self._run.index.refresh_metrics(EVERY):
            if self._seen is not None and self._seen[1] != signature[1]:
                messages.append(("events", {"run": self._run.id}))
            self._seen = signature
        messages += self._new_rows()
        summary = self._run.summarizer.summary()
        if summary.state != self._state:
            self._state = summary.state
            messages.append(("state", {"run": self._run.id, "state": summary.state}))
        return messages

    def _new_rows(self) -> list[Message]:
        index = self._run.index
        generation, rows = index.generation, index.rows
        if generation == self._generation and rows == self._rows:
            return []
        about = {"run": self._run.id, "cursor": f"{self._run.id}:{generation}:{rows}"}
        is_far = generation != self._generation or rows - self._rows > MOST_ROWS
        after, self._generation, self._rows = self._rows - 1, generation, rows
        if is_far:
            return [("reload", about)]
        with index.reading() as db:
            names = [row["metric"] for row in db.execute("SELECT metric FROM metric") if row["metric"] not in HIDDEN]
            points = {name: found for name in names if len(found := points_of(db, name, after))}
        return [("rows", {**about, "series": {name: columns(found) for name, found in points.items()}})]

    def _samples_size(self) -> int:
        folder = self._run.folder.path
        try:
            return sum(size_of(folder / file.name) for file in completions_files(folder))
        except OSError:
            return 0


def _whole(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else 0


def _stream(request: Request, look: Callable[[], list[Message]], every: float) -> Response:
    """A response that looks for messages until the page or the dashboard is closed."""

    async def messages() -> AsyncIterator[str]:
        quiet = 0.0
        yield "retry: 2000\n\n"
        while not request.app.state.is_ending():
            news = await run_in_threadpool(look)
            for name, content in news:
                yield f"event: {name}\ndata: {json.dumps(content)}\n\n"
            quiet = 0.0 if news else quiet + every
            if quiet >= BEAT:
                quiet = 0.0
                yield ": still here\n\n"
            await anyio.sleep(every)

    return StreamingResponse(messages(), media_type="text/event-stream")


ROUTES = [Route("/live/runs", follow_runs), Route("/live/run", follow_run)]
