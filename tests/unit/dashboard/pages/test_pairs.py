"""Pages of pairs: filters and order, one group, a prompt over the steps."""

import json
import random
import re
import time
from contextlib import contextmanager

import pytest

from online_dpo.dashboard.index.run_index import RunIndex
from online_dpo.dashboard.plain_words import ratio_class, why_left_out, why_no_pair
from online_dpo.dashboard.sample_query import SampleQuery
from online_dpo.runs import frames

HOSTILE = '<script>alert(1)</script>"><img src=x onerror=alert(2)> {{ 7 * 7 }}'


def completion(text, reward, **facts):
    row = {"text": text, "length": len(text.split()), "finish": "stop", "author": "policy", "version": 0}
    return {**row, "rewards": {"helpful": reward}, "weighted": {"helpful": reward}, "score": reward, **facts}


def group(step, prompt="Name a colour.", reason=None, **facts):
    completions = facts.pop("completions", None) or [completion("Red is nice.", 2.0), completion("Blue.", -1.5)]
    row = {"step": step, "rank": 0, "index": 0, "round": 0, "prompt": prompt, "completions": completions, **facts}
    pair = {"chosen": 0, "rejected": 1, "probability": 1.0, "margin": 3.5, "weight": 1.0, "loss": 0.6, "implied": 0.2}
    return row | ({"reason": reason} if reason else {"pairs": [pair | facts.get("pair", {})]})


@pytest.fixture
def pages(tmp_path, opened):
    """A client of a dashboard with one run of these groups."""

    def write(*groups):
        folder = tmp_path / "run"
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("")
        content = b"".join(frames.encode([one]) for one in groups)
        (folder / "completions-r0-00000.jsonl.zst").write_bytes(content)
        client = opened(tmp_path)
        client.at = f"/runs/{client.run_id('run')}"
        return client

    return write


def keys(answer):
    return re.findall(r'class="sample panel" href="/runs/[^/]+/pairs/(\d+-\d+-\d+-\d+)', answer.text)


THREE = (
    group(1, pair={"margin": 1.0, "implied": 2.0}),
    group(2, "Name an animal.", reason="tie"),
    group(3, pair={"margin": 9.0, "implied": -2.0}, completions=[completion("A b c d.", 5.0), completion("A.", 4.0)]),
)


def test_a_list_without_what_was_read_meanwhile_is_asked_for_again(pages, monkeypatch):
    """All files have been read when the page is made, but not when its rows were."""
    client = pages(*THREE)
    index = client.dashboard.run(client.run_id("run")).index
    monkeypatch.setattr(index, "refresh_samples", lambda seconds: False)
    reading = index.reading

    @contextmanager
    def reading_meanwhile():
        with reading() as db:
            yield db
        assert RunIndex.refresh_samples(index, 60.0)

    monkeypatch.setattr(index, "reading", reading_meanwhile)
    first = client.get(f"{client.at}/pairs")
    assert "data-reading" in first.text and keys(first) == []
    second = client.get(f"{client.at}/pairs")
    assert "data-reading" not in second.text and len(keys(second)) == 3


@pytest.mark.parametrize(
    ("query", "steps"),
    [
        ("", [1, 2, 3]),
        ("q=ANIMAL", [2]),
        ("q=nothing+like+it", []),
        ("step_min=2&step_max=2", [2]),
        ("margin_min=2", [3]),
        ("margin_max=2", [1]),
        ("ratio_min=3.5", [3]),
        ("surprise_min=0.7", [3]),
        ("result=paired", [1, 3]),
        ("result=unpaired", [2]),
        ("result=tie", [2]),
        ("scorer=helpful&score_min=4.5", [3]),
        ("scorer=other&score_min=0", []),
        ("score_max=-1", [1, 2]),
        ("sort=-step", [3, 2, 1]),
        ("sort=-surprise", [3, 1, 2]),
        ("sort=margin", [1, 3, 2]),
        ("sort=nonsense&page=nonsense", [1, 2, 3]),
    ],
)
def test_filters_and_order(pages, query, steps):
    client = pages(*THREE)
    answer = client.get(f"{client.at}/pairs?{query}")
    assert [int(key.split("-")[0]) for key in keys(answer)] == steps
    assert answer.status_code == 200 and ("Nothing passes these filters" in answer.text) == (not steps)


def test_what_is_no_number_is_said_and_not_used(pages):
    client = pages(*THREE)
    answer = client.get(f"{client.at}/pairs?margin_min=<b>&step_min=nan")
    assert len(keys(answer)) == 3 and "“&lt;b&gt;” is no number" in answer.text and "“nan” is no number" in answer.text


def test_an_empty_run_says_what_to_do(pages):
    client = pages()
    assert "log_completions" in client.get(f"{client.at}/pairs").text
    assert "No judge has spoken" in client.get(f"{client.at}/judge").text
    assert "judge: human" in client.get(f"{client.at}/vote").text


def test_a_query_and_its_link_are_the_same():
    given = {"q": "a b&c", "margin_min": "0.5", "result": "tie", "scorer": "s", "score_max": "2", "sort": "-margin"}
    query = SampleQuery.read(given)
    assert query.link() == "margin_min=0.5&q=a+b%26c&result=tie&score_max=2&scorer=s&sort=-margin"
    assert query.link(page=3).endswith("page=3&q=a+b%26c&result=tie&score_max=2&scorer=s&sort=-margin")


@pytest.mark.smoke
def test_a_group_shows_its_pair_its_rewards_and_its_neighbours(pages):
    client = pages(*THREE)
    text = client.get(f"{client.at}/pairs/3-0-0-0?result=paired").text
    assert (
        f'rel="prev" data-key="k" href="{client.at}/pairs/1-0-0-0?result=paired"' in text and 'rel="next"' not in text
    )
    assert "2 of 2" in text and "<ins> b c d</ins>" in text
    assert "This prompt over the steps (2)" in text


def test_weights_normalisation_and_penalties_of_rewards_are_told(pages):
    parts = {"weighted": {"helpful": 0.5}, "normalized": {"helpful": 1.25}, "penalties": {"missing_eos": 1.0}}
    one = completion("Red.", 2.0, **parts, ranking=0.75) | {"score": 1.5, "finish": "length"}
    client = pages(group(1, completions=[one, completion("Blue.", None)]))
    text = client.get(f"{client.at}/pairs/1-0-0-0").text
    for part in ("normalised 1.25", "weighted 0.500", "missing_eos", "ranked by 0.750", "ended by the length limit"):
        assert part in text, part


@pytest.mark.parametrize("reason", ["tie", "identical", "missing_score", "no_answer", "contradiction", "margin"])
def test_why_there_is_no_pair_is_said_in_words(pages, reason):
    client = pages(group(1, reason=reason, left_out={"margin": 2}, resampled_for=None))
    text = client.get(f"{client.at}/pairs/1-0-0-0").text
    assert why_no_pair(reason) in text.replace("&#39;", "'") and "2 pairs left out because of their margin" in text
    assert "Chosen" not in text


def test_reasons_nobody_knows_yet_are_shown_as_they_are():
    assert "“new_one”" in why_no_pair("new_one") and why_left_out("new_one", 1) == "1 pair left out (new_one)."
    assert "answered again" in why_no_pair("resampled", "tie") and "same score" in why_no_pair("resampled", "tie")


def test_tokens_are_coloured_by_log_ratio_and_told_in_words(pages):
    one = completion("Red is", 2.0, tokens=["Red", " is"], log_ratios=[1.5, -0.3], logp=-4.0, ref_logp=-5.2)
    client = pages(group(1, completions=[one, completion("Blue.", 1.0)]))
    text = client.get(f"{client.at}/pairs/1-0-0-0?view=tokens").text
    assert '<span class="r4" title="&#34;Red&#34; log-ratio +1.500">Red</span>' in text
    assert '<span class="r-2" title="&#34; is&#34; log-ratio -0.300"> is</span>' in text
    assert "Legend of the colours" in text and "Its tokens are not recorded" in text
    assert [ratio_class(r) for r in (None, 0.0, 0.04, -0.06, 0.5, -9.0)] == ["r0", "r0", "r0", "r-1", "r3", "r-4"]


def test_both_orders_of_a_judge_are_shown_with_its_words(pages):
    orders = [
        {"shown": [0, 1], "probability": 0.9, "words": "The first is clear.", "seconds": 0.8, "tokens": 512},
        {"shown": [1, 0], "probability": 0.7, "words": "Again the first.", "cost": 0.001},
        {"shown": [1, 0], "probability": None, "failure": "no verdict in 'Hm'"},
    ]
    client = pages(group(1, comparisons=[{"first": 0, "second": 1, "probability": 0.6, "orders": orders}]))
    text = client.get(f"{client.at}/pairs/1-0-0-0").text.replace("&#39;", "'")
    for part in ("The first is clear.", "Again the first.", "no verdict in 'Hm'", "the orders disagree", "512 tokens"):
        assert part in text, part
    assert text.index("answer 1 is</span> completion 1") < text.index("answer 1 is</span> completion 2")


def test_a_prompt_over_the_steps_is_compared_with_its_earliest_answers(pages):
    late = [completion("Green is nice.", 3.0, version=4), completion("No.", 0.0, version=4)]
    client = pages(group(1), group(5, completions=late), group(6, "Another prompt."))
    link = re.search(r'href="(/runs/[^"]+/prompts/\w+)"', client.get(f"{client.at}/pairs/1-0-0-0").text)[1]
    text = client.get(link).text
    assert "2 groups from step 1 to 5" in text and "start model" in text and "<ins>Green</ins> is nice." in text
    assert client.get(f"{client.at}/prompts/unknown").status_code == 404


@pytest.mark.parametrize("key", ["9-0-0-0", "1-0-0", "x", "1-0-0-0-0"])
def test_a_group_that_is_not_there_is_a_page_that_says_so(pages, key):
    client = pages(*THREE)
    answer = client.get(f"{client.at}/pairs/{key}")
    assert answer.status_code == 404 and "There is no such group" in answer.text


def test_hostile_texts_stay_texts_everywhere(pages):
    tokens = {"tokens": [HOSTILE], "log_ratios": [0.5]}
    hostile = [completion(HOSTILE, 1.0, **tokens), completion(HOSTILE + " b", 0.0, **tokens)]
    orders = [{"shown": [0, 1], "probability": 0.5, "words": HOSTILE, "failure": HOSTILE}]
    row = group(1, HOSTILE, completions=hostile, comparisons=[{"first": 0, "second": 1, "orders": orders}])
    row |= {"columns": {HOSTILE: [HOSTILE]}, "notes": {HOSTILE: [HOSTILE]}}
    client = pages(json.loads(json.dumps(row)))
    prompts = re.search(r"/prompts/\w+|$", client.get(f"{client.at}/pairs/1-0-0-0").text)[0]
    for path in (
        "/pairs",
        "/pairs?q=%3Cscript%3E",
        "/pairs/1-0-0-0",
        "/pairs/1-0-0-0?view=tokens",
        "/judge",
        "/vote",
        prompts,
    ):
        text = client.get(client.at + path).text
        assert "<script>alert" not in text and "<img" not in text and "49" not in text, path


@pytest.mark.parametrize(
    ("typed", "value"), [("1,200", 1200), ("-1,200,000.5", -1200000.5), ("0,5", 0.5), ("1,25", 1.25), ("0,500", 0.5)]
)
def test_numbers_with_commas_are_read_as_pages_and_people_write_them(typed, value):
    assert SampleQuery.read({"step_min": typed}).bounds["step"][0] == value


def test_all_pairs_of_sixteen_long_completions_take_no_minute(pages):
    rng = random.Random(0)
    texts = [" ".join(f"w{rng.randrange(2)}" for _ in range(1200)) for _ in range(16)]
    scored = [completion(text, float(place)) for place, text in enumerate(texts)]
    pairs = [{"chosen": i, "rejected": j} for i in range(16) for j in range(i)]
    client = pages(group(1, completions=scored) | {"pairs": pairs})
    began = time.process_time()
    page = client.get(f"{client.at}/pairs/1-0-0-0").text
    assert time.process_time() - began < 20
    assert page.count("P(chosen is better)") == len(pairs) and texts[0] in page


def test_the_views_of_a_pair_show_the_same_texts(pages):
    client = pages(group(1))
    shown = {view: client.get(f"{client.at}/pairs/1-0-0-0?view={view}").text for view in ("", "text", "other")}
    assert "<ins>" in shown[""] and shown["other"].count("<ins>") == shown[""].count("<ins>")
    assert "<ins>" not in shown["text"] and "Red is nice." in shown["text"]
