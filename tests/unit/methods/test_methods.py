"""What XPO and Nash-MD minimise and which pairs they take, by hand from the papers."""

from math import exp, log
from typing import get_args

import pytest
import torch

from online_dpo.config.method import MethodName
from online_dpo.methods import METHODS
from online_dpo.methods.nash_md import pairs_of_two
from online_dpo.objective.inputs import LossOptions, PairLogprobs, pair_logprobs
from online_dpo.objective.losses import pair_losses
from online_dpo.packing.pack import pack_pairs
from online_dpo.rollout.opponent import joined
from online_dpo.training.metric_store import MetricStore
from online_dpo.training.metrics.loss import record_loss, trained_kl
from online_dpo.training.metrics.pairs import record_pairs
from online_dpo.training.metrics.rollout import record_rollout
from online_dpo.types import Completion, Group, Pair, Pairing, Preference, RowLogprobs, Scores, Verdicts
from support import tiny

W, L, REF_W, REF_L, H = -3.0, -7.0, -4.0, -5.5, 2.5  # h = (-3 + 7) - (-4 + 5.5)


def s(x):
    return 1 / (1 + exp(-x))


def pair(policy_wrote, probability=1.0):
    """One pair whose chosen and whose rejected completion the policy wrote, or not; and what gradients are taken of."""
    chosen_N, rejected_N = (torch.tensor([x], dtype=torch.double, requires_grad=True) for x in (W, L))
    rest = dict(ref_chosen_N=REF_W, ref_rejected_N=REF_L, chosen_length_N=4, rejected_length_N=5)
    rest |= dict(probability_N=probability)
    own = [torch.tensor([wrote]) for wrote in policy_wrote]
    doubles = {name: torch.tensor([x], dtype=torch.double) for name, x in rest.items()}
    return PairLogprobs(chosen_N, rejected_N, **doubles, chosen_by_policy_N=own[0], rejected_by_policy_N=own[1])


def loss_and_slopes(made, method, **options):
    loss_N = METHODS[method].losses(made, LossOptions(**options))
    return loss_N.item(), [g.item() for g in torch.autograd.grad(loss_N.sum(), (made.chosen_N, made.rejected_N))]


def test_every_name_of_the_configuration_is_a_method():
    assert tuple(METHODS) == get_args(MethodName)


# XPO ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy_wrote, explored, slopes",
    [((True, False), L, (0.0, 0.01)), ((False, True), W, (0.01, 0.0))],
    ids=["the policy wins", "the reference wins"],
)
def test_xpo_is_dpo_plus_alpha_times_the_references_log_probability(policy_wrote, explored, slopes):
    made = pair(policy_wrote)
    loss, got = loss_and_slopes(made, method="xpo", beta=0.2, own={"xpo_alpha": 0.01})
    assert loss == pytest.approx(-log(s(0.2 * H)) + 0.01 * explored)
    pull = 0.2 * s(-0.2 * H)  # DPO's own slopes are -pull and +pull
    assert got == pytest.approx([-pull + slopes[0], pull + slopes[1]])


def test_descending_xpos_term_alone_makes_the_references_completion_less_likely_and_leaves_the_policys_alone():
    for policy_wrote, k in (((True, False), 1), ((False, True), 0)):
        with_term = loss_and_slopes(pair(policy_wrote), method="xpo", own={"xpo_alpha": 0.3})[1]
        without = loss_and_slopes(pair(policy_wrote), method="xpo", own={"xpo_alpha": 0.0})[1]
        assert with_term[k] - without[k] == pytest.approx(0.3) and with_term[1 - k] == without[1 - k]


def test_xpo_takes_any_loss_of_pairs_and_is_that_where_the_policy_wrote_both():
    options = dict(terms=(("ipo", 1.0), ("sft", 0.5)), own={"xpo_alpha": 0.1}, beta=0.2)
    made = pair((True, False), probability=0.8)
    plain = pair_losses(made, LossOptions(**options)).item()
    assert loss_and_slopes(made, "xpo", **options)[0] == pytest.approx(plain + 0.1 * L)
    assert plain == pytest.approx(0.8 * (H - 2.5) ** 2 + 0.2 * (-H - 2.5) ** 2 + 0.5 * 3 / 4)
    assert loss_and_slopes(pair((True, True), probability=0.8), "xpo", **options)[0] == pytest.approx(plain)


# Nash-MD --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy_wrote, probability, slopes",
    [
        # -(P - 1/2 - beta (log pi - log pi_ref)) on the policy's own completion, nothing on the other
        ((True, False), 0.9, (-(0.9 - 0.5 - 0.2 * 1.0), 0.0)),
        ((False, True), 0.9, (0.0, -(0.1 - 0.5 - 0.2 * -1.5))),
        ((True, False), 0.5, (0.2 * 1.0, 0.0)),  # a tie leaves the pull towards the reference
        ((True, True), 0.9, (-(0.4 - 0.2 * 1.0) / 2, -(-0.4 - 0.2 * -1.5) / 2)),
    ],
)
def test_nash_mds_gradient_is_that_of_the_paper(policy_wrote, probability, slopes):
    loss, got = loss_and_slopes(pair(policy_wrote, probability), method="nash_md", beta=0.2)
    assert got == pytest.approx(slopes)
    assert loss == pytest.approx(slopes[0] * W + slopes[1] * L)  # the bracket is a constant


def test_the_expectation_of_nash_mds_gradient_is_that_of_preference_and_kl():
    """Three answers, so that expectations are sums: of -P(pi > opponent) + beta KL(pi, ref), by automatic gradients."""
    logits_Y = torch.tensor([0.3, -0.2, 0.5], dtype=torch.double, requires_grad=True)
    reference_Y = torch.tensor([-0.1, 0.4, 0.2], dtype=torch.double).log_softmax(-1)
    wins_YY = torch.tensor([[0.5, 0.8, 0.3], [0.2, 0.5, 0.9], [0.7, 0.1, 0.5]], dtype=torch.double)
    opponent_Y = torch.tensor([0.2, 0.5, 0.3], dtype=torch.double)
    policy_Y = logits_Y.log_softmax(-1)
    objective = 0.3 * (policy_Y.exp() * (policy_Y - reference_Y)).sum() - policy_Y.exp() @ wins_YY @ opponent_Y
    [expected] = torch.autograd.grad(objective, logits_Y)

    policy_Y = logits_Y.log_softmax(-1)
    total = torch.zeros((), dtype=torch.double)
    for y in range(3):
        for z in range(3):
            p, better = wins_YY[y, z], bool(wins_YY[y, z] >= 0.5)
            a, b = (y, z) if better else (z, y)
            made = PairLogprobs(
                policy_Y[a][None],
                policy_Y[b][None],
                reference_Y[a][None],
                reference_Y[b][None],
                torch.ones(1),
                torch.ones(1),
                torch.maximum(p, 1 - p)[None],
                torch.tensor([better]),
                torch.tensor([not better]),
            )
            probability = (policy_Y[y].exp() * opponent_Y[z]).detach()
            total = total + probability * METHODS["nash_md"].losses(made, LossOptions(beta=0.3)).sum()
    [got] = torch.autograd.grad(total, logits_Y)
    torch.testing.assert_close(got, expected)


def groups_of_two():
    first, second, third = tiny.prompts([3, 4, 2])
    return [
        tiny.group(first, [[5, 6, 1], [7, 8, 9, 10]]),
        tiny.group(second, [[11, 1], [12, 13, 1]]),
        tiny.group(third, [[5, 1], [5, 1]]),
    ]


def outcome(pairing):
    return [(p.chosen, p.rejected, round(p.probability, 6), p.chosen_score, p.rejected_score) for p in pairing.pairs]


def test_scores_of_two_become_bradley_terry_probabilities_and_ties_stay():
    made = groups_of_two()
    scores = Scores([[1.0, 3.0], [2.0, 2.0], [9.0, 9.0]], {})
    assert outcome(pairs_of_two(made, scores, temperature=4.0)) == [
        (1, 0, round(s(0.5), 6), 3.0, 1.0),
        (0, 1, 0.5, 2.0, 2.0),
        (0, 1, 0.5, 9.0, 9.0),
    ]
    certain = pairs_of_two(made, Scores([[1e6, -1e6], [0.0, 1.0], [1.0, 0.0]], {}))
    assert [p.probability for p in certain.pairs] == pytest.approx([1.0, s(1.0), 0.5])  # the last two are the same text


def test_two_are_compared_by_normalised_scores_and_keep_the_reported_ones():
    scores = Scores([[1.0, 3.0], [2.0, 2.0], [9.0, 9.0]], {}, normalized=[[2.0, -2.0], [0.0, 1.0], [0.0, 0.0]])
    assert outcome(pairs_of_two(groups_of_two(), scores, temperature=4.0)) == [
        (0, 1, round(s(1.0), 6), 1.0, 3.0),
        (1, 0, round(s(0.25), 6), 2.0, 2.0),
        (0, 1, 0.5, 9.0, 9.0),
    ]


def test_a_judges_answers_about_two_are_taken_as_they_are():
    verdicts = Verdicts([Preference(1, 0, 0.8), None, Preference(0, 1, 0.5)], duels=3, unanswered=1)
    made = pairs_of_two(groups_of_two(), verdicts)
    assert outcome(made) == [(1, 0, 0.8, None, None), (0, 1, 0.5, None, None)]
    assert made.dropped == {"no_answer": 1}


def test_a_missing_score_is_no_tie():
    made = pairs_of_two(groups_of_two(), Scores([[None, 3.0], [2.0, None], [None, None]], {}))
    assert not made.pairs and made.dropped == {"missing_score": 3}


# who wrote what -------------------------------------------------------------------------------------------------------


def signed(group, author):
    made = tuple(Completion(c.token_ids, c.logprobs, c.finish_reason, 7, c.text, author) for c in group.completions)
    return Group(group.prompt, made)


def against_the_reference():
    first, second = tiny.prompts([3, 4])
    own = [tiny.group(first, [[5, 6, 1]]), tiny.group(second, [[11, 12, 13, 14, 1]])]
    theirs = [tiny.group(first, [[7, 8, 9, 10]]), tiny.group(second, [[12, 1]])]
    return joined(own, [signed(group, "reference") for group in theirs])


@pytest.mark.smoke
def test_groups_are_joined_with_the_policys_completion_first():
    made = against_the_reference()
    assert [[c.author for c in group.completions] for group in made] == [["policy", "reference"]] * 2
    assert [c.token_ids for c in made[1].completions] == [(11, 12, 13, 14, 1), (12, 1)]


def test_a_pairs_numbers_say_who_wrote_them():
    group = against_the_reference()[0]
    for shared in (True, False):
        rows = pack_pairs([Pair(group, 1, 0), Pair(group, 0, 1)], shared)
        zeros = RowLogprobs(torch.zeros(7), torch.zeros(7), torch.zeros(2))
        made = pair_logprobs(rows, zeros, zeros)
        assert made.chosen_by_policy_N.tolist() == [False, True]
        assert made.rejected_by_policy_N.tolist() == [True, False]
        assert made.exchanged().chosen_by_policy_N.tolist() == [True, False]


def test_metrics_are_of_what_the_policy_wrote_and_the_opponents_stand_apart():
    store, made = MetricStore(), against_the_reference()
    scores = Scores([[2.0, 5.0], [4.0, None]], {"f": [[2.0, 5.0], [4.0, None]]})
    record_rollout(store, made, scores, version=7)
    pairs = [Pair(made[0], 1, 0, 5.0, 2.0, probability=0.9), Pair(made[1], 0, 1, 4.0, 3.0)]
    record_pairs(store, 2, Pairing(pairs))
    rows = pack_pairs(pairs, shared=True)  # the reference's 4 tokens, the policy's 3 and 5, the reference's 2
    length_S, entropy_M = rows.length_S.float(), torch.tensor([9.0] * 4 + [2.0] * 8 + [9.0] * 2)
    ones_M = torch.ones(14)
    rows.sampled_logps_M.copy_(-1.0 * torch.ones(14))
    rows.sampled_logps_M[0] = -50.0  # the reference's own: no difference between sampler and trainer
    policy = RowLogprobs(-1.0 * ones_M, entropy_M, -1.0 * length_S)
    reference = RowLogprobs(-1.5 * ones_M, ones_M, -1.5 * length_S)
    record_loss(store, rows, policy, reference, torch.tensor([0.5, 0.9]), beta=0.2)
    metrics = store.drain()
    assert metrics["completions/mean_length"] == 4.0 and metrics["opponent/mean_length"] == 3.0
    assert metrics["sampling/staleness"] == 7.0  # the policy's completions are of version 0
    assert metrics["objective/scores"] == 3.0 and metrics["opponent/scores"] == 5.0 and metrics["scores/f"] == 3.0
    assert metrics["scores/f/missing_ratio"] == 0.25
    assert metrics["opponent/win_rate"] == pytest.approx((0.1 + 1.0) / 2)
    assert metrics["objective/kl"] == pytest.approx(0.5 * (3 + 5) / 2) and metrics["objective/entropy"] == 4.0
    assert metrics["objective/token_entropy"] == 2.0 and metrics["sampling/sampling_logp_difference/max"] == 0.0
    assert metrics["objective/rlhf_reward"] == pytest.approx(3.0 - 0.2 * metrics["objective/kl"])
    assert metrics["logps/chosen"] == -4.5  # of the pair, whoever wrote it
    assert trained_kl(rows, policy, reference).tolist() == [1.5, 2.5]
