"""XPO (Xie et al. 2024, arXiv 2405.21046): the policy plays the reference, with an exploration bonus."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.methods.base import Method, check_one_opponent, method
from online_dpo.modeling.reference import Reference
from online_dpo.objective.inputs import LossOptions, PairLogprobs
from online_dpo.objective.losses import pair_losses
from online_dpo.rollout.opponent import ModelOpponent, Opponent
from online_dpo.rollout.registry import built_in_engine


@method("xpo")
class XPO(Method):
    """One completion of the policy and one of the reference; any loss, and an exploration term."""

    epoch_fields = ("xpo_alpha",)

    def check(self, args: OnlineDPOConfig) -> None:
        """Checks what the opponent needs, see `check_one_opponent`."""
        check_one_opponent(args)

    def build_opponent(
        self,
        policy: nn.Module,
        reference: Reference,
        tokenizer: PreTrainedTokenizerBase,
        args: OnlineDPOConfig,
        epoch: Callable[[], float],
    ) -> Opponent:
        """The reference, sampled by the built-in engine."""
        with reference.active() as model:
            return ModelOpponent(built_in_engine(model, tokenizer, args), "reference", reference.active)

    def losses(self, pairs: PairLogprobs, options: LossOptions) -> torch.Tensor:
        """The losses of the pairs, plus ``alpha log pi(y)`` of the completion ``y`` that the reference wrote
        (algorithm 1, the update of the policy).

        Minimising it makes completions of the reference less likely, and all others more: optimism about what has not
        been tried.
        """
        chosen_N = torch.where(pairs.chosen_by_policy_N, 0.0, pairs.chosen_N)
        rejected_N = torch.where(pairs.rejected_by_policy_N, 0.0, pairs.rejected_N)
        return pair_losses(pairs, options) + options.own["xpo_alpha"] * (chosen_N + rejected_N)
