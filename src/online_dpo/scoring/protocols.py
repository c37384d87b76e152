"""What a scorer is, and the few helpers that every kind of scorer needs."""

from __future__ import annotations

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
"""Held while a model scores in this process. With `max_staleness`, several steps are scored at the same time, each in a
thread of its own; a forward pass changes the model's config and modules for a while, which another would run into."""


@runtime_checkable
class PointwiseScorer(Protocol):
    """Gives each completion a number.

    ``score`` returns P lists of K items, in the order of ``groups`` and their completions. ``None`` says that the
    scorer does not apply; ``nan`` and infinities say that it failed.
    """

    name: str

    def score(self, groups: Sequence[Group]) -> list[list[float | None]]: ...


@runtime_checkable
class AsyncPointwiseScorer(PointwiseScorer, Protocol):
    """A pointwise scorer that may wait on a network: if ``is_async``, ``score_async`` runs beside the other scorers."""

    is_async: bool

    async def score_async(self, groups: Sequence[Group]) -> list[list[float | None]]: ...


@runtime_checkable
class PairwiseScorer(Protocol):
    """Says which of two completions is better, and how surely.

    ``prefer`` returns for each group of two the probability, from 0 to 1, that the first completion is the better one;
    ``None`` says that there is no preference to be had, and so does nan.
    """

    name: str

    def prefer(self, comparisons: Sequence[Group]) -> list[float | None]: ...


@dataclass(frozen=True)
class Counts:
    """What a scorer has counted: sums, and rates as part and whole, by the name of their metric.

    >>> Counts(sums={"judge/requests": 12.0}, rates={"judge/position_bias": (6.5, 12.0)}).metrics()
    {'judge/requests': 12.0, 'judge/position_bias': 0.5416666666666666}
    """

    sums: Mapping[str, float]
    rates: Mapping[str, tuple[float, float]]

    def metrics(self) -> dict[str, float]:
        return {**self.sums, **{name: part / whole for name, (part, whole) in self.rates.items()}}


@runtime_checkable
class CountingScorer(Protocol):
    """A scorer that counts what it does; ``drain`` returns what was counted since the last time."""

    def drain(self) -> Counts: ...


def check_comparisons(comparisons: Sequence[Group]) -> None:
    """
    Raises:
        ValueError: a group has not two completions.
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
        ScoringError: it is something else. ``owner`` names who returned it.
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
    """A number of Python, numpy or torch (without dimensions) as a float; ``None`` for anything else."""
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)) and value.ndim == 0:
        value = value.item()
    return float(value) if isinstance(value, numbers.Real) else None


def describe(value: Any) -> str:
    """Type and short form of a value, for error messages."""
    return "None" if value is None else f"{type(value).__name__} {reprlib.repr(value)}"


def chat_messages(prompt: Prompt) -> list[Message]:
    """Copies of a conversational prompt's messages, without the keys whose value is ``None``.

    Datasets give every message the keys of all messages, and a chat template would print such a key as "None".
    """
    assert not isinstance(prompt.content, str), "a text prompt has no messages"
    return [{key: value for key, value in message.items() if value is not None} for message in prompt.content]
