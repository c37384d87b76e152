"""How often the scorers, the judge and the labels of a run agree with a person's votes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from online_dpo.runs.votes import Vote
from online_dpo.stats.intervals import wilson_interval

Group = Mapping[str, Any]
"""A group as it stands in the completions of a run folder."""


@dataclass(frozen=True)
class Agreement:
    """How often one source prefers the same answer as a person.

    ``agreed`` of ``compared`` votes; ``undecided`` are those on which the source has no preference. ``kind`` is that of
    the source: a reward, the score (their sum), the judge, or the label that was trained on.

    >>> Agreement("helpful", "reward", agreed=31, compared=40, undecided=2).share
    0.775
    """

    name: str
    kind: str
    agreed: int
    compared: int
    undecided: int

    @property
    def share(self) -> float:
        """The share of votes with which it agrees."""
        return self.agreed / self.compared

    @property
    def interval(self) -> tuple[float, float]:
        """The bounds of the share's 95 % Wilson interval."""
        return wilson_interval(self.share, self.compared)


def agreements(votes: Iterable[Vote], group_of: Callable[[Vote], Group | None]) -> list[Agreement]:
    """The agreement of each source with those blind votes that prefer an answer and whose group is still there.

    Args:
        votes: one for each question.
        group_of: finds the group of a vote by its name; ``None`` if it has gone.
    """
    counts: dict[tuple[str, str], tuple[int, int, int]] = {}
    for vote in votes:
        group = group_of(vote)
        if vote.preferred is None or vote.completions is None or group is None or not vote.blind:
            continue
        if not _is_about(vote, group):
            continue
        better, worse = vote.completions if vote.choice == "first" else vote.completions[::-1]
        for name, kind, preference in preferences(group, better, worse):
            agreed, compared, undecided = counts.get((kind, name), (0, 0, 0))
            if preference:  # neither missing nor 0
                counts[kind, name] = (agreed + (preference > 0), compared + 1, undecided)
            else:
                counts[kind, name] = (agreed, compared, undecided + 1)
    return [Agreement(name, kind, *numbers) for (kind, name), numbers in counts.items() if numbers[1]]


def _is_about(vote: Vote, group: Group) -> bool:
    """Whether the group still has the texts that the vote is about: a run may have been started anew meanwhile."""
    completions = group.get("completions", [])
    places = vote.completions or ()
    if any(not 0 <= place < len(completions) for place in places):
        return False
    return [completions[place].get("text") for place in places] == [vote.first, vote.second]


def preferences(group: Group, one: int, other: int) -> Iterator[tuple[str, str, float | None]]:
    """What each source says of two completions: its name, its kind, and a number above 0 where it prefers ``one``, 0
    where it has no preference, and ``None`` where it has no answer.
    """
    completions = group["completions"]
    rewards, others = completions[one].get("rewards") or {}, completions[other].get("rewards") or {}
    for name in rewards:
        yield name, "reward", _difference(rewards[name], others.get(name))
    if len(rewards) > 1:
        yield "score", "score", _difference(completions[one].get("score"), completions[other].get("score"))
    for comparison in group.get("comparisons") or []:
        if {comparison["first"], comparison["second"]} == {one, other}:
            probability = comparison.get("probability")
            sign = 1 if comparison["first"] == one else -1
            yield "judge", "judge", None if probability is None else sign * (probability - 0.5)
    for pair in group.get("pairs") or []:
        if {pair["chosen"], pair["rejected"]} == {one, other}:
            yield "label", "label", 1.0 if pair["chosen"] == one else -1.0


def _difference(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other
