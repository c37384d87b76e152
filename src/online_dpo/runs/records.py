"""What the record of a run says of a group of completions: one dataclass for each kind of JSON object in its row.

`as_json` gives strict JSON: keys without content are left out, a number that is not finite is ``null``. Scores and what
they are made of are exact; other numbers are rounded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from online_dpo.runs.plain_json import exact, plain, plain_or_named, rounded

Row = dict[str, Any]


@dataclass(frozen=True)
class CompletionRecord:
    """One completion, what was made of its score, and what policy and reference said of it in training.

    ``rewards`` are the scorers' raw scores by name, ``weighted`` these times their weights, ``normalized`` those of
    normalised scorers before the weights, ``penalties`` those above 0 by name. ``score`` is the sum, ``None`` where it
    is missing; ``ranking`` is the number by which pairs were formed, where that is another. ``sampled_logp`` is the sum
    of the sampler's log-probabilities. ``tokens`` are the texts of the tokens; they, ``log_ratios`` (log policy minus
    log reference, for each token), ``logp`` and ``ref_logp`` (sums) are there for completions that were trained on.
    There are so many ``log_ratios`` that they are rounded together before, and written as they are.

    >>> CompletionRecord("Red.", 2, "stop", "policy", 11, rewards={"format": 1.0}, weighted={"format": 0.5}, score=0.5)
    """

    text: str
    length: int
    finish: str
    author: str
    version: int
    rewards: Mapping[str, float | None] = field(default_factory=dict)
    weighted: Mapping[str, float | None] = field(default_factory=dict)
    normalized: Mapping[str, float | None] = field(default_factory=dict)
    penalties: Mapping[str, float] = field(default_factory=dict)
    score: float | None = None
    ranking: float | None = None
    sampled_logp: float | None = None
    tokens: Sequence[str] = ()
    log_ratios: Sequence[float] = ()
    logp: float | None = None
    ref_logp: float | None = None

    def as_json(self) -> Row:
        """The completion's object in a row."""
        row: Row = {
            "text": self.text,
            "length": self.length,
            "finish": self.finish,
            "author": self.author,
            "version": self.version,
        }
        row |= _given(
            rewards=_exact(self.rewards),
            weighted=_exact(self.weighted),
            normalized=_exact(self.normalized),
            penalties=_exact(self.penalties),
        )
        if self.rewards:  # else nothing gives scores, and none is missing
            row["score"] = exact(self.score)
        return row | _given(
            ranking=exact(self.ranking),
            sampled_logp=rounded(self.sampled_logp),
            tokens=list(self.tokens),
            log_ratios=_as_they_are(self.log_ratios),
            logp=rounded(self.logp),
            ref_logp=rounded(self.ref_logp),
        )


@dataclass(frozen=True)
class PairRecord:
    """A pair that was trained on: chosen and rejected completion, by their places in the group.

    ``probability`` is that the chosen one is better. ``margin`` is the difference of the scores, ``None`` where a judge
    compared without numbers. ``implied`` is the policy's implied reward margin: beta times the difference of the summed
    log-ratios; ``None``, as ``loss``, where the step ended before.

    >>> PairRecord(chosen=1, rejected=0, margin=2.0, loss=0.69, implied=0.03)
    """

    chosen: int
    rejected: int
    probability: float = 1.0
    margin: float | None = None
    weight: float = 1.0
    loss: float | None = None
    implied: float | None = None

    def as_json(self) -> Row:
        """The pair's object in a row."""
        row: Row = {
            "chosen": self.chosen,
            "rejected": self.rejected,
            "probability": rounded(self.probability),
            "margin": exact(self.margin),
            "weight": rounded(self.weight),
        }
        return row | _given(loss=rounded(self.loss), implied=rounded(self.implied))


@dataclass(frozen=True)
class OrderRecord:
    """One question to a judge: the completions in the order in which it saw them, and what it said.

    ``probability`` is that the one shown first is better, ``None`` without an answer; ``failure`` then says why.
    ``words`` is its answer as text; ``cached`` says that it is an earlier answer to the same question. ``cost`` is in
    the currency of the configured prices.

    >>> OrderRecord(shown=(0, 1), probability=0.9, words="Answer 1 is clearer.", seconds=0.8, tokens=512)
    """

    shown: tuple[int, int]
    probability: float | None
    words: str | None = None
    seconds: float | None = None
    tokens: int | None = None
    cost: float | None = None
    failure: str | None = None
    cached: bool = False

    def as_json(self) -> Row:
        """The question's object in a row."""
        row: Row = {"shown": list(self.shown), "probability": rounded(self.probability)}
        return row | _given(
            words=self.words,
            seconds=rounded(self.seconds),
            tokens=self.tokens,
            cost=rounded(self.cost),
            failure=self.failure,
            cached=self.cached or None,
        )


@dataclass(frozen=True)
class ComparisonRecord:
    """Two completions that a judge compared, by their places in the group.

    ``probability`` is that the first is better, after penalties; ``None`` without an answer. ``orders`` are its
    questions, in both orders where it asked in both.

    >>> ComparisonRecord(first=0, second=1, probability=0.8, orders=(OrderRecord((0, 1), 0.8),))
    """

    first: int
    second: int
    probability: float | None
    orders: tuple[OrderRecord, ...] = ()

    def as_json(self) -> Row:
        """The comparison's object in a row."""
        row: Row = {"first": self.first, "second": self.second, "probability": rounded(self.probability)}
        return row | _given(orders=[order.as_json() for order in self.orders])


@dataclass(frozen=True)
class GroupRecord:
    """One prompt of a step, its completions, what is said of them, and the pairs that were made of them.

    ``step``, ``rank``, ``index`` (the place among the rank's prompts of the step) and ``round`` identify it; a prompt
    that was answered again has a record for each round. ``reason`` says why there is no pair; ``resampled_for``, where
    it is "resampled", what the answers of this round lacked. ``left_out`` counts pairs that limits exclude, by reason.
    ``columns`` and ``notes`` have any values (notes one for each completion); what JSON has nothing for is named in
    ``columns_left_out``. ``skipped`` says that the step's update was not made.

    >>> GroupRecord(12, 0, 3, 0, prompt="Name a colour.", prompt_row=17, prompt_length=4, completions=(completion,))
    """

    step: int
    rank: int
    index: int
    round: int
    prompt: str | Sequence[Mapping[str, Any]]
    prompt_row: int
    prompt_length: int
    completions: tuple[CompletionRecord, ...]
    prompt_cut: bool = False
    columns: Mapping[str, Any] = field(default_factory=dict)
    pairs: tuple[PairRecord, ...] = ()
    reason: str | None = None
    resampled_for: str | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)
    comparisons: tuple[ComparisonRecord, ...] = ()
    notes: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    skipped: bool = False

    def as_json(self) -> Row:
        """The row."""
        columns, unwritable = _columns(self.columns)
        row: Row = {
            "step": self.step,
            "rank": self.rank,
            "index": self.index,
            "round": self.round,
            "prompt": plain_or_named(self.prompt),
            "prompt_row": self.prompt_row,
            "prompt_length": self.prompt_length,
            "prompt_cut": self.prompt_cut,
        }
        row |= _given(columns=columns, columns_left_out=unwritable)
        row |= {"completions": [completion.as_json() for completion in self.completions]}
        return row | _given(
            pairs=[pair.as_json() for pair in self.pairs],
            reason=self.reason,
            resampled_for=self.resampled_for,
            left_out=dict(self.left_out),
            comparisons=[comparison.as_json() for comparison in self.comparisons],
            notes={name: [plain_or_named(value) for value in values] for name, values in self.notes.items()},
            skipped=self.skipped or None,
        )


def _as_they_are(numbers: Sequence[float]) -> list[float | None]:
    return list(numbers) if math.isfinite(sum(numbers)) else [exact(number) for number in numbers]


def _exact(numbers: Mapping[str, float | None]) -> Row:
    return {name: exact(number) for name, number in numbers.items()}


def _columns(columns: Mapping[str, Any]) -> tuple[Row, list[str]]:
    """The columns that JSON has values for, and the names of the others."""
    kept: Row = {}
    for name, value in columns.items():
        try:
            kept[str(name)] = plain(value)
        except (TypeError, RecursionError):
            continue
    return kept, [str(name) for name in columns if str(name) not in kept]


def _given(**entries: Any) -> Row:
    """The entries that have content."""
    return {name: value for name, value in entries.items() if value is not None and value != [] and value != {}}
