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

from online_dpo.rollout.builtin import sampling
from online_dpo.rollout.builtin.random_numbers import uniform_numbers
from online_dpo.rollout.builtin.sampling import (
    draw_tokens,
    may_refuse_cumsum,
    next_tokens,
    prefix_sum,
    prefix_sum_by_products,
    reshape_logits,
    token_logprobs,
)
from online_dpo.rollout.params import RolloutKey, SamplingParams, Stream
from support.determinism import RefusingAsOnGpus, asked_for


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


@pytest.mark.parametrize("size", [1, 2, 127, 128, 129, 1187, 128 * 128 + 1, 152064])
def test_prefix_sums_by_products_are_those_of_cumsum(size):
    values = torch.rand(3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size)) ** 20
    sums = prefix_sum_by_products(values)
    torch.testing.assert_close(sums, values.cumsum(-1), rtol=1e-12, atol=0.0)
    half = prefix_sum_by_products(values.float())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), values.float().double().cumsum(-1), rtol=1e-7, atol=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(prefix_sum_by_products(values), sums) and torch.equal(
            prefix_sum_by_products(values.float()), half
        )


def test_on_a_cpu_prefix_sums_are_cumsum_bit_for_bit():
    values = torch.rand(3, 1187, dtype=torch.float64)
    assert torch.equal(prefix_sum(values), values.cumsum(-1))
    with asked_for():
        assert torch.equal(prefix_sum(values), values.cumsum(-1))


@pytest.mark.parametrize("fields", [{}, dict(top_p=0.7), dict(top_p=0.95, min_p=0.01, top_k=50, temperature=0.7)])
def test_the_other_prefix_sum_draws_the_same_tokens(fields, monkeypatch):
    logits = 4 * torch.randn(1, 5003, generator=torch.Generator().manual_seed(1)).expand(400, -1)
    uniform = torch.rand(400, generator=torch.Generator().manual_seed(2))
    tokens, logps = next_tokens(logits, logits, uniform, params(**fields), None)
    monkeypatch.setattr(sampling, "prefix_sum", prefix_sum_by_products)
    same_tokens, same_logps = next_tokens(logits, logits, uniform, params(**fields), None)
    assert torch.equal(tokens, same_tokens) and len(tokens.unique()) > 10
    torch.testing.assert_close(logps, same_logps, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fields", [{}, dict(top_p=0.7, min_p=0.01, top_k=50, repetition_penalty=1.3)])
def test_draws_take_no_operation_that_a_gpu_refuses_under_full_determinism(fields, monkeypatch):
    logits, uniform, seen = torch.randn(4, 5003), torch.rand(4), torch.rand(4, 5003) < 0.1
    with RefusingAsOnGpus():
        with pytest.raises(RuntimeError, match="cumsum"):
            next_tokens(logits, logits, uniform, params(**fields), seen)
        monkeypatch.setattr(sampling, "may_refuse_cumsum", lambda device: True)
        next_tokens(logits, logits, uniform, params(**fields), seen)


def test_cumsum_is_refused_on_a_gpu_alone_and_where_determinism_is_asked_for():
    places = [torch.device("cpu"), torch.device("cuda", 0)]
    assert [may_refuse_cumsum(device) for device in places] == [False, False]
    with asked_for():
        assert [may_refuse_cumsum(device) for device in places] == [False, True]
