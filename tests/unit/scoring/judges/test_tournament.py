"""Best and worst of K by a judge of two: right, in few comparisons, round by round."""

import itertools
import math
import random

import pytest

from online_dpo.errors import ScoringError
from online_dpo.scoring.judges.tournament import ComparisonCounter, find_preferences
from online_dpo.scoring.penalties import Penalties
from online_dpo.types import Completion, Group, Preference, Prompt
from support.asked_judge import AskedJudge

PROMPT = Prompt("p", (1,), row=0)


class Strengths(AskedJudge):
    """Knows how good each text is. The better one wins with this probability; ``silent`` comparisons have no answer."""

    name = "strengths"

    def __init__(self, probability=0.9, silent=()):
        super().__init__(silent)
        self.probability = probability

    def preference(self, first, second):
        a, b = float(first), float(second)
        return 0.5 if a == b else self.probability if a > b else 1 - self.probability


def group(*strengths, finished=None, tokens=None):
    finished = finished or [True] * len(strengths)
    tokens = tokens or [1] * len(strengths)
    return Group(
        PROMPT,
        tuple(
            Completion((k,) * count, (0.0,) * count, "stop" if end else "length", 0, str(strength))
            for k, (strength, end, count) in enumerate(zip(strengths, finished, tokens, strict=True))
        ),
    )


def find(*groups, judge=None):
    judge = judge or Strengths()
    return find_preferences(groups, judge), judge


@pytest.mark.parametrize("count", range(2, 10))
def test_best_and_worst_of_any_order_in_few_comparisons(count):
    orders = list(itertools.permutations(range(count))) if count < 6 else []
    shuffled = [random.Random(seed).sample(range(count), count) for seed in range(100)]
    for order in orders or shuffled:
        verdicts, judge = find(group(*order))
        assert verdicts.preferences == [Preference(order.index(count - 1), order.index(0), pytest.approx(0.9))]
        asked = [pair for call in judge.calls for pair in call]
        assert len(asked) == verdicts.duels <= math.ceil(3 * count / 2) - 2 + 1
        assert len({frozenset(pair) for pair in asked}) == len(asked)  # nothing is asked twice
        direct = frozenset((str(count - 1), "0")) in {frozenset(pair) for pair in asked}
        assert direct and verdicts.unanswered == 0


def test_two_completions_are_one_comparison():
    verdicts, judge = find(group(1, 2), group(4, 3), judge=Strengths(0.7))
    assert verdicts.preferences == [Preference(1, 0, pytest.approx(0.7)), Preference(0, 1, 0.7)]
    assert judge.calls == [[("1", "2"), ("4", "3")]] and verdicts.duels == 2


@pytest.mark.smoke
def test_each_round_of_all_groups_is_one_call():
    verdicts, judge = find(group(1, 2, 3, 4), group(1, 2), group(3, 1, 2))
    assert [len(call) for call in judge.calls] == [4, 3, 2]
    assert judge.calls[0] == [("1", "2"), ("3", "4"), ("1", "2"), ("3", "1")]
    assert judge.calls[1] == [("2", "4"), ("1", "3"), ("3", "2")]
    assert judge.calls[2] == [("4", "1"), ("1", "2")]  # best against worst; of three, who has not played and has lost
    assert [(p.chosen, p.rejected) for p in verdicts.preferences] == [(3, 0), (1, 0), (0, 1)]


def test_a_comparison_that_ends_even_is_won_by_its_first():
    verdicts, judge = find(group("1", "1.0"), group("2", "2.0", "1", "1.0"))
    assert verdicts.preferences == [Preference(0, 1, 0.5), Preference(0, 3, pytest.approx(0.9))]
    assert judge.calls[1] == [("2", "1"), ("2.0", "1.0")]


def test_no_groups_are_no_call():
    verdicts, judge = find()
    assert verdicts.preferences == [] and judge.calls == []


def test_the_same_text_is_not_asked_about_and_is_as_good():
    verdicts, judge = find(group(1, 1), group(2, 2, 1, 1))
    assert verdicts.preferences == [Preference(0, 1, 0.5), Preference(0, 2, pytest.approx(0.9))]
    assert judge.calls == [[("2", "1")]] and verdicts.duels == 1


@pytest.mark.parametrize(
    "silent, expected",
    [
        ([("1", "2")], Preference(3, 2, 0.9)),  # none of the first two goes on
        ([("1", "2"), ("3", "4")], None),
        ([("2", "4")], None),  # no best
        ([("1", "3")], None),  # no worst
        ([("4", "1")], None),  # the last comparison
    ],
)
def test_comparisons_without_an_answer(silent, expected):
    verdicts, _ = find(group(1, 2, 3, 4), judge=Strengths(silent=silent))
    if expected is not None:
        expected = Preference(expected.chosen, expected.rejected, pytest.approx(expected.probability))
    assert verdicts.preferences == [expected] and verdicts.unanswered == len(silent)


def test_a_judge_that_goes_in_circles_says_so_in_the_last_comparison():
    """1 beats 0, 3 beats 2, 1 beats 3 and 2 loses to 0: best 1, worst 2. And yet it prefers 2 to 1."""
    wins = {("0", "1"): 0.1, ("2", "3"): 0.1, ("1", "3"): 0.9, ("0", "2"): 0.9, ("1", "2"): 0.2}

    class Table(Strengths):
        def answer(self, first, second):
            return wins[first, second]

    verdicts, _ = find(group(0, 1, 2, 3), judge=Table())
    assert verdicts.preferences == [Preference(1, 2, 0.2)]


def test_best_and_worst_are_never_the_same_however_odd_the_judge():
    for seed in range(300):
        rng = random.Random(seed)

        class Coin(Strengths):
            def answer(self, first, second, rng=rng):
                return rng.choice([0.0, 0.3, 0.5, 0.8, 1.0, None])

        verdicts, _ = find(*(group(*range(k)) for k in range(2, 9)), judge=Coin())
        for preference in verdicts.preferences:
            assert preference is None or preference.chosen != preference.rejected


# completions that did not end ---------------------------------------------------------------------------------------


def test_a_penalty_on_log_odds_where_only_one_has_ended():
    ask = ComparisonCounter(Strengths(0.8), Penalties(missing_eos=1.5))
    comparisons = [
        group(2, 1, finished=[True, True]),
        group(2, 1, finished=[False, False]),
        group(2, 1, finished=[False, True]),
        group(2, 1, finished=[True, False]),
        group(2, 2, finished=[False, True]),
    ]
    odds = math.log(0.8 / 0.2)
    shifted = [1 / (1 + math.exp(-x)) for x in (odds - 1.5, odds + 1.5, -1.5)]
    assert ask(comparisons) == pytest.approx([0.8, 0.8, *shifted])


def test_certainty_counts_a_hundred_to_one_there():
    ask = ComparisonCounter(Strengths(1.0), Penalties(missing_eos=6.0))
    odds = math.log(0.99 / 0.01)
    expected = [1.0, 1 / (1 + math.exp(6.0 - odds)), 1 / (1 + math.exp(-6.0 - odds))]
    given = [group(2, 1), group(2, 1, finished=[False, True]), group(2, 1, finished=[True, False])]
    assert ask(given) == pytest.approx(expected) and expected[1] < 0.5


def test_each_token_counts_on_log_odds_by_the_difference_of_lengths():
    ask = ComparisonCounter(Strengths(0.8), Penalties(missing_eos=1.0, per_token=0.25))
    comparisons = [
        group(2, 1, tokens=[7, 7]),
        group(2, 1, tokens=[9, 5]),
        group(2, 1, tokens=[5, 9]),
        group(2, 1, tokens=[3, 1], finished=[False, True]),
        group(2, 1, tokens=[1, 5], finished=[False, True]),  # what the one has in tokens the other has in its end
    ]
    odds = math.log(0.8 / 0.2)
    shifted = [1 / (1 + math.exp(-x)) for x in (odds - 1.0, odds + 1.0, odds - 1.5)]
    assert ask(comparisons) == pytest.approx([0.8, *shifted, 0.8])


def test_certainty_stays_certain_between_equal_lengths():
    ask = ComparisonCounter(Strengths(1.0), Penalties(per_token=0.5))
    odds = math.log(0.99 / 0.01)
    expected = [1.0, 1 / (1 + math.exp(0.5 - odds)), 1 / (1 + math.exp(5.0 - odds))]
    assert ask([group(2, 1), group(2, 1, tokens=[2, 1]), group(2, 1, tokens=[11, 1])]) == pytest.approx(expected)
    verdicts = find_preferences([group(2, 1, tokens=[11, 1])], Strengths(1.0), Penalties(per_token=0.5))
    assert verdicts.preferences == [Preference(1, 0, pytest.approx(1 - expected[2]))] and expected[2] < 0.5


class Says(Strengths):
    def answer(self, first, second):
        return self.probability


def test_an_answer_that_is_no_number_is_none():
    verdicts = find_preferences([group(1, 2)], Says(math.nan), Penalties(per_token=1.0))
    assert verdicts.preferences == [None] and (verdicts.duels, verdicts.unanswered) == (1, 1)


@pytest.mark.parametrize("number", [-0.1, 1.5, math.inf])
def test_a_number_that_is_no_probability_is_told_and_not_trained_on(number):
    with pytest.raises(ScoringError, match=f"Judge `strengths` returned {number:g} for a pair.*from 0 to 1, or None"):
        find_preferences([group(1, 2)], Says(number))
