"""A dashboard of made run folders, and a client that has opened the address with the token."""

import sys
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from online_dpo.dashboard import same_prompts
from online_dpo.dashboard.app import create_app
from online_dpo.dashboard.catalog import Catalog
from online_dpo.dashboard.context import Dashboard
from online_dpo.dashboard.pages import judge, pairs, run, vote
from online_dpo.dashboard.security import Access

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
import run_folders


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """Pages wait until all files are read: a busy machine does not do that in the tenth of a second that a person has.
    What is shown in the meantime has tests of its own.
    """
    for module in (judge, pairs, run, vote, same_prompts):
        monkeypatch.setattr(module, "PATIENCE", 120.0)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Two run folders: ``scored`` with reward functions, ``judged`` with a judge, of 30 steps and 60 groups each."""
    folder = tmp_path_factory.mktemp("runs")
    run_folders.make(folder / "scored", 30, 60, seed=0)
    run_folders.make(folder / "judged", 30, 60, seed=1, judged=True, state="running")
    return folder


@pytest.fixture
def opened():
    """Opens a dashboard of a folder; the client comes with ``.dashboard``, ``.run_id(name)`` and ``.csrf``."""
    open_now = []

    def open_dashboard(folder):
        dashboard = Dashboard(Catalog([folder]), Access("the-token", "127.0.0.1", 8765))
        client = TestClient(create_app(dashboard), base_url="http://127.0.0.1:8765")
        client.__enter__()
        open_now.append(client)
        client.get("/runs?token=the-token")
        client.dashboard = dashboard
        client.run_id = lambda name: next(run.id for run in dashboard.catalog.runs() if run.name == name)
        client.csrf = {"x-csrf-token": dashboard.access.csrf_token, "origin": "http://127.0.0.1:8765"}
        return client

    yield open_dashboard
    for client in open_now:
        client.__exit__(None, None, None)
