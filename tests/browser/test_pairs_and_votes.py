"""Pairs, the judge and votes in a real browser: filters, keys, links, a vote that reaches a waiting trainer.

With ``PICTURES=folder`` pictures of the pages are written there, such as those of the documentation.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import uvicorn
from playwright.sync_api import expect

from online_dpo.dashboard.app import create_app
from online_dpo.dashboard.catalog import Catalog
from online_dpo.dashboard.context import Dashboard
from online_dpo.dashboard.security import Access
from online_dpo.runs.reading import RunFolder
from online_dpo.runs.votes import votes_of
from support import processes, run_files

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import run_folders

VIEWS = [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]
PICTURES = os.environ.get("PICTURES")
expect.set_options(timeout=60_000)  # machines that run other tests as well are slow


class Served:
    """A dashboard of a folder that answers in a thread of this process."""

    def __init__(self, folder):
        listening = socket.create_server(("127.0.0.1", 0))
        self.port = listening.getsockname()[1]
        access = Access("the-token", "127.0.0.1", self.port)
        self.dashboard = Dashboard(Catalog([folder]), access)
        self.server = uvicorn.Server(uvicorn.Config(create_app(self.dashboard), log_level="warning"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listening]})
        self.thread.start()
        self.address = f"http://127.0.0.1:{self.port}"

    def at(self, name, path=""):
        run = next(run for run in self.dashboard.catalog.runs() if run.name == name)
        return f"{self.address}/runs/{run.id}{path}"

    def close(self):
        self.server.should_exit = True
        self.thread.join(60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("runs")
    run_folders.make(made / "scored", 40, 80, seed=3)
    run_folders.make(made / "judged", 40, 80, seed=4, judged=True)
    return made


@pytest.fixture(scope="module")
def served(folder):
    server = Served(folder)
    yield server
    server.close()


@pytest.fixture
def serve():
    """Serves folders of a test's own, until its pages are closed: `open_page` needs this fixture, so it ends first."""
    servers = []

    def serve_one(folder):
        servers.append(Served(folder))
        return servers[-1]

    yield serve_one
    for server in servers:
        server.close()


@pytest.fixture
def open_page(browser, served, serve):
    """Opens pages; at the end none of them has told an error, shown a dialog, or asked another machine."""
    contexts, wrong = [], []

    def open_one(width=1280, theme="light", address=served.address, **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: request.url.startswith((address, "data:")) or wrong.append(request.url))
        page.goto(f"{address}/runs?token=the-token")
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert wrong == []


def picture(page, name):
    if PICTURES:
        page.screenshot(path=Path(PICTURES) / f"{name}.png")


def test_filters_narrow_the_list_and_its_link_shows_the_same(open_page, served):
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    page.goto(served.at("scored", "/pairs"))
    expect(page.locator("#results")).to_contain_text("80 groups")
    page.get_by_label("Search in prompts and answers").fill("QUESTION 1")
    expect(page.locator("#results")).to_contain_text("of 80 groups")
    page.get_by_text("More filters").click()
    page.get_by_label("Step, at most").fill("20")
    page.get_by_label("Result").select_option("paired")
    page.get_by_label("Order").select_option("-surprise")
    expect(page).to_have_url(re.compile(r"sort=-surprise"))
    expect(page.locator("#results .sample").first).to_be_visible()
    shown = page.locator(".samples").inner_text()
    page.get_by_role("button", name="Copy link").click()
    link = page.evaluate("navigator.clipboard.readText()")
    assert "token" not in link and "q=QUESTION+1" in link and "step_max=20" in link
    page.goto(link)
    assert page.locator(".samples").inner_text() == shown
    assert page.get_by_label("Step, at most").input_value() == "20"


def test_keys_go_through_the_list_and_the_groups(open_page, served):
    page = open_page()
    page.goto(served.at("scored", "/pairs?sort=-margin"))
    expect(page.locator("#results:not([data-reading])")).to_contain_text("80 groups")
    page.keyboard.press("/")
    expect(page.get_by_label("Search in prompts and answers")).to_be_focused()
    page.keyboard.press("Escape")
    page.keyboard.press("j")
    page.keyboard.press("j")
    expect(page.locator(".sample").nth(1)).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_text("2 of 80")).to_be_visible()
    page.wait_for_load_state()  # the keys come with the script
    second = page.url
    page.keyboard.press("j")
    expect(page.get_by_text("3 of 80")).to_be_visible()
    page.wait_for_load_state()
    page.keyboard.press("k")
    expect(page).to_have_url(second)
    page.wait_for_load_state()
    page.keyboard.press("?")
    expect(page.get_by_text("next group")).to_be_visible()
    page.keyboard.press("u")
    expect(page).to_have_url(re.compile(r"/pairs\?sort=-margin$"))
    page.goto(second)
    page.keyboard.press("/")
    expect(page.get_by_label("Search in prompts and answers")).to_be_focused()


def test_a_pair_is_opened_with_its_difference_and_its_tokens(open_page, served):
    page = open_page()
    page.goto(served.at("scored", "/pairs?result=paired"))
    page.locator(".sample").first.click()
    expect(page.locator(".side.chosen ins").first).to_be_visible()
    expect(page.locator(".side.rejected del").first).to_be_visible()
    page.get_by_role("link", name="Tokens").click()
    expect(page.get_by_label("Legend of the colours")).to_be_visible()
    assert page.locator(".side.chosen .tokens span").first.get_attribute("title").count("log-ratio") == 1
    page.get_by_text("Tokens as a table").first.click()
    expect(page.locator(".token-table").first).to_be_visible()


def test_the_list_grows_while_the_run_writes(open_page, served, folder):
    page = open_page()
    page.goto(served.at("judged", "/pairs"))
    expect(page.locator("#results")).to_contain_text("80 groups")
    run_folders.append_step(folder / "judged", 41, 50)
    page.reload()
    expect(page.locator("#results")).to_contain_text("82 groups")


@pytest.mark.parametrize(("width", "theme"), VIEWS)
def test_no_page_is_wider_than_the_screen(open_page, served, width, theme):
    page = open_page(width, theme)
    scored, judged = served.at("scored"), served.at("judged")
    pages = {"pairs": f"{scored}/pairs", "judge": f"{judged}/judge", "vote": f"{judged}/vote"}
    pages["agreement"] = f"{scored}/vote/agreement"
    page.goto(f"{scored}/pairs?result=paired&sort=-surprise")
    pages["pair"] = page.locator(".sample").first.evaluate("link => link.href") + "&view=tokens"
    page.goto(f"{judged}/pairs?result=paired")
    pages["judged-pair"] = page.locator(".sample").first.evaluate("link => link.href")
    for name, address in pages.items():
        page.goto(address)
        expect(page.locator("main h1")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        picture(page, f"{name}-{width}-{theme}")


def test_hostile_texts_stay_texts(open_page, served, folder):
    hostile = {
        text
        for at in RunFolder(folder / "scored").all_frames()
        for row in RunFolder(folder / "scored").groups(at)
        for completion in row["completions"]
        if (text := completion["text"]) in run_folders.HOSTILE
    }
    assert hostile
    page = open_page()
    for text in sorted(hostile):
        page.goto(served.at("scored", "/pairs"))
        page.get_by_label("Search in prompts and answers").fill(text)
        expect(page.locator("#results")).to_contain_text("of 80 groups")
        page.locator(".sample").first.click()
        expect(page.locator(".all").get_by_text(text, exact=True).first).to_be_visible()
    assert page.evaluate("document.querySelectorAll('main script, main img').length") == 0


def test_the_voting_page_is_blind_and_one_key_is_a_vote(open_page, served, folder):
    page = open_page()
    page.goto(served.at("scored", "/vote"))
    for key, choice in (("1", "first"), ("2", "second"), ("0", "tie"), ("s", "skip")):
        source = page.content().replace("scored", "")
        assert not re.search(r"helpful|chosen|rejected|margin|rewards|score", source.split('id="vote"')[1])
        shown = page.locator(".sides .text").all_inner_texts()
        page.keyboard.press(key)
        expect(page.locator(".sides .text").first).not_to_have_text(shown[0])
        vote = list(votes_of(folder / "scored").values())[-1]
        assert vote.choice == choice and [" ".join(t.split()) for t in (vote.first, vote.second)] == [
            " ".join(text.split()) for text in shown
        ]
    expect(page.get_by_text("3 votes so far")).to_be_visible()
    page.get_by_role("link", name="Agreement and export").click()
    expect(page.get_by_role("row", name=re.compile("^label"))).to_be_visible()
    with page.expect_download() as download:
        page.get_by_role("link", name="Export").click()
    assert len(Path(download.value.path()).read_text().splitlines()) == 3


def test_votes_reach_a_waiting_trainer(open_page, serve, tmp_path):
    run_files.fill_folder(tmp_path, "", prompts=2)
    settings = dict(judge="human", human_timeout=600, num_completions=2, per_device_train_batch_size=2, run_folder=True)
    run_file = run_files.write_run_file(tmp_path, **settings)
    words = [sys.executable, "-m", "online_dpo", "train", str(run_file)]
    with subprocess.Popen(
        words, env=processes.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as trainer:
        out = tmp_path / "out"
        try:
            until = time.monotonic() + 300
            while not (out / "questions.jsonl").exists() and trainer.poll() is None and time.monotonic() < until:
                time.sleep(0.1)
            server = serve(tmp_path)
            page = open_page(390, address=server.address)
            page.goto(server.at("out", "/vote"))
            expect(page.get_by_text("the trainer waits: 2 questions")).to_be_visible()
            picture(page, "waiting-trainer-390-light")
            page.keyboard.press("1")
            expect(page.get_by_text("the trainer waits: 1 question", exact=True)).to_be_visible()
            page.keyboard.press("2")
            expect(page.get_by_text("The trainer has no open questions")).to_be_visible()
            said = trainer.communicate(timeout=300)[0]
        finally:
            trainer.kill()
    assert trainer.returncode == 0, said
    notice = f"Waiting for a person's vote on 2 questions: online-dpo dashboard {out}"
    assert "".join(notice.split()) in "".join(said.split())
    assert sorted(vote.choice for vote in votes_of(out).values()) == ["first", "second"]
    [row] = [row for row in RunFolder(out).metrics().rows if "loss" in row]
    assert row["pairs/count"] == 2
