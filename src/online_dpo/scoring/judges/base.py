"""The forms that a judge can have: TRL's, and judges that return probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from online_dpo.types import Completion, Group, Prompt

NO_ANSWER = -1
"""The rank of a pair for which a judge in TRL's form has no answer."""


@runtime_checkable
class Judge(Protocol):
    """A pairwise judge in TRL's form."""

    def judge(self, prompts: list[str], completions: list[list[str]], shuffle_order: bool = True) -> Sequence[int]:
        """Return for each prompt the index of the better of its two texts, or -1 without an answer."""
        ...


class PreferenceJudge:
    """Base class of judges that return probabilities (``prefer``). ``judge`` makes them usable as judges of TRL too."""

    name: str

    def prefer(self, comparisons: Sequence[Group]) -> list[float | None]:
        """Return the probability that the first of two completions is better, as :meth:`PairwiseScorer.prefer`."""
        raise NotImplementedError

    def judge(self, prompts: list[str], completions: list[list[str]], shuffle_order: bool = True) -> list[int]:
        """Return the index of the better text of each pair, or -1 without an answer or with a probability of 0.5.

        ``shuffle_order`` has no effect: the judge's own settings decide in which order the texts are shown.
        """
        comparisons = [
            Group(Prompt(prompt, (), row=row), tuple(Completion((), (), "stop", 0, text) for text in pair))
            for row, (prompt, pair) in enumerate(zip(prompts, completions, strict=True))
        ]
        return [NO_ANSWER if p is None or p == 0.5 else int(p < 0.5) for p in self.prefer(comparisons)]
