"""Metrics of a step and the store that keeps them, against values by hand."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from online_dpo.packing.pack import pack_pairs, stand_in
from online_dpo.training.metric_store import MetricStore
from online_dpo.training.metrics.loss import record_loss
from online_dpo.training.metrics.pairs import record_pairs, record_resampling
from online_dpo.training.metrics.rollout import record_rollout
from online_dpo.types import Pair, Pairing, Preference, Round, RowLogprobs, Scores, Verdicts
from support import tiny


def test_means_weigh_every_value_the_same_however_they_came():
    store = MetricStore()
    store.mean("x", torch.tensor([1.0, 2.0, 3.0]))
    store.mean("x", [10.0])
    store.mean("x", 4)
    store.total("n", 2)
    store.total("n", 3)
    store.ratio("share", 1, 4)
    store.ratio("share", 3, 4)
    assert store.drain() == {"x": 4.0, "n": 5.0, "share": 0.5}
    assert store.drain() == {}


def test_values_that_are_not_finite_do_not_hide_the_others():
    store = MetricStore()
    store.mean("x", torch.tensor([math.nan, 2.0, math.inf]))
    store.mean("only", [math.nan])
    store.largest("most", torch.tensor([math.nan, 3.0, math.inf]))
    store.largest("none", torch.tensor([math.nan]))
    assert store.drain() == {"x": 2.0, "most": 3.0}


def test_a_store_goes_back_to_a_snapshot_in_place():
    store = MetricStore()
    store.mean("x", [1.0])
    store.total("n", 2.0)
    store.largest("most", torch.tensor([1.0]))
    held, before = store, store.snapshot()
    store.mean("x", [3.0])
    store.mean("y", [5.0])
    store.total("n", 1.0)
    store.largest("most", torch.tensor([7.0]))
    store.restore(before)
    assert held.drain() == {"x": 1.0, "n": 2.0, "most": 1.0}
    store.restore(before)  # as often as wanted: what was collected since has not changed it
    store.total("n", 1.0)
    assert held.drain() == {"x": 1.0, "n": 3.0, "most": 1.0}


def groups():
    first, second = tiny.prompts([3, 4])
    return [tiny.group(first, [[5, 6, 1], [7, 8, 9, 10]]), tiny.group(second, [[11, 1], [12, 13, 14, 15, 1]])]


@pytest.mark.smoke
def test_rollout_and_pair_metrics():
    store, made = MetricStore(), groups()
    values = [[2.0, None], [1.0, 4.0]]
    record_rollout(store, made, Scores(values, {"f": [[3.0, None], [2.0, 5.0]]}), version=2)
    pair = Pair(made[1], chosen=1, rejected=0, chosen_score=4.0, rejected_score=1.0)
    record_pairs(store, 2, Pairing([pair], Counter(missing_score=1)))
    metrics = store.drain()
    assert metrics["completions/mean_length"] == (3 + 4 + 2 + 5) / 4
    assert metrics["sampling/staleness"] == 2  # completions of version 0
    assert metrics["completions/clipped_ratio"] == 0.25 and metrics["val/contain_eos_token"] == 0.75
    assert metrics["objective/scores"] == pytest.approx(7 / 3) and metrics["scores/f"] == pytest.approx(10 / 3)
    assert metrics["scores/f/missing_ratio"] == 0.25 and metrics["objective/scores_margin"] == 3.0
    assert metrics["completions/chosen_minus_rejected_length"] == 3.0
    assert metrics["pairs/usable_ratio"] == 0.5 and metrics["pairs/groups"] == 1 and metrics["pairs/probability"] == 1.0
    assert metrics["pairs/tie_rate"] == 0.0 and metrics["pairs/count"] == 1 and metrics["dropped/missing_score"] == 1


def test_a_judge_for_the_best_has_metrics_of_both():
    store, made = MetricStore(), groups()
    scores = Scores([[2.0, None], [1.0, 4.0]], {"f": [[3.0, None], [2.0, 5.0]]}, normalized=[[9.0, None], [9.0, 9.0]])
    record_rollout(store, made, Verdicts([None, Preference(1, 0, 0.9)], duels=2, unanswered=1, scores=scores), 2)
    metrics = store.drain()
    assert metrics["judge/duels"] == 2 and metrics["judge/unanswered_ratio"] == 0.5
    assert metrics["objective/scores"] == pytest.approx(7 / 3) and metrics["scores/f"] == pytest.approx(10 / 3)
    record_rollout(store, made, Verdicts([None, None], duels=2, unanswered=2), 2)
    assert "objective/scores" not in store.drain()


def test_what_is_answered_again_counts_as_comparisons_and_not_as_scores():
    store, made = MetricStore(), groups()
    theirs = replace(made[1].completions[1], author="reference")  # was there before
    again = [made[0], replace(made[1], completions=(made[1].completions[0], theirs))]
    further = (Round([0, 3], again, Verdicts([None, None], 4, 3)), Round([3], again[1:], Verdicts([None], 2, 0)))
    record_resampling(store, further, Pairing([], Counter(tie=1)))
    assert store.drain() == {
        "judge/duels": 6,
        "judge/unanswered_ratio": 0.5,
        "resample/groups": 2,
        "resample/rescued": 1,
    }


def test_a_step_of_a_checkpoint_from_before_there_were_rounds_rescues_nothing():
    store = MetricStore()
    record_resampling(store, (), Pairing([], Counter(tie=3)))
    assert store.drain() == {"resample/groups": 0, "resample/rescued": 0}


def test_loss_metrics_by_hand_and_nothing_from_a_stand_in():
    made = groups()
    pairs = [Pair(made[0], 0, 1, 1.0, 0.0), Pair(made[1], 1, 0, 5.0, 3.0)]
    rows = pack_pairs(pairs, shared=True)
    rows.sampled_logps_M.copy_(torch.tensor([-1.0] * 13 + [-1.7]))
    ones_M, length_S = torch.ones(len(rows.target_M)), rows.length_S.float()
    policy = RowLogprobs(-1.0 * ones_M, 2.0 * ones_M, -1.0 * length_S)
    reference = RowLogprobs(-1.5 * ones_M, 9.0 * ones_M, -1.5 * length_S)
    store = MetricStore()
    record_loss(store, rows, policy, reference, torch.tensor([0.5, 0.9]), beta=0.2)
    metrics = store.drain()
    assert metrics["loss"] == pytest.approx(0.7)
    assert metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(0.7 / 14)
    assert metrics["sampling/sampling_logp_difference/max"] == pytest.approx(0.7)
    lengths = {"chosen": (3, 5), "rejected": (4, 2)}
    assert metrics["logps/chosen"] == -4.0 and metrics["logps/rejected"] == -3.0
    assert metrics["rewards/chosen"] == pytest.approx(0.2 * 0.5 * 4) and metrics["rewards/rejected"] == pytest.approx(
        0.3
    )
    assert metrics["rewards/margins"] == pytest.approx(0.1) and metrics["rewards/accuracies"] == 0.5
    assert metrics["objective/kl"] == pytest.approx(0.5 * sum(sum(n) for n in lengths.values()) / 4)
    assert metrics["objective/entropy"] == 3.5 and metrics["objective/token_entropy"] == 2.0
    assert metrics["objective/non_score_reward"] == pytest.approx(-0.2 * metrics["objective/kl"])
    assert metrics["objective/rlhf_reward"] == pytest.approx(9 / 4 - 0.2 * metrics["objective/kl"])

    empty = stand_in(shared=True)
    zeros = RowLogprobs(torch.zeros(2), torch.zeros(2), torch.zeros(2))
    record_loss(store, empty, zeros, zeros, torch.tensor([0.7]), beta=0.2)
    assert store.drain() == {"beta": 0.2}


def test_a_completion_in_several_pairs_counts_once_where_completions_are_averaged():
    group = tiny.group(tiny.prompts([3])[0], [[5, 6, 1], [7, 1], [8, 9, 10, 11, 12]])
    rows = pack_pairs([Pair(group, 0, 1, 2.0, 1.0), Pair(group, 0, 2, 2.0, 0.0)], shared=True)
    policy, reference = (RowLogprobs(torch.zeros(10), torch.zeros(10), x * rows.length_S.float()) for x in (-1.0, -1.5))
    store = MetricStore()
    record_loss(store, rows, policy, reference, torch.tensor([0.5, 0.9]), beta=0.2)
    metrics = store.drain()
    assert metrics["objective/kl"] == pytest.approx(0.5 * (3 + 2 + 5) / 3)
    assert metrics["objective/entropy"] == pytest.approx((3 + 2 + 5) / 3)
    assert metrics["loss"] == pytest.approx(0.7) and metrics["logps/chosen"] == -3.0
