"""Numbers of an evaluation, against values by hand."""

import math

import pytest

from online_dpo.evaluation.records import EvalRecord, summarise, win_share
from online_dpo.stats.intervals import wilson_interval


@pytest.mark.parametrize(
    "scores, reference, expected",
    [
        ([2.0, 1.0, 0.0], 1.0, 0.5),
        ([2.0, 3.0], 1.0, 1.0),
        ([None, 0.0], 1.0, 0.0),
        ([None, None], 1.0, None),
        ([2.0], None, None),
    ],
)
def test_win_share(scores, reference, expected):
    assert win_share(scores, reference) == expected


def record(**changes):
    base = dict(
        scores=(1.0, 3.0),
        reference_score=2.0,
        win=0.5,
        losses=(0.7,),
        kl=(1.0, 2.0),
        entropy=(0.5, 1.5),
        lengths=(4, 6),
        finished=(True, False),
    )
    return EvalRecord(**{**base, **changes})


def test_summary_leaves_missing_values_out():
    metrics = summarise(
        [record(), record(scores=(None, 7.0), win=1.0, losses=()), record(win=None, reference_score=None)]
    )
    assert metrics["objective/scores"] == pytest.approx((1 + 3 + 7 + 1 + 3) / 5)
    assert metrics["objective/reference_scores"] == 2.0 and metrics["win_rate"] == 0.75 and metrics["loss"] == 0.7
    assert metrics["objective/kl"] == 1.5 and metrics["completions/mean_length"] == 5.0 and metrics["prompts"] == 3.0
    low, high = wilson_interval(0.75, 2)
    assert (metrics["win_rate_ci95_low"], metrics["win_rate_ci95_high"]) == (low, high)
    assert "win_rate" not in summarise([record(win=None)]) and math.isnan(summarise([record(losses=())])["loss"])
