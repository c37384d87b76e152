"""What completions lose for how they ended and how long they are: in scores, or in log-odds before a judge."""

from __future__ import annotations

import math
from dataclasses import dataclass

from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.stats.preference import sigmoid
from online_dpo.types import Completion, Group

CERTAIN = 0.99
"""What a judge's certainty counts where a penalty shifts its answer: certain log-odds are infinite."""


@dataclass(frozen=True)
class Penalties:
    """``missing_eos`` for a completion that did not end by itself, ``per_token`` for each token of any.

    >>> Penalties(missing_eos=1.0, per_token=0.01)
    """

    missing_eos: float = 0.0
    per_token: float = 0.0

    @classmethod
    def from_config(cls, args: OnlineDPOConfig) -> Penalties:
        return cls(args.missing_eos_penalty or 0.0, args.length_penalty or 0.0)

    def of(self, completion: Completion) -> float:
        """What the completion's score loses."""
        unfinished = completion.finish_reason != "stop"
        return self.missing_eos * unfinished + self.per_token * len(completion.token_ids)

    def shifted(self, answer: float, comparison: Group) -> float:
        """A judge's answer, the probability that the first of two is the better one, with the penalties taken from both
        log-odds. Where they are not the same, an answer beyond `CERTAIN` counts as `CERTAIN`.
        """
        first, second = comparison.completions
        unfinished = (second.finish_reason != "stop") - (first.finish_reason != "stop")
        tokens = len(second.token_ids) - len(first.token_ids)
        shift = self.missing_eos * unfinished + self.per_token * tokens
        if shift == 0.0:
            return answer
        answer = min(max(answer, 1 - CERTAIN), CERTAIN)
        return sigmoid(math.log(answer / (1 - answer)) + shift)


NO_PENALTIES = Penalties()
