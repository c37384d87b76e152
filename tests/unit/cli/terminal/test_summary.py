"""What is printed at the end of a run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from transformers import TrainerState

from online_dpo.cli.terminal.summary import best_evaluation, places, summary_of_figures


def summary(history, first_step=0, steps=40, metric=None, greater=None):
    args = SimpleNamespace(metric_for_best_model=metric, greater_is_better=greater)
    state = TrainerState(global_step=steps, log_history=history)
    return list(summary_of_figures(args, state, first_step, seconds=75.0))


def evaluation(step, **figures):
    return {"step": step, "eval_runtime": 1.0, **{f"eval_{name}": value for name, value in figures.items()}}


def test_reward_and_kl_are_means_of_the_first_and_last_tenth():
    history = [{"step": i, "prompts": 8.0, "objective/scores": float(i), "objective/kl": 0.1 * i} for i in range(20)]
    assert summary(history) == [
        "Trained 40 steps in 0:01:15.",
        "From the beginning to the end (the means of the first 2 logs and of the last 2):",
        "  reward  0.5 to 18.5",
        "  KL      0.05 to 1.85",
    ]


def test_a_judge_alone_gives_no_reward_and_one_log_has_no_course():
    logs = [{"step": i, "prompts": 8.0, "objective/kl": float(i), "rewards/accuracies": 0.5} for i in (1, 2)]
    assert summary(logs)[2:] == ["  KL      1 to 2"]
    assert summary(logs[:1]) == ["Trained 40 steps in 0:01:15."]


def test_a_resumed_run_says_what_was_there_before_and_a_finished_one_nothing():
    assert summary([], first_step=1000, steps=1001) == ["Trained 1 step in 0:01:15, after 1,000 earlier steps."]
    assert summary([], first_step=40) == []


@pytest.mark.parametrize(
    ("metric", "greater", "words"),
    [
        (None, None, "at step 20: eval_win_rate 0.75, the highest of 3"),
        ("loss", False, "at step 30: eval_loss 0.25, the lowest of 3"),
        ("eval_own", True, "at step 10: eval_own 3"),
    ],
)
def test_the_best_evaluation_is_that_of_the_configured_metric(metric, greater, words):
    history = [
        evaluation(10, win_rate=0.5, loss=0.5, own=3.0),
        evaluation(20, win_rate=0.75, loss=0.5),
        evaluation(30, win_rate=0.25, loss=0.25),
    ]
    assert best_evaluation(SimpleNamespace(metric_for_best_model=metric, greater_is_better=greater), history) == words


def test_gold_decides_before_the_training_score():
    history = [evaluation(10, gold_score=2.0, win_rate=0.5), evaluation(20, gold_score=1.0, win_rate=0.9)]
    args = SimpleNamespace(metric_for_best_model=None, greater_is_better=None)
    assert best_evaluation(args, history) == "at step 10: eval_gold_score 2, the highest of 2"


def test_places(tmp_path):
    assert list(places(str(tmp_path))) == [
        f"Model saved in {tmp_path}",
        f"  log of every metric: {tmp_path}/trainer_state.json",
    ]
    for step in (5, 100, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert list(places(str(tmp_path)))[2] == f"  checkpoints: {tmp_path}/checkpoint-STEP, of steps 5, 20, 100"
