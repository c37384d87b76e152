"""Forming the pairs of a step as the configuration says."""

from __future__ import annotations

from collections.abc import Sequence

from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.errors import ForeignCodeError
from online_dpo.foreign import among_rows, foreign
from online_dpo.methods.base import Method
from online_dpo.pairing.select import Selection
from online_dpo.rollout.builtin.random_numbers import uniform_numbers
from online_dpo.rollout.params import RolloutKey, Stream
from online_dpo.types import Group, Pairing, Prompt, Scores, Verdicts


class PairFormer:
    """Forms pairs by the method and the pair selection of a configuration.

    Random choices depend on the run's seed, the step and the prompt alone, never on how often pairs are formed.
    """

    def __init__(self, method: Method, args: OnlineDPOConfig) -> None:
        self._method, self._args = method, args
        self._selection = Selection.from_config(args)

    def __call__(self, groups: Sequence[Group], assessment: Scores | Verdicts, step: int) -> Pairing:
        """Returns the pairs of the groups, and why the other groups were dropped."""
        key = RolloutKey(self._args.seed, step, Stream.PAIRING)

        def draw(prompt: Prompt) -> float:
            return float(uniform_numbers(key, prompt.row, sample=0, count=1)[0])

        who = f"Method `{self._args.method}` with `pair_selection={self._args.pair_selection!r}`"
        with foreign(who, lambda: among_rows(groups), raises=ForeignCodeError):
            return self._method.form_pairs(groups, assessment, self._selection, draw)
