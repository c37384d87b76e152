"""A judge among the highest scores: the right pair, by few comparisons, and nothing lost silently."""

import itertools
import random

import pytest

from online_dpo.scoring.judges.top_k import judge_the_top
from online_dpo.scoring.penalties import Penalties
from online_dpo.types import Completion, Group, Preference, Prompt, Scores
from support.asked_judge import AskedJudge

PROMPT = Prompt("p", (1,), row=0)


class Taste(AskedJudge):
    """Prefers the text that stands earlier in its list; ``silent`` comparisons have no answer."""

    name = "taste"

    def __init__(self, order, probability=0.9, silent=()):
        super().__init__(silent)
        self.order, self.probability = list(order), probability

    def preference(self, first, second):
        return self.probability if self.order.index(first) < self.order.index(second) else 1 - self.probability


def group(texts, finished=None):
    ends = finished or [True] * len(texts)
    return Group(
        PROMPT,
        tuple(
            Completion((ord(text),), (0.0,), "stop" if end else "length", 0, text)
            for text, end in zip(texts, ends, strict=True)
        ),
    )


def find(texts, scores, judge, top=3, **options):
    """One group whose completions have these texts and scores."""
    verdicts = judge_the_top([group(texts)], Scores([list(scores)], {}), judge, top, **options)
    return verdicts.preferences[0], verdicts


def about(chosen, rejected, probability):
    return Preference(chosen, rejected, pytest.approx(probability))


@pytest.mark.parametrize("top", [2, 3, 4, 5, 8])
def test_the_judges_best_of_the_top_against_the_lowest_score_by_as_many_comparisons_as_top(top):
    texts = "abcdefgh"
    for seed in range(60):
        rng = random.Random(seed)
        scores = rng.sample(range(100), 8)
        order = rng.sample(texts, 8)
        judge = Taste(order)
        found, verdicts = find(texts, scores, judge, top)
        by_score = sorted(range(8), key=lambda k: -scores[k])
        best = min(by_score[:top], key=lambda k: order.index(texts[k]))
        worst = by_score[-1] if by_score[-1] != best else by_score[-2]
        better = order.index(texts[best]) < order.index(texts[worst])
        assert found == about(best, worst, 0.9 if better else 0.1)
        asked = [frozenset(pair) for call in judge.calls for pair in call]
        assert len(asked) == len(set(asked)) == verdicts.duels <= top
        if top < 8:
            assert len(asked) == top  # the lowest score is not among them, so that the two have not met


def test_each_round_of_all_groups_is_one_call_and_scores_say_who_meets_whom():
    groups = [group("abcd"), group("ab"), group("cdab")]
    judge = Taste("abcd")
    scores = Scores([[1.0, 4.0, 2.0, 3.0], [0.0, 1.0], [1.0, 9.0, 8.0, 7.0]], {})
    verdicts = judge_the_top(groups, scores, judge, 3)
    # rounds: the highest against the second, then the third; two have met; last, the winner and the lowest score
    assert judge.calls == [[("b", "d"), ("b", "a"), ("d", "a")], [("b", "c"), ("a", "b")], [("b", "a"), ("a", "c")]]
    assert verdicts.preferences == [about(1, 0, 0.1), about(0, 1, 0.9), about(2, 0, 0.9)]
    assert verdicts.duels == 7 and verdicts.unanswered == 0 and verdicts.scores is scores


def test_a_judge_that_likes_the_lowest_score_best_contradicts_the_scores():
    found, _ = find("abcd", [4.0, 3.0, 2.0, 1.0], Taste("dcba"))
    assert found == about(2, 3, 0.1)


def test_the_winner_is_never_the_rejected_one():
    found, verdicts = find("abc", [3.0, 2.0, 1.0], Taste("cba"))  # the lowest score wins all: rejected is the one above
    assert found == about(2, 1, 0.9) and verdicts.duels == 2
    found, verdicts = find("ab", [1.0, 2.0], Taste("ab"), top=2)
    assert found == about(0, 1, 0.9) and verdicts.duels == 1
    found, verdicts = find("ab", [1.0, 2.0], Taste("ab"), top=8)
    assert found == about(0, 1, 0.9) and verdicts.duels == 1


def test_pairs_are_formed_by_the_normalised_scores():
    scores = Scores([[1.0, 2.0, 3.0]], {}, normalized=[[3.0, 2.0, 1.0]])
    verdicts = judge_the_top([group("abc")], scores, Taste("abc"), 2)
    assert verdicts.preferences == [about(0, 2, 0.9)]


def test_without_a_score_a_completion_takes_no_part():
    found, verdicts = find("abcd", [None, 1.0, None, 2.0], Taste("abcd"))
    assert found == about(1, 3, 0.9) and verdicts.duels == 1
    for scores in ([None, None, 5.0, None], [None] * 4):
        found, verdicts = find("abcd", scores, Taste("abcd"))
        assert found is None and verdicts.duels == verdicts.unanswered == 0


def test_between_equal_scores_the_earlier_is_the_higher():
    judge = Taste("dcba")
    found, _ = find("abcd", [1.0, 1.0, 1.0, 1.0], judge, top=2)
    assert judge.calls == [[("a", "b")], [("b", "d")]] and found == about(1, 3, 0.1)


def test_the_same_text_is_one_that_stands_at_its_first_place():
    judge = Taste("abc")
    found, verdicts = find("aabbc", [5.0, 5.0, 4.0, 4.0, 1.0], judge, top=3)
    assert judge.calls == [[("a", "b")], [("a", "c")]] and found == about(0, 4, 0.9)
    found, verdicts = find("aab", [None, 5.0, 1.0], Taste("ab"))
    assert found == about(1, 2, 0.9)
    found, verdicts = find("aaa", [None, 5.0, 5.0], Taste("a"))
    assert found == Preference(1, 2, 0.5) and verdicts.duels == 0


def test_an_even_comparison_is_won_by_the_higher_score_and_an_even_last_one_is_even():
    found, verdicts = find("abcd", [1.0, 2.0, 3.0, 4.0], Taste("abcd", probability=0.5))
    assert found == Preference(3, 0, 0.5) and verdicts.duels == 3


@pytest.mark.parametrize(
    "silent, expected, comparisons",
    [
        ([("a", "b")], about(2, 3, 0.9), 2),  # neither goes on; the third has no opponent
        ([("a", "c")], None, 2),
        ([("a", "d")], None, 3),
        ([("a", "b"), ("c", "d")], None, 2),
        ([("b", "c")], about(0, 3, 0.9), 3),  # never asked
    ],
)
def test_comparisons_without_an_answer(silent, expected, comparisons):
    found, verdicts = find("abcd", [4.0, 3.0, 2.0, 1.0], Taste("abcd", silent=silent))
    assert found == expected and verdicts.duels == comparisons
    assert verdicts.unanswered == (0 if silent == [("b", "c")] else len(silent))


def test_penalties_are_taken_from_the_judges_answers():
    """c is best but did not end: before the penalty it beats all, after it only scores stand for it."""
    groups = [group("abc", finished=[True, True, False])]
    scores = Scores([[3.0, 1.0, 2.0]], {})
    assert judge_the_top(groups, scores, Taste("cab"), 2).preferences == [about(2, 1, 0.9)]
    verdicts = judge_the_top(groups, scores, Taste("cab"), 2, Penalties(missing_eos=5.0))
    assert verdicts.preferences == [about(0, 1, 0.9)]


def test_chosen_and_rejected_differ_however_odd_the_judge_and_the_scores():
    for seed, top in itertools.product(range(100), (2, 3, 5)):
        rng = random.Random(seed)

        class Coin(Taste):
            def answer(self, first, second, rng=rng):
                return rng.choice([0.0, 0.3, 0.5, 0.8, 1.0, None])

        groups = [group("abcdefgh"[:k]) for k in range(2, 9)]
        rows: list[list[float | None]] = [[rng.choice([None, 1.0, 2.0, 3.0]) for _ in g.completions] for g in groups]
        verdicts = judge_the_top(groups, Scores(rows, {}), Coin(""), top)
        for row, preference in zip(rows, verdicts.preferences, strict=True):
            if preference is not None:
                assert preference.chosen != preference.rejected
                assert row[preference.chosen] is not None and row[preference.rejected] is not None

    assert judge_the_top([], Scores([], {}), Taste(""), 3).preferences == []
