"""Protocols of scorers, with their optional members, and helpers that every kind of scorer needs."""

from __future__ import annotations

import math
import numbers
import reprlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch

from online_dpo.errors import ScoringError
from online_dpo.types import Group, Message, Prompt

T = TypeVar("T")

one_at_a_time = threading.RLock()
"""Lock that a model holds while it scores in this process.

With `max_staleness`, several steps are scored at the same time, each in its own thread. A forward pass changes the
model's config and modules temporarily, so two passes must not overlap.
"""


@runtime_checkable
class PointwiseScorer(Protocol):
    """A scorer that gives each completion a number. ``name`` is its name in metrics and messages."""

    name: str

    def score(self, groups: Sequence[Group]) -> list[list[float | None]]:
        """Return P lists of K scores, in the order of ``groups`` and of their completions.

        ``None`` means that the scorer does not apply; ``nan`` and infinities mean that it failed.
        """
        ...


@runtime_checkable
class AsyncPointwiseScorer(PointwiseScorer, Protocol):
    """A pointwise scorer that may wait on a network. If ``is_async``, ``score_async`` runs while other scorers work."""

    is_async: bool

    async def score_async(self, groups: Sequence[Group]) -> list[list[float | None]]:
        """Return the same as ``score``."""
        ...


@runtime_checkable
class PairwiseScorer(Protocol):
    """A judge: a scorer that compares two completions. ``name`` is its name in metrics and messages.

    A judge may also have the members of `FairScorer`, `DiagnosingScorer` and `CountingScorer`.
    """

    name: str

    def prefer(self, comparisons: Sequence[Group]) -> list[float | None]:
        """Return, for each group of two completions, the probability that the first one is better, from 0 to 1.

        ``None`` or nan means that there is no answer.
        """
        ...


@runtime_checkable
class FailureCountingScorer(Protocol):
    """Optional member of a scorer: that it counts its failures itself, with a limit of its own."""

    counts_failures: bool


@runtime_checkable
class FairScorer(Protocol):
    """Optional member of a judge: whether its preferences are free of position bias.

    A bias towards the completion that is shown first cancels, for example, if the judge asks in both orders. A judge
    without this member is treated as biased; see :func:`is_fair`.
    """

    @property
    def is_fair(self) -> bool:
        """Whether position bias cancels in the preferences of this judge."""
        ...


@runtime_checkable
class DiagnosingScorer(Protocol):
    """Optional member of a scorer: the latest cause of a missing answer, for messages."""

    @property
    def last_failure(self) -> str:
        """The latest cause of a missing answer, empty if there was none."""
        ...


@runtime_checkable
class WaitingScorer(Protocol):
    """Optional member of a judge that waits for people: it has so much time for each assessment, and a step without an
    answer does not mean that the run has stalled.
    """

    def begin_assessment(self) -> None:
        """Begin the time for the questions of an assessment, in this thread."""
        ...


@runtime_checkable
class ChatTemplateScorer(Protocol):
    """Optional member of a scorer that renders conversational prompts with a chat template of its own."""

    def check_chat_template(self) -> None:
        """Check the template before anything is scored.

        Raises:
            ValueError: the scorer cannot render conversational prompts.
        """
        ...


@dataclass(frozen=True)
class Counts:
    """Counts of a scorer, under the names of their metrics: sums, and rates as (part, whole).

    Sums and rates of several processes are added up before a rate is divided.

    >>> Counts(sums={"judge/requests": 12.0}, rates={"judge/position_bias": (6.5, 12.0)}).metrics()
    {'judge/requests': 12.0, 'judge/position_bias': 0.5416666666666666}
    """

    sums: Mapping[str, float]
    rates: Mapping[str, tuple[float, float]]

    def metrics(self) -> dict[str, float]:
        """The sums, and each rate as part / whole."""
        return {**self.sums, **{name: part / whole for name, (part, whole) in self.rates.items()}}


@runtime_checkable
class Identified(Protocol):
    """A scorer or judge that says what it scores with, so that checkpoints of runs with another one are known."""

    def identity(self) -> Mapping[str, Any]:
        """Returns what changes its scores beside its name, as values of JSON, without secrets."""
        ...


@runtime_checkable
class CountingScorer(Protocol):
    """Optional member of a scorer that counts what it does."""

    def drain(self) -> Counts:
        """Return what was counted since the last call, and reset the counts."""
        ...


def is_own(scorer: object) -> bool:
    """Whether a scorer is one of this package."""
    return type(scorer).__module__.partition(".")[0] == __name__.partition(".")[0]


def is_fair(judge: PairwiseScorer) -> bool:
    """Whether the judge says that its preferences are free of position bias."""
    return isinstance(judge, FairScorer) and judge.is_fair


def check_comparisons(comparisons: Sequence[Group]) -> None:
    """Check that each group has two completions.

    Raises:
        ValueError: a group has more or fewer.
    """
    for comparison in comparisons:
        if len(comparison.completions) != 2:
            raise ValueError(
                f"A judge compares two completions, but a group has {len(comparison.completions)}. "
                "Set `num_completions` to 2."
            )


def regroup(flat: Sequence[T], groups: Sequence[Group]) -> list[list[T]]:
    """Cut a prompt-major list ``[p0k0, p0k1, p1k0, ...]`` into one list for each group."""
    rest = iter(flat)
    return [[next(rest) for _ in group.completions] for group in groups]


def flat_list(returned: Any, owner: str) -> list[Any]:
    """The items of a list, tuple, 1-D tensor or 1-D array that a user's function or judge returned.

    Raises:
        ScoringError: it is something else. ``owner`` is the subject of the message.
    """
    if isinstance(returned, (torch.Tensor, np.ndarray)):
        if returned.ndim == 1:
            return returned.tolist()
        kind = "a tensor" if isinstance(returned, torch.Tensor) else "an array"
        raise ScoringError(
            f"{owner} returned {kind} of shape {tuple(returned.shape)}. Return one flat list, or {kind} with one "
            "dimension."
        )
    if isinstance(returned, (list, tuple)):
        return list(returned)
    raise ScoringError(f"{owner} returned {describe(returned)}. Return one flat list.")


def as_number(value: Any) -> float | None:
    """Convert a number of Python, numpy or torch (a scalar) to a float; ``None`` for anything else.

    One that is too large for a float, such as ``10**400``, becomes infinite.
    """
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:  # an int or a fraction of any length
        return math.inf if value > 0 else -math.inf  # pyright: ignore[reportOperatorIssue]


class ShortForm(reprlib.Repr):
    """Shortens what is printed of a value, also integers that Python refuses to print for their length."""

    def repr_int(self, x: int, level: int) -> str:
        """The digits of a number, or how many bits it has."""
        return super().repr_int(x, level) if x.bit_length() < LONGEST_INT else f"of {x.bit_length()} bits"


LONGEST_INT = 1_000
"""Bits of an integer that is still printed."""


def describe(value: Any) -> str:
    """The type and a shortened form of a value, for error messages."""
    return "None" if value is None else f"{type(value).__name__} {ShortForm().repr(value)}"


def chat_messages(prompt: Prompt) -> list[Message]:
    """Copies of a conversational prompt's messages, without keys whose value is ``None``.

    Datasets give every message the keys of all messages, and a chat template would render such a value as "None".
    """
    assert not isinstance(prompt.content, str), "a text prompt has no messages"
    return [{key: value for key, value in message.items() if value is not None} for message in prompt.content]
