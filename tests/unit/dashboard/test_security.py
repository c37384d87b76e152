"""Only this machine's user gets a page, and nothing changes by a page of another site."""

import pytest
from starlette.testclient import TestClient

from online_dpo.dashboard.app import create_app
from online_dpo.dashboard.catalog import Catalog
from online_dpo.dashboard.context import Dashboard
from online_dpo.dashboard.security import Access

ORIGIN = "http://127.0.0.1:8765"


@pytest.fixture
def stranger(tmp_path):
    """A client that has no token."""
    dashboard = Dashboard(Catalog([tmp_path]), Access("the-token", "127.0.0.1", 8765))
    with TestClient(create_app(dashboard), base_url=ORIGIN, follow_redirects=False) as client:
        yield client


def test_without_the_token_there_is_one_sentence(stranger):
    for path in ("/", "/runs", "/runs?token=other", "/runs/some-run", "/nothing", "/runs?token="):
        refused = stranger.get(path)
        assert refused.status_code == 403, path
        assert "has printed" in refused.text


def test_the_address_with_the_token_sets_a_cookie_and_leads_on_without_it(stranger):
    leading = stranger.get("/runs?token=the-token&sort=step")
    assert leading.status_code == 303 and leading.headers["location"] == "/runs?sort=step"
    cookie = leading.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite" in cookie and "online_dpo_8765=the-token" in cookie
    assert stranger.get("/runs").status_code == 200


def test_the_token_never_leads_to_another_host(stranger):
    leading = stranger.get(f"{ORIGIN}//evil.example/runs?token=the-token")
    assert leading.headers["location"] == "/evil.example/runs"


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8765", "127.0.0.1.evil.example", "", "[", "10.0.0.7"])
def test_a_host_that_is_not_this_machine_is_refused(stranger, host):
    assert stranger.get("/runs?token=the-token", headers={"host": host}).status_code == 421


@pytest.mark.parametrize(
    "host", ["localhost/static/", "localhost?token=the-token", "localhost#", "evil@localhost", "localhost/static/x:80"]
)
def test_a_host_that_is_more_than_a_name_and_a_port_is_refused(stranger, host):
    assert stranger.get("/runs", headers={"host": host}).status_code == 421


@pytest.mark.parametrize("host", ["localhost", "localhost:9000", "127.0.0.1:8765", "[::1]:8765"])
def test_names_of_loopback_are_known_with_any_port(stranger, host):
    assert stranger.get("/runs?token=the-token", headers={"host": host}).status_code == 303


def test_pages_may_load_nothing_from_elsewhere_and_no_inline_script(stranger):
    for path in ("/runs", "/static/base.css", "/nothing"):
        policy = stranger.get(path).headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy


def test_what_changes_something_needs_the_origin_and_the_second_token(stranger):
    stranger.get("/runs?token=the-token")
    csrf = Access("the-token", "127.0.0.1", 8765).csrf_token
    right = {"origin": ORIGIN, "x-csrf-token": csrf}
    for wrong in ({"origin": "http://evil.example"}, {"origin": ""}, {"origin": "null"}, {"x-csrf-token": "other"}):
        assert stranger.post("/runs", headers=right | wrong, content=b"{}").status_code == 403, wrong
    assert stranger.post("/runs", headers=right, content=b"{}").status_code == 405  # no such change: but it got there


def test_large_requests_are_refused(stranger):
    stranger.get("/runs?token=the-token")
    headers = {"origin": ORIGIN, "x-csrf-token": Access("the-token", "127.0.0.1", 8765).csrf_token}
    assert stranger.post("/runs", headers=headers, content=b"x" * (2 << 20)).status_code == 413


@pytest.mark.parametrize("path", ["/static/../app.py", "/static/%2e%2e/app.py", "/runs/..%2f..%2fetc", "/runs/%2e%2e"])
def test_no_path_leads_out(stranger, path):
    stranger.get("/runs?token=the-token")
    assert stranger.get(path).status_code in (404, 303)
