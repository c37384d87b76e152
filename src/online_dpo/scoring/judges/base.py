"""Pairwise judges as scorers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from online_dpo.types import Completion, Group, Prompt

NO_ANSWER = -1


@runtime_checkable
class Judge(Protocol):
    """TRL's pairwise judge: prompts and pairs of texts in, the index of the better text out (-1: no answer)."""

    def judge(self, prompts: list[str], completions: list[list[str]], shuffle_order: bool = True) -> Sequence[int]: ...


class PreferenceJudge:
    """A judge that gives probabilities, in the form of TRL's judges as well."""

    name: str

    def prefer(self, comparisons: Sequence[Group]) -> list[float | None]:
        """As :class:`PairwiseScorer` says."""
        raise NotImplementedError

    def judge(self, prompts: list[str], completions: list[list[str]], shuffle_order: bool = True) -> list[int]:
        """0 or 1 for the better text of each pair, -1 without a preference or with equal chances.

        ``shuffle_order`` changes nothing: which orders are judged is a matter of the judge's own settings.
        """
        comparisons = [
            Group(Prompt(prompt, (), row=row), tuple(Completion((), (), "stop", 0, text) for text in pair))
            for row, (prompt, pair) in enumerate(zip(prompts, completions, strict=True))
        ]
        return [NO_ANSWER if p is None or p == 0.5 else int(p < 0.5) for p in self.prefer(comparisons)]
