"""What `online-dpo export` and `online-dpo report` say of real runs: the same as their logs and rewards."""

import contextlib
import json
import re

import pytest

from online_dpo.cli.main import main
from online_dpo.errors import NothingTrainedError
from online_dpo.runs.report.facts import facts_of
from support import training
from support.endpoint import serving
from support.llm_judges import first_wins, judge_of
from support.training import word_reward


def exported(folder, *words):
    file = folder / "pairs.jsonl"
    assert main(["export", str(folder), "--to", str(file), "--overwrite", *words]) == 0
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Six steps of three completions, with prompts that are answered again, and two evaluations."""
    folder = tmp_path_factory.mktemp("run")
    options = dict(run_folder=True, max_steps=6, num_completions=3, resample_rounds=1, eval_strategy="steps")
    kwargs = {"eval_dataset": training.dataset((5, 6, 7, 8))}
    made = training.trainer(folder, eval_steps=3, kwargs=kwargs, **options)
    made.train()
    made.create_model_card()
    return folder, made


def test_exported_pairs_are_those_that_were_trained_on(run):
    folder, made = run
    rows = exported(folder)
    logs = training.step_logs(made)
    assert len(rows) == sum(log["pairs/count"] for log in logs) > 6
    for row in rows:
        scores = word_reward([row["chosen"], row["rejected"]])
        assert scores == [row["score_chosen"], row["score_rejected"]] and row["margin"] == scores[0] - scores[1] > 0
        assert row["score_chosen_word_reward"] == row["score_chosen"]
    prompts = [prompt["prompt"] for prompt in training.dataset()]
    assert all(prompts[row["row"]] == row["prompt"] for row in rows)
    assert len({row["id"] for row in rows}) == len(rows)
    for log in logs:
        assert sum(row["step"] == log["step"] for row in rows) == log["pairs/count"]


def test_exported_completions_are_all_that_were_sampled(run):
    folder, made = run
    rows = exported(folder, "--all-completions")
    logs = training.step_logs(made)
    answered = sum(log["prompts"] + log.get("resample/groups", 0) for log in logs)
    assert len(rows) == 3 * answered and all(row["score"] == word_reward([row["completion"]])[0] for row in rows)


def test_the_report_and_the_card_say_what_the_logs_say(run):
    folder, made = run
    assert main(["report", str(folder)]) == 0
    page, card, facts = (folder / "report.html").read_text(), (folder / "README.md").read_text(), facts_of(folder)
    logs = training.step_logs(made)
    pairs, prompts = (sum(log[name] for log in logs) for name in ("pairs/count", "prompts"))
    without = sum(count for log in logs for name, count in log.items() if name.startswith("dropped/"))
    assert (facts.pairs, facts.prompts, sum(facts.dropped.values())) == (pairs, prompts, without)
    assert f"{pairs:.0f} pairs were trained on; {without:.0f} of {prompts:.0f} prompts gave none." in card
    assert f"{without:,.0f} of {prompts:,.0f} prompts gave none" in page
    last = [log for log in made.state.log_history if "eval_win_rate" in log][-1]
    interval = f"{last['eval_win_rate_ci95_low']:.1%} to {last['eval_win_rate_ci95_high']:.1%}"
    assert f"<b>{last['eval_win_rate']:.1%}</b>" in page and interval in page
    assert facts.state == "finished" and facts.missing == [] and len(facts.examples) == 4
    total = sum(log["time/all"] for log in logs)
    assert sum(facts.seconds.values()) == pytest.approx(total, rel=0.01)
    assert re.search(r'<span class="state finished">finished</span>', page)


def test_a_judge_that_likes_the_first_place_is_told_by_the_report(tmp_path):
    """It gives the first place 0.7 whoever stands there: both orders disagree, and no pair is sure."""
    with serving(first_wins) as endpoint:
        kwargs = {"judge": judge_of(endpoint)}
        options = dict(run_folder=True, max_steps=2, num_completions=2, kwargs=kwargs)
        made = training.trainer(tmp_path, reward_funcs=None, **options)
        with contextlib.suppress(NothingTrainedError):
            made.train()
    facts = facts_of(tmp_path)
    judged, asked = facts.groups.judged, sum(log["judge/requests"] for log in training.step_logs(made))
    assert judged.position_bias == pytest.approx(0.7, abs=1e-3) and judged.disagreement == 1.0
    assert judged.orders >= asked > 0 and judged.tokens > 0
    assert facts.dropped == {"tie": sum(log["prompts"] for log in training.step_logs(made))}
    assert main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "0.700 (fair: 0.5)" in page and "(100.0%)" in page
