"""Which pairs come out of groups, and why the others do not."""

import math
import statistics
from collections import Counter
from typing import get_args

import pytest

from online_dpo.config.feedback import PairSelection
from online_dpo.pairing.rounds import latest, reasons, without_pair
from online_dpo.pairing.select import Selection, pairs_from_preferences, pairs_from_scores
from online_dpo.pairing.strategies import STRATEGIES
from online_dpo.types import Comparison, Feedback, Pair, Pairing, Preference, Round, Scores, Verdicts
from support import tiny

PROMPTS = tiny.prompts([3] * 8)
THREE = [[5, 1], [6, 1], [7, 1]]
FOUR = [[5, 1], [6, 1], [7, 1], [8, 1]]


def groups_of(*completions):
    return [tiny.group(PROMPTS[i], ids) for i, ids in enumerate(completions)]


def pairing(completions, values, draw=lambda prompt: 0.0, **selection):
    """Of groups given as lists of completions and of scores."""
    scores = Scores([list(v) for v in values], {})
    return pairs_from_scores(groups_of(*completions), scores, Selection(**selection), draw)


def indices(made):
    return [(p.chosen, p.rejected) for p in made.pairs]


def test_every_name_of_the_configuration_is_a_strategy():
    assert tuple(STRATEGIES) == get_args(PairSelection)


def test_best_against_worst():
    made = pairing([THREE, THREE], [[0.2, 0.9, -1.0], [3.0, 1.0, 2.0]])
    assert [(p.chosen, p.rejected, p.margin) for p in made.pairs] == [(1, 2, 1.9), (0, 1, 2.0)]
    assert all(p.probability == p.weight == 1.0 for p in made.pairs)
    assert not made.dropped and not made.left_out


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_missing_score_takes_part_in_no_pair_and_never_counts_as_zero(strategy):
    made = pairing([THREE] * 3, [[None, -1.0, -2.0], [None, None, -5.0], [None] * 3], strategy=strategy)
    assert indices(made) == [(1, 2)] and made.dropped == {"missing_score": 2}


def test_ties_are_dropped_or_trained_as_trl_does():
    values = [[1.0, 1.0, 1.0], [None, 0.5, 0.5]]
    made = pairing([THREE, THREE], values)
    assert made.pairs == [] and made.dropped == {"tie": 2}
    made = pairing([THREE, THREE], values, tie_policy="first")
    assert [(p.chosen, p.rejected, p.margin) for p in made.pairs] == [(0, 1, 0.0), (1, 2, 0.0)] and not made.dropped


def test_between_equal_scores_the_earlier_is_chosen_and_the_later_rejected():
    assert indices(pairing([FOUR], [[2.0, 2.0, 0.0, 0.0]])) == [(0, 3)]


def test_identical_completions_are_no_pair_and_the_first_of_them_counts():
    made = pairing([[[5, 1], [5, 1]]], [[1.0, 0.0]])
    assert made.pairs == [] and made.dropped == {"identical": 1}
    repeated = [[5, 1], [6, 1], [5, 1], [6, 1]]
    assert indices(pairing([repeated], [[1.0, 0.5, -3.0, 7.0]], strategy="all_pairs")) == [(0, 1)]
    assert pairing([repeated], [[1.0, 1.0, 0.0, 0.0]]).dropped == {"tie": 1}


# strategies ---------------------------------------------------------------------------------------------------------


def test_a_random_rejected_one_is_any_but_the_best_by_the_number_drawn():
    values = [[1.0, 4.0, 4.0, 3.0, 2.0]]
    five = [[*FOUR, [9, 1]]]

    def picked(number):
        return indices(pairing(five, values, draw=lambda prompt: number, strategy="best_random"))

    assert [picked(x) for x in (0.0, 0.33, 0.34, 0.66, 0.67, 0.999)] == [[(1, 0)]] * 2 + [[(1, 3)]] * 2 + [[(1, 4)]] * 2


def test_numbers_are_drawn_for_prompts():
    def draw(prompt):
        return prompt.row / 8

    made = pairing([FOUR] * 4, [[3.0, 0.0, 1.0, 2.0]] * 4, draw=draw, strategy="best_random")
    assert indices(made) == [(0, 1), (0, 1), (0, 1), (0, 2)]  # 0, 1/8, 2/8 and 3/8 of the way through three


def test_the_rejected_one_closest_to_mean_minus_two_sigma():
    """An outlier far below the others is not the one, nor is what lies one sigma below the mean."""
    values = [5.0, *[3.0] * 13, -1.0, -4.5, -12.0]
    target = statistics.fmean(values) - 2 * statistics.pstdev(values)
    assert -7 < target < -6
    many = [[k, 1] for k in range(5, 22)]
    assert indices(pairing([many], [values], strategy="best_mean_minus_two_sigma")) == [(0, 15)]
    # The group is all there is: its own standard deviation gives -3.05, an estimate of a wider one would give -3.27.
    values = [*[3.0] * 10, -1.0, -5.5]
    assert indices(pairing([many[:12]], [values], strategy="best_mean_minus_two_sigma")) == [(0, 10)]
    assert indices(pairing([THREE], [[1.0, 0.0, 0.5]], strategy="best_mean_minus_two_sigma")) == [(0, 1)]


def test_all_pairs_of_different_scores():
    made = pairing([FOUR, THREE], [[1.0, 2.0, 2.0, 0.0], [5.0, 6.0, None]], strategy="all_pairs")
    assert indices(made) == [(0, 3), (1, 0), (1, 3), (2, 0), (2, 3), (1, 0)]
    assert all(p.group is made.pairs[0].group for p in made.pairs[:5]) and made.pairs[5].group.prompt.row == 1


# filters, weights and labels ----------------------------------------------------------------------------------------


def test_margins_outside_the_band_are_left_out_and_counted():
    values = [[1.0, 0.9], [1.0, 0.5], [1.0, -9.0], [2.0, 1.5]]
    made = pairing([THREE[:2]] * 4, values, min_margin=0.5, max_margin=2.0)
    assert [p.group.prompt.row for p in made.pairs] == [1, 3] and made.dropped == {"margin": 2}


def test_pairs_left_out_of_a_group_that_keeps_others_do_not_drop_it():
    made = pairing([THREE, THREE], [[3.0, 2.9, 0.0], [1.0, 0.9, 0.8]], strategy="all_pairs", min_margin=1.0)
    assert indices(made) == [(0, 2), (1, 2)]
    assert made.left_out == {"margin": 1} and made.dropped == {"margin": 1}


def test_lengths_that_differ_too_much():
    completions = [[[5] * 4, [6] * 8], [[5] * 9, [6] * 4], [[5] * 3, [6] * 3]]
    made = pairing(completions, [[1.0, 0.0]] * 3, max_length_ratio=2.0)
    assert [p.group.prompt.row for p in made.pairs] == [0, 2] and made.dropped == {"length_ratio": 1}


@pytest.mark.smoke
def test_soft_labels_and_weights_from_margins():
    [pair] = pairing([THREE], [[2.0, 1.0, 0.5]], label_temperature=0.5, margin_weighting=True).pairs
    assert pair.probability == pytest.approx(1 / (1 + math.exp(-3.0))) and pair.weight == 1.5


# judges -------------------------------------------------------------------------------------------------------------


def test_preferences_of_a_judge():
    preferences = [Preference(1, 0, 0.8), None, Preference(2, 0, 1.0), Preference(0, 1, 0.5), Preference(0, 2, 0.4)]
    made = pairs_from_preferences(groups_of(*[THREE] * 5), preferences)
    assert [(p.chosen, p.rejected, p.probability, p.margin) for p in made.pairs] == [(1, 0, 0.8, None), (2, 0, 1, None)]
    assert made.dropped == {"no_answer": 1, "tie": 1, "contradiction": 1}
    assert [p.group.prompt.row for p in made.pairs] == [0, 2]


def test_a_judges_ties_identical_completions_and_lengths():
    groups = groups_of(THREE, [[5, 1], [5, 1]], [[5] * 9, [6]])
    preferences = [Preference(0, 1, 0.5), Preference(0, 1, 0.5), Preference(0, 1, 0.9)]
    made = pairs_from_preferences(groups, preferences, Selection(tie_policy="first", max_length_ratio=3.0))
    assert [(p.chosen, p.rejected, p.probability) for p in made.pairs] == [(0, 1, 1.0)]
    assert made.dropped == {"identical": 1, "length_ratio": 1}


def test_the_widest_pair_that_is_allowed():
    """Lengths 2, 9, 3 and 8 tokens: in 0 to 2 and 1 to 3 they are within half of each other."""
    lengths = [[5, 1], [5] * 8 + [1], [6, 5, 1], [7] * 7 + [1]]
    selection = Selection(strategy="widest_allowed", max_length_ratio=1.5)
    rows = [
        [9.0, 1.0, 8.0, 5.0],
        [9.0, 1.0, 3.0, 2.0],
        [9.0, 9.0, 9.0, 9.0],
        [None, 1.0, 2.0, None],
        [4.0, 2.0, 1.0, 5.0],
    ]
    made = pairs_from_scores(groups_of(*[lengths] * 5), Scores(rows, {}), selection)
    assert indices(made) == [(3, 1), (0, 2), (0, 2)]
    assert made.dropped == {"tie": 1, "length_ratio": 1} and not made.left_out

    selection = Selection(strategy="widest_allowed", min_margin=0.5, max_margin=3.0)
    rows = [[9.0, 1.0, 6.0, 5.0], [9.0, 1.0, 9.25, 20.0], [4.0, 2.0, 4.0, 2.0]]
    made = pairs_from_scores(groups_of(*[lengths] * 3), Scores(rows, {}), selection)
    assert indices(made) == [(0, 2), (0, 3)] and made.dropped == {"margin": 1} and not made.left_out
    plain = Selection(strategy="widest_allowed")
    assert indices(pairs_from_scores(groups_of(*[lengths] * 3), Scores(rows, {}), plain)) == indices(
        pairs_from_scores(groups_of(*[lengths] * 3), Scores(rows, {}))
    )


# normalised scores, and a judge beside scores -------------------------------------------------------------------------


def test_pairs_are_formed_by_normalised_scores_and_carry_the_reported_ones():
    """Also where both say the opposite, and where the reported ones are all the same."""
    scores = Scores([[5.0, 1.0, 3.0], [2.0, 2.0, 2.0]], {}, normalized=[[-1.0, 0.5, 0.0], [0.0, -3.0, 1.0]])
    made = pairs_from_scores(groups_of(THREE, THREE), scores, Selection(label_temperature=3.0, margin_weighting=True))
    assert [(p.chosen, p.rejected, p.chosen_score, p.rejected_score) for p in made.pairs] == [
        (1, 0, 1.0, 5.0),
        (2, 1, 2.0, 2.0),
    ]
    assert [p.margin for p in made.pairs] == [-4.0, 0.0] and [p.weight for p in made.pairs] == [1.5, 4.0]
    assert [p.probability for p in made.pairs] == pytest.approx([1 / (1 + math.exp(-m / 3)) for m in (1.5, 4.0)])
    made = pairs_from_scores(groups_of(THREE, THREE), scores, Selection(min_margin=2.0))
    assert indices(made) == [(2, 1)] and made.dropped == {"margin": 1}


def test_equal_normalised_scores_are_a_tie_whatever_is_reported():
    scores = Scores([[5.0, 1.0], [2.0, None]], {}, normalized=[[0.0, 0.0], [0.0, None]])
    made = pairs_from_scores(groups_of(THREE[:2], THREE[:2]), scores)
    assert made.dropped == {"tie": 1, "missing_score": 1}


def test_a_judges_pairs_have_the_scores_by_which_it_was_shown_the_best():
    scores = Scores([[3.0, 2.0, 1.0], [2.0, 3.0, 1.0], [None, None, 4.0], [1.0, None, 4.0], [1.0, 2.0, 3.0]], {})
    preferences = [Preference(1, 2, 0.8), Preference(2, 0, 0.7), None, None, Preference(2, 0, 0.1)]
    made = pairs_from_preferences(groups_of(*[THREE] * 5), preferences, Selection(), scores)
    assert [(p.chosen, p.rejected, p.chosen_score, p.rejected_score, p.probability) for p in made.pairs] == [
        (1, 2, 2.0, 1.0, 0.8),
        (2, 0, 1.0, 2.0, 0.7),
    ]
    assert made.dropped == {"missing_score": 1, "no_answer": 1, "contradiction": 1}


# --- groups that are answered again


def test_a_group_without_a_pair_is_told_from_an_equal_one_that_has_one():
    """A prompt may come twice in a step."""
    twice = [tiny.group(PROMPTS[0], [[5, 1], [6, 1]]) for _ in range(3)]
    made = pairs_from_scores(twice, Scores([[1.0, 1.0], [2.0, 1.0], [None, 1.0]], {}))
    assert twice[0] == twice[1] and without_pair(twice, made) == [0, 2]
    assert without_pair([], pairs_from_scores([], Scores([], {}))) == []


def test_the_latest_answers_are_those_of_the_last_round_of_each_prompt():
    groups, again = groups_of(THREE[:2], THREE[:2], THREE[:2]), groups_of(FOUR[2:], FOUR[2:], FOUR[1:3])
    first = Scores([[1.0, 1.0], [2.0, 0.0], [3.0, 3.0]], {"f": [[0.5, 0.5], [1.0, 0.0], [1.5, 1.5]]})
    rounds = (
        Round([0, 2], again[:2], Scores([[4.0, 5.0], [6.0, 6.0]], {"f": [[2.0, 2.5], [3.0, 3.0]]})),
        Round([2], again[2:], Scores([[7.0, 8.0]], {"f": [[3.5, 4.0]]})),
    )
    feedback = Feedback(groups, first, {}, rounds)
    last, scores = latest(feedback)
    assert [group is other for group, other in zip(last, [again[0], groups[1], again[2]], strict=True)] == [True] * 3
    assert scores == Scores([[4.0, 5.0], [2.0, 0.0], [7.0, 8.0]], {"f": [[2.0, 2.5], [1.0, 0.0], [3.5, 4.0]]})
    assert first.values[0] == [1.0, 1.0] and latest(Feedback(groups, first, {})) == (groups, first)

    normalized = Scores([[1.0, 2.0]], {}, normalized=[[-1.0, 1.0]])
    turned = Scores([[5.0, 3.0]], {}, normalized=[[1.0, -1.0]])
    _, scores = latest(Feedback(groups[:1], normalized, {}, (Round([0], again[:1], turned),)))
    assert scores == turned

    even, sure = Preference(0, 1, 0.5), Preference(1, 0, 0.9)
    judged = Feedback(
        groups, Verdicts([even, sure, None], 4, 1), {}, (Round([0, 2], again[:2], Verdicts([sure, None], 3, 2)),)
    )
    assert latest(judged)[1] == Verdicts([sure, sure, None], 7, 3)
    top = Verdicts([even], 2, 0, normalized)
    assert latest(Feedback(groups[:1], top, {}, (Round([0], again[:1], Verdicts([sure], 1, 1, turned)),)))[
        1
    ] == Verdicts([sure], 3, 1, turned)


# --- what became of each group


def test_each_group_without_a_pair_has_its_reason_and_the_counters_are_their_sums():
    same = [[5, 1], [5, 1], [5, 1]]
    completions = [THREE, THREE, same, THREE, THREE, [[5, 1], [6] * 9, [7, 1]]]
    values = [[1.0, 1.0, 1.0], [None, 1.0, None], [1.0, 2.0, 3.0], [1.0, 1.1, 1.2], [1.0, 3.0, 5.0], [0.0, 9.0, 4.0]]
    groups, scores = groups_of(*completions), Scores([list(row) for row in values], {})
    made = pairs_from_scores(groups, scores, Selection(min_margin=1.0, max_length_ratio=2.0))
    assert made.reasons == {0: "tie", 1: "missing_score", 2: "identical", 3: "margin", 5: "length_ratio"}
    assert made.dropped == Counter(made.reasons.values()) and made.left_out_of == {}
    assert reasons(groups, made) == ["tie", "missing_score", "identical", "margin", None, "length_ratio"]


def test_pairs_left_out_are_told_of_each_group():
    made = pairing([THREE, THREE], [[3.0, 2.5, 1.0], [9.0, 5.0, 0.0]], strategy="all_pairs", min_margin=1.0)
    assert made.left_out_of == {0: {"margin": 1}} and made.left_out == {"margin": 1}


def test_each_group_that_a_judge_decides_nothing_about_has_its_reason():
    groups = groups_of(THREE, THREE, THREE, [[5, 1], [5, 1], [6, 1]], THREE)
    told = [None, Preference(0, 1, 0.5), Preference(0, 1, 0.3), Preference(0, 1, 0.9), Preference(2, 0, 0.9)]
    made = pairs_from_preferences(groups, told)
    assert made.reasons == {0: "no_answer", 1: "tie", 2: "contradiction", 3: "identical"}
    assert made.dropped == Counter(made.reasons.values())


def test_groups_that_a_method_from_outside_only_counts():
    groups = groups_of(THREE, THREE, THREE)
    pair = Pair(groups[1], 0, 1)
    assert reasons(groups, Pairing([pair], Counter(dull=2))) == ["dull", None, "dull"]
    assert reasons(groups, Pairing([pair], Counter(dull=1))) == ["not_said", None, "not_said"]
    assert reasons(groups, Pairing([pair], Counter(dull=1, long=1))) == ["not_said", None, "not_said"]
    assert reasons(groups, Pairing([pair])) == ["not_said", None, "not_said"]
    assert reasons(groups, Pairing([pair], Counter(dull=1), reasons={2: "dull"})) == ["not_said", None, "dull"]


def test_the_latest_of_what_scores_are_made_of_and_of_what_was_compared():
    groups, again = groups_of(THREE[:2], THREE[:2]), groups_of(FOUR[2:])
    scores = Scores(
        [[1.0, 1.0], [2.0, 0.0]], {"f": [[1.0, 1.0], [2.0, 0.0]]}, [[0.0, 0.0], [1.0, -1.0]], {"f": 1.0},
        {"f": [[0.0, 0.0], [1.0, -1.0]]}, [[{}, {}], [{"length": 1.0}, {}]],
    )  # fmt: skip
    newer = Scores(
        [[4.0, 5.0]], {"f": [[4.0, 5.0]]}, [[-1.0, 1.0]], {"f": 1.0}, {"f": [[-1.0, 1.0]]}, [[{"missing_eos": 2.0}, {}]]
    )
    last = latest(Feedback(groups, scores, {}, (Round([0], again, newer, ["tie"]),)))[1]
    assert isinstance(last, Scores) and last.weights == {"f": 1.0}
    assert last.relative == {"f": [[-1.0, 1.0], [1.0, -1.0]]}
    assert last.penalties == [[{"missing_eos": 2.0}, {}], [{"length": 1.0}, {}]]

    one, other, third = Comparison(0, 1, 0.9), Comparison(0, 1, 0.2), Comparison(1, 0, None)
    judged = Verdicts([None, None], 2, 0, None, [(one,), (other,)])
    rejudged = Verdicts([None], 1, 1, None, [(third,)])
    last = latest(Feedback(groups, judged, {}, (Round([0], again, rejudged, ["tie"]),)))[1]
    assert isinstance(last, Verdicts) and last.comparisons == [(third,), (other,)]
