"""Takes the pictures of the dashboard that the documentation shows: made runs, Debian's Chromium, light and dark.

python benchmarks/dashboard_pictures.py docs/images
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import run_folders
from playwright.sync_api import Browser, sync_playwright

RUNS = {
    "chat/beta-0.05": "finished",
    "chat/beta-0.1": "running",
    "chat/beta-0.3": "stopped",
    "math/lr-1e-6": "finished",
    "math/lr-5e-6": "failed",
    "summaries/first": "finished",
}


def main() -> None:
    """Make the runs, serve them, and take the pictures."""
    pictures = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        for seed, (name, state) in enumerate(RUNS.items()):
            run_folders.make(Path(folder) / name, 400 + 100 * seed, 200, seed, state=state)
        words = [sys.executable, "-m", "online_dpo", "dashboard", folder, "--port", "0", "--no-browser"]
        server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        found = re.search(r"http://\S+", server.stdout.readline())
        assert found is not None
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for scheme, ending in (("light", ".png"), ("dark", "-dark.png")):
            take(browser, found[0], scheme, f"{pictures}/{{}}{ending}")
        browser.close()
        server.terminate()
        server.wait()


def take(browser: Browser, address: str, scheme: str, names: str) -> None:
    """Take the pictures of one theme."""
    context = browser.new_context(viewport={"width": 1200, "height": 700}, color_scheme=scheme)  # pyright: ignore
    page = context.new_page()
    page.goto(address)
    page.screenshot(path=names.format("runs"))
    page.get_by_label("Choose chat/beta-0.1").check()
    page.get_by_label("Choose chat/beta-0.3").check()
    page.get_by_role("button", name="Overlay charts of the chosen").click()
    page.locator("canvas").first.wait_for()
    page.locator("#smoothing").fill("0.9")
    page.locator("#filter").focus()
    page.wait_for_timeout(3000)
    page.screenshot(path=names.format("run"))
    context.close()


if __name__ == "__main__":
    main()
