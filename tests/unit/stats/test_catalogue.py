"""Descriptions of metrics are found by the names in logs."""

import pytest

import online_dpo.training.trainer  # noqa: F401  (all that records metrics)
from online_dpo.stats.catalogue import CATALOGUE, Metric, describe, description, undescribed


def test_capitals_stand_for_any_text_and_the_most_particular_description_wins():
    assert description("scores/org/reward-model/missing_ratio").name == "scores/NAME/missing_ratio"
    assert description("scores/words").name == "scores/NAME"
    assert description("agreement/a/label").name == "agreement/NAME/label"
    assert undescribed(["loss", "nothing/like/this", "dropped/tie", "losses"]) == ["losses", "nothing/like/this"]


def test_a_name_is_described_once():
    with pytest.raises(ValueError, match="`loss` is described twice"):
        describe("Other", Metric("loss", "", "", ""))
    assert "Other" not in CATALOGUE


def test_every_description_says_something():
    for members in CATALOGUE.values():
        for metric in members:
            assert all((metric.name, metric.unit, metric.formula, metric.tells)), metric
            assert "\n" not in metric.formula + metric.tells
