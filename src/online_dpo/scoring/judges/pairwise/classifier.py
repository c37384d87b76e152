"""Sequence classifiers that read two answers in one text.

Shapes: ``R`` texts of one forward pass, ``T`` tokens of a text, ``L`` labels of the head (1 or 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from online_dpo.errors import ScoringError
from online_dpo.modeling.known_tokens import embedding_rows
from online_dpo.scoring.judges.llm.prompts import Template, prompt_text
from online_dpo.scoring.judges.pairwise.reader import Text, device_of, padded, tokenised
from online_dpo.scoring.rewards.model import longest_text, overridden
from online_dpo.scoring.special_tokens import SpecialTokens
from online_dpo.types import Group

TEMPLATE = "Request: {prompt}\n\nFirst answer: {first}\n\nSecond answer: {second}"


class PairwiseClassifier:
    """The reader of a sequence classifier. See :class:`PairwiseReader` for its members.

    A head with one label gives the log-odds that the first answer is better. A head with two labels gives the logits of
    "first" and "second".

    Raises:
        ValueError: the head has more than two labels.
        ScoringError: (when reading) the shape of the logits is not ``(R, L)``.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, template: str = TEMPLATE) -> None:
        config: Any = model.config
        if config.num_labels not in (1, 2):
            raise ValueError(f"A pairwise model's head must have one or two labels; this one has {config.num_labels}.")
        self.model = model
        self.tokenizer = tokenizer
        self._special_tokens = SpecialTokens(tokenizer)
        self._template = Template("", template, max_tokens=0)
        self._config = config.get_text_config()
        self.max_tokens = longest_text(model, tokenizer)
        self._known_tokens = embedding_rows(model)
        pad: Any = tokenizer.pad_token_id
        self._pad = pad if pad is not None and pad < self._known_tokens else None
        self.pads = self._pad is not None

    def token_ids(self, comparisons: Sequence[Group]) -> list[Text]:
        """The token ids of each comparison in the template."""
        as_text = self._special_tokens.as_text
        texts = [
            self._template.fill("", prompt_text(comparison.prompt), *(as_text(c.text) for c in comparison.completions))
            for comparison in comparisons
        ]
        return [tuple(ids) for ids in tokenised(self.tokenizer, texts)]

    @torch.no_grad()
    def log_odds(self, texts: Sequence[Text]) -> list[float]:
        """The log-odds that the first answer of each text is better."""
        fill = self._pad
        if fill is None:  # nothing is padded, but the head of a decoder needs a padding token that ends no text
            fill = next(token for token in range(self._known_tokens) if token not in {ids[-1] for ids in texts})
        ids_RT, mask_RT = padded(texts, fill, device_of(self.model))
        with overridden(self._config, pad_token_id=fill, use_cache=False):
            logits_RL = self.model(input_ids=ids_RT, attention_mask=mask_RT).logits.float()
        labels = self._config.num_labels
        if logits_RL.shape != (len(texts), labels):
            raise ScoringError(
                f"A pairwise model returned logits of shape {tuple(logits_RL.shape)} for {len(texts)} texts; "
                f"it should return ({len(texts)}, {labels})."
            )
        return (logits_RL[:, 0] if labels == 1 else logits_RL[:, 0] - logits_RL[:, 1]).tolist()
