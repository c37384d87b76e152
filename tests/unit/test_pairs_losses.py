"""Pairs and losses against values worked out by hand."""

import math

import pytest
import torch

import tiny
from online_dpo.losses import LOSSES, log_ratio
from online_dpo.pairs import pairs_from_ranks, pairs_from_scores
from online_dpo.types import Scores

PROMPTS = tiny.prompts([3] * 8)


def groups_of(*completions):
    return [tiny.group(PROMPTS[i], ids) for i, ids in enumerate(completions)]


def scores_of(*values):
    return Scores([list(v) for v in values], {})


THREE = [[5, 1], [6, 1], [7, 1]]


def test_best_against_worst():
    pairs, dropped = pairs_from_scores(groups_of(THREE, THREE), scores_of([0.2, 0.9, -1.0], [3.0, 1.0, 2.0]))
    assert [(p.chosen, p.rejected, p.margin) for p in pairs] == [(1, 2, 1.9), (0, 1, 2.0)]
    assert not dropped


def test_a_missing_score_takes_part_in_no_pair_and_never_counts_as_zero():
    pairs, dropped = pairs_from_scores(
        groups_of(THREE, THREE, THREE), scores_of([None, -1.0, -2.0], [None, None, -5.0], [None] * 3)
    )
    assert [(p.chosen, p.rejected) for p in pairs] == [(1, 2)]
    assert dropped == {"missing_score": 2}


def test_ties_are_dropped_or_trained_as_trl_does():
    groups, scores = groups_of(THREE, THREE), scores_of([1.0, 1.0, 1.0], [None, 0.5, 0.5])
    assert pairs_from_scores(groups, scores) == ([], {"tie": 2})
    pairs, dropped = pairs_from_scores(groups, scores, tie_policy="first")
    assert [(p.chosen, p.rejected, p.margin) for p in pairs] == [(0, 1, 0.0), (1, 2, 0.0)] and not dropped


def test_between_equal_scores_the_earlier_is_chosen_and_the_later_rejected():
    [pair], _ = pairs_from_scores(groups_of([[5], [6], [7], [8]]), scores_of([2.0, 2.0, 0.0, 0.0]))
    assert (pair.chosen, pair.rejected) == (0, 3)


def test_identical_completions_are_no_pair():
    pairs, dropped = pairs_from_scores(groups_of([[5, 1], [5, 1]]), scores_of([1.0, 0.0]))
    assert pairs == [] and dropped == {"identical": 1}


def test_ranks_of_a_judge():
    two = THREE[:2]
    pairs, dropped = pairs_from_ranks(groups_of(two, two, two), [1, -1, 0])
    assert [(p.chosen, p.rejected, p.margin) for p in pairs] == [(1, 0, None), (0, 1, None)]
    assert dropped == {"no_answer": 1}
    assert [p.group.prompt.row for p in pairs] == [0, 2]


def test_log_ratio_and_losses_by_hand():
    h = log_ratio(*(torch.tensor([x]) for x in (-3.0, -7.0, -4.0, -5.5)))
    assert h.item() == pytest.approx((-3 + 7) - (-4 + 5.5))
    assert LOSSES["sigmoid"](h, 0.2).item() == pytest.approx(math.log(1 + math.exp(-0.2 * 2.5)))
    assert LOSSES["ipo"](h, 0.2).item() == pytest.approx((2.5 - 1 / 0.4) ** 2)
    assert LOSSES["ipo"](h, 0.1).item() == pytest.approx((2.5 - 5.0) ** 2)


def test_losses_agree_with_numerical_gradients_and_do_not_overflow():
    for loss in LOSSES.values():
        h = torch.tensor([-2.0, 0.0, 3.0], dtype=torch.double, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, loss=loss: loss(x, 0.3), (h,))
    assert LOSSES["sigmoid"](torch.tensor([-1e5]), 1.0).item() == pytest.approx(1e5)
