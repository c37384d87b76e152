"""The judge's page, votes, and what agrees with them."""

import json
import re
import shutil
import time
from urllib.parse import urlencode

import pytest

from online_dpo.runs import frames
from online_dpo.runs.layout import VOTES
from online_dpo.runs.questions import ask, asked
from online_dpo.runs.reading import RunFolder
from online_dpo.runs.votes import question_id, votes_of
from support import records


@pytest.fixture
def runs(tmp_path, made, opened):
    """A client of a dashboard with copies of the made runs; ``at(name)`` is the address of one."""
    shutil.copytree(made, tmp_path / "runs")
    client = opened(tmp_path / "runs")
    client.folder = tmp_path / "runs"
    client.at = lambda name: f"/runs/{client.run_id(name)}"
    return client


def post(client, path, **form):
    headers = client.csrf | {"content-type": "application/x-www-form-urlencoded"}
    return client.post(path, content=urlencode(form), headers=headers, follow_redirects=False)


def fields(page):
    return dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)"', page))


def answers(page):
    return re.findall(r'<h3>Answer \d</h3><div class="text" dir="auto">([^<]*)</div>', page)


def test_figures_of_the_judge_equal_those_counted_here(runs):
    groups = [
        row
        for at in RunFolder(runs.folder / "judged").all_frames()
        for row in RunFolder(runs.folder / "judged").groups(at)
    ]
    compared = [one for row in groups for one in row.get("comparisons", [])]
    orders = [order for one in compared for order in one["orders"]]
    first = sum(order["probability"] > 0.5 for order in orders)
    contradictions = sum(
        one["orders"][0]["probability"] > 0.5
        and 1 - one["orders"][1]["probability"] < 0.5
        or one["orders"][0]["probability"] < 0.5
        and 1 - one["orders"][1]["probability"] > 0.5
        for one in compared
    )
    text = runs.get(f"{runs.at('judged')}/judge").text
    shares = re.findall(r'class="big">(\d+) %', text)
    assert shares == [f"{100 * first / len(orders):.0f}", f"{100 * contradictions / len(compared):.0f}", "0"]
    assert f'class="big">{len(orders)}</span> <span class="small muted">questions' in text
    assert f"{400 * len(orders):,} tokens" in text and f"{len(compared)} comparisons" in text


def test_words_of_the_judge_are_searched(runs):
    words = "Answer 1 is"
    all_of_them = runs.get(f"{runs.at('judged')}/judge?{urlencode({'q': words.upper()})}").text
    assert "Nothing that the judge said" not in all_of_them and words in all_of_them
    assert "Nothing that the judge said" in runs.get(f"{runs.at('judged')}/judge?q=never+said").text
    assert "0 comparisons" in runs.get(f"{runs.at('judged')}/judge?shown=failed").text


def judged_group(step, forward, backward):
    """A group whose judge gave these probabilities to the answer shown first, in both orders."""
    completions = [
        {"text": text, "length": 1, "finish": "stop", "author": "policy", "version": 0} for text in ("Red.", "Blue.")
    ]
    orders = [
        {"shown": [0, 1], "probability": forward, "words": "The first is shorter."},
        {"shown": [1, 0], "probability": backward, "words": "No difference."},
    ]
    comparison = {"first": 0, "second": 1, "probability": 0.5, "orders": orders}
    row = {"step": step, "rank": 0, "index": 0, "round": 0, "prompt": "Name a colour.", "completions": completions}
    return row | {"comparisons": [comparison], "reason": "tie"}


@pytest.fixture
def contradicted(tmp_path, opened):
    """A run whose judge prefers what is shown first at step 1, and is sure in one order only at step 2."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    groups = [judged_group(1, 0.6, 0.6), judged_group(2, 1.0, 0.5)]
    (tmp_path / "run" / "completions-r0-00000.jsonl.zst").write_bytes(b"".join(frames.encode([g]) for g in groups))
    client = opened(tmp_path)
    client.at = f"/runs/{client.run_id('run')}"
    return client


def test_a_search_in_the_words_of_one_order_looks_at_both_orders(contradicted):
    for query in ("shown=disagree", "shown=disagree&q=shorter", "shown=disagree&q=no+difference"):
        page = contradicted.get(f"{contradicted.at}/judge?{query}").text
        assert "1 comparison<" in page and "Step 1 " in page, query


def test_orders_disagree_in_the_same_sense_on_all_pages(contradicted):
    pages = [contradicted.get(f"{contradicted.at}/pairs/{step}-0-0-0").text for step in (1, 2)]
    assert ["the orders disagree</span>" in page for page in pages] == [True, False]


def test_the_voting_page_is_blind(runs):
    page = runs.get(f"{runs.at('scored')}/vote").text
    assert len(answers(page)) == 2
    given = fields(page)
    folder = RunFolder(runs.folder / "scored")
    group = next(
        row
        for at in folder.all_frames()
        for row in folder.groups(at)
        if "-".join(str(row[name]) for name in ("step", "rank", "index", "round")) == given["group"]
    )
    for completion in group["completions"]:
        for value in (*completion["rewards"].values(), completion["score"]):
            assert f"{value:.3f}" not in page and f"{value:.2f}" not in page
    voting = page.split('<section id="vote"')[1]
    assert not re.search(
        r"helpful|chosen|rejected|margin|score|reward", voting.replace(runs.run_id("scored"), ""), re.I
    )


def test_a_vote_is_kept_and_the_next_question_follows(runs):
    at = f"{runs.at('scored')}/vote"
    page = runs.get(at).text
    answer = post(runs, at, **fields(page), choice="second")
    assert answer.status_code == 303 and answer.headers["location"] == at
    [vote] = votes_of(runs.folder / "scored").values()
    assert [vote.first, vote.second] == answers(page) and vote.choice == "second" and vote.blind
    assert vote.group == fields(page)["group"] and 0 <= vote.seconds < 60
    following = runs.get(at).text
    assert fields(following)["group"] != vote.group and "1 vote so far" in following


def test_a_vote_in_the_moment_of_the_question_took_no_time(runs, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1764160000.96875)  # rounded, the question would come after the vote
    at = f"{runs.at('scored')}/vote"
    post(runs, at, **fields(runs.get(at).text), choice="first")
    assert [vote.seconds for vote in votes_of(runs.folder / "scored").values()] == [0.0]


def test_a_question_behind_many_equal_ones_is_asked(tmp_path, opened):
    steps = range(1, 61)
    last = max(steps, key=lambda step: step * 2654435761 % 2**32)  # the one that comes last
    texts = {step: ("Red.", "Green." if step == last else "Blue.") for step in steps}
    answers_of = {step: [records.completion(text) for text in texts[step]] for step in steps}
    groups = [records.group(step, answers_of[step], prompt="Which?") for step in steps]
    records.write(tmp_path / "run", groups, [{"step": 60, "loss": 0.6}])
    client = opened(tmp_path)
    at = f"/runs/{client.run_id('run')}/vote"
    for _ in range(2):
        post(client, at, **fields(client.get(at).text), choice="first")
    asked_about = {frozenset((vote.first, vote.second)) for vote in votes_of(tmp_path / "run").values()}
    assert asked_about == set(map(frozenset, texts.values()))
    assert "You have voted on every pair" in client.get(at).text


def test_the_order_does_not_tell_what_was_chosen(runs):
    at, shown_first = f"{runs.at('scored')}/vote", []
    for _ in range(24):
        given = fields(runs.get(at).text)
        row = runs.dashboard.catalog.find(runs.run_id("scored")).index.find_group(given["group"])
        shown_first.append(given["completions"].split("-")[0] == str(row.pairs[0].chosen))
        post(runs, at, **given, choice="tie")
    assert 4 < sum(shown_first) < 20


def test_questions_of_a_waiting_trainer_come_first(runs):
    folder, now = runs.folder / "scored", time.time()
    late, soon = (asked(prompt, "yes", "no", 0, now, now + left) for prompt, left in (("P", 900.0), ("Q", 90.0)))
    over = asked("R", "yes", "no", 0, now - 50, now - 1)
    ask(folder, [late, soon, over])
    at = f"{runs.at('scored')}/vote"
    page = runs.get(at).text
    assert fields(page)["question"] == soon.id and "2 questions" in page and "in 1 min" in page
    assert post(runs, at, **fields(page), choice="first").status_code == 303
    assert votes_of(folder)[question_id("Q", "yes", "no")].preferred == soon.first
    assert fields(runs.get(at).text)["question"] == late.id
    post(runs, at, question=late.id, choice="skip")
    assert "group" in fields(runs.get(at).text)


def test_a_run_with_people_as_judge_waits_for_its_next_questions(runs):
    (runs.folder / "scored" / "run.yaml").write_text("judge: human\n")
    page = runs.get(f"{runs.at('scored')}/vote").text
    assert "The trainer has no open questions" in page and 'hx-trigger="every 2s"' in page


@pytest.mark.parametrize(
    ("form", "status"),
    [
        ({"choice": "third"}, 400),
        ({"choice": "first", "question": "unknown"}, 404),
        ({"choice": "first", "group": "1-0-0-0", "completions": "0-99"}, 404),
        ({"choice": "first", "group": "999-0-0-0", "completions": "0-1"}, 404),
        ({"choice": "first", "group": "1-0-0-0", "completions": "0-x"}, 404),
        ({}, 400),
    ],
)
def test_a_vote_on_nothing_is_refused(runs, form, status):
    runs.get(f"{runs.at('scored')}/pairs")
    assert post(runs, f"{runs.at('scored')}/vote", **form).status_code == status
    assert not (runs.folder / "scored" / VOTES).exists()


def test_a_vote_of_another_site_is_refused(runs):
    at = f"{runs.at('scored')}/vote"
    given = urlencode(fields(runs.get(at).text) | {"choice": "first"})
    for headers in ({}, {"origin": "http://evil.example"}, runs.csrf | {"x-csrf-token": "wrong"}):
        assert runs.post(at, content=given, headers=headers).status_code == 403
    assert not (runs.folder / "scored" / VOTES).exists()


def test_a_vote_on_an_open_pair_is_no_blind_one(runs):
    at = runs.at("scored")
    runs.get(f"{at}/pairs?result=paired")
    key = next(row for row in re.findall(r"/pairs/([\d-]+)", runs.get(f"{at}/pairs?result=paired").text))
    form = fields(runs.get(f"{at}/pairs/{key}").text)
    assert "Kept in votes.jsonl" in post(runs, f"{at}/vote", **form, choice="second").text
    [vote] = votes_of(runs.folder / "scored").values()
    assert not vote.blind and vote.group == key
    assert "nothing to compare them with" in runs.get(f"{at}/vote/agreement").text


def test_agreement_and_export(runs):
    at = f"{runs.at('scored')}/vote"
    assert "There are no votes yet" in runs.get(f"{at}/agreement").text
    for _ in range(6):
        given = fields(runs.get(at).text)
        group = runs.dashboard.catalog.find(runs.run_id("scored")).index.find_group(given["group"])
        is_first = given["completions"].split("-")[0] == str(group.pairs[0].chosen)
        post(runs, at, **given, choice="first" if is_first else "second")
    page = runs.get(f"{at}/agreement").text
    row = re.search(r'<th scope="row">label</th>.*?</tr>', page, re.S)[0]
    assert "<strong>100 %</strong>" in row and "61 % to 100 %" in row and ">6<" in row
    assert 'scope="row">helpful<' in page and 'scope="row">short<' in page
    export = runs.get(f"{runs.at('scored')}/votes.jsonl")
    lines = [json.loads(line) for line in export.text.splitlines()]
    assert len(lines) == 6 and all({"prompt", "response_a", "response_b", "label"} <= line.keys() for line in lines)
    assert export.headers["content-disposition"].startswith("attachment")
