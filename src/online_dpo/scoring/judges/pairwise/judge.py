"""Models that read two answers at once, as judges.

R is the texts of one forward pass.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from online_dpo.config.pairwise_judge import LETTERS, PAIRRM, check_options, kind_of_class, pairwise_kind
from online_dpo.foreign import among_rows, at_row, foreign, loading
from online_dpo.modeling.borrowing import eval_mode
from online_dpo.modeling.known_tokens import check_known, check_tokenizer, embedding_rows
from online_dpo.scoring.accounting import Tally
from online_dpo.scoring.judges.base import PreferenceJudge
from online_dpo.scoring.judges.pairwise.classifier import PairwiseClassifier
from online_dpo.scoring.judges.pairwise.letters import LetterReader
from online_dpo.scoring.judges.pairwise.reader import PairwiseReader, Text
from online_dpo.scoring.protocols import Counts, check_comparisons, one_at_a_time
from online_dpo.scoring.rewards.model import last_part
from online_dpo.types import Group


class PairwiseModelJudge(PreferenceJudge):
    """A model that says how likely the first of two answers is the better one: a sequence classifier with one label or
    two (:class:`DuelClassifier`), PairRM (:class:`PairRMReader`), or a causal language model that answers with a letter
    (:class:`LetterReader`). Its class tells which.

    Each comparison is read in both orders: the preference is the mean of what one order says and one minus what the
    other says, so that equal texts, and a model that looks at the place only, give 0.5.

    Nothing is cut off: a comparison that is longer than the model reads has no preference, and is counted in
    ``judge/too_long``.

    Args:
        model: of transformers. It runs where its parameters are, in evaluation mode, and is left in the mode it was in.
        tokenizer: the model's.
        name: name in metrics; when not given, the last part of the model's path.
        template: the text to read, with ``{prompt}``, ``{first}`` and ``{second}``, as the model was trained with. Not
            for PairRM, which has its own.
        batch_size: texts in one forward pass, similar lengths together.
        options: ``letters`` of a causal language model, for the first answer and the second (``["A", "B"]``);
            ``max_tokens`` of PairRM, for prompt and answers together (2048).

    Raises:
        ValueError: an option does not go with the model or has no such value, the model is no pairwise model, or its
            tokenizer has tokens that it does not know.
        ScoringError: (when judging) the model's logits are not of the shape that they should have, or it, its
            tokenizer or its chat template failed.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        name: str | None = None,
        template: str | None = None,
        batch_size: int = 16,
        **options: Any,
    ) -> None:
        config: Any = model.config
        kind = kind_of_class(type(model).__name__)
        if template is not None:
            options["template"] = template
        check_options(kind, {**options, "batch_size": batch_size})
        self.name = name or last_part(config._name_or_path) or type(model).__name__
        chat = kind == LETTERS and tokenizer.chat_template is not None
        check_tokenizer(model, tokenizer, f"Judge `{self.name}`", chat=chat)
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.reader: PairwiseReader = _classes(kind)[1](model, tokenizer, **options)
        self._known_tokens = embedding_rows(model)
        self._tally = Tally(("too_long", "failed", "seconds"))

    @classmethod
    def load(cls, path: str, device: str | torch.device = "cpu", **options: Any) -> PairwiseModelJudge:
        """A judge from a folder or the hub, in the dtype that it was saved in; ``options`` are those of the class.

        Raises:
            ValueError: the model has no trained head, or what the class says.
            OSError: there is no such model or tokenizer.
        """
        path = os.path.expanduser(path)
        with loading(path):
            config, _ = PreTrainedConfig.get_config_dict(path)
        try:
            kind = pairwise_kind(config)
        except ValueError as problem:
            raise ValueError(f"`{path}`: {problem}") from None
        check_options(kind, {option: value for option, value in options.items() if option != "name"})
        with loading(path):
            model, info = _classes(kind)[0].from_pretrained(path, dtype="auto", output_loading_info=True)
            tokenizer = AutoTokenizer.from_pretrained(path)
        if info["missing_keys"]:
            missing = ", ".join(sorted(info["missing_keys"]))
            raise ValueError(f"`{path}` is no trained pairwise model: it has no weights for {missing}.")
        return cls(model.to(device), tokenizer, **options)

    def prefer(self, comparisons: Sequence[Group]) -> list[float | None]:
        """For each group of two, the probability that its first completion is the better one; ``None`` if they are too
        long, or the model's output is not finite.
        """
        check_comparisons(comparisons)
        started = time.perf_counter()
        longest = self.reader.max_tokens
        named = foreign(f"Judge `{self.name}`", lambda: among_rows(comparisons))
        with one_at_a_time, named, eval_mode(self.model):
            ids = [text for comparison in comparisons for text in self._both_orders(comparison)]
            p_first = self._probabilities([text for text in dict.fromkeys(ids) if len(text) <= longest])
        read = [p_first.get(text) for text in ids]
        preferences = [self._combined(*pair) for pair in zip(read[::2], read[1::2], strict=True)]
        self._tally.add("too_long", sum(None in pair for pair in zip(read[::2], read[1::2], strict=True)))
        self._tally.add("failed", sum(value is not None and math.isnan(value) for value in read))
        self._tally.add("seconds", time.perf_counter() - started)
        return preferences

    def _both_orders(self, comparison: Group) -> list[Text]:
        who = f"Judge `{self.name}`"
        with foreign(who, lambda: at_row(comparison.prompt)):  # its chat template may refuse this one
            texts = self.reader.token_ids([comparison, Group(comparison.prompt, comparison.completions[::-1])])
        for text in texts:
            check_known(text, self._known_tokens, who, comparison.prompt)
        return texts

    def metrics(self) -> dict[str, float]:
        """What was counted since the last call, as :meth:`LLMJudge.metrics`."""
        return self.drain().metrics()

    def drain(self) -> Counts:
        """The same, with rates as part and whole, so that they can be added up."""
        return self._tally.drain()

    def _combined(self, given: float | None, turned: float | None) -> float | None:
        if given is None or turned is None or math.isnan(given) or math.isnan(turned):
            return None
        self._tally.order(given)
        self._tally.order(turned)
        self._tally.add("both_orders")
        self._tally.add("disagreed", (given - 0.5) * (turned - 0.5) > 0)
        return (1 + (given - turned)) / 2  # exactly one half where both orders read the same

    def _probabilities(self, texts: list[Text]) -> dict[Text, float]:
        """The probability of "first" for each text, nan where the model gives none."""
        found: dict[Text, float] = {}
        for batch in self._batches(sorted(texts, key=len, reverse=True)):
            log_odds_R = torch.tensor(self.reader.log_odds(batch), dtype=torch.float64)
            log_odds_R[~log_odds_R.isfinite()] = torch.nan
            found.update(zip(batch, log_odds_R.sigmoid().tolist(), strict=True))
        return found

    def _batches(self, longest_first: list[Text]) -> Iterator[list[Text]]:
        """Where nothing can be padded, only texts of one length are read together."""
        batch: list[Text] = []
        for text in longest_first:
            full = len(batch) == self.batch_size
            if batch and (full or (not self.reader.pads and len(text) != len(batch[0]))):
                yield batch
                batch = []
            batch.append(text)
        if batch:
            yield batch


def _classes(kind: str) -> tuple[Any, Any]:
    """What loads a model of this kind, and what reads with it."""
    if kind == PAIRRM:
        from online_dpo.scoring.judges.pairwise.pairrm import (  # importing DeBERTa takes a while
            DebertaV2PairRM,
            PairRMReader,
        )

        return DebertaV2PairRM, PairRMReader
    if kind == LETTERS:
        return AutoModelForCausalLM, LetterReader
    return AutoModelForSequenceClassification, PairwiseClassifier
