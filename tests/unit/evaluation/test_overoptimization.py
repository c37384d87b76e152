"""When the training score and the gold score part: the rule on scores made by hand."""

from __future__ import annotations

import logging

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from online_dpo.evaluation.overoptimization import Measurement, OveroptimisationGuard, evaluations_over, measurements
from online_dpo.evaluation.records import EvalRecord, GoldRecord, summarise


def history(*scores, errors=(0.1, 0.1)):
    return [Measurement(10 * i, proxy, errors[0], gold, errors[1]) for i, (proxy, gold) in enumerate(scores)]


@pytest.mark.parametrize(
    ("scores", "count"),
    [
        ([(0.0, 0.0)], 0),
        ([(0.0, 0.0), (1.0, -1.0)], 1),
        ([(0.0, 0.0), (1.0, 1.0), (2.0, 2.0)], 0),  # they agree
        ([(0.0, 0.0), (-1.0, -1.0)], 0),  # both fall: training fails, but not by overoptimisation
        ([(0.0, 0.0), (1.0, -0.28)], 0),  # the fall is within 2 * sqrt(0.1^2 + 0.1^2) = 0.283
        ([(0.0, 0.0), (1.0, -0.29)], 1),
        ([(0.0, 0.0), (0.28, -1.0)], 0),  # and so is the rise
        ([(0.0, 0.0), (0.29, -1.0)], 1),
        ([(0.0, 0.0), (1.0, 1.0), (2.0, 0.5)], 1),  # above the start, but below the best
        ([(0.0, 0.0), (1.0, 1.0), (2.0, 0.5), (3.0, 0.0)], 2),
        ([(0.0, 0.0), (1.0, 1.0), (2.0, 0.5), (3.0, 0.9)], 0),  # it has come back
        ([(0.0, 0.0), (1.0, 1.0), (2.0, 0.5), (3.0, 0.9), (4.0, 0.0)], 1),
        ([(0.0, 2.0), (1.0, 1.0), (2.0, 0.5), (3.0, 2.5), (4.0, 1.5)], 1),  # the best is the latest peak
    ],
)
def test_evaluations_that_show_it(scores, count):
    assert evaluations_over(history(*scores)) == count


def test_a_sure_fall_of_an_unsure_score_is_none():
    assert evaluations_over(history((0.0, 0.0), (1.0, -1.0), errors=(0.1, 0.6))) == 0
    assert evaluations_over(history((0.0, 0.0), (1.0, -1.0), errors=(0.6, 0.1))) == 0


def log(step, proxy, gold, prefix="eval", **others):
    names = {"objective/scores": proxy, "gold_score": gold}
    return {
        f"{prefix}_{name}{end}": value for name, v in names.items() for end, value in (("", v), ("_stderr", 0.1))
    } | {
        "step": step,
        **others,
    }


def test_scores_are_found_in_the_log_history_and_win_rates_stand_in_for_them():
    logs = [log(1, 0.5, 0.25), {"loss": 1.0, "step": 1}, log(1, 9.0, 9.0, prefix="eval_b"), {"eval_loss": 1, "step": 2}]
    assert measurements(logs, "eval") == [Measurement(1, 0.5, 0.1, 0.25, 0.1)]
    assert measurements(logs, "eval_b") == [Measurement(1, 9.0, 0.1, 9.0, 0.1)]
    rates = {"eval_win_rate": 0.6, "eval_win_rate_stderr": 0.05, "step": 3}
    rates |= {"eval_gold_win_rate": 0.4, "eval_gold_win_rate_stderr": 0.02}
    assert measurements([rates], "eval") == [Measurement(3, 0.6, 0.05, 0.4, 0.02)]


def evaluated(guard, logs, tmp_path, prefix="eval"):
    """The control after the last of the logs."""
    state = TrainerState(global_step=logs[-1]["step"], log_history=logs, is_world_process_zero=True)
    metrics = {name: value for name, value in logs[-1].items() if name.startswith(prefix)}
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    return guard.on_evaluate(arguments, state, TrainerControl(), metrics=metrics)


LOGS = [log(10, 0.0, 0.0), log(20, 1.0, 1.0), log(30, 2.0, 0.5), log(40, 3.0, 0.2), log(50, 4.0, 0.1)]


def test_a_warning_comes_once_and_names_the_best_checkpoint(tmp_path, caplog):
    guard = OveroptimisationGuard(stop=False, patience=1)
    warned = []
    for end in range(1, 6):
        with caplog.at_level(logging.WARNING):
            control = evaluated(guard, LOGS[:end], tmp_path)
        warned.append(len(caplog.records))
        assert not control.should_training_stop and not control.should_save
    assert warned == [0, 0, 1, 1, 1]
    assert "`eval` at step 30: since step 20" in caplog.text and "from 1 (standard error 0.1) to 2 (0.1)" in caplog.text
    assert "fallen from 1 (0.1) to 0.5 (0.1). The best weights by gold are in no checkpoint" in caplog.text
    (tmp_path / "checkpoint-20").mkdir()
    evaluated(guard, LOGS[:3], tmp_path)
    assert f"The best weights by gold are in {tmp_path / 'checkpoint-20'}." in caplog.text


def test_it_stops_after_as_many_as_patience_says_also_when_resumed(tmp_path):
    for end, stops in ((3, False), (4, True), (5, True)):  # each with a guard that knows nothing but the history
        control = evaluated(OveroptimisationGuard(stop=True, patience=2), LOGS[:end], tmp_path)
        assert (control.should_training_stop, control.should_save) == (stops, stops)


def test_each_evaluation_dataset_is_watched_for_itself(tmp_path, caplog):
    logs = [log(1, 0.0, 0.0, "eval_a"), log(1, 0.0, 0.0, "eval_b"), log(2, 1.0, 1.0, "eval_a")]
    guard = OveroptimisationGuard(stop=True, patience=1)
    assert not evaluated(guard, logs, tmp_path, "eval_a").should_training_stop
    logs.append(log(2, 1.0, -1.0, "eval_b"))
    assert evaluated(guard, logs, tmp_path, "eval_b").should_training_stop
    assert "`eval_b` at step 2" in caplog.text


def record(scores, gold, win=None, gold_win=None):
    return EvalRecord(scores, None, win, (0.5,), (), (0.1,), (3, 4), (True,), gold=GoldRecord(gold, gold_win))


def test_gold_metrics_by_hand():
    records = [
        record((1.0, 3.0), (5.0, None), win=1.0, gold_win=0.0),
        record((4.0, 4.0), (1.0, 3.0), win=0.0, gold_win=1.0),
        record((6.0, None), (None, None), win=0.5, gold_win=None),
    ]
    metrics = summarise(records)
    assert metrics["gold_score"] == 3.0 and metrics["gold_missing_ratio"] == 0.5 and metrics["gold_win_rate"] == 0.5
    assert metrics["objective/scores"] == 18 / 5
    # means of prompts: 2, 4, 6 by the training score, 5 and 2 by gold
    assert metrics["objective/scores_stderr"] == pytest.approx(2 / 3**0.5)
    assert metrics["gold_score_stderr"] == pytest.approx(1.5)
    assert metrics["win_rate_stderr"] == pytest.approx(0.5 / 3**0.5)
    assert metrics["gold_win_rate_stderr"] == pytest.approx(0.5)
