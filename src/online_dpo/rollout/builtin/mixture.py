"""Sampling from a geometric mixture of two models that read the same tokens side by side.

Token by token the distribution is ``pi(t)^(1 - m) ref(t)^m``, normalised: what Munos et al. 2023 (arXiv 2312.00886,
section 7.1) call the one-step-at-a-time regularised policy. A softmax takes care of the norm, so mixing logits is
enough. Temperature and the like come after it.

Shapes: ``G`` groups, ``K`` completions, ``B = G * K`` sequences, ``T`` tokens, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from online_dpo.modeling.introspection import unwrapped
from online_dpo.modeling.onednn import onednn_linears
from online_dpo.rollout.builtin.decoding import Decoder, StepwiseDecoder, can_decode
from online_dpo.rollout.builtin.engine import TransformersEngine

ModelContext = Callable[[], AbstractContextManager[nn.Module]]
"""Inside the context, a forward pass of the model is one of the reference."""


class MixtureEngine(TransformersEngine):
    """Samples from the mixture of a model and a reference, with the weights that they have.

    Args:
        model: the policy.
        lend: lends the reference. It may be the policy itself with its adapter off, so that the two take turns.
        coefficient: share of the reference, from 0 (the policy alone) to 1; asked before each rollout.

    Raises:
        ValueError: one of the two cannot be read token by token here, or their vocabularies differ in size.
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
        self._lend, self._coefficient = model_context, coefficient
        with model_context() as reference:
            self._reference = reference
        if not (can_decode(model) and can_decode(reference)):
            raise ValueError(
                "A mixture of policy and reference can only be sampled from models that are made of attention layers "
                "alone. `method: xpo`, whose opponent is the reference, works with all."
            )
        sizes = [unwrapped(part).config.get_text_config().vocab_size for part in (model, reference)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"The policy predicts {sizes[0]} tokens and the reference {sizes[1]}. To mix them both need the same "
                "vocabulary; give another `ref_model`, or none."
            )

    def _decoder(self, prompts: Sequence[Sequence[int]], num_completions: int, max_new_tokens: int) -> StepwiseDecoder:
        own = Decoder(self.model, prompts, num_completions, max_new_tokens)
        other = Decoder(self._reference, prompts, num_completions, max_new_tokens)
        return _MixtureDecoder(own, other, self._lend, self._coefficient())

    def _plain_logits(self, ids_1T: torch.Tensor) -> torch.Tensor:
        own_1TV = super()._plain_logits(ids_1T)
        with self._lend():
            other_1TV = self._reference(input_ids=ids_1T, use_cache=False).logits
        return mixed_logits(own_1TV, other_1TV, self._coefficient())

    @contextmanager
    def _fast_linears(self) -> Iterator[None]:
        with super()._fast_linears(), onednn_linears(self._reference, pack=True):
            yield

    def _generate(self, batch: Any) -> None:
        """
        Raises:
            ValueError: always. That this way is needed has been said in a warning, with the cause.
        """
        raise ValueError(
            "The mixture of policy and reference cannot be sampled with this model: the warning before says why. "
            "`method: xpo`, whose opponent is the reference, works with all."
        )


class _MixtureDecoder(StepwiseDecoder):
    """Two decoders that are given the same tokens."""

    def __init__(self, own: Decoder, other: Decoder, model_context: ModelContext, coefficient: float) -> None:
        self._own, self._other, self._lend, self._coefficient = own, other, model_context, coefficient

    def prefill(self) -> torch.Tensor:
        own_GV = self._own.prefill()
        with self._lend():
            return mixed_logits(own_GV, self._other.prefill(), self._coefficient)

    def step(self, token_B: torch.Tensor) -> torch.Tensor:
        own_BV = self._own.step(token_B)
        with self._lend():
            return mixed_logits(own_BV, self._other.step(token_B), self._coefficient)

    def keep(self, rows_GK: torch.Tensor) -> None:
        self._own.keep(rows_GK)
        self._other.keep(rows_GK)


def mixed_logits(own_XV: torch.Tensor, other_XV: torch.Tensor, coefficient: float) -> torch.Tensor:
    """Logits of the geometric mixture, with a share ``coefficient`` of the other, fp32."""
    return torch.lerp(own_XV.float(), other_XV.float(), coefficient)
