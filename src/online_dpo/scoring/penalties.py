"""Penalties for unfinished and for long completions, subtracted from scores, or from a judge's log-odds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.stats.preference import sigmoid
from online_dpo.types import Completion, Group

CERTAIN = 0.99
"""A preference probability is limited to 0.01 to 0.99 before a penalty shifts it: certainty has infinite log-odds."""


@dataclass(frozen=True)
class Penalties:
    """``missing_eos`` is subtracted for a completion that did not end by itself, ``per_token`` for each token.

    >>> Penalties(missing_eos=1.0, per_token=0.01)
    """

    missing_eos: float = 0.0
    per_token: float = 0.0

    @classmethod
    def from_config(cls, args: OnlineDPOConfig) -> Penalties:
        """The penalties that the configuration asks for."""
        return cls(args.missing_eos_penalty or 0.0, args.length_penalty or 0.0)

    def of(self, completion: Completion) -> float:
        """The penalty of one completion."""
        unfinished = completion.finish_reason != "stop"
        return self.missing_eos * unfinished + self.per_token * len(completion.token_ids)

    def parts(self, groups: Sequence[Group]) -> list[list[dict[str, float]]]:
        """The penalties of each completion that are not 0, by name; an empty list where there is no penalty at all."""
        if self == NO_PENALTIES:
            return []
        return [[self._parts(completion) for completion in group.completions] for group in groups]

    def _parts(self, completion: Completion) -> dict[str, float]:
        unfinished = completion.finish_reason != "stop"
        named = {"missing_eos": self.missing_eos * unfinished, "length": self.per_token * len(completion.token_ids)}
        return {name: penalty for name, penalty in named.items() if penalty}

    def shifted(self, probability: float, comparison: Group) -> float:
        """A judge's probability that the first of two completions is better, after the penalties of both.

        The log-odds move by the difference of the penalties. If there is one, a probability above `CERTAIN` (or below
        1 - `CERTAIN`) is limited to it first.
        """
        first, second = comparison.completions
        unfinished = (second.finish_reason != "stop") - (first.finish_reason != "stop")
        tokens = len(second.token_ids) - len(first.token_ids)
        shift = self.missing_eos * unfinished + self.per_token * tokens
        if shift == 0.0:
            return probability
        probability = min(max(probability, 1 - CERTAIN), CERTAIN)
        return sigmoid(math.log(probability / (1 - probability)) + shift)


NO_PENALTIES = Penalties()
