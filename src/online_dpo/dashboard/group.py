"""A group of completions as pages show it: read from its JSON, which may be damaged or hostile, into clean values."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from online_dpo.runs.plain_json import number

Row = dict[str, Any]
MOST_ITEMS = 1000
"""Completions, pairs, comparisons and scorers of a group that are read: more than any run writes."""


def integer(value: Any) -> int | None:
    """The value as a whole number that a database holds, or ``None``."""
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 62 else None


def text_of(value: Any) -> str:
    """The value as text, without what UTF-8 cannot hold."""
    try:
        text = value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)
    except RecursionError:
        text = "(nested too deeply)"
    return text.encode("utf-8", "replace").decode("utf-8")


def numbers_of(value: Any) -> dict[str, float | None]:
    """The numbers of an object, by name."""
    items = list(value.items())[:MOST_ITEMS] if isinstance(value, dict) else []
    return {text_of(name): number(entry) for name, entry in items}


def objects(value: Any) -> list[Row]:
    """The objects of a list."""
    return [entry for entry in value[:MOST_ITEMS] if isinstance(entry, dict)] if isinstance(value, list) else []


@dataclass(frozen=True)
class Message:
    """A message of a prompt.

    >>> Message(role="user", content="Name a colour.")
    """

    role: str
    content: str


@dataclass(frozen=True)
class Completion:
    """A completion; its fields are those of the run folder's JSON."""

    place: int
    text: str
    length: int | None
    finish: str
    author: str
    version: int | None
    rewards: dict[str, float | None]
    weighted: dict[str, float | None]
    normalized: dict[str, float | None]
    penalties: dict[str, float | None]
    score: float | None
    ranking: float | None
    sampled_logp: float | None
    logp: float | None
    ref_logp: float | None
    tokens: tuple[str, ...]
    log_ratios: tuple[float | None, ...]

    @classmethod
    def read(cls, place: int, row: Row) -> Completion:
        """The completion of a JSON object."""
        tokens, ratios = row.get("tokens"), row.get("log_ratios")
        single = {name: number(row.get(name)) for name in ("score", "ranking", "sampled_logp", "logp", "ref_logp")}
        return cls(
            place=place,
            text=text_of(row.get("text")),
            length=integer(row.get("length")),
            finish=text_of(row.get("finish")),
            author=text_of(row.get("author")),
            version=integer(row.get("version")),
            tokens=tuple(map(text_of, tokens)) if isinstance(tokens, list) else (),
            log_ratios=tuple(map(number, ratios)) if isinstance(ratios, list) else (),
            rewards=numbers_of(row.get("rewards")),
            weighted=numbers_of(row.get("weighted")),
            normalized=numbers_of(row.get("normalized")),
            penalties=numbers_of(row.get("penalties")),
            **single,
        )


@dataclass(frozen=True)
class Pair:
    """A pair of a group; ``chosen`` and ``rejected`` are places of completions that exist."""

    chosen: int
    rejected: int
    probability: float | None
    margin: float | None
    weight: float | None
    loss: float | None
    implied: float | None

    @property
    def surprise(self) -> float | None:
        """How strongly the policy prefers the other one: its implied reward margin against the label's, in nats. Above
        0.69 (a coin's), the policy and the label disagree.
        """
        if self.implied is None:
            return None
        implied = max(-700.0, min(700.0, self.implied))
        label = 1.0 if self.probability is None else min(1.0, max(0.0, self.probability))
        return label * math.log1p(math.exp(-implied)) + (1 - label) * math.log1p(math.exp(implied))


@dataclass(frozen=True)
class Order:
    """A question to a judge. ``probability`` is that the completion shown first is better."""

    shown: tuple[int, int]
    probability: float | None
    words: str
    seconds: float | None
    tokens: float | None
    cost: float | None
    failure: str
    cached: bool


@dataclass(frozen=True)
class Comparison:
    """Two completions that a judge compared; ``probability`` is that ``first`` is better."""

    first: int
    second: int
    probability: float | None
    orders: tuple[Order, ...]

    def first_is_better(self, order: Order) -> float | None:
        """An order's probability that ``first`` is better."""
        if order.probability is None:
            return None
        return order.probability if order.shown[0] == self.first else 1 - order.probability

    @property
    def disagreement(self) -> float | None:
        """How far the two orders' probabilities lie apart; ``None`` without both."""
        said = [p for order in self.orders if (p := self.first_is_better(order)) is not None]
        return max(said) - min(said) if len({order.shown for order in self.orders}) > 1 and len(said) > 1 else None

    @property
    def is_contradicted(self) -> bool:
        """Whether its orders have different winners."""
        said = [p for order in self.orders if (p := self.first_is_better(order)) is not None]
        return self.disagreement is not None and min(said) < 0.5 < max(said)


@dataclass(frozen=True)
class Group:
    """A prompt, its completions, and what was made of them."""

    step: int
    rank: int
    index: int
    round: int
    prompt: tuple[Message, ...]
    prompt_row: int | None
    prompt_length: int | None
    prompt_cut: bool
    columns: Row
    completions: tuple[Completion, ...]
    pairs: tuple[Pair, ...]
    reason: str
    resampled_for: str
    left_out: dict[str, float | None]
    comparisons: tuple[Comparison, ...]
    notes: Row
    skipped: bool

    @property
    def key(self) -> str:
        """Its identity in links: ``12-0-3-0``."""
        return f"{self.step}-{self.rank}-{self.index}-{self.round}"

    @property
    def prompt_text(self) -> str:
        """The prompt as one text."""
        return "\n".join(message.content for message in self.prompt)

    @property
    def prompt_key(self) -> str:
        """The same for the same prompt, in other steps and other runs."""
        spoken = json.dumps([(message.role, message.content) for message in self.prompt])
        return hashlib.sha256(spoken.encode()).hexdigest()[:16]

    @property
    def scorers(self) -> list[str]:
        """The names of the scorers that gave its completions a number."""
        return sorted({name for completion in self.completions for name in completion.rewards})

    @classmethod
    def read(cls, row: Row) -> Group | None:
        """The group of a JSON object; ``None`` if it has no identity."""
        step, rank, index, round_ = (integer(row.get(name, 0)) for name in ("step", "rank", "index", "round"))
        if step is None or rank is None or index is None or round_ is None or min(step, rank, index, round_) < 0:
            return None
        completions = tuple(
            Completion.read(place, entry) for place, entry in enumerate(objects(row.get("completions")))
        )
        return cls(
            **{"step": step, "rank": rank, "index": index, "round": round_},
            prompt=_messages(row.get("prompt")),
            prompt_row=integer(row.get("prompt_row")),
            prompt_length=integer(row.get("prompt_length")),
            prompt_cut=row.get("prompt_cut") is True,
            columns=_object(row.get("columns")),
            completions=completions,
            pairs=tuple(_pairs(row.get("pairs"), len(completions))),
            reason=text_of(row.get("reason")),
            resampled_for=text_of(row.get("resampled_for")),
            left_out=numbers_of(row.get("left_out")),
            comparisons=tuple(_comparisons(row.get("comparisons"), len(completions))),
            notes=_object(row.get("notes")),
            skipped=row.get("skipped") is True,
        )


def _object(value: Any) -> Row:
    return value if isinstance(value, dict) else {}


def _messages(prompt: Any) -> tuple[Message, ...]:
    if not isinstance(prompt, list):
        return (Message("", text_of(prompt)),)
    return tuple(Message(text_of(entry.get("role")), text_of(entry.get("content"))) for entry in objects(prompt))


def _places(row: Row, names: tuple[str, str], count: int) -> tuple[int, int] | None:
    first, second = integer(row.get(names[0])), integer(row.get(names[1]))
    if first is None or second is None or not (0 <= first < count and 0 <= second < count):
        return None
    return first, second


def _pairs(value: Any, count: int) -> Iterator[Pair]:
    for row in objects(value):
        if places := _places(row, ("chosen", "rejected"), count):
            names = ("probability", "margin", "weight", "loss", "implied")
            yield Pair(*places, **{name: number(row.get(name)) for name in names})


def _comparisons(value: Any, count: int) -> Iterator[Comparison]:
    for row in objects(value):
        if places := _places(row, ("first", "second"), count):
            orders = tuple(order for entry in objects(row.get("orders")) if (order := _order(entry, places)))
            yield Comparison(*places, number(row.get("probability")), orders)


def _order(row: Row, of: tuple[int, int]) -> Order | None:
    shown = row.get("shown")
    if shown not in (list(of), list(of[::-1])):
        return None
    amounts = {name: number(row.get(name)) for name in ("probability", "seconds", "tokens", "cost")}
    words, failure = text_of(row.get("words")), text_of(row.get("failure"))
    return Order((shown[0], shown[1]), words=words, failure=failure, cached=row.get("cached") is True, **amounts)
