"""The fields that say how completions are scored and which become pairs: which values they take."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest

from online_dpo.config.feedback import PairSelection
from support.configuration import check_range, made, refused

ABOVE_0 = ([None, 1e-6, 5.0], [0.0, -1.0, math.inf])


@pytest.mark.parametrize(
    ("name", "wanted", "inside", "outside"),
    [
        ("reward_batch_size", "at least 1", [1], [0]),
        ("max_failure_share", "in [0, 1]", [0, 0.5, 1], [-0.1, 1.1]),
        ("missing_eos_penalty", "above 0", *ABOVE_0),
        ("length_penalty", "above 0", *ABOVE_0),
        ("min_margin", "above 0", *ABOVE_0),
        ("max_margin", "above 0", *ABOVE_0),
        ("label_temperature", "above 0", *ABOVE_0),
        ("max_length_ratio", "1 or more", [None, 1.0, 3.0], [0.9]),
        ("resample_rounds", "0 or more", [0, 2], [-1]),
        ("overoptimisation_patience", "at least 1", [1, 5], [0]),
    ],
)
def test_ranges(name: str, wanted: str, inside: list[Any], outside: list[Any]) -> None:
    check_range(name, wanted, inside, outside)


def test_a_judge_is_shown_two_completions_at_least_and_no_more_than_there_are() -> None:
    check_range("judge_top", "from 2 to 5 completions", [None, 2, 5], [1, 6], num_completions=5)


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("pair_selection", get_args(PairSelection)),
        ("reward_normalization", ("none", "group")),
        ("tie_policy", ("skip", "first")),
        ("overoptimisation", ("off", "warn", "stop")),
    ],
)
def test_choices(name: str, choices: tuple[str, ...]) -> None:
    for choice in choices:
        assert getattr(made(**{name: choice}), name) == choice
    refused(f"`{name}` must be one of {', '.join(choices)}; it is 'x'.", **{name: "x"})


def test_what_stands_for_a_choice() -> None:
    assert made(overoptimisation=False).overoptimisation == "off"  # as YAML reads it
    assert made(reward_normalization=["group"]).reward_normalization == "group"
    assert made(reward_normalization=["group", "none"]).reward_normalization == ["group", "none"]
    refused("it is 'grup'. Did you mean `group`?", reward_normalization=["none", "grup"])
    refused("it is 'best_wrst'. Did you mean `best_worst`?", pair_selection="best_wrst")


def test_margins_that_leave_no_pair() -> None:
    assert made(min_margin=1.0, max_margin=1.0).max_margin == 1.0
    refused("`min_margin` (2.0) is above `max_margin` (1.0): no pair would be left.", min_margin=2.0, max_margin=1.0)


@pytest.mark.parametrize(
    ("name", "value"), [("min_margin", 0.5), ("margin_weighting", True), ("label_temperature", 1.0)]
)
def test_ties_that_are_trained_have_no_margin(name: str, value: Any) -> None:
    refused(
        f"`tie_policy='first'` trains pairs without a margin, which `{name}` needs.",
        tie_policy="first",
        **{name: value},
    )


def test_resampling_beside_training_needs_a_server() -> None:
    both = {"resample_rounds": 1, "max_staleness": 1}
    for fields in ({}, {"use_vllm": True}, {"vllm_mode": "server"}):
        refused("`resample_rounds` with `max_staleness` samples while the policy is trained", **both, **fields)
    assert made(**both, use_vllm=True, vllm_mode="server").resample_rounds == 1
