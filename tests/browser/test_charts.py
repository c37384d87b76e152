"""All runs and a run's charts in a real browser, served by the command: live, overlaid, zoomed, safe."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import expect

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import run_folders

VIEWS = [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>{{ 7 * 7 }}"
expect.set_options(timeout=60_000)  # machines that run other tests as well are slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs: two large ones, a live one, and one whose every name is hostile."""
    made = tmp_path_factory.mktemp("runs")
    run_folders.make(made / "first", 2000, 400, seed=0)
    run_folders.make(made / "second", 1500, 100, seed=1, judged=True, state="failed")
    run_folders.make(made / "live", 20, 40, seed=2, state="running")
    hostile = run_folders.make(made / "<b>hostile", 5, 5, seed=3)
    with (hostile / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 0.5, "%s": 1.0}\n' % HOSTILE)  # noqa: UP031
    with (hostile / "events.jsonl").open("a") as file:
        file.write('{"step": 6, "kind": "%s", "message": "%s", "x": ["%s"]}\n' % (HOSTILE, HOSTILE, HOSTILE))  # noqa: UP031
    (hostile / "run.yaml").write_text(f"'{HOSTILE}': '{HOSTILE}'\nmodel_name_or_path: '{HOSTILE}'\n")
    return made


class Command:
    """``online-dpo dashboard`` in a process of its own."""

    def __init__(self, folder):
        words = [sys.executable, "-m", "online_dpo", "dashboard", str(folder), "--port", "0", "--no-browser"]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.address = re.search(r"http://\S+", self.process.stdout.readline())[0]
        self.base = self.address.partition("/?")[0]

    def interrupt(self):
        """Ctrl-C; returns the exit code and what was said on standard error."""
        self.process.send_signal(signal.SIGINT)
        _, errors = self.process.communicate(timeout=120)
        return self.process.returncode, errors


@pytest.fixture(scope="module")
def served(folder):
    command = Command(folder)
    yield command
    command.interrupt()


@pytest.fixture
def open_page(served, browser):
    """Opens pages with the token; at the end, none may have asked another host, or said anything on the console."""
    contexts, complaints, requests = [], [], []

    def open_page(width=1280, scheme="light"):
        contexts.append(browser.new_context(viewport={"width": width, "height": 850}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(served.address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    assert {urlsplit(url).netloc for url in requests} == {urlsplit(served.base).netloc}


def go(page, served, name, path=""):
    """Open a page of a run, by the link in the table of all runs."""
    page.goto(f"{served.base}/runs")
    link = page.get_by_role("link", name=name, exact=True)
    page.goto(served.base + link.get_attribute("href") + path)


def chart(page, metric):
    return page.locator(f'figure[data-metric="{metric}"]')


def drawn(page, metric):
    """Wait until a chart has its lines."""
    expect(chart(page, metric).locator("canvas")).to_be_visible()


def test_the_table_of_runs_sorts_filters_and_shows_states(served, open_page):
    page = open_page()
    rows = page.locator("tbody tr")
    expect(rows).to_have_count(4)
    page.get_by_role("link", name="Step").click()
    expect(rows.first).to_contain_text("first")
    expect(page.locator('th[aria-sort="descending"]')).to_contain_text("Step")
    page.get_by_role("link", name="Step").click()
    expect(rows.first).to_contain_text("hostile")
    page.get_by_label("Filter by name or model").fill("seco")
    expect(rows).to_have_count(1)
    expect(rows.first).to_contain_text("failed")


def test_a_live_append_appears_within_a_second(served, folder, open_page):
    page = open_page()
    go(page, served, "live")
    drawn(page, "completions/mean_length")
    page.evaluate(
        """() => {
        window.seen = {};
        const readout = document.querySelector('figure[data-metric="completions/mean_length"] .readout');
        new MutationObserver(() => (window.seen[readout.textContent.trim()] = Date.now())).observe(readout, {
          childList: true, subtree: true });
      }"""
    )
    time.sleep(1)  # the page follows the run by now
    delays = []
    for step in range(21, 41):
        run_folders.append_step(folder / "live", step, 47)
        value = f"{20 + 30 * step / 47:#.4g}"
        wrote = time.time()
        while (seen := page.evaluate("value => window.seen[value]", value)) is None:
            assert time.time() < wrote + 60, (value, page.evaluate("window.seen"))
            page.wait_for_timeout(20)
        delays.append(seen / 1000 - wrote)
        if delays[-1] <= 1:  # each begins right after the server has looked, so that none is quick by chance
            return
    pytest.fail(f"never within a second: {delays}")  # a busy machine may be late now and then


def test_the_table_of_runs_is_kept_up_to_date(served, folder, open_page):
    page = open_page()
    page.goto(f"{served.base}/runs")
    page.get_by_label("Choose second").check()
    time.sleep(1.5)
    run_folders.append_step(folder / "live", 44, 47)
    row = page.locator("tbody tr").filter(has=page.get_by_role("link", name="live", exact=True))
    expect(row).to_contain_text("44")
    expect(page.get_by_label("Choose second")).to_be_checked()


def test_two_runs_are_overlaid_and_zoomed_together(served, open_page):
    page = open_page()
    page.goto(f"{served.base}/runs")
    page.get_by_label("Choose first").check()
    page.get_by_label("Choose second").check()
    page.get_by_role("button", name="Overlay charts of the chosen").click()
    drawn(page, "objective/scores")
    expect(page.locator(".chip")).to_have_count(2)
    names = page.locator(".chip").evaluate_all("chips => chips.map(chip => chip.dataset.name)")
    assert set(names) == {"first", "second"}
    expect(chart(page, "objective/scores").locator(".readout span")).to_have_count(2)
    label = chart(page, "objective/scores").locator(".plot").get_attribute("aria-label")
    assert "first: last value" in label and "second: last value" in label
    box = chart(page, "objective/scores").locator(".u-over").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 70, steps=5)
    page.mouse.up()
    page.wait_for_url(re.compile(r"from=\d+&to=\d+"))
    low, high = (int(page.locator(name).input_value()) for name in ("#from", "#to"))
    assert 350 < low < 650 and 850 < high < 1150, "a quarter to a half of 2,000 steps"
    page.get_by_role("button", name="Reset zoom").click()
    expect(page.locator("#from")).to_have_value("")
    page.get_by_role("button", name="Remove").click()
    expect(page.locator(".chip")).to_have_count(1)


def test_smoothing_log_axis_and_filter_are_in_the_address(served, open_page):
    page = open_page()
    go(page, served, "first")
    drawn(page, "objective/scores")
    page.locator("#smoothing").fill("0.9")
    page.get_by_role("button", name="Log axis").click()
    expect(page).to_have_url(re.compile(r"log=1"))
    expect(page).to_have_url(re.compile(r"smoothing=0.9"))
    page.reload()
    expect(page.get_by_role("button", name="Log axis")).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#smoothing")).to_have_value("0.9")
    page.get_by_label("Filter metrics by name").fill("grad")
    expect(page.locator("figure.chart:visible")).to_have_count(1)


def test_a_click_on_a_point_opens_the_samples_of_its_step(served, open_page):
    page = open_page()
    go(page, served, "first")
    drawn(page, "objective/scores")
    plot = chart(page, "objective/scores").locator(".u-over")
    box = plot.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.1, box["y"] + box["height"] * 0.5)
    expect(chart(page, "objective/scores").locator(".readout")).to_contain_text("step")
    step = re.search(r"step ([\d,]+)", chart(page, "objective/scores").locator(".readout").inner_text())[1]
    page.mouse.down()
    page.mouse.up()
    page.wait_for_url(re.compile(rf"/pairs\?step_min={step.replace(',', '')}&step_max={step.replace(',', '')}"))
    expect(page.locator("main")).to_contain_text("Question")


def test_a_chart_has_a_table_that_a_keyboard_reaches(served, open_page):
    page = open_page()
    go(page, served, "live")
    drawn(page, "objective/scores")
    chart(page, "objective/scores").locator("summary").focus()
    page.keyboard.press("Enter")
    rows = chart(page, "objective/scores").locator("tbody tr")
    expect(rows.last).to_be_visible()
    assert rows.count() >= 20
    page.keyboard.press("Tab")
    assert "/pairs?step_min=" in page.evaluate("document.activeElement.href")


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_pages_fit_their_window_and_hostile_text_stays_text(served, open_page, width, scheme):
    page = open_page(width, scheme)
    for place, path in enumerate(("", "/settings", "/environment", "/events", "/pairs")):
        go(page, served, "<b>hostile", path)
        assert page.locator("main b, main img, main script").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path
        if place in (1, 3):
            expect(page.locator("main")).to_contain_text(HOSTILE)
    go(page, served, "<b>hostile")
    expect(page.locator("figure h3").filter(has_text="onerror")).to_have_text(HOSTILE)
    for path in ("/runs", "/compare"):
        page.goto(served.base + path)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", ground))) < 60) == (scheme == "dark"), ground


def test_the_theme_can_be_chosen(served, open_page):
    page = open_page()
    ground = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(ground)
    page.get_by_role("button", name="Change between light and dark").click()
    assert page.evaluate(ground) != before
    page.reload()
    assert page.evaluate(ground) != before


def test_ctrl_c_ends_it_quietly_while_a_page_is_open(folder, browser):
    """It does not wait for the page, which would keep its connection open for as long as it is shown."""
    command = Command(folder)
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.goto(command.address)
    page.goto(f"{command.base}/runs")
    time.sleep(1)
    assert command.interrupt() == (0, "")
    context.close()
