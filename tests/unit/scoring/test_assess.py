"""`Assessor`, built alone: scorers, a judge, or a judge for the highest scores."""

import pytest

from online_dpo.scoring.assess import AssessmentOptions, Assessor
from online_dpo.scoring.judges.adapters import FunctionJudge
from online_dpo.scoring.penalties import Penalties
from online_dpo.scoring.protocols import Counts
from online_dpo.scoring.rewards.function import FunctionScorer
from online_dpo.types import Preference, Scores, Verdicts
from support import tiny


def groups():
    first, second = tiny.prompts([3, 4])
    return [
        tiny.group(first, [[5, 6, 1], [7, 8, 9, 1], [10, 1]]),
        tiny.group(second, [[11, 12], [13, 1], [14, 15, 16, 1]]),  # the first one has not ended
    ]


def having(**options):
    return lambda: AssessmentOptions(**options)


def lengths(completions, **_):
    return [float(len(text.split())) for text in completions]


def shorter(prompt, first, second):
    return 0.9 if len(first.split()) < len(second.split()) else 0.1


LENGTHS = [[2.0, 3.0, 1.0], [2.0, 1.0, 3.0]]


@pytest.mark.smoke
def test_scorers_give_numbers_by_weight_less_penalties():
    scorers = [FunctionScorer(lengths, "lengths"), FunctionScorer(lambda completions, **_: [1.0] * 6, "one")]
    assessment = Assessor(scorers, options=having(weights=[2.0, 0.5], penalties=Penalties(missing_eos=10.0))).assess(
        groups()
    )
    by_scorer = {"lengths": LENGTHS, "one": [[1.0] * 3] * 2}
    weights, penalties = {"lengths": 2.0, "one": 0.5}, [[{}, {}, {}], [{"missing_eos": 10.0}, {}, {}]]
    assert assessment == Scores([[4.5, 6.5, 2.5], [-5.5, 2.5, 6.5]], by_scorer, weights=weights, penalties=penalties)


def test_a_judge_gives_preferences():
    assessor = Assessor([], FunctionJudge(shorter))
    assessment = assessor.assess(groups())
    assert isinstance(assessment, Verdicts) and assessment.scores is None
    assert assessment.preferences == [Preference(2, 1, pytest.approx(0.9)), Preference(1, 2, pytest.approx(0.9))]


def test_a_judge_beside_scorers_sees_the_highest_scores():
    assessor = Assessor([FunctionScorer(lengths, "lengths")], FunctionJudge(shorter), having(judge_top=2))
    assessment = assessor.assess(groups())
    assert isinstance(assessment, Verdicts) and assessment.scores == Scores(
        LENGTHS, {"lengths": LENGTHS}, weights={"lengths": 1.0}
    )
    # the two longest meet, the shorter of them wins; the shortest of all is the rejected one, whatever the judge likes
    assert [(p.chosen, p.rejected) for p in assessment.preferences if p] == [(0, 2), (0, 1)]


def test_comparisons_are_asked_with_the_penalties():
    first, second = groups()
    pair = tiny.group(second.prompt, [[11, 12], [13, 14, 1]])
    judge = FunctionJudge(lambda prompt, first, second: 0.5)
    assert Assessor([], judge).preferences([pair]) == [0.5]
    [penalised] = Assessor([], judge, having(penalties=Penalties(missing_eos=1.0))).preferences([pair])
    assert penalised == pytest.approx(1 / (1 + 2.718281828**1.0), rel=1e-6)


def test_without_groups_nothing_is_asked_and_nothing_counted():
    def never(completions, **_):
        raise AssertionError

    assessor = Assessor([FunctionScorer(never)])
    assert assessor.assess([]) == Scores([], {}) and assessor.drain_counts() == Counts({}, {})
