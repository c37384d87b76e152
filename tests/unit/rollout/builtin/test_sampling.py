"""The distribution that tokens are drawn from, and the draw."""

import math

import numpy as np
import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from online_dpo.rollout.builtin.random_numbers import uniform_numbers
from online_dpo.rollout.builtin.sampling import draw_tokens, reshape_logits, token_logprobs
from online_dpo.rollout.params import RolloutKey, SamplingParams, Stream


def params(**fields):
    return SamplingParams(max_new_tokens=4, end_token_ids=(1,), **fields)


@pytest.mark.parametrize(
    "fields",
    [
        dict(temperature=0.7),
        dict(top_k=5),
        dict(top_p=0.6),
        dict(min_p=0.2),
        dict(repetition_penalty=1.7),
        dict(temperature=1.3, top_k=9, top_p=0.8, min_p=0.05, repetition_penalty=0.8),
    ],
)
def test_equals_the_warpers_of_transformers(fields):
    logits = 3 * torch.randn(6, 30, generator=torch.Generator().manual_seed(1))
    ids = torch.randint(0, 30, (6, 8), generator=torch.Generator().manual_seed(2))
    seen = torch.zeros(6, 30, dtype=torch.bool).scatter_(1, ids, True)
    expected = logits
    if "repetition_penalty" in fields:
        expected = RepetitionPenaltyLogitsProcessor(fields["repetition_penalty"])(ids, expected)
    if "temperature" in fields:
        expected = TemperatureLogitsWarper(fields["temperature"])(ids, expected)
    if "top_k" in fields:
        expected = TopKLogitsWarper(fields["top_k"])(ids, expected)
    if "top_p" in fields:
        expected = TopPLogitsWarper(fields["top_p"])(ids, expected)
    if "min_p" in fields:
        expected = MinPLogitsWarper(fields["min_p"])(ids, expected)
    torch.testing.assert_close(reshape_logits(logits, params(**fields), seen), expected)


def test_draw_takes_the_token_at_which_the_cumulative_probability_passes_the_number():
    logits = torch.tensor([[0.1, 0.0, 0.6, 0.3]]).log().expand(5, -1)
    drawn = draw_tokens(logits, torch.tensor([0.0, 0.0999, 0.1001, 0.6999, 0.7001]))[0]
    assert drawn.tolist() == [0, 0, 2, 2, 3]


def test_draw_never_takes_an_excluded_token_at_either_end():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 1.0, -math.inf]]).expand(2, -1)
    assert draw_tokens(logits, torch.tensor([0.0, 1 - 2**-24]))[0].tolist() == [1, 3]


def test_frequencies_follow_the_distribution():
    logits = torch.randn(1, 8, generator=torch.Generator().manual_seed(3))
    numbers = torch.from_numpy(uniform_numbers(RolloutKey(0, 0), row=5, sample=0, count=40_000))
    counts = torch.bincount(draw_tokens(logits.expand(40_000, -1), numbers)[0], minlength=8) / 40_000
    torch.testing.assert_close(counts, logits.softmax(-1)[0], atol=0.01, rtol=0)


def test_numbers_depend_on_every_part_of_the_key_and_on_nothing_else():
    def draw(seed=1, step=2, stream=0, row=3, sample=0, count=16):
        return uniform_numbers(RolloutKey(seed, step, stream), row, sample, count)

    base = draw()
    np.testing.assert_array_equal(base, draw())
    np.testing.assert_array_equal(base[:4], draw(count=4))
    for change in (dict(seed=7), dict(step=3), dict(stream=1), dict(row=4), dict(sample=1)):
        assert not np.isin(draw(**change), base).any()


def test_token_logprobs_are_those_of_the_unmodified_distribution():
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    expected = 2.0 - math.log(math.exp(1) + math.exp(2) + math.exp(3))
    assert token_logprobs(logits, torch.tensor([1])).item() == pytest.approx(expected, abs=1e-6)


def test_only_the_quickstarts_held_out_samples_share_their_numbers_with_another_use():
    names = {name: uniform_numbers(RolloutKey(0, 0, stream), 0, 0, 1)[0] for name, stream in Stream.__members__.items()}
    same = [{a, b} for a in names for b in names if a < b and names[a] == names[b]]
    assert same == [{"PAIRING", "HELD_OUT"}]
