"""The quickstart's machinery at a tiny size; the full run is an end-to-end test."""

import json

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from online_dpo.quickstart.artifacts import build
from online_dpo.quickstart.language import parse_request, split_of
from online_dpo.quickstart.models import FULL, TINY, build_policy_config, build_tokenizer, new_policy
from online_dpo.quickstart.run import PolicyAnswers, run_quickstart, summarise
from online_dpo.runs.reading import RunFolder
from online_dpo.runs.state import state_of
from online_dpo.stats.intervals import wilson_interval


@pytest.mark.smoke
def test_tiny_artifacts_load_and_their_prompts_are_held_out(tmp_path):
    made = build(tmp_path, seed=3, size=TINY)
    AutoModelForCausalLM.from_pretrained(made.policy_dir)
    assert AutoModelForSequenceClassification.from_pretrained(made.reward_dir).config.num_labels == 1
    assert AutoTokenizer.from_pretrained(made.policy_dir).eos_token == "<eos>"
    files = (
        (made.prompts_train, "online", 64),
        (made.prompts_validation, "validation", 16),
        (made.prompts_test, "test", 16),
    )
    for file, split, count in files:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        requests = [parse_request(row["prompt"]) for row in rows]
        assert len(rows) == count and {split_of(request.text) for request in requests} == {split}
        assert [request.answer for request in requests] == [row["answer"] for row in rows]


def test_the_full_policy_has_the_size_that_the_readme_says():
    tokenizer = build_tokenizer(["What is 3 plus 2? It is 5."], FULL.vocab_size)
    model = new_policy(build_policy_config(tokenizer, FULL.hidden, FULL.layers, FULL.heads))
    body = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name)
    assert 0.85e6 < body < 3e6


def test_summary_counts_ties_half_and_right_answers():
    before = PolicyAnswers(
        [], [1.0, 2.0, 3.0, 4.0], [0.0] * 4, right=[True, False, False, False], greedy_right=[True] * 4
    )
    after = PolicyAnswers(
        [], [2.0, 2.0, 2.0, 5.0], [1.0] * 4, right=[True, True, True, False], greedy_right=[False] * 4
    )
    summary = summarise(before, after)
    assert summary["win_rate"] == 0.625 and summary["win_rate_ci95"] == list(wilson_interval(0.625, 4))
    assert (summary["gold_before"], summary["gold_after"], summary["proxy_after"]) == (2.5, 2.75, 1.0)
    assert (summary["accuracy_before"], summary["accuracy_after"]) == (0.25, 0.75)
    assert (summary["greedy_accuracy_before"], summary["greedy_accuracy_after"]) == (1.0, 0.0)
    assert summary["accuracy_after_ci95"] == list(wilson_interval(0.75, 4)) and summary["prompts"] == 4


@pytest.mark.slow
def test_a_tiny_run_writes_what_it_says(tmp_path):
    console = Console(record=True, width=200)
    summary = run_quickstart(tmp_path, seed=1, size=TINY, max_steps=2, console=console)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    expected = (
        "win_rate win_rate_ci95 gold_before gold_after proxy_before proxy_after kl steps seconds tokens_per_second "
        "accuracy_before accuracy_after greedy_accuracy_before greedy_accuracy_after reward_model_accuracy"
    )
    assert set(expected.split()) <= summary.keys() and summary["steps"] == 2
    text = console.export_text()
    rows = [json.loads(line) for line in (tmp_path / "start" / "prompts_test.jsonl").read_text().splitlines()]
    shown = [text.index(row["prompt"]) for row in rows[:3]]
    assert shown == sorted(shown)
    for name in ("accuracy_before", "greedy_accuracy_after", "reward_model_accuracy"):
        assert f"{summary[name]:.1%}" in text
    assert f"{summary['win_rate']:.1%}" in text and text.count("before (") == 3
    AutoModelForCausalLM.from_pretrained(tmp_path)
    opening, ending = text.split("Making a tokenizer")[0], text.split("The trained model is in")[1]
    assert f"online-dpo dashboard {tmp_path}" in opening and f"online-dpo dashboard {tmp_path}" in ending
    assert f"online-dpo report {tmp_path}" in ending and f"online-dpo train {tmp_path}/run.yaml" in ending
    assert state_of(tmp_path) == "finished"
    folder = RunFolder(tmp_path)
    assert [row["kind"] for row in folder.metrics().rows][-1] == "eval"
    assert folder.events().rows[-1]["kind"] == "end"
    assert "training.svg" in (tmp_path / "README.md").read_text() or len(folder.metrics().rows) == 1
