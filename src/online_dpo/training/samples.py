"""`Samples`: what a log shows of the groups of its step, beside the metrics: distributions, and a few pairs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from online_dpo.runs.records import CompletionRecord, GroupRecord, PairRecord

WORDS = 400
"""Most characters that are shown of what a judge has said."""


@dataclass(frozen=True)
class PairSample:
    """A pair as people read it. ``why`` says in one line what made the one better than the other.

    >>> PairSample(12, "12-0-3-0", "Name a colour.", "Red.", "A fish.", 2.0, 0.0, 1.0, "words 2 against 0")
    """

    step: int
    group: str
    prompt: str
    chosen: str
    rejected: str
    chosen_score: float | None
    rejected_score: float | None
    probability: float
    why: str


COLUMNS = ("step", "group", "prompt", "chosen", "rejected", "chosen_score", "rejected_score", "probability", "why")
"""Names of the columns of a table of pairs, the fields of `PairSample`."""


@dataclass(frozen=True)
class Samples:
    """Of the groups of one step: numbers by the name of their distribution, and a few pairs."""

    step: int
    distributions: Mapping[str, Sequence[float]] = field(default_factory=dict)
    pairs: Sequence[PairSample] = ()


def samples_of(step: int, groups: Sequence[GroupRecord], most: int) -> Samples:
    """Return the distributions over all groups of a step, of the numbers that are finite, and at most ``most`` pairs of
    it, each of another group if there are enough.
    """
    return Samples(step, _distributions(groups), list(_pairs(groups))[:most])


def _distributions(groups: Sequence[GroupRecord]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}

    def add(name: str, *values: float | None) -> None:
        finite = (value for value in values if value is not None and math.isfinite(value))  # trackers refuse others
        found.setdefault(name, []).extend(finite)

    for group in groups:
        for completion in group.completions:
            add("length", completion.length)
            add("score", completion.score)
            add("token_log_ratio", *completion.log_ratios)
            for name, value in completion.rewards.items():
                add(f"reward/{name}", value)
        add("margin", *(pair.margin for pair in group.pairs))
        add("implied_margin", *(pair.implied for pair in group.pairs))
    return {name: values for name, values in found.items() if values}


def _pairs(groups: Sequence[GroupRecord]) -> Iterator[PairSample]:
    """The first pair of each group, then the second of each."""
    for place in range(max((len(group.pairs) for group in groups), default=0)):
        for group in groups:
            if place < len(group.pairs):
                yield _pair(group, group.pairs[place])


def _pair(group: GroupRecord, pair: PairRecord) -> PairSample:
    chosen, rejected = group.completions[pair.chosen], group.completions[pair.rejected]
    return PairSample(
        step=group.step,
        group=f"{group.step}-{group.rank}-{group.index}-{group.round}",
        prompt=_text(group),
        chosen=chosen.text,
        rejected=rejected.text,
        chosen_score=chosen.score,
        rejected_score=rejected.score,
        probability=pair.probability,
        why="; ".join(_reasons(group, pair, chosen, rejected)),
    )


def _text(group: GroupRecord) -> str:
    if isinstance(group.prompt, str):
        return group.prompt
    return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in group.prompt)


def _reasons(
    group: GroupRecord, pair: PairRecord, chosen: CompletionRecord, rejected: CompletionRecord
) -> Iterator[str]:
    """What speaks for the pair: each reward, each penalty, and what a judge said of the two."""
    for name, value in chosen.rewards.items():
        yield f"{name} {_number(value)} against {_number(rejected.rewards.get(name))}"
    for name in dict.fromkeys([*chosen.penalties, *rejected.penalties]):
        taken = _number(chosen.penalties.get(name, 0.0)), _number(rejected.penalties.get(name, 0.0))
        yield f"penalty for {name} {taken[0]} against {taken[1]}"
    for comparison in group.comparisons:
        if {comparison.first, comparison.second} == {pair.chosen, pair.rejected}:
            yield f"judge: {pair.probability:.3g}"
            words = [order.words for order in comparison.orders if order.words]
            yield from (f"judge says {text[:WORDS]!r}" for text in words[:1])


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"
