"""The site is built strictly, asks no other host for anything, and its generated pages are those of today."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from docs.blocks import ROOT
from support.site import build_site

PAGE = ROOT / "docs/reference/command-line.md"


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_site(tmp_path_factory.mktemp("site"))


class Loaded(HTMLParser):
    """What a page loads by itself: not where its links lead."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "link" and given.get("rel") in ("canonical", "prev", "next", "edit"):
            return
        names = ("src", "srcset", "poster", "data") if tag != "link" else ("href",)
        self.addresses += [value for name in names if (value := given.get(name))]


def test_no_page_asks_another_host(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        loaded = Loaded()
        loaded.feed(page.read_text(encoding="utf-8"))
        elsewhere = [address for address in loaded.addresses if re.match(r"(https?:)?//", address)]
        assert not elsewhere, (page.relative_to(site), elsewhere)
        assert 'data-md-component="source"' not in page.read_text(encoding="utf-8"), "it asks GitHub for stars"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import) *[\"']?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_pictures_of_mermaid_are_drawn_by_the_sites_own_script(site):
    drawn = [page for page in site.rglob("*.html") if 'class="mermaid"' in page.read_text(encoding="utf-8")]
    assert drawn
    for page in drawn:
        [script] = re.findall(r'src="([^"]*mermaid[^"]*)"', page.read_text(encoding="utf-8"))
        assert (page.parent / script).is_file()


def test_the_root_pages_are_shown_with_links_that_hold(site):
    changelog = (site / "project/changelog/index.html").read_text(encoding="utf-8")
    assert "../../guides/dashboard/" in changelog
    assert "https://github.com/online-dpo/online-dpo/blob/main/src" not in (site / "index.html").read_text()


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="argparse of other versions prints help in another form")
def test_the_page_of_the_command_line_is_current():
    words = [sys.executable, "-c", "import command_line; print(command_line.command_line_page(), end='')"]
    paths = os.pathsep.join([str(ROOT / "scripts/site"), str(ROOT / "src")])
    done = subprocess.run(words, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.stdout == PAGE.read_text(encoding="utf-8"), f"run `make pages`\n{done.stderr}"
