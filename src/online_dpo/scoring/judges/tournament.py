"""From a judge of two completions to the best and the worst of K, with few questions.

All completions meet in pairs; then the winners play each other until one is left, the best, and the losers until one is
left, the worst. That is ceil(3K/2) - 2 comparisons (Pohl 1972, "A sorting problem and its complexity": no way needs
fewer), and one more where best and worst have not met, which gives the probability that the one is better than the
other. Each round of all groups is one call of the judge.
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
from online_dpo.scoring.protocols import PairwiseScorer, describe, flat_list
from online_dpo.types import Group, Preference, Verdicts

Comparison = tuple[int, int]
Answers = list[float | None]
Contest = Generator[list[Comparison], Answers, Preference | None]
"""The rounds of one group: yields comparisons, is sent their answers, returns the outcome."""


class ComparisonCounter:
    """Asks a judge, but not about completions with the same text, and counts.

    ``penalties`` are taken from the judge's log-odds, see `Penalties.shifted`.
    """

    def __init__(self, judge: PairwiseScorer, penalties: Penalties = NO_PENALTIES) -> None:
        self._judge = judge
        self._penalties = penalties
        self.duels = 0
        self.unanswered = 0

    def __call__(self, comparisons: Sequence[Group]) -> Answers:
        """The probability that the first completion of each comparison is the better one; one half for the same text.

        Raises:
            ScoringError: the judge failed, or gave a number that is no probability (nan is no answer).
        """
        asked = [
            i
            for i, comparison in enumerate(comparisons)
            if comparison.completions[0].text != comparison.completions[1].text
        ]
        answers: Answers = [0.5] * len(comparisons)
        if asked:
            fought = [comparisons[i] for i in asked]
            with foreign(f"Judge `{self._judge.name}`", lambda: among_rows(fought)):
                replies = self._judge.prefer(fought)
            for i, reply in zip(asked, self._checked(replies, len(asked)), strict=True):
                answers[i] = self._probability(reply)
        self.duels += len(asked)
        self.unanswered += sum(answers[i] is None for i in asked)
        return [
            None if answer is None else self._penalties.shifted(answer, comparison)
            for answer, comparison in zip(answers, comparisons, strict=True)
        ]

    def _checked(self, replies: Any, expected: int) -> list[Any]:
        said = flat_list(replies, f"Judge `{self._judge.name}`")
        if len(said) != expected:
            raise ScoringError(f"Judge `{self._judge.name}` gave {len(said)} preferences for {expected} pairs.")
        return said

    def _probability(self, reply: float | None) -> float | None:
        if reply is not None and not isinstance(reply, (numbers.Real, torch.Tensor)):
            raise ScoringError(f"Judge `{self._judge.name}` says {describe(reply)} of a pair; wanted: a probability.")
        if reply is None or math.isnan(reply):
            return None
        if not 0 <= reply <= 1:
            raise ScoringError(
                f"Judge `{self._judge.name}` says {reply:g} of a pair. `prefer` returns the probability that the first "
                "completion is better, from 0 to 1, or None."
            )
        return reply


def find_preferences(groups: Sequence[Group], judge: PairwiseScorer, penalties: Penalties = NO_PENALTIES) -> Verdicts:
    """Best and worst completion of each group by the judge's comparisons.

    Of completions with the same text that have ended alike, the first stands for all. Where a comparison ends even, its
    first completion counts as the winner. Where it has no answer, neither goes on: two winners of earlier comparisons
    cannot become the best any more, two losers not the worst. A group has no preference where nobody is left, or where
    the last comparison, best against worst, has no answer.
    """
    ask = ComparisonCounter(judge, penalties)
    preferences: list[Preference | None] = [Preference(0, 1, 0.5)] * len(groups)  # all texts the same
    entrants = {p: distinct(group, range(len(group.completions))) for p, group in enumerate(groups)}
    contests = {p: _contest(found) for p, found in entrants.items() if len(found) > 1}
    for p, outcome in hold(groups, contests, ask).items():
        preferences[p] = outcome
    return Verdicts(preferences, ask.duels, ask.unanswered)


def hold(
    groups: Sequence[Group], contests: Mapping[int, Contest], ask: ComparisonCounter
) -> dict[int, Preference | None]:
    """The outcome of each contest, by the index of its group; a round of all of them is one call of the judge."""
    ended: dict[int, Preference | None] = {}
    waiting = {p: next(contest) for p, contest in contests.items()}
    while waiting:
        comparisons = [(p, comparison) for p, wanted in waiting.items() for comparison in wanted]
        answers = iter(ask([_comparison(groups[p], comparison) for p, comparison in comparisons]))
        replies = {p: [next(answers) for _ in wanted] for p, wanted in waiting.items()}
        waiting = {}
        for p, reply in replies.items():
            try:
                waiting[p] = contests[p].send(reply)
            except StopIteration as end:
                ended[p] = end.value
    return ended


class Rounds:
    """The comparisons of one group that have been fought, and who goes on."""

    def __init__(self) -> None:
        self._known: dict[Comparison, float | None] = {}

    def play(self, comparisons: list[Comparison]) -> Generator[list[Comparison], Answers, None]:
        self._known.update(zip(comparisons, (yield comparisons), strict=True))

    def survivors(self, entrants: list[int], place: int) -> list[int]:
        """Of each comparison the winner (place 0) or the loser (1); an entrant without an opponent goes on."""
        ended = [self._outcome(comparison) for comparison in neighbours(entrants)]
        return [end[place] for end in ended if end is not None] + _alone(entrants)

    def last(self, best: int, worst: int) -> Contest:
        """The preference for the best over the worst: they meet unless they have met."""
        if (worst, best) in self._known:
            answer = self._known[worst, best]
            return None if answer is None else Preference(best, worst, 1 - answer)
        if (best, worst) not in self._known:
            yield from self.play([(best, worst)])
        answer = self._known[best, worst]
        return None if answer is None else Preference(best, worst, answer)

    def _outcome(self, comparison: Comparison) -> Comparison | None:
        """Winner and loser."""
        answer = self._known[comparison]
        if answer is None:
            return None
        return comparison if answer >= 0.5 else (comparison[1], comparison[0])


def _contest(everybody: list[int]) -> Contest:
    rounds = Rounds()
    yield from rounds.play(neighbours(everybody))
    late = _alone(everybody)  # has not played: it may be the best, or else the worst
    winners = rounds.survivors(everybody, 0)
    losers = [k for k in rounds.survivors(everybody, 1) if k not in late]
    while len(winners) > 1 or len(losers) > 1:
        yield from rounds.play(neighbours(winners) + neighbours(losers))
        winners, losers = rounds.survivors(winners, 0), rounds.survivors(losers, 1)
    if late and winners and losers and winners != late:
        losers += late
        yield from rounds.play(neighbours(losers))
        losers = rounds.survivors(losers, 1)
    if not winners or not losers:
        return None
    [best], [worst] = winners, losers
    return (yield from rounds.last(best, worst))


def neighbours(entrants: Sequence[int]) -> list[Comparison]:
    """Each comparison of a round: the first meets the second, the third the fourth."""
    return list(zip(entrants[0::2], entrants[1::2], strict=False))


def _alone(entrants: list[int]) -> list[int]:
    """Who has no opponent among an odd number of entrants."""
    return entrants[len(entrants) // 2 * 2 :]


def distinct(group: Group, taking_part: Sequence[int]) -> list[int]:
    """Of completions with the same text that have ended alike the first one that takes part."""
    first: dict[tuple[str, str], int] = {}
    for k in taking_part:
        completion = group.completions[k]
        first.setdefault((completion.text, completion.finish_reason), k)
    return list(first.values())


def _comparison(group: Group, comparison: Comparison) -> Group:
    return Group(group.prompt, (group.completions[comparison[0]], group.completions[comparison[1]]))
