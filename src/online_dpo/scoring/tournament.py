"""From a judge of two completions to the best and the worst of K, with few questions.

All completions meet in pairs; then the winners play each other until one is left, the best, and the losers until one is
left, the worst. That is ceil(3K/2) - 2 duels (Pohl 1972, "A sorting problem and its complexity": no way needs fewer),
and one more where best and worst have not met, which gives the probability that the one is better than the other. Each
round of all groups is one call of the judge.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence

from online_dpo.chance import sigmoid
from online_dpo.scoring.scorer import PairwiseScorer
from online_dpo.types import Completion, Group, Preference, Verdicts

CERTAIN = 0.99
"""What a judge's certainty counts where `missing_eos_penalty` is taken from it: certain log-odds are infinite."""

Duel = tuple[int, int]
Answers = list[float | None]


class DuelCounter:
    """Asks a judge, but not about completions with the same text, and counts.

    Args:
        missing_eos_penalty: taken from the log-odds of a completion that did not end by itself when it meets one that
            did. An answer beyond `CERTAIN` counts as `CERTAIN` there.
    """

    def __init__(self, judge: PairwiseScorer, missing_eos_penalty: float | None) -> None:
        self._judge = judge
        self._penalty = missing_eos_penalty or 0.0
        self.duels = 0
        self.unanswered = 0

    def __call__(self, duels: Sequence[Group]) -> Answers:
        """The probability that the first completion of each duel is the better one; one half for the same text."""
        asked = [i for i, duel in enumerate(duels) if duel.completions[0].text != duel.completions[1].text]
        answers: Answers = [0.5] * len(duels)
        replies = self._judge.prefer([duels[i] for i in asked]) if asked else []
        for i, reply in zip(asked, replies, strict=True):
            answers[i] = reply
        self.duels += len(asked)
        self.unanswered += sum(reply is None for reply in replies)
        return [
            None if answer is None else _less_penalty(answer, duel.completions, self._penalty)
            for answer, duel in zip(answers, duels, strict=True)
        ]


def find_preferences(groups: Sequence[Group], judge: PairwiseScorer, missing_eos_penalty: float | None) -> Verdicts:
    """Best and worst completion of each group by the judge's duels.

    Of completions with the same text that have ended alike, the first stands for all. Where a duel ends even, its first
    completion counts as the winner. Where it has no answer, neither goes on: two winners of earlier duels cannot become
    the best any more, two losers not the worst. A group has no preference where nobody is left, or where the last duel,
    best against worst, has no answer.
    """
    ask = DuelCounter(judge, missing_eos_penalty)
    preferences: list[Preference | None] = [Preference(0, 1, 0.5)] * len(groups)  # all texts the same
    entrants = {p: found for p, group in enumerate(groups) if len(found := _distinct(group)) > 1}
    contests = {p: _contest(found) for p, found in entrants.items()}
    waiting = {p: next(contest) for p, contest in contests.items()}
    while waiting:
        duels = [(p, duel) for p, wanted in waiting.items() for duel in wanted]
        answers = iter(ask([_duel(groups[p], duel) for p, duel in duels]))
        replies = {p: [next(answers) for _ in wanted] for p, wanted in waiting.items()}
        waiting = {}
        for p, reply in replies.items():
            try:
                waiting[p] = contests[p].send(reply)
            except StopIteration as end:
                preferences[p] = end.value
    return Verdicts(preferences, ask.duels, ask.unanswered)


def _contest(everybody: list[int]) -> Generator[list[Duel], Answers, Preference | None]:
    """The rounds of one group: yields duels, is sent their answers, returns the outcome."""
    known: dict[Duel, float | None] = {}

    def play(duels: list[Duel]) -> Generator[list[Duel], Answers, None]:
        known.update(zip(duels, (yield duels), strict=True))

    def outcome(duel: Duel) -> Duel | None:
        """Winner and loser."""
        answer = known[duel]
        if answer is None:
            return None
        return duel if answer >= 0.5 else (duel[1], duel[0])

    def survivors(entrants: list[int], place: int) -> list[int]:
        """Of each duel the winner (place 0) or the loser (1); an entrant without an opponent goes on."""
        ended = [outcome(duel) for duel in _duels(entrants)]
        return [end[place] for end in ended if end is not None] + _alone(entrants)

    yield from play(_duels(everybody))
    late = _alone(everybody)  # has not played: it may be the best, or else the worst
    winners = survivors(everybody, 0)
    losers = [k for k in survivors(everybody, 1) if k not in late]
    while len(winners) > 1 or len(losers) > 1:
        yield from play(_duels(winners) + _duels(losers))
        winners, losers = survivors(winners, 0), survivors(losers, 1)
    if late and winners and losers and winners != late:
        losers += late
        yield from play(_duels(losers))
        losers = survivors(losers, 1)
    if not winners or not losers:
        return None
    [best], [worst] = winners, losers
    if (worst, best) in known:
        answer = known[worst, best]
        return None if answer is None else Preference(best, worst, 1 - answer)
    if (best, worst) not in known:
        yield from play([(best, worst)])
    answer = known[best, worst]
    return None if answer is None else Preference(best, worst, answer)


def _duels(entrants: Sequence[int]) -> list[Duel]:
    return list(zip(entrants[0::2], entrants[1::2], strict=False))


def _alone(entrants: list[int]) -> list[int]:
    """Who has no opponent among an odd number of entrants."""
    return entrants[len(entrants) // 2 * 2 :]


def _distinct(group: Group) -> list[int]:
    first: dict[tuple[str, str], int] = {}
    for k, completion in enumerate(group.completions):
        first.setdefault((completion.text, completion.finish_reason), k)
    return list(first.values())


def _duel(group: Group, duel: Duel) -> Group:
    return Group(group.prompt, (group.completions[duel[0]], group.completions[duel[1]]))


def _less_penalty(answer: float, completions: Sequence[Completion], penalty: float) -> float:
    unfinished = [completion.finish_reason != "stop" for completion in completions]
    shift = penalty * (unfinished[1] - unfinished[0])
    if shift == 0.0:
        return answer
    answer = min(max(answer, 1 - CERTAIN), CERTAIN)
    return sigmoid(math.log(answer / (1 - answer)) + shift)
