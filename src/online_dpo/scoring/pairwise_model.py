"""Cross-encoders that read two answers at once, as judges.

R is the texts of one forward pass, T their tokens, L the labels of the head (1 or 2).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from online_dpo.errors import ScoringError
from online_dpo.scoring.judge import PreferenceJudge
from online_dpo.scoring.judge_prompts import Template, prompt_text
from online_dpo.scoring.judge_tally import Tally
from online_dpo.scoring.reward_model import last_part, overridden
from online_dpo.scoring.scorer import Counts, check_duels
from online_dpo.types import Group

TEMPLATE = "Request: {prompt}\n\nFirst answer: {first}\n\nSecond answer: {second}"

Text = tuple[int, ...]


class PairwiseModelJudge(PreferenceJudge):
    """A sequence-classification model that says how likely the first of two answers is the better one.

    A head with one label gives the log-odds of that (its sigmoid is the probability), one with two labels the logits of
    "first" and "second" (softmax). Each duel is read in both orders: the preference is the mean of what one order says
    and one minus what the other says, so that equal texts, and a model that looks at the place only, give 0.5.

    Nothing is cut off: a duel that is longer than the model reads has no preference, and is counted in
    ``judge/too_long``.

    Args:
        model: with a ``config`` of transformers. It runs where its parameters are, in evaluation mode.
        tokenizer: the model's.
        name: name in metrics; when not given, the last part of the model's path.
        template: the text to read, with ``{prompt}``, ``{first}`` and ``{second}``, as the model was trained with.
        batch_size: texts in one forward pass, similar lengths together.

    Raises:
        ValueError: the head has more than two labels, or the template lacks a place.
        ScoringError: (when judging) the model's logits have not the shape ``(R, L)``.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        name: str | None = None,
        template: str = TEMPLATE,
        batch_size: int = 16,
    ) -> None:
        config: Any = model.config
        if config.num_labels not in (1, 2):
            raise ValueError(f"A pairwise model's head must have one or two labels; this one has {config.num_labels}.")
        if missing := [place for place in ("{prompt}", "{first}", "{second}") if place not in template]:
            raise ValueError(f"The template has no place for {', '.join(missing)}.")
        self.name = name or last_part(config._name_or_path) or type(model).__name__
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self._template = Template(self.name, template, max_tokens=0)
        self._config = config.get_text_config()
        positions = getattr(self._config, "max_position_embeddings", None)  # recurrent and ALiBi models have none
        self._max_tokens = min(tokenizer.model_max_length, positions or tokenizer.model_max_length)
        self._tally = Tally(("too_long", "failed", "seconds"))

    @classmethod
    def load(cls, path: str, device: str | torch.device = "cpu", **options: Any) -> PairwiseModelJudge:
        """A judge from a folder or the hub; ``options`` are those of the class.

        Raises:
            ValueError: the model has no trained head, or what the class says.
            OSError: there is no such model or tokenizer.
        """
        path = os.path.expanduser(path)
        model, info = AutoModelForSequenceClassification.from_pretrained(path, output_loading_info=True)
        if info["missing_keys"]:
            raise ValueError(f"`{path}` is no trained pairwise model: it has no weights for {info['missing_keys']}.")
        return cls(model.to(device), AutoTokenizer.from_pretrained(path), **options)

    def prefer(self, duels: Sequence[Group]) -> list[float | None]:
        """For each group of two, the probability that its first completion is the better one; ``None`` if they are too
        long, or the model's output is not finite.
        """
        check_duels(duels)
        started = time.perf_counter()
        texts = [text for duel in duels for text in self._both_orders(duel)]
        ids: list[Text] = [tuple(one) for one in self._token_ids(texts)]
        p_first = self._probabilities([text for text in dict.fromkeys(ids) if len(text) <= self._max_tokens])
        read = [p_first.get(text) for text in ids]
        preferences = [self._combined(*pair) for pair in zip(read[::2], read[1::2], strict=True)]
        self._tally.add("too_long", sum(len(text) > self._max_tokens for text in ids[::2]))
        self._tally.add("failed", sum(value is not None and math.isnan(value) for value in read))
        self._tally.add("seconds", time.perf_counter() - started)
        return preferences

    def metrics(self) -> dict[str, float]:
        """What was counted since the last call, as :meth:`LLMJudge.metrics`."""
        return self.drain().metrics()

    def drain(self) -> Counts:
        """The same, with rates as part and whole, so that they can be added up."""
        return self._tally.drain()

    def _both_orders(self, duel: Group) -> tuple[str, str]:
        prompt, (first, second) = prompt_text(duel.prompt), (completion.text for completion in duel.completions)
        return self._template.fill("", prompt, first, second), self._template.fill("", prompt, second, first)

    def _combined(self, given: float | None, turned: float | None) -> float | None:
        if given is None or turned is None or math.isnan(given) or math.isnan(turned):
            return None
        self._tally.order(given)
        self._tally.order(turned)
        self._tally.add("both_orders")
        self._tally.add("disagreed", (given - 0.5) * (turned - 0.5) > 0)
        return (given + 1 - turned) / 2

    def _token_ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded: Mapping[str, Any] = self.tokenizer(texts, truncation=False, verbose=False)
        return encoded["input_ids"]

    def _probabilities(self, texts: list[Text]) -> dict[Text, float]:
        found: dict[Text, float] = {}
        for batch in self._batches(sorted(texts, key=len, reverse=True)):
            found.update(zip(batch, self._forward(batch), strict=True))
        return found

    def _batches(self, longest_first: list[Text]) -> Iterator[list[Text]]:
        """Without a token to pad with, only texts of one length are read together."""
        batch: list[Text] = []
        for text in longest_first:
            full = len(batch) == self.batch_size
            if batch and (full or (self.tokenizer.pad_token_id is None and len(text) != len(batch[0]))):
                yield batch
                batch = []
            batch.append(text)
        if batch:
            yield batch

    @torch.no_grad()
    def _forward(self, batch: list[Text]) -> list[float]:
        """The probability of "first" for each text, nan where the model gives none."""
        fill: Any = self.tokenizer.pad_token_id
        if fill is None:  # nothing is padded, but heads on decoders want a token, which must then end no text
            fill = next(token for token in range(self._config.vocab_size) if token not in {ids[-1] for ids in batch})
        length, device = len(batch[0]), next(self.model.parameters()).device
        ids_RT = torch.tensor([[*ids, *[fill] * (length - len(ids))] for ids in batch], device=device)
        mask_RT = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in batch], device=device)
        with overridden(self._config, pad_token_id=fill, use_cache=False):
            logits_RL = self.model(input_ids=ids_RT, attention_mask=mask_RT).logits.float()
        labels = self._config.num_labels
        if logits_RL.shape != (len(batch), labels):
            raise ScoringError(
                f"Judge `{self.name}` returned logits of shape {tuple(logits_RL.shape)} for {len(batch)} texts; "
                f"a pairwise model returns ({len(batch)}, {labels})."
            )
        p_R = logits_RL[:, 0].sigmoid() if labels == 1 else logits_RL.softmax(-1)[:, 0]
        return p_R.tolist()
