"""What the recorded groups of a run add up to, in one pass that keeps numbers and places, not texts."""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from online_dpo.runs.plain_json import number
from online_dpo.runs.reading import RunFolder, StepFrame
from online_dpo.runs.report.series import Series

Row = dict[str, Any]


@dataclass
class Seen:
    """Where a prompt was answered first and last: the step, the frame, and the group's place in it."""

    first_step: int
    first: tuple[StepFrame, int]
    last_step: int
    last: tuple[StepFrame, int]


@dataclass
class Judged:
    """What the orders of a judge's comparisons add up to.

    ``orders`` questions, of which ``unanswered`` without an answer; ``first_place`` is the sum of the probabilities
    given to the answer shown first, over the ``answered`` orders of comparisons that were asked ``both`` ways;
    ``disagreed`` are those of them whose orders had different winners. ``words`` are examples.
    """

    comparisons: int = 0
    orders: int = 0
    unanswered: int = 0
    both: int = 0
    disagreed: int = 0
    first_place: float = 0.0
    seconds: float = 0.0
    tokens: float = 0.0
    cost: float = 0.0
    words: list[str] = field(default_factory=list)

    @property
    def position_bias(self) -> float | None:
        """Mean probability given to the answer that was shown first; 0.5 is fair."""
        return self.first_place / (2 * self.both) if self.both else None

    @property
    def disagreement(self) -> float | None:
        """Share of comparisons asked in both orders whose orders had different winners."""
        return self.disagreed / self.both if self.both else None


@dataclass
class GroupFacts:
    """The recorded groups of a run.

    ``reasons`` has the steps of the groups without a pair, by reason; ``with_pairs`` those of the others. ``lengths``,
    ``scores`` and ``score_steps`` are of all completions of the policy with a score, ``margins`` and ``implied`` of the
    pairs. ``prompts`` says where the policy answered each prompt first and last; ``kept`` has the groups that were
    asked for.
    """

    groups: int = 0
    unreadable: int = 0
    last_step: int = 0
    reasons: dict[str, array] = field(default_factory=lambda: defaultdict(lambda: array("d")))
    with_pairs: array = field(default_factory=lambda: array("d"))
    lengths: array = field(default_factory=lambda: array("d"))
    scores: array = field(default_factory=lambda: array("d"))
    score_steps: array = field(default_factory=lambda: array("d"))
    margins: Series = field(default_factory=Series)
    implied: Series = field(default_factory=Series)
    longer_chosen: Counter[str] = field(default_factory=Counter)
    finish: Counter[str] = field(default_factory=Counter)
    judged: Judged = field(default_factory=Judged)
    prompts: dict[bytes, Seen] = field(default_factory=dict)
    kept: dict[str, Row] = field(default_factory=dict)
    _within: np.ndarray = field(default_factory=lambda: np.zeros(3))

    @property
    def correlation(self) -> float | None:
        """The correlation of length and score over all completions."""
        x, y = np.asarray(self.lengths), np.asarray(self.scores)
        if len(x) < 3 or not x.std() or not y.std():
            return None
        return float(np.corrcoef(x, y)[0, 1])

    @property
    def correlation_within(self) -> float | None:
        """The same among the answers to one prompt: what pairs teach of length."""
        xx, yy, xy = self._within
        return float(xy / math.sqrt(xx * yy)) if xx > 0 and yy > 0 else None

    @property
    def accuracy(self) -> float | None:
        """Share of the pairs whose chosen answer the policy's own implied reward puts first."""
        return float(np.mean(np.asarray(self.implied.values) > 0)) if len(self.implied) else None

    def add(self, group: Row, at: StepFrame, place: int) -> None:
        """Adds a group.

        Raises:
            AttributeError, IndexError, KeyError, TypeError: it is none; it may have been added in part.
        """
        step, completions, pairs = group["step"], group["completions"], group.get("pairs", [])
        self.groups += 1
        self.last_step = max(self.last_step, step)
        if pairs:
            self.with_pairs.append(step)
        else:
            self.reasons[str(group.get("reason") or "not recorded")].append(step)
        self._add_scores([completion for completion in completions if is_by_policy(completion)], step)
        for pair in pairs:
            self._add_pair(pair, completions, step)
        for comparison in group.get("comparisons", []):
            _add_comparison(self.judged, comparison)
        if group.get("round", 0) == 0 and any(is_by_policy(completion) for completion in completions):
            self._add_prompt(group, step, (at, place))

    def _add_scores(self, completions: list[Row], step: int) -> None:
        self.finish.update(str(completion.get("finish")) for completion in completions)
        scored = [(c["length"], score) for c in completions if (score := number(c.get("score"))) is not None]
        for length, score in scored:
            self.lengths.append(length)
            self.scores.append(score)
            self.score_steps.append(step)
        if len(scored) > 1:
            mean_x, mean_y = (sum(part) / len(scored) for part in zip(*scored, strict=True))
            for x, y in scored:
                self._within += (x - mean_x) ** 2, (y - mean_y) ** 2, (x - mean_x) * (y - mean_y)

    def _add_pair(self, pair: Row, completions: list[Row], step: int) -> None:
        for series, name in ((self.margins, "margin"), (self.implied, "implied")):
            if (value := number(pair.get(name))) is not None:
                series.add(step, value)
        chosen, rejected = (completions[pair[side]]["length"] for side in ("chosen", "rejected"))
        self.longer_chosen["longer" if chosen > rejected else "shorter" if chosen < rejected else "equal"] += 1

    def _add_prompt(self, group: Row, step: int, place: tuple[StepFrame, int]) -> None:
        text = json.dumps([group.get("prompt_row"), group["prompt"]]).encode()
        key = hashlib.blake2b(text, digest_size=12).digest()
        seen = self.prompts.get(key)
        if seen is None:
            self.prompts[key] = Seen(step, place, step, place)
        elif step < seen.first_step:
            seen.first_step, seen.first = step, place
        elif step > seen.last_step:
            seen.last_step, seen.last = step, place


def collect_groups(folder: RunFolder, wanted: Collection[str] = ()) -> GroupFacts:
    """Read all groups of a run; those with the ``wanted`` names are kept."""
    facts = GroupFacts()
    for at in folder.all_frames():
        try:
            for place, group in enumerate(folder.each_group(at)):
                _add(facts, group, at, place, wanted)
        except (OSError, ValueError):  # rotated out meanwhile, or damaged: what was before it counts
            facts.unreadable += 1
    return facts


def _add(facts: GroupFacts, group: Row | None, at: StepFrame, place: int, wanted: Collection[str]) -> None:
    try:
        if group is None:
            raise TypeError("a row that is no object")
        facts.add(group, at, place)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):  # written by others, or by another version
        facts.unreadable += 1
    else:
        if wanted and (name := identity(group)) in wanted:
            facts.kept[name] = group


def is_by_policy(completion: Row) -> bool:
    """Whether a completion is the policy's own, not an opponent's."""
    return completion.get("author", "policy") == "policy"


def identity(group: Row) -> str:
    """The name of a group, as links and votes have it.

    >>> identity({"step": 12, "rank": 0, "index": 3, "round": 0})
    '12-0-3-0'
    """
    return "-".join(str(group.get(name)) for name in ("step", "rank", "index", "round"))


WORDS_KEPT = 3


def _add_comparison(judged: Judged, comparison: Row) -> None:
    judged.comparisons += 1
    orders = comparison.get("orders", [])
    by_place: dict[int, list[float]] = defaultdict(list)
    for order in orders:
        probability = number(order.get("probability"))
        judged.orders += 1
        judged.unanswered += probability is None
        judged.seconds += number(order.get("seconds")) or 0.0
        judged.tokens += number(order.get("tokens")) or 0.0
        judged.cost += number(order.get("cost")) or 0.0
        if probability is not None:
            by_place[order["shown"][0]].append(probability)
        if isinstance(words := order.get("words"), str) and len(judged.words) < WORDS_KEPT:
            judged.words.append(words)
    if len(by_place) == 2:
        one, other = (sum(votes) / len(votes) for votes in by_place.values())
        judged.both += 1
        judged.first_place += one + other
        judged.disagreed += (one - 0.5) * (0.5 - other) < 0
