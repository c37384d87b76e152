"""The fields that say how completions are sampled: which values they take."""

from __future__ import annotations

import math
from typing import Any

import pytest

from support.configuration import check_range, made, refused


@pytest.mark.parametrize(
    ("name", "wanted", "inside", "outside"),
    [
        ("num_completions", "at least 2: a pair needs two completions", [2, 8], [1, 0]),
        ("max_new_tokens", "at least 1", [1, 511], [0, -1]),
        ("max_prompt_length", "at least 1", [None, 1], [0]),
        ("temperature", "above 0: completions of one prompt have to differ", [1e-3, 2.0], [0.0, -1.0, math.nan]),
        ("top_p", "in (0, 1]", [1e-3, 1.0], [0.0, 1.001]),
        ("top_k", "0 (off) or more", [0, 1], [-1]),
        ("min_p", "in [0, 1]", [None, 0.0, 1.0], [-0.1, 1.1]),
        ("repetition_penalty", "above 0", [0.5, 2.0], [0.0]),
        ("rollout_batch_size", "at least 1", [1], [0]),
        ("max_staleness", "0 or more", [0, 3], [-1]),
        ("sync_check_steps", "0 or more", [0, 1], [-1]),
    ],
)
def test_ranges(name: str, wanted: str, inside: list[Any], outside: list[Any]) -> None:
    check_range(name, wanted, inside, outside)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("temperature", 0.0, "above 0: completions of one prompt have to differ"),
        ("top_p", 1.5, "in (0, 1]"),
        ("top_k", -1, "0 (off) or more"),
        ("min_p", 2.0, "in [0, 1]"),
        ("repetition_penalty", 0.0, "above 0"),
    ],
)
def test_generation_kwargs_are_in_the_same_ranges(name: str, value: float, wanted: str) -> None:
    refused(f"`{name}` must be {wanted}; it is {value!r}.", generation_kwargs={name: value})
    refused(f"`{name}` must be {wanted}; it is {value!r}.", **{name: value})
    good = {"temperature": 0.5, "top_p": 0.5, "top_k": 5, "min_p": 0.5, "repetition_penalty": 1.5}
    assert made(generation_kwargs=good, top_k=-1).generation_kwargs == good  # they win


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({}, 448),
        ({"max_length": 65}, 1),
        ({"max_length": None}, None),
        ({"max_length": None, "max_prompt_length": 9}, 9),
        ({"max_prompt_length": 9}, 9),
        ({"max_prompt_length": 450}, 448),
    ],
)
def test_the_limit_of_a_prompt(fields: dict[str, Any], limit: int | None) -> None:
    assert made(**fields).prompt_limit == limit


def test_a_prompt_needs_room() -> None:
    for length in (64, 10):
        refused(f"`max_length` ({length}) leaves no room for a prompt beside `max_new_tokens` (64).", max_length=length)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_beams": 4},
            "`generation_kwargs` must not hold `num_beams`: beam search does not sample from the policy",
        ),
        ({"no_repeat_ngram": 2}, "Did you mean `no_repeat_ngram_size`?"),
        ({"typical_p": 0.5}, "`generation_kwargs` must not hold `typical_p`: the sampler knows temperature"),
        ({"max_new_tokens": 5}, "set max_new_tokens in the configuration itself"),
        ({"stop_strings": 3}, "`stop_strings` must be a text or a list of texts; it is 3."),
    ],
)
def test_options_that_generation_cannot_have(options: dict[str, Any], message: str) -> None:
    refused(message, generation_kwargs=options)
