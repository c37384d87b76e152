"""A tournament that finds the best and the worst of K completions with few comparisons of two.

All completions are compared in pairs. Then the winners are compared until one is left, the best, and the losers until
one is left, the worst. That takes ceil(3K/2) - 2 comparisons, the minimum (Pohl 1972, "A sorting problem and its
complexity"). If best and worst have not been compared, one more comparison gives the probability that the best is
better than the worst. Each round of all groups is one call of the judge.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import torch

from online_dpo.errors import ScoringError
from online_dpo.foreign import among_rows, foreign
from online_dpo.scoring.penalties import NO_PENALTIES, Penalties
from online_dpo.scoring.protocols import PairwiseScorer, describe, flat_list, is_own
from online_dpo.scoring.questions import keeping_questions
from online_dpo.scoring.time_limit import call_in_time
from online_dpo.types import Comparison, Group, Preference, Question, Verdicts

Contest = tuple[int, int]
"""The indices of two completions of a group."""

Answers = list[float | None]
"""For each comparison, the probability that its first completion is better; ``None`` without an answer."""

Tournament = Generator[list[Contest], Answers, Preference | None]
"""The rounds of one group: yields comparisons, receives their answers, returns the preference."""


class ComparisonCounter:
    """Compares completions with a judge, checks its answers, and counts comparisons and missing answers.

    The judge is not asked about two completions with the same text. ``penalties`` are subtracted from the log-odds of
    its answers (see `Penalties.shifted`). ``questions`` has what the judge tells of each comparison of the latest call,
    ``None`` where it was not asked.
    """

    def __init__(self, judge: PairwiseScorer, penalties: Penalties = NO_PENALTIES) -> None:
        self._judge = judge
        self._penalties = penalties
        self.comparisons = 0
        self.unanswered = 0
        self.questions: list[tuple[Question, ...] | None] = []

    def __call__(self, comparisons: Sequence[Group]) -> Answers:
        """Return the probability that the first completion of each comparison is better; 0.5 for the same text.

        Raises:
            ScoringError: the judge failed, or returned a number that is not a probability (nan means no answer).
        """
        asked = [
            i
            for i, comparison in enumerate(comparisons)
            if comparison.completions[0].text != comparison.completions[1].text
        ]
        answers: Answers = [0.5] * len(comparisons)
        self.questions = [None] * len(comparisons)
        if asked:
            different = [comparisons[i] for i in asked]
            with foreign(f"Judge `{self._judge.name}`", lambda: among_rows(different)), keeping_questions() as told:
                returned = self._prefer(different)
            for i, answer in zip(asked, self._checked_list(returned, len(asked)), strict=True):
                answers[i] = self._checked_probability(answer)
                self.questions[i] = told.of(comparisons[i])
        self.comparisons += len(asked)
        self.unanswered += sum(answers[i] is None for i in asked)
        return [
            None if answer is None else self._penalties.shifted(answer, comparison)
            for answer, comparison in zip(answers, comparisons, strict=True)
        ]

    def _prefer(self, comparisons: Sequence[Group]) -> Any:
        """The judge's answers, with the time limit; a judge of this package puts it around what it calls."""
        if is_own(self._judge):
            return self._judge.prefer(comparisons)
        who = f"Judge `{self._judge.name}`"
        return call_in_time(lambda: self._judge.prefer(comparisons), who, lambda: among_rows(comparisons))

    def _checked_list(self, returned: Any, expected: int) -> list[Any]:
        answers = flat_list(returned, f"Judge `{self._judge.name}`")
        if len(answers) != expected:
            raise ScoringError(
                f"Judge `{self._judge.name}` gave {len(answers)} preferences for {expected} pairs. Return one for each."
            )
        return answers

    def _checked_probability(self, answer: float | None) -> float | None:
        if answer is not None and not isinstance(answer, (numbers.Real, torch.Tensor)):
            raise ScoringError(
                f"Judge `{self._judge.name}` returned {describe(answer)} for a pair; wanted: a probability."
            )
        if answer is None or math.isnan(answer):
            return None
        if not 0 <= answer <= 1:
            raise ScoringError(
                f"Judge `{self._judge.name}` returned {answer:g} for a pair. `prefer` returns the probability that the "
                "first completion is better, from 0 to 1, or None."
            )
        return answer


def find_preferences(groups: Sequence[Group], judge: PairwiseScorer, penalties: Penalties = NO_PENALTIES) -> Verdicts:
    """Find the best and the worst completion of each group by a judge's comparisons.

    Of completions with the same text and finish reason, only the first takes part. If a comparison ends even, its first
    completion counts as the winner. If it has no answer, neither completion goes on: two winners of earlier comparisons
    can no longer become the best, two losers no longer the worst. A group has no preference if no completion is left,
    or if the last comparison, best against worst, has no answer.
    """
    compare = ComparisonCounter(judge, penalties)
    preferences: list[Preference | None] = [Preference(0, 1, 0.5)] * len(groups)  # if all texts are the same
    entrants = {p: distinct_completions(group, range(len(group.completions))) for p, group in enumerate(groups)}
    tournaments = {p: _best_against_worst(indices) for p, indices in entrants.items() if len(indices) > 1}
    results, made = run_tournaments(groups, tournaments, compare)
    for p, preference in results.items():
        preferences[p] = preference
    return Verdicts(
        preferences, compare.comparisons, compare.unanswered, comparisons=made, penalties=penalties.parts(groups)
    )


def run_tournaments(
    groups: Sequence[Group], tournaments: Mapping[int, Tournament], compare: ComparisonCounter
) -> tuple[dict[int, Preference | None], list[tuple[Comparison, ...]]]:
    """Run all tournaments to their end and return their results, and the comparisons that were asked in each group.
    The keys are indices of groups.

    The next rounds of all tournaments are one call of the judge.
    """
    results: dict[int, Preference | None] = {}
    made: list[list[Comparison]] = [[] for _ in groups]
    waiting = {p: next(tournament) for p, tournament in tournaments.items()}
    while waiting:
        comparisons = [(p, comparison) for p, requested in waiting.items() for comparison in requested]
        answered = compare([_comparison_group(groups[p], comparison) for p, comparison in comparisons])
        for (p, contest), answer, questions in zip(comparisons, answered, compare.questions, strict=True):
            if questions is not None:
                made[p].append(Comparison(*contest, None if answer is None else float(answer), questions))
        answers = iter(answered)
        answers_of = {p: [next(answers) for _ in requested] for p, requested in waiting.items()}
        waiting = {}
        for p, answers_of_round in answers_of.items():
            try:
                waiting[p] = tournaments[p].send(answers_of_round)
            except StopIteration as end:
                results[p] = end.value
    return results, [tuple(of_group) for of_group in made]


class Rounds:
    """The comparisons that one group's tournament has made so far, and which completions go on."""

    def __init__(self) -> None:
        self._answers: dict[Contest, float | None] = {}

    def play(self, comparisons: list[Contest]) -> Generator[list[Contest], Answers, None]:
        """Request a round of comparisons and record their answers."""
        self._answers.update(zip(comparisons, (yield comparisons), strict=True))

    def winners(self, entrants: list[int]) -> list[int]:
        """The winner of each comparison between adjacent entrants, and the entrant without an opponent."""
        return [winner for winner, _ in self._results(entrants)] + without_opponent(entrants)

    def losers(self, entrants: list[int]) -> list[int]:
        """The loser of each comparison between adjacent entrants, and the entrant without an opponent."""
        return [loser for _, loser in self._results(entrants)] + without_opponent(entrants)

    def final(self, best: int, worst: int) -> Tournament:
        """Return the preference for the best over the worst. They are compared unless they already were."""
        if (worst, best) in self._answers:
            answer = self._answers[worst, best]
            return None if answer is None else Preference(best, worst, 1 - answer)
        if (best, worst) not in self._answers:
            yield from self.play([(best, worst)])
        answer = self._answers[best, worst]
        return None if answer is None else Preference(best, worst, answer)

    def _results(self, entrants: list[int]) -> list[Contest]:
        """(winner, loser) of each comparison between adjacent entrants; comparisons without an answer are left out."""
        answers = {comparison: self._answers[comparison] for comparison in adjacent_pairs(entrants)}
        return [
            (first, second) if answer >= 0.5 else (second, first)
            for (first, second), answer in answers.items()
            if answer is not None
        ]


def _best_against_worst(entrants: list[int]) -> Tournament:
    rounds = Rounds()
    yield from rounds.play(adjacent_pairs(entrants))
    late = without_opponent(entrants)  # not compared yet: it may become the best, or else the worst
    winners = rounds.winners(entrants)
    losers = [k for k in rounds.losers(entrants) if k not in late]
    while len(winners) > 1 or len(losers) > 1:
        yield from rounds.play(adjacent_pairs(winners) + adjacent_pairs(losers))
        winners, losers = rounds.winners(winners), rounds.losers(losers)
    if late and winners and losers and winners != late:
        losers += late
        yield from rounds.play(adjacent_pairs(losers))
        losers = rounds.losers(losers)
    if not winners or not losers:
        return None
    [best], [worst] = winners, losers
    return (yield from rounds.final(best, worst))


def adjacent_pairs(entrants: Sequence[int]) -> list[Contest]:
    """The comparisons of a round: the first entrant with the second, the third with the fourth, and so on."""
    return list(zip(entrants[0::2], entrants[1::2], strict=False))


def without_opponent(entrants: list[int]) -> list[int]:
    """The last of an odd number of entrants, which has no opponent in a round; empty for an even number."""
    return entrants[len(entrants) // 2 * 2 :]


def distinct_completions(group: Group, indices: Sequence[int]) -> list[int]:
    """Of completions with the same text and finish reason, the first one among ``indices``."""
    first: dict[tuple[str, str], int] = {}
    for k in indices:
        completion = group.completions[k]
        first.setdefault((completion.text, completion.finish_reason), k)
    return list(first.values())


def _comparison_group(group: Group, comparison: Contest) -> Group:
    first, second = comparison
    return Group(group.prompt, (group.completions[first], group.completions[second]))
