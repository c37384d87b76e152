"""Takes the pictures that the README and the pages show: of the dashboard and the report, in Debian's Chromium.

    python benchmarks/pictures.py docs/images
    python benchmarks/pictures.py docs/images --work /tmp/pictures   # keep the runs, to take the pictures again

The runs are real: the quickstart, the same run with XPO, and one with a judge that answers by the quickstart's rubric
and has a liking for the first answer. They take a quarter of an hour on 2 CPU cores.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import rubric_judges
from playwright.sync_api import Browser, Page, sync_playwright

Shoot = Callable[[Page, str], None]
"""Brings a page into the state that the picture shows, from the dashboard's first page and its address."""

JUDGE = {"model": "rubric", "template": "reasoned", "cache": None, "input_price": 0.4, "output_price": 1.6}
AGAIN = ("train", "runs/quickstart/run.yaml", "--logging_steps", "1", "--save_strategy", "no", "--output_dir")


SHORT_PATHS = r"""() => {
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) texts.currentNode.data = texts.currentNode.data.replace(/\S*\/(?=runs\/)/, "");
}"""


def main() -> None:
    """Make the runs that are not there yet, serve them, and take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--work", type=Path, help="the folder of the runs, which are kept (default: a temporary one)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as playwright:
        work = args.work or Path(temporary)
        make_runs(work)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        with serving(work) as address:
            for name, (height, shoot) in PICTURES.items():
                take(browser, address, args.pictures / name, height, shoot)
        take(browser, f"file://{work.resolve()}/runs/quickstart/report.html", args.pictures / "report.png", 790)
        browser.close()


def make_runs(work: Path) -> None:
    """Train what the pictures show, but for what a former call has left in the folder."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "runs/quickstart/summary.json").exists():
        command(work, "quickstart")
    if not (work / "runs/xpo").exists():
        command(work, *AGAIN, "runs/xpo", "--method", "xpo", "--num_completions", "2", "--max_steps", "50")
    if not (work / "runs/judge").exists():
        with rubric_judges.serving(rubric_judges.judge_in_words) as address:
            kwargs = json.dumps({**JUDGE, "base_url": address})
            judge = ("--reward_model_path", "null", "--judge", "llm", "--judge_kwargs", kwargs)
            command(work, *AGAIN, "runs/judge", *judge, "--num_completions", "2", "--max_steps", "30")
    command(work, "report", "runs/quickstart")


def command(work: Path, *words: str) -> None:
    """Run the command in this folder."""
    subprocess.run([sys.executable, "-m", "online_dpo", *words], cwd=work, check=True)


@contextmanager
def serving(work: Path) -> Iterator[str]:
    """The dashboard of the folder's runs. Gives its address, and ends with the block."""
    words = [sys.executable, "-m", "online_dpo", "dashboard", "runs", "--port", "0", "--no-browser"]
    with subprocess.Popen(words, cwd=work, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        found = re.search(r"http://\S+", server.stdout.readline())
        assert found is not None
        yield found[0]
        server.terminate()


def take(browser: Browser, address: str, file: Path, height: int, shoot: Shoot = lambda page, base: None) -> None:
    """Take one picture. Names that end with ``-dark`` are of the dark theme."""
    scheme = "dark" if file.stem.endswith("-dark") else "light"
    context = browser.new_context(viewport={"width": 1280, "height": height}, color_scheme=scheme)
    page = context.new_page()
    page.goto(address)
    shoot(page, page.url.split("/runs")[0])
    page.screenshot(path=file)
    context.close()


def runs(page: Page, base: str) -> None:
    """All runs, with paths as they are from their folder."""
    page.locator("main table a").first.wait_for()
    page.evaluate(SHORT_PATHS)


def charts(page: Page, base: str) -> None:
    """The charts of a run with another over it."""
    page.get_by_label("Choose quickstart").check()
    page.get_by_label("Choose xpo").check()
    page.get_by_role("button", name="Overlay charts of the chosen").click()
    page.locator("canvas").first.wait_for()
    page.wait_for_timeout(3000)


def page_of(run: str, path: str) -> Shoot:
    """One of the pages of a run, by its path behind the run's."""

    def shoot(page: Page, base: str) -> None:
        link = page.get_by_role("link", name=run, exact=True).first.get_attribute("href")
        page.goto(f"{base}{link}{path}")
        page.wait_for_timeout(1500)
        page.locator("[data-reading]").wait_for(state="detached", timeout=120_000)

    return shoot


def first_pair(run: str, query: str) -> Shoot:
    """The first pair of a run in an order."""

    def shoot(page: Page, base: str) -> None:
        page_of(run, f"/pairs?{query}")(page, base)
        page.locator(".sample").first.click()
        page.locator(".side.chosen ins").first.wait_for()

    return shoot


PAIRS = "result=paired&sort=-surprise"
PICTURES: dict[str, tuple[int, Shoot]] = {
    "runs.png": (400, runs),
    "run.png": (700, charts),
    "run-dark.png": (700, charts),
    "pairs-list.png": (860, page_of("quickstart", f"/pairs?{PAIRS}")),
    "pairs.png": (860, first_pair("judge", "result=paired&sort=-margin")),
    "judge.png": (860, page_of("judge", "/judge")),
    "vote.png": (600, page_of("quickstart", "/vote")),
}
"""Each picture of the dashboard: its height, and what it shows."""

if __name__ == "__main__":
    main()
