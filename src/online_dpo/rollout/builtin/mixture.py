"""Sampling from a geometric mixture of policy and reference, which decode the same tokens side by side.

The distribution of each token is ``pi(t)^(1 - m) ref(t)^m``, normalised: the one-step-at-a-time regularised policy of
Munos et al. 2023 (arXiv 2312.00886, section 7.1). The softmax normalises, so it is enough to interpolate the logits.
Temperature and the other sampling options are applied to the mixture.

Shapes: ``G`` groups, ``K`` completions, ``B = G * K`` sequences, ``T`` tokens, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from online_dpo.distributed.weights import gathered
from online_dpo.modeling.borrowing import ModelContext
from online_dpo.modeling.introspection import unwrapped
from online_dpo.rollout.builtin.decoding import Decoder, StepwiseDecoder, can_decode
from online_dpo.rollout.builtin.engine import TransformersEngine


class MixtureEngine(TransformersEngine):
    """Samples from the geometric mixture of the policy and a reference, with their current weights.

    Args:
        model: the policy.
        model_context: inside it, a forward pass of the model is one of the reference. It may be the policy itself with
            its adapter off, so the two models are never computed at the same time.
        coefficient: returns the share of the reference, from 0 (the policy alone) to 1; called before each batch.

    Raises:
        ValueError: the built-in decoder cannot run one of the two, or their vocabularies differ in size.
    """

    def __init__(
        self,
        model: nn.Module,
        model_context: ModelContext,
        coefficient: Callable[[], float],
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 64,
    ) -> None:
        super().__init__(model, tokenizer, batch_size, static_steps=False)
        self._reference_context, self._coefficient = model_context, coefficient
        with model_context() as reference:
            self._reference = reference
        if not (can_decode(model) and can_decode(reference)):
            raise ValueError(
                "A mixture of policy and reference can only be sampled from models whose layers all are full or "
                "sliding-window attention. `method: xpo`, whose opponent is the reference, works with all models."
            )
        sizes = [unwrapped(part).config.get_text_config().vocab_size for part in (model, reference)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"The policy predicts {sizes[0]} tokens and the reference {sizes[1]}. To mix them, both need the same "
                "vocabulary: give another `ref_model`, or none."
            )

    def _decoder(self, prompts: Sequence[Sequence[int]], num_completions: int, max_new_tokens: int) -> StepwiseDecoder:
        policy = Decoder(self.model, prompts, num_completions, max_new_tokens)
        reference = Decoder(self._reference, prompts, num_completions, max_new_tokens)
        return _MixtureDecoder(policy, reference, self._reference_context, self._coefficient())

    def _plain_logits(self, ids_1T: torch.Tensor) -> torch.Tensor:
        policy_1TV = super()._plain_logits(ids_1T)
        with self._reference_context():
            reference_1TV = self._reference(input_ids=ids_1T, use_cache=False).logits
        return mixed_logits(policy_1TV, reference_1TV, self._coefficient())

    def _callable_alone(self) -> AbstractContextManager[None]:
        return gathered(self.model, self._reference)

    @property
    def _copies_linears(self) -> bool:
        return False  # policy and reference may be one model, with its adapter on and off from step to step

    @property
    def _models(self) -> Sequence[nn.Module]:
        return [self.model, self._reference]

    def _generate(self, batch: Any) -> None:
        """Refuses: the model's own `generate` cannot mix two models.

        Raises:
            ValueError: always. The warning about the slower path, logged before, has the cause.
        """
        raise ValueError(
            "The mixture of policy and reference cannot be sampled with this model; the warning before this error says "
            "why. `method: xpo`, whose opponent is the reference, works with all models."
        )


class _MixtureDecoder(StepwiseDecoder):
    """A decoder for each of the two models, both given the same tokens; its logits are those of the mixture."""

    def __init__(
        self, policy: Decoder, reference: Decoder, reference_context: ModelContext, coefficient: float
    ) -> None:
        self._policy, self._reference = policy, reference
        self._reference_context, self._coefficient = reference_context, coefficient

    def prefill(self) -> torch.Tensor:
        policy_GV = self._policy.prefill()
        with self._reference_context():
            return mixed_logits(policy_GV, self._reference.prefill(), self._coefficient)

    def step(self, token_B: torch.Tensor) -> torch.Tensor:
        policy_BV = self._policy.step(token_B)
        with self._reference_context():
            return mixed_logits(policy_BV, self._reference.step(token_B), self._coefficient)

    def keep_only(self, rows_GK: torch.Tensor) -> None:
        self._policy.keep_only(rows_GK)
        self._reference.keep_only(rows_GK)


def mixed_logits(policy_XV: torch.Tensor, reference_XV: torch.Tensor, coefficient: float) -> torch.Tensor:
    """The logits of the geometric mixture, up to a constant, (X, V) fp32; ``coefficient`` is the reference's share."""
    return torch.lerp(policy_XV.float(), reference_XV.float(), coefficient)
