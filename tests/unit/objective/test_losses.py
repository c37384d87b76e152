"""Losses against values worked out by hand from the papers' formulas."""

import dataclasses
import math
from math import exp, log
from typing import get_args

import pytest
import torch

from online_dpo.config.loss import (
    LOSSES_WITHOUT_LABELS,
    LOSSES_WITHOUT_REFERENCE,
    LossType,
    without_labels,
    without_reference,
)
from online_dpo.objective.inputs import LossOptions, PairLogprobs, pair_logprobs
from online_dpo.objective.losses import LOSSES, pair_losses
from online_dpo.packing.pack import pack_pairs
from online_dpo.types import Pair, RowLogprobs
from support import tiny

# One pair: log-probabilities and lengths of its chosen and its rejected completion.
W, L, REF_W, REF_L, LENGTH_W, LENGTH_L = -3.0, -7.0, -4.0, -5.5, 4, 5
H = 2.5  # (-3 + 7) - (-4 + 5.5)
# r(w) = 1.0 beta and r(l) = -1.5 beta


def pairs(probability=1.0, dtype=torch.double, **changes):
    values = dict(
        chosen_N=W,
        rejected_N=L,
        ref_chosen_N=REF_W,
        ref_rejected_N=REF_L,
        chosen_length_N=LENGTH_W,
        rejected_length_N=LENGTH_L,
        probability_N=probability,
        chosen_by_policy_N=True,
        rejected_by_policy_N=True,
    )
    return PairLogprobs(
        **{
            name: torch.tensor([value], dtype=None if isinstance(value, bool) else dtype)
            for name, value in (values | changes).items()
        }
    )


def options(*names, **fields):
    return LossOptions(terms=tuple((name, 1.0) for name in names), **fields)


def s(x):
    return 1 / (1 + exp(-x))


def test_every_name_of_the_configuration_is_a_loss():
    assert tuple(LOSSES) == get_args(LossType) and set(LOSSES_WITHOUT_LABELS) < set(LOSSES)
    assert set(LOSSES.having("without labels")) == without_labels() == set(LOSSES_WITHOUT_LABELS)
    assert set(LOSSES.having("without reference")) == without_reference() == set(LOSSES_WITHOUT_REFERENCE)


@pytest.mark.smoke
@pytest.mark.parametrize(
    "name, given, expected",
    [
        ("sigmoid", dict(beta=0.2), -log(s(0.5))),
        ("sigmoid", dict(beta=0.2, label_smoothing=0.1), -0.9 * log(s(0.5)) - 0.1 * log(s(-0.5))),
        ("sigmoid", dict(beta=0.2, p=0.7), -0.7 * log(s(0.5)) - 0.3 * log(s(-0.5))),
        # p = 0.7 * 0.9 + 0.3 * 0.1
        ("sigmoid", dict(beta=0.2, p=0.7, label_smoothing=0.1), -0.66 * log(s(0.5)) - 0.34 * log(s(-0.5))),
        ("robust", dict(beta=0.2, label_smoothing=0.1), (-0.9 * log(s(0.5)) + 0.1 * log(s(-0.5))) / 0.8),
        (
            "robust",
            dict(beta=0.2, label_smoothing=0.1, p=0.7),
            0.7 * (-0.9 * log(s(0.5)) + 0.1 * log(s(-0.5))) / 0.8
            + 0.3 * (-0.9 * log(s(-0.5)) + 0.1 * log(s(0.5))) / 0.8,
        ),
        ("ipo", dict(beta=0.2), (2.5 - 1 / 0.4) ** 2),
        ("ipo", dict(beta=0.1), (2.5 - 5.0) ** 2),
        ("ipo", dict(beta=0.1, p=0.6), 0.6 * (2.5 - 5.0) ** 2 + 0.4 * (-2.5 - 5.0) ** 2),
        ("hinge", dict(beta=0.2), 0.5),
        ("hinge", dict(beta=1.0), 0.0),
        ("hinge", dict(beta=1.0, p=0.6), 0.4 * 3.5),
        ("simpo", dict(beta=2.0, simpo_gamma=0.5), -log(s(2.0 * (-3 / 4 + 7 / 5) - 0.5))),
        (
            "simpo",
            dict(beta=2.0, simpo_gamma=0.5, p=0.8),
            -0.8 * log(s(2.0 * 0.65 - 0.5)) - 0.2 * log(s(-2.0 * 0.65 - 0.5)),
        ),
        ("sft", dict(p=0.6), 3 / 4),
        ("apo_zero", dict(beta=0.2), 1 - s(0.2) + s(-0.3)),
        ("apo_zero", dict(beta=0.2, p=0.6), 0.6 * (1 - s(0.2) + s(-0.3)) + 0.4 * (1 - s(-0.3) + s(0.2))),
        ("apo_down", dict(beta=0.2), s(0.2) + 1 - s(0.5)),
        ("dpop", dict(beta=0.2, dpop_lambda=50.0), -log(s(0.5))),  # the chosen one is likelier than it was
        # the other way round: h = -2.5, and the chosen one has lost 1.5 nats
        ("dpop", dict(beta=0.2, dpop_lambda=3.0, p=0.0), -log(s(0.2 * (-2.5 - 3.0 * 1.5)))),
        (
            "exo_pair",
            dict(beta=0.2, label_smoothing=0.01),
            s(0.5) * log(s(0.5) / 0.99) + s(-0.5) * log(s(-0.5) / 0.01),
        ),
    ],
)
def test_values_by_hand(name, given, expected):
    given = dict(given)
    made = pairs(given.pop("p", 1.0))
    assert pair_losses(made, options(name, **given)).item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_a_wrong_label_costs_robust_dpo_nothing_on_average():
    """Its expectation over labels of which 10 % are wrong is the loss of DPO on right ones."""
    given = dict(beta=0.3, label_smoothing=0.1)
    exchanged = dataclasses.replace(pairs().exchanged(), probability_N=pairs().probability_N)
    right, wrong = (pair_losses(made, options("robust", **given)).item() for made in (pairs(), exchanged))
    assert 0.9 * right + 0.1 * wrong == pytest.approx(-log(s(0.3 * H)))


def test_several_losses_add_up_by_their_weights():
    both = LossOptions(terms=(("sigmoid", 1.0), ("sft", 0.2)), beta=0.2)
    assert pair_losses(pairs(), both).item() == pytest.approx(-log(s(0.5)) + 0.2 * 3 / 4)


def test_weights_by_what_the_policy_would_say_have_no_gradient():
    made = pairs()
    made.chosen_N.requires_grad_()
    weighted = pair_losses(made, options("sigmoid", beta=0.2, use_weighting=True))
    weight = exp(-3 / 4) * exp(-7 / 5)
    assert weighted.item() == pytest.approx(-weight * log(s(0.5)))
    [slope] = torch.autograd.grad(weighted.sum(), made.chosen_N)
    assert slope.item() == pytest.approx(-weight * 0.2 * s(-0.5))


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_agree_with_numerical_ones(name):
    """Of what the policy says; through the reference and the labels nothing flows into the weights."""
    chosen_N, rejected_N = (
        torch.tensor(values, dtype=torch.double, requires_grad=True) for values in ([-2.0, -9.0], [-4.0, -3.0])
    )

    def loss(chosen_N, rejected_N):
        given = dict(ref_chosen_N=[-3.0, -8.5], ref_rejected_N=[-3.5, -5.0], chosen_length_N=[3, 9])
        given |= dict(rejected_length_N=[4, 2], probability_N=[0.9, 1.0])
        rest = {key: torch.tensor(value, dtype=torch.double) for key, value in given.items()}
        rest |= dict(chosen_by_policy_N=torch.tensor([True, True]), rejected_by_policy_N=torch.tensor([True, True]))
        return pair_losses(
            PairLogprobs(chosen_N, rejected_N, **rest), options(name, beta=0.3, label_smoothing=0.05, dpop_lambda=2.0)
        )

    assert torch.autograd.gradcheck(loss, (chosen_N, rejected_N))


@pytest.mark.parametrize("name", LOSSES)
def test_far_from_the_reference_losses_and_gradients_stay_finite(name):
    made = pairs(dtype=torch.float, chosen_N=-3e4, ref_chosen_N=-1.0)
    made.chosen_N.requires_grad_()
    loss = pair_losses(made, options(name, beta=1.0, label_smoothing=1e-3))
    loss.sum().backward()
    assert made.chosen_N.grad is not None and made.chosen_N.grad.isfinite().all() and loss.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_losses_without_a_reference_read_none(name):
    made = pairs(0.7, ref_chosen_N=math.nan, ref_rejected_N=math.nan)
    loss = pair_losses(made, options(name, label_smoothing=0.1, use_weighting=True))
    assert bool(loss.isfinite()) is (name in LOSSES_WITHOUT_REFERENCE)


def test_a_pairs_numbers_are_those_of_its_two_completions():
    group = tiny.group(tiny.prompts([3])[0], [[5, 6, 1], [7, 1], [8, 9, 10, 11]])
    rows = pack_pairs([Pair(group, 2, 0, 3.0, 1.0, probability=0.75), Pair(group, 0, 1, 1.0, 0.0)], shared=True)
    assert rows.length_S.tolist() == [4, 3, 2]  # each completion once, in the order in which pairs name them
    policy, reference = (RowLogprobs(torch.zeros(9), torch.zeros(9), x) for x in (-rows.length_S, -2 * rows.length_S))
    made = pair_logprobs(rows, policy, reference)
    expected = dict(chosen_N=[-4, -3], rejected_N=[-3, -2], ref_chosen_N=[-8, -6], ref_rejected_N=[-6, -4])
    expected |= dict(chosen_length_N=[4, 3], rejected_length_N=[3, 2], probability_N=[0.75, 1.0])
    assert {field: getattr(made, field).tolist() for field in expected} == expected


def test_a_log_ratio_of_zero_is_log_two():
    same = pairs(chosen_N=REF_W, rejected_N=REF_L)
    assert pair_losses(same, LossOptions()).item() == pytest.approx(math.log(2))
