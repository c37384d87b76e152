"""What every page of the dashboard has at hand: the runs, the templates, and the tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from online_dpo.dashboard import formats
from online_dpo.dashboard.catalog import Catalog, Run
from online_dpo.dashboard.security import Access

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Dashboard:
    """A dashboard: its runs and who may see them.

    >>> Dashboard(Catalog([Path("runs")]), Access.new("127.0.0.1", 8765))
    """

    catalog: Catalog
    access: Access

    def run(self, run_id: str) -> Run:
        """The run of a link.

        Raises:
            HTTPException: there is none.
        """
        run = self.catalog.find(run_id)
        if run is None:
            raise HTTPException(404, "There is no such run in the folders of this dashboard.")
        return run


def dashboard_of(request: Request) -> Dashboard:
    """The dashboard that answers a request."""
    return request.app.state.dashboard


def run_of(request: Request) -> Run:
    """The run of a request, by the path's ``run``."""
    return dashboard_of(request).run(request.path_params["run"])


def render(request: Request, template: str, status: int = 200, **context: Any) -> Response:
    """A page, or a part of one, from a template. Everything in it is escaped."""
    access = dashboard_of(request).access
    page = TEMPLATES.get_template(template).render(request=request, csrf_token=access.csrf_token, **context)
    return HTMLResponse(page.encode("utf-8", "replace"), status_code=status)


TEMPLATES = Environment(loader=FileSystemLoader(HERE / "templates"), autoescape=True, undefined=StrictUndefined)
TEMPLATES.filters |= formats.FILTERS
