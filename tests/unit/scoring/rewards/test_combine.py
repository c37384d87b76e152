"""Several scorers to one number: weighted, normalised, penalised, waited for together."""

from __future__ import annotations

import asyncio
import math
import random
import time

import pytest

from online_dpo.errors import ScoringError
from online_dpo.scoring.penalties import Penalties
from online_dpo.scoring.rewards.combine import score_groups
from online_dpo.scoring.rewards.function import FunctionScorer
from online_dpo.types import Completion, Group, Prompt
from support.fixed_scores import Says, group

GROUPS = [group("p", "a", "b"), group("q", "c", "d")]


# the sum --------------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_weighted_sum():
    scorers = [Says("f", [1, 2], [3, 4]), Says("g", [0.5, -1], [0, 8])]
    assert score_groups(GROUPS, scorers, [2.0, -0.5]).values == [[1.75, 4.5], [6.0, 4.0]]
    scores = score_groups(GROUPS, scorers)
    assert scores.values == [[1.5, 1.0], [3.0, 12.0]]
    assert scores.by_scorer == {"f": [[1.0, 2.0], [3.0, 4.0]], "g": [[0.5, -1.0], [0.0, 8.0]]}


def test_penalty_only_where_the_engine_says_that_it_was_cut():
    groups = [group("p", "a", "b", reasons="sl"), group("q", "c", "d", reasons="ls")]
    scorer = Says("f", [1, 1], [1, math.nan])
    assert score_groups(groups, [scorer], [2.0], Penalties(0.75)).values == [[2.0, 1.25], [1.25, None]]
    assert score_groups(groups, [scorer], [2.0]).values == [[2.0, 2.0], [2.0, None]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite_is_missing_and_only_there(bad):
    scores = score_groups(GROUPS, [Says("f", [bad, 1], [2, 3]), Says("g", [1, 1], [1, bad])])
    assert scores.values == [[None, 2.0], [3.0, None]]
    assert scores.by_scorer == {"f": [[None, 1.0], [2.0, 3.0]], "g": [[1.0, 1.0], [1.0, None]]}


def test_not_finite_is_missing_even_with_weight_zero():
    assert score_groups(GROUPS, [Says("f", [math.inf, 1], [2, 3])], [0.0]).values == [[None, 0.0], [0.0, 0.0]]


def test_a_sum_that_overflows_is_missing():
    scores = score_groups(GROUPS, [Says("f", [1e308, 1], [2, 3])], [10.0])
    assert scores.values == [[None, 10.0], [20.0, 30.0]]
    assert scores.by_scorer["f"][0][0] == 1e308


def test_a_scorer_that_does_not_apply_to_a_prompt_is_left_out_there():
    scorers = [Says("maths", [None, None], [1, 2]), Says("code", [5, 6], [None, None])]
    assert score_groups(GROUPS, scorers, [1.0, 10.0]).values == [[50.0, 60.0], [1.0, 2.0]]


def test_none_for_some_completions_is_missing():
    scorers = [Says("f", [None, 1], [1, 2]), Says("g", [5, 6], [7, None])]
    assert score_groups(GROUPS, scorers).values == [[None, 7.0], [8.0, None]]


def test_none_beside_nan_does_apply():
    scorers = [Says("f", [None, math.nan], [1, 2]), Says("g", [5, 6], [7, 8])]
    assert score_groups(GROUPS, scorers).values == [[None, None], [8.0, 10.0]]


def test_where_nothing_applies_all_is_missing():
    scorers = [Says("f", [None, None], [1, 2]), Says("g", [None, None], [3, 4])]
    scores = score_groups([group("p", "a", "b", reasons="ll"), GROUPS[1]], scorers, None, Penalties(1.0))
    assert scores.values == [[None, None], [4.0, 6.0]]


def test_names_are_made_unique():
    rows = ([1, 2], [3, 4])
    scorers = [Says("f", *rows), Says("f_2", *rows), Says("f", *rows), Says("f", *rows)]
    assert list(score_groups(GROUPS, scorers).by_scorer) == ["f", "f_2", "f_3", "f_4"]
    assert list(score_groups(GROUPS, [scorers[0], scorers[2]]).by_scorer) == ["f", "f_2"]


def test_a_scorer_listed_twice_is_run_once():
    scorer = Says("f", [1, 2], [3, 4])
    scores = score_groups(GROUPS, [scorer, scorer], [1.0, 10.0])
    assert scorer.calls == 1
    assert scores.values == [[11.0, 22.0], [33.0, 44.0]] and list(scores.by_scorer) == ["f", "f_2"]


def test_wrong_shape_and_wrong_number_of_weights():
    with pytest.raises(ScoringError, match=r"`f` returned lists of \[2, 1\] scores for groups of \[2, 2\]"):
        score_groups(GROUPS, [Says("f", [1, 2], [3])])
    with pytest.raises(ScoringError, match=r"`f` returned lists of \[2\] scores for groups of \[2, 2\]"):
        score_groups(GROUPS, [Says("f", [1, 2])])
    with pytest.raises(ValueError, match="3 weights for 1 scorers"):
        score_groups(GROUPS, [Says("f", [1, 2], [3, 4])], [1.0, 2.0, 3.0])


def test_no_groups():
    async def wait(completions):
        return [1.0 for _ in completions]

    def busy(completions):
        return [4.0 for _ in completions]

    scores = score_groups([], [FunctionScorer(wait), FunctionScorer(busy)], None, Penalties(1.0))
    assert scores.values == [] and scores.by_scorer == {"wait": [], "busy": []}


# normalised -----------------------------------------------------------------------------------------------------------


def test_scorers_on_different_scales_count_as_their_weights_say():
    """By the raw sum the first scorer decides alone; in deviations the second has three times its say."""
    groups = [group("p", "a", "b", "c", "d")]
    big, small = [100.0, 300.0, 500.0, 300.0], [0.3, 0.2, 0.1, 0.2]
    scores = score_groups(groups, [Says("big", big), Says("small", small)], [1.0, 3.0], normalization="group")
    root = math.sqrt(2)  # the outer two are 1 / sqrt(1/2) deviations away
    assert scores.ranking == [pytest.approx([-root + 3 * root, 0.0, root - 3 * root, 0.0])]
    assert scores.values == [pytest.approx([100.9, 300.6, 500.3, 300.6])]
    assert scores.by_scorer == {"big": [big], "small": [small]}
    one = score_groups(groups, [Says("big", big), Says("small", small)], [1.0, 3.0], normalization=["none", "group"])
    assert (
        one.ranking == [pytest.approx([100 + 3 * root, 300.0, 500 - 3 * root, 300.0])] and one.values == scores.values
    )


def test_the_deviation_is_that_of_the_group_itself():
    scores = score_groups([group("p", "a", "b", "c")], [Says("f", [1.0, 2.0, 6.0])], normalization="group")
    deviation = math.sqrt((4 + 1 + 9) / 3)
    assert scores.ranking == [pytest.approx([-2 / deviation, -1 / deviation, 3 / deviation])]


def test_without_normalisation_pairs_are_formed_by_what_is_reported():
    for kinds in ("none", ["none"]):
        scores = score_groups(GROUPS, [Says("f", [1, 2], [3, 4])], normalization=kinds)
        assert scores.ranking is scores.values and scores.normalized is None


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_missing_scores_stay_missing_and_count_in_no_mean(bad):
    """What is left of the group is 1 and 5, whatever the second scorer says of the one that is missing."""
    scorers = [Says("f", [1.0, bad, 5.0]), Says("g", [0.0, 100.0, 0.0])]
    scores = score_groups([group("p", "a", "b", "c")], scorers, [2.0, 0.0], normalization=["group", "none"])
    assert scores.ranking == [[-2.0, None, 2.0]] and scores.values == [[2.0, None, 10.0]]


def test_a_scorer_that_does_not_tell_apart_or_does_not_apply_says_nothing():
    scorers = [Says("same", [0.1, 0.1, 0.1]), Says("away", [None] * 3), Says("f", [0.0, 1.0, 2.0])]
    groups = [group("p", "a", "b", "c")]
    root = math.sqrt(1.5)
    assert score_groups(groups, scorers, normalization="group").ranking == [pytest.approx([-root, 0.0, root])]
    assert score_groups(groups, scorers[:1], normalization="group").ranking == [[0.0, 0.0, 0.0]]
    assert score_groups(groups, scorers[1:2], normalization="group").ranking == [[None] * 3]
    assert score_groups(groups, [Says("f", [None, 7.0, None])], normalization="group").ranking == [[None, 0.0, None]]


def test_scorers_that_contradict_each_other_cancel_exactly():
    for seed in range(200):
        rng = random.Random(seed)
        f, g = sorted(rng.random() for _ in range(2)), sorted((rng.random() * 1e3 for _ in range(2)), reverse=True)
        scores = score_groups(GROUPS[:1], [Says("f", f), Says("g", g)], [0.3, 0.3], normalization="group")
        assert scores.ranking == [[0.0, 0.0]]
    far = [Says("f", [1e8 + 0.1, 1e8 + 0.2]), Says("g", [1.0, 0.0])]
    assert score_groups(GROUPS[:1], far, normalization="group").ranking == [[0.0, 0.0]]


def test_each_group_is_normalised_by_itself():
    rows = [[1.0, 3.0, 8.0], [1e6, 1e6 + 1, 1e6 - 5], [0.0, 0.0, 1.0]]
    groups = [group("p", "a", "b", "c")] * 3
    whole = score_groups(groups, [Says("f", *rows)], normalization="group").ranking
    assert whole == [score_groups(groups[:1], [Says("f", row)], normalization="group").ranking[0] for row in rows]


def test_a_penalty_is_in_the_units_of_what_it_is_taken_from():
    groups = [group("p", "a", "b", reasons="sl"), group("q", "c", "d", reasons="ls")]
    scores = score_groups(groups, [Says("f", [1, 9], [1, 1])], [2.0], Penalties(0.75, 0.5), "group")
    assert scores.values == [[1.5, 16.75], [0.75, 1.5]]  # every completion has one token
    assert scores.ranking == [[-2.5, 0.75], [-1.25, -0.5]]


def test_a_sum_that_overflows_is_missing_among_the_normalised_as_well():
    scores = score_groups([group("p", "a", "b", "c")], [Says("f", [1e308, 1, 2])], [10.0], normalization="group")
    assert scores.values[0][0] is None and scores.ranking[0][0] is None and None not in scores.ranking[0][1:]


# length ---------------------------------------------------------------------------------------------------------------


def test_every_token_costs():
    lengths = (1, 4, 30)
    completions = tuple(Completion((9,) * n, (-1.0,) * n, "stop" if n < 30 else "length", 0, "x") for n in lengths)
    groups = [Group(Prompt("p", (1,), row=0), completions)]
    assert score_groups(groups, [Says("f", [1, 1, 1])], [2.0], Penalties(per_token=0.25)).values == [[1.75, 1.0, -5.5]]
    both = score_groups(groups, [Says("f", [1, 1, math.nan])], None, Penalties(1.5, 0.5))
    assert both.values == [[0.5, -1.0, None]]
    assert score_groups(groups, [Says("f", [1, 1, 1])], None, Penalties(1.5, 0.5)).values == [[0.5, -1.0, -15.5]]


# async ----------------------------------------------------------------------------------------------------------------


def meeting(number):
    """Three functions, of which none answers before ``number`` of them have been called."""
    called = set()

    async def met(name):
        called.add(name)
        until = time.monotonic() + 60
        while len(called) < number:
            assert time.monotonic() < until, f"only {called} were called"
            await asyncio.sleep(0.01)

    async def sleeper_one(completions):
        await met("one")
        return [1.0 for _ in completions]

    async def sleeper_two(completions):
        await met("two")
        return [2.0 for _ in completions]

    def busy(completions):
        asyncio.run(met("busy"))
        return [4.0 for _ in completions]

    return sleeper_one, sleeper_two, busy


def test_async_scorers_wait_beside_each_other_and_beside_the_others():
    scorers = [FunctionScorer(f) for f in meeting(3)]
    scores = score_groups(GROUPS, scorers)
    assert scores.values == [[7.0, 7.0], [7.0, 7.0]]
    assert list(scores.by_scorer) == ["sleeper_one", "sleeper_two", "busy"]


def test_async_scorers_where_a_loop_is_running():
    async def notebook():
        return score_groups(GROUPS, [FunctionScorer(f) for f in meeting(2)[:2]]).values

    assert asyncio.run(notebook()) == [[3.0, 3.0], [3.0, 3.0]]


@pytest.mark.parametrize("failing_is_async", [False, True])
def test_one_that_fails_stops_those_that_wait(failing_is_async):
    ended = []

    async def patient(completions):
        try:
            await asyncio.sleep(300)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    async def fails_async(completions):
        await asyncio.sleep(0.05)
        raise RuntimeError("no")

    def fails(completions):
        time.sleep(0.05)
        raise RuntimeError("no")

    # An async failure is seen when its turn to be waited for has come: order of the list.
    scorers = [FunctionScorer(fails_async if failing_is_async else fails, name="bad"), FunctionScorer(patient)]
    with pytest.raises(ScoringError, match="`bad` raised RuntimeError: no"):
        score_groups(GROUPS, scorers)
    deadline = time.perf_counter() + 60
    while not ended and time.perf_counter() < deadline:
        time.sleep(0.01)
    assert ended == ["cancelled"]


# what it is made of ---------------------------------------------------------------------------------------------------


def test_weights_normalised_numbers_and_penalties_by_name_are_kept():
    long = Completion((9,) * 4, (-1.0,) * 4, "length", 0, "b")
    groups = [Group(Prompt("p", (1,), row=0), (Completion((9,), (-1.0,), "stop", 0, "a"), long))]
    scorers = [Says("f", [1.0, 3.0]), Says("f", [math.nan, 2.0]), Says("g", [5.0, 6.0])]
    penalties = Penalties(missing_eos=0.5, per_token=0.25)
    scores = score_groups(groups, scorers, [2.0, 1.0, 3.0], penalties, ["group", "none", "group"])
    assert scores.weights == {"f": 2.0, "f_2": 1.0, "g": 3.0}
    assert scores.relative == {"f": [[-1.0, 1.0]], "g": [[-1.0, 1.0]]}
    assert scores.penalties == [[{"length": 0.25}, {"missing_eos": 0.5, "length": 1.0}]]
    assert scores.values == [[None, 6.0 + 2.0 + 18.0 - 1.5]]
    assert scores.normalized == [[None, 2.0 + 2.0 + 3.0 - 1.5]]


def test_without_penalties_and_normalisation_nothing_is_kept_of_them():
    scores = score_groups(GROUPS, [Says("f", [1, 2], [3, 4])])
    assert (scores.weights, scores.relative, scores.penalties) == ({"f": 1.0}, {}, [])
