"""The documentation site in a browser: it asks no other host, fits a phone, draws its pictures, and can be searched."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from support.site import build_site

expect.set_options(timeout=60_000)  # machines that run other tests as well are slow

PAGES = ("", "start/quickstart/", "guides/judges/", "concepts/loop/", "reference/python/", "reference/metrics/")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = build_site(tmp_path_factory.mktemp("site"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """A phone's, on which nothing may go wrong and no other host be asked."""
    wrong: list[str] = []
    opened = browser.new_page(viewport={"width": 390, "height": 844})
    opened.set_default_timeout(60_000)
    opened.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    ours = (address, "data:", "blob:")
    opened.on("request", lambda request: None if request.url.startswith(ours) else wrong.append(request.url))
    yield opened
    opened.close()
    assert not wrong


def test_pages_fit_a_phone(page, address):
    for path in PAGES:
        page.goto(address + path)
        expect(page.locator("h1")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path


def test_a_picture_is_drawn(page, address):
    page.goto(address + "concepts/loop/")
    expect(page.locator("div.mermaid").first).to_be_visible()


def test_the_search_finds_judges(page, address):
    page.goto(address)
    page.locator("label[for=__search].md-icon").first.click()
    page.get_by_role("textbox", name="Search").press_sequentially("judge")
    found = page.locator(".md-search-result__item").first  # a worker reads the index first
    expect(found).to_contain_text("judge", ignore_case=True, timeout=60_000)
