"""Runs side by side: what their settings differ in, their last metrics, and their answers to the same prompts."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from online_dpo.dashboard.context import dashboard_of, render
from online_dpo.dashboard.metric_groups import grouped
from online_dpo.dashboard.same_prompts import same_prompts
from online_dpo.dashboard.settings import compared, flat

MOST = 8
PROMPTS = 5


def show_comparison(request: Request) -> Response:
    """Settings, last metrics and answers of the runs in the query."""
    dashboard = dashboard_of(request)
    ids = list(dict.fromkeys(run_id for run_id in request.query_params.getlist("run") if run_id))[:MOST]
    runs = [dashboard.run(run_id) for run_id in ids]
    prompts, count, percent = same_prompts(runs, PROMPTS) if len(runs) > 1 else ([], 0, 100)
    last = [run.summarizer.summary().last for run in runs]
    return render(
        request,
        "compare.html",
        page="compare",
        runs=runs,
        all_runs=dashboard.catalog.runs(),
        settings=compared([flat(run.folder.settings) for run in runs]),
        groups=grouped({name for metrics in last for name in metrics} - {"step"}),
        last=last,
        prompts=prompts,
        prompt_count=count,
        percent=percent,
    )


ROUTES = [Route("/compare", show_comparison)]
