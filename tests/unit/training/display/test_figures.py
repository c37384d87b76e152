"""Figures of a log as a person reads them."""

from __future__ import annotations

from online_dpo.training.display.figures import count, duration, evaluation_prefix, number
from support.logs import EVALUATION, LOGS


def test_numbers_durations_and_counts() -> None:
    assert [number(x) for x in (0.00001234, 1.0, 999.96, 1000.4, float("nan"), float("inf"))] == [
        "1.234e-05",
        "1",
        "1000",
        "1000",
        "nan",
        "inf",
    ]
    assert (duration(3723.4), duration(-1), duration(100_000)) == ("1:02:03", "0:00:00", "27:46:40")
    assert [count(n) for n in (0, 16_928, 1_235_000_000, 7e6, 1.5e12)] == [
        "0",
        "16,928",
        "1.24 billion",
        "7 million",
        "1.5 trillion",
    ]


def test_which_logs_are_evaluations() -> None:
    assert evaluation_prefix(EVALUATION) == "eval_" and evaluation_prefix(LOGS) == ""
    assert evaluation_prefix({"test_loss": 1.0, "test_runtime": 1.0}) == "test_"
    assert evaluation_prefix({"train_loss": 1.0, "train_runtime": 1.0}) == ""
    assert evaluation_prefix({**LOGS, "tool_runtime": 1.0}) == ""  # a metric of a reward function
