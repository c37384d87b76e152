"""Every block of code in README.md and docs/ does what it says: one test for each page.

pytest tests/docs -k several-gpus    the blocks of docs/guides/several-gpus.md
"""

from __future__ import annotations

import pytest

from docs.blocks import ROOT, blocks_of, not_run, pages

MOST_NOT_RUN = 20


def has_blocks(page: str) -> bool:
    return "```" in (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "page", [page for page in pages() if has_blocks(page)], ids=lambda page: page.removesuffix(".md")
)
def test_the_blocks_of(page, stage, tmp_path):
    stage.run_page(page, tmp_path / "page")


def test_few_blocks_are_not_run():
    print("\n".join(f"{block.place}: {block.reason}" for block in not_run()))
    assert len(not_run()) <= MOST_NOT_RUN


def test_every_page_keeps_to_the_convention():
    for page in pages():
        list(blocks_of(page, (ROOT / page).read_text(encoding="utf-8")))
