"""`online-dpo report`: the page says what the folder says, works on any folder, and hostile text in it stays text."""

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest

from online_dpo.cli.main import main
from online_dpo.runs.layout import CompletionsFile
from online_dpo.runs.report.facts import Answered, facts_of
from online_dpo.runs.votes import Vote, add_vote
from support import records
from support.processes import run_python
from support.records import completion, group

VOID = {"meta", "link", "br", "img", "hr", "input"}
HOSTILE = "</style></script><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }}\u202e\x00\x1b[31m&amp;"


class Page(HTMLParser):
    """The elements and the text of a page; every element is closed in its turn."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == [], self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def report(folder, *words):
    assert main(["report", str(folder), *map(str, words)]) == 0
    return (folder / "report.html").read_text(encoding="utf-8")


def train_row(step, **metrics):
    row = {"step": step, "time": 1764160000.0 + step, "kind": "train", "loss": 0.69 - 0.01 * step}
    row |= {
        "objective/scores": step / 10,
        "objective/kl": step / 5,
        "prompts": 4.0,
        "pairs/count": 3.0,
        "dropped/tie": 1.0,
    }
    row |= {"time/rollout": 2.0, "time/training": 1.5, "time/reference": 0.5, "time/all": 4.0}
    return row | {"perf/tokens_per_second": 100.0, "perf/host_memory_peak": 1.5} | metrics


def eval_row(step, rate):
    row = {"step": step, "time": 1764160000.0 + step, "kind": "eval", "eval_win_rate": rate, "eval_runtime": 1.0}
    return row | {"eval_win_rate_ci95_low": rate - 0.1, "eval_win_rate_ci95_high": rate + 0.1}


def judged(step, shown_first, shown_second):
    """A comparison in both orders, by the probabilities that the answer shown first is better."""
    orders = [{"shown": [0, 1], "probability": shown_first, "words": "The first is better.", "tokens": 10}]
    orders.append({"shown": [1, 0], "probability": shown_second, "seconds": 0.5, "tokens": 20})
    comparison = {"first": 0, "second": 1, "probability": 0.7, "orders": orders}
    return group(step, [completion("a"), completion("b")], comparisons=[comparison])


@pytest.fixture
def folder(tmp_path):
    """Twenty steps: scores grow with the lengths of the answers, every fourth group is a tie."""
    groups = []
    for step in range(1, 21):
        texts = [" ".join(["word"] * n) for n in (step, step + 1, step + 2)]
        scores = [1.0] * 3 if step % 4 == 0 else [float(step + n) for n in range(3)]
        answers = [completion(text, score) for text, score in zip(texts, scores, strict=True)]
        is_tie = step % 4 == 0
        groups.append(
            group(step, answers, [] if is_tie else [(2, 0)], prompt=f"Prompt {step % 5}?", prompt_row=step % 5)
            | ({"reason": "tie"} if is_tie else {})
        )
    rows = [train_row(step) for step in range(1, 21)] + [eval_row(10, 0.6), eval_row(20, 0.8)]
    events = [
        {"time": 1.0, "step": 0, "kind": "start", "message": "The run starts."},
        {"time": 2.0, "step": 7, "kind": "skip", "message": "Step 7 skipped."},
        {"time": 3.0, "step": 9, "kind": "skip", "message": "Step 9 skipped: not finite."},
        {"time": 4.0, "step": 10, "kind": "checkpoint", "message": "checkpoint-10 was saved."},
        {"time": 4.5, "step": 15, "kind": "checkpoint", "message": "No room for checkpoint-15.", "saved": False},
        {"time": 4.6, "step": 16, "kind": "retry", "message": "Asked again.", "times": 1},
        {"time": 4.7, "step": 17, "kind": "retry", "message": "Asked again: 429.", "times": 41},
        {"step": 20, "rank": 0, "kind": "end", "message": "The run ended.", "code": 0, "state": "finished"},
    ]
    settings = {"model_name_or_path": "org/model", "beta": 0.1, "max_steps": 20}
    environment = {"sessions": [{"started": 1764160000.0, "versions": {"torch": "2.13"}, "processes": 2}]}
    return records.write(tmp_path / "helpful", groups, rows, events, settings, environment)


@pytest.mark.smoke
def test_figures_of_the_page_are_those_of_the_folder(folder, capsys):
    page = Page(report(folder))
    words = page.words
    assert f"Report written to {folder / 'report.html'}" in capsys.readouterr().out
    assert "helpful finished" in words and "org/model" in words and "torch 2.13" in words
    assert "steps 20 of 20" in words and "pairs trained on 60 20 of 80 prompts gave none" in words
    assert "reward 1.95 from 0.15; means" in words and "KL to the reference 3.9 nats" in words
    assert "win rate, eval 80.0% 70.0% to 90.0%" in words
    assert "20 groups are recorded, 15 of them gave pairs" in words
    assert "tie all scores are equal, or the judge has no preference 20 25.0%" in words
    assert "skip 2 7–9 Step 9 skipped: not finite." in words and "checkpoint-10" not in words
    assert "checkpoint not saved 1 15 No room for checkpoint-15." in words
    assert "retry 42 16–17 Asked again: 429." in words  # a row may stand for several
    assert "rollout 40 s, 50%" in words and "training 20 s, 25%" in words and "reference 10 s, 12%" in words
    assert "other 10 s, 12%" in words
    assert "the longer one in 100% of the pairs" in words
    assert "Not in the folder" not in words


def test_correlations_are_those_of_numpy(folder):
    facts = facts_of(folder).groups
    lengths, scores = np.asarray(facts.lengths), np.asarray(facts.scores)
    assert len(scores) == 60 and facts.correlation == pytest.approx(np.corrcoef(lengths, scores)[0, 1])
    centred = lengths.reshape(-1, 3) - lengths.reshape(-1, 3).mean(1, keepdims=True)
    of_scores = scores.reshape(-1, 3) - scores.reshape(-1, 3).mean(1, keepdims=True)
    expected = (centred * of_scores).sum() / np.sqrt((centred**2).sum() * (of_scores**2).sum())
    assert facts.correlation_within == pytest.approx(expected)


def test_answers_are_the_first_sampled_ones_early_and_late(folder):
    examples = facts_of(folder).examples
    assert len(examples) == 4 and all(one.late.step - one.early.step == 15 for one in examples)
    one = next(one for one in examples if one.early.prompt == "Prompt 1?")
    assert one.early == Answered(1, "Prompt 1?", "word", 1.0)
    assert one.late == Answered(16, "Prompt 1?", " ".join(["word"] * 16), 1.0)
    words = Page(report(folder)).words
    assert "Prompt 1? step 1, score 1 word step 16, score 1 word word" in words and "farthest apart" in words


def test_where_no_prompt_comes_twice_answers_of_the_first_and_last_steps_are_shown(tmp_path):
    groups = [group(step, [completion(f"answer {step}", 1.0), completion("other", 0.0)]) for step in range(1, 4)]
    folder = records.write(tmp_path / "run", groups)
    [one] = facts_of(folder).examples
    assert (one.early.text, one.late.text) == ("answer 1", "answer 3")
    assert "step 1, score 1 Prompt 1? answer 1 step 3, score 1 Prompt 3? answer 3" in Page(report(folder)).words


@pytest.mark.parametrize("answers", [[], [completion("Red.", 1.0, author="reference")]], ids=["none", "an opponent's"])
def test_a_prompt_that_the_policy_did_not_answer_is_no_example(tmp_path, answers):
    others = [group(step, [completion("Blue.", 1.0)], [], prompt="Which?", prompt_row=5) for step in (1, 4)]
    groups = [group(step, answers, [], prompt="Who?", prompt_row=6) for step in (2, 3)]
    facts = facts_of(records.write(tmp_path / "run", [*others, *groups], [train_row(4)]))
    assert [(one.early.step, one.late.step) for one in facts.examples] == [(1, 4)]
    assert facts.groups.groups == 4 and "Blue." in report(tmp_path / "run")


def test_models_of_a_run_from_python_are_those_in_the_comments_of_its_settings(folder):
    text = "# Written by online-dpo 0.1.0\n# model: LlamaForCausalLM, <b>start\n# feedback: words\nbeta: 0.1\n"
    (folder / "run.yaml").write_text(text)
    assert "model LlamaForCausalLM, <b>start feedback words beta 0.1" in Page(report(folder)).words


def test_a_judges_bias_and_disagreement_are_counted(tmp_path):
    groups = [judged(1, 0.9, 0.2), judged(2, 0.9, 0.8), judged(3, 0.6, None)]
    words = Page(report(records.write(tmp_path / "judged", groups))).words
    assert "comparisons recorded 3 questions 6 questions without an answer 1 (16.7%)" in words
    assert f"shown first {(0.9 + 0.2 + 0.9 + 0.8) / 4:.3f} (fair: 0.5)" in words
    assert "whose two orders disagree 1 (50.0%)" in words and "tokens 90" in words
    assert "The first is better." in words


def test_votes_and_who_agrees_with_them_are_shown(folder):
    """The label of step 1 prefers completion 2 to 0, and so does the person; on step 2 the person does not."""
    for step, choice in ((1, "first"), (2, "second"), (3, "tie"), (5, "skip")):
        words = " ".join(["word"] * (step + 2)), " ".join(["word"] * step)
        vote = Vote(f"Prompt {step}?", *words, choice, time=1.0, group=f"{step}-0-0-0", completions=(2, 0))
        add_vote(folder, vote)
    words = Page(report(folder)).words
    assert "4 questions have a vote: 1 are ties, 1 were skipped." in words
    assert "words reward 1 of 2 50.0%" in words and "label label 1 of 2 50.0%" in words


def test_figures_of_an_evaluation_that_lie_in_the_folder_are_shown(folder):
    (folder / "figures.json").write_text(
        '{"model": "runs/a", "against": "start", "prompts": 500, "scored_by": "rubric", '
        '"win_rate": {"value": 0.9312, "low": 0.9, "high": 0.95}}'
    )
    (folder / "summary.json").write_text('{"prompts": 500, "win_rate": 0.5, "win_rate_ci95": [0.4, 0.6]}')
    (folder / "other.json").write_text("[1, 2")
    words = Page(report(folder)).words
    assert "figures.json runs/a start 500 rubric 93.1% 90.0% to 95.0%" in words
    assert "summary.json 500 50.0% 40.0% to 60.0%" in words


def test_hostile_text_stays_text(tmp_path):
    answers = [completion(HOSTILE, 2.0), completion(HOSTILE + " more", 1.0)]
    groups = [group(step, answers, prompt=HOSTILE, prompt_row=0, reason=HOSTILE) for step in (1, 2)]
    groups.append(group(3, answers, [], reason=HOSTILE))
    events = [
        {"step": 1, "kind": HOSTILE, "message": HOSTILE},
        {"step": 1, "kind": "end", "state": HOSTILE, "message": HOSTILE},
    ]
    rows = [
        train_row(1, **{f"dropped/{HOSTILE}": 1.0, f"time/{HOSTILE}": 3.0}),
        {"step": 2, "kind": "eval", f"{HOSTILE}_win_rate": 0.5},
    ]
    settings, environment = {HOSTILE: HOSTILE}, {"sessions": [{HOSTILE: HOSTILE, "versions": {HOSTILE: HOSTILE}}]}
    folder = records.write(tmp_path / "<b>run", groups, rows, events, settings, environment)
    (folder / "figures.json").write_text('{"win_rate": 0.5, "model": "<script>\\ud800</script>"}')
    text = report(folder)
    page = Page(text)
    assert not {"script", "img"} & set(page.tags) and "49" not in re.findall(r"\b49\b", page.words)
    assert all(not name.startswith("on") and name not in ("src", "href") for name, _ in page.attributes)
    assert "<script>alert(1)</script>" in page.words and "{{ 7 * 7 }}" in page.words and "⟨U+202E⟩" in page.words
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", text)
    for chart in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        ET.fromstring(chart)


def test_a_page_asks_for_nothing_and_allows_no_script(folder):
    text = report(folder)
    assert "default-src 'none'; style-src 'unsafe-inline'" in text
    assert not re.search(r"(src|href)=|url\(|@import|https?://(?!www\.w3\.org/2000/svg)", text)


@pytest.mark.parametrize(
    "parts",
    [
        {"metrics": [train_row(1)]},
        {"metrics": [{"step": 1, "kind": "train", "loss": None}]},
        {"events": [{"step": 0, "kind": "start", "message": "The run starts."}]},
        {"groups": [group(1, [completion("a", 1.0), completion("b", 0.0)])]},
        {"groups": [group(1, [completion("a"), completion("a")], [], reason="identical")]},
        {"environment": {"sessions": "none"}},
        {"metrics": [{"step": "one"}, {"loss": 1.0}, {"step": 10**400, "loss": 10**400, "time": "now"}]},
    ],
    ids=["one step", "no number", "just begun", "one group", "no pair", "bare", "strange"],
)
def test_tiny_and_partial_folders_have_a_page_that_says_what_is_missing(tmp_path, parts, capsys):
    folder = records.write(tmp_path / "run", **parts)
    page = Page(report(folder))
    assert facts_of(folder).state in ("running", "lost") and "Not in the folder, so not on this page" in page.words
    assert ("Metrics: metrics.jsonl is not there, has no row" in page.words) == (not facts_of(folder).metrics.logs)
    assert "nan" not in page.words and "inf " not in page.words
    for chart in re.findall(r"<svg.*?</svg>", (folder / "report.html").read_text(), flags=re.DOTALL):
        ET.fromstring(chart)
        assert "nan" not in chart


def test_a_failed_run_says_how_it_ended(folder):
    events = folder / "events.jsonl"
    text = events.read_text().replace('"finished"', '"failed"').replace("The run ended.", "ScoringError: away.")
    events.write_text(text + '{"torn')
    (folder / CompletionsFile(0, 0).name).write_bytes(b"no frame")
    words = Page(report(folder)).words
    assert "helpful failed ScoringError: away." in words


def test_only_a_report_is_written_over(folder, tmp_path, capsys):
    mine = tmp_path / "mine.html"
    mine.write_text("<p>mine")
    assert main(["report", str(folder), "--output", str(mine)]) == 2 and mine.read_text() == "<p>mine"
    assert "exists and is no report" in capsys.readouterr().err
    assert report(folder) and report(folder)
    for words, expected in (
        ([tmp_path / "nowhere"], "there is no such folder"),
        ([tmp_path], "no run has written its record here"),
        ([folder, "--output", folder], "is a folder"),
        ([folder, "--output", folder / "run.yaml"], "belongs to the record"),
        ([folder, "--output", tmp_path / "none" / "a.html"], "there is no folder"),
    ):
        assert main(["report", *map(str, words)]) == 2
        assert expected in capsys.readouterr().err


def test_a_huge_run_takes_little_memory_and_time(tmp_path):
    """20,000 logs and 4,000 groups: a fraction of what a script measures, to notice a change of kind."""
    groups = [group(n, [completion("word " * 30, 1.0 + n % 7), completion("word " * 20, 0.5)]) for n in range(1, 4001)]
    folder = records.write(tmp_path / "run", groups, (train_row(step) for step in range(1, 20_001)))
    code = (  # `getrusage` would have the memory of the process that started this one
        "import re, sys, time\nfrom online_dpo.cli.main import main\nstart = time.process_time()\n"
        f"assert main(['report', {str(folder)!r}]) == 0\n"
        "peak = re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]\n"
        "print(int(peak) // 1024, time.process_time() - start)\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'accelerate', 'pyarrow'} & set(sys.modules)))"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    figures, heavy = done.stdout.splitlines()[-2:]
    megabytes, seconds = map(float, figures.split())
    assert megabytes < 120 and seconds < 40 and heavy == "[]"
    assert (folder / "report.html").stat().st_size < 400_000
