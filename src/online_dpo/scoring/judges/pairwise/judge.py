"""Judges that are models of their own: they read two answers in one text and give the probability of the first.

Shapes: ``R`` texts of one forward pass.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from functools import partial
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
from online_dpo.distributed.loading import loading_whole
from online_dpo.distributed.weights import is_sharded, make_whole
from online_dpo.errors import ModelFolderError
from online_dpo.foreign import among_rows, at_row, foreign, loading
from online_dpo.modeling.borrowing import eval_mode
from online_dpo.modeling.fingerprint import weights_fingerprint
from online_dpo.modeling.known_tokens import check_known, check_tokenizer, embedding_rows
from online_dpo.modeling.loaded import check_config, check_finite, check_loaded, check_not_zero, without_report
from online_dpo.modeling.memory import Halving
from online_dpo.modeling.weight_casts import weights_cast_once
from online_dpo.scoring.accounting import FailureWindow, JudgeStatistics
from online_dpo.scoring.judges.base import PreferenceJudge
from online_dpo.scoring.judges.pairwise.classifier import PairwiseClassifier
from online_dpo.scoring.judges.pairwise.letters import LetterReader
from online_dpo.scoring.judges.pairwise.reader import PairwiseReader, Text
from online_dpo.scoring.protocols import Counts, check_comparisons, one_at_a_time
from online_dpo.scoring.questions import keep_questions, texts_of
from online_dpo.scoring.rewards.loading import last_part
from online_dpo.scoring.time_limit import call_in_time
from online_dpo.types import Group, Question

NOT_FINITE = "the model's output is not finite"
FEWEST_TOKENS = 8
"""That a comparison can have: two answers and the marks around them."""


class PairwiseModelJudge(PreferenceJudge):
    """A judge that is a pairwise model: it gives the probability that the first of two answers is better.

    The model is a sequence classifier with one or two labels (:class:`PairwiseClassifier`), PairRM
    (:class:`PairRMReader`), or a causal language model that answers with a letter (:class:`LetterReader`). The class of
    the model decides which.

    Each comparison is read in both orders. The preference is the mean of p in one order and 1 - p in the other, so that
    equal texts give 0.5, and so does a model that only looks at the position.

    Nothing is truncated: a comparison that is too long for the model has no preference, and is counted in
    ``judge/too_long``.

    Args:
        model: a model of transformers. It runs on the device of its parameters, in evaluation mode, and returns to its
            former mode afterwards.
        tokenizer: the model's tokenizer.
        name: name in metrics; by default the last part of the model's path.
        template: the text that the model was trained to read, with ``{prompt}``, ``{first}`` and ``{second}``. Not for
            PairRM, which has its own format.
        batch_size: texts in one forward pass; texts of similar length are in one batch.
        max_failure_share: the run stops when more than this share of the latest comparisons has an output that is not
            finite.
        options: ``letters`` of a causal language model for the first and second answer (``["A", "B"]``);
            ``max_tokens`` of PairRM for prompt and answers together (2048).

    Raises:
        ValueError: an option does not fit the model or has a wrong value, the model is not a pairwise model, or its
            tokenizer has tokens that it does not know.
        ScoringError: (when judging) the logits have the wrong shape, or the model, its tokenizer or its chat template
            raised an error.
    """

    is_fair = True  # each comparison is read in both orders

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        name: str | None = None,
        template: str | None = None,
        batch_size: int = 16,
        max_failure_share: float = 0.2,
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
        if is_sharded(model):  # it was loaded while ZeRO-3 was configured
            device = next(model.parameters()).device
            make_whole(model)
            model.to(device)
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.reader: PairwiseReader = _classes(kind)[1](model, tokenizer, **options)
        if self.reader.max_tokens < FEWEST_TOKENS:
            raise ModelFolderError(
                f"Judge `{self.name}` reads {self.reader.max_tokens} tokens at most (`max_position_embeddings` of its "
                "config, or `model_max_length` of its tokenizer): no comparison is as short. Correct it."
            )
        self._options = options
        self._known_tokens = embedding_rows(model)
        self._fitting = Halving(f"Judge `{self.name}`")
        self.last_failure = ""
        self._failures = FailureWindow(f"Judge `{self.name}`", max_failure_share)
        self._statistics = JudgeStatistics(("too_long", "failed", "seconds"))

    def identity(self) -> dict[str, Any]:
        """Returns the fingerprint of the model's weights, and the options of how it is asked."""
        return {"weights": weights_fingerprint(self.model), **self._options}

    @classmethod
    def load(cls, path: str, device: str | torch.device = "cpu", **options: Any) -> PairwiseModelJudge:
        """Load a judge from a folder or the hub, in the type that its weights were saved in.

        ``options`` are the arguments of the class.

        Raises:
            ValueError: the model has no trained head, or the class rejects the model or an option.
            OSError: there is no such model or tokenizer.
        """
        path = os.path.expanduser(path)
        with loading(path):
            config, _ = PreTrainedConfig.get_config_dict(path)
        try:
            kind = pairwise_kind(config)
        except ValueError as problem:
            raise ValueError(f"`{path}`: {problem}") from None
        check_options(
            kind, {option: value for option, value in options.items() if option not in ("name", "max_failure_share")}
        )
        with loading(path), loading_whole(), without_report():
            model, info = _classes(kind)[0].from_pretrained(
                path, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
            )
            check_loaded(model, info, path, "pairwise model")
            check_not_zero(model, path)
            check_config(model.config, path)
            check_finite(model, path)
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)  # unset, it would ask
        return cls(model.to(device), tokenizer, **options)

    def prefer(self, comparisons: Sequence[Group]) -> list[float | None]:
        """Return for each group of two completions the probability that the first one is better.

        ``None`` if the comparison is too long for the model, or if the model's output is not finite.
        """
        check_comparisons(comparisons)
        started = time.perf_counter()
        longest = self.reader.max_tokens
        who, rows = f"Judge `{self.name}`", partial(among_rows, comparisons)
        with one_at_a_time, foreign(who, rows), eval_mode(self.model):
            texts = [text for comparison in comparisons for text in self._both_orders(comparison)]
            readable = [text for text in dict.fromkeys(texts) if len(text) <= longest]
            p_first = call_in_time(partial(self._probabilities, readable), who, rows)
        by_order = [p_first.get(text) for text in texts]
        pairs = list(zip(by_order[::2], by_order[1::2], strict=True))
        self._count_failures(
            too_long=sum(None in pair for pair in pairs),
            failed=sum(p is not None and math.isnan(p) for p in by_order),
        )
        preferences = [self._combine_and_count(*pair) for pair in pairs]
        for comparison, pair in zip(comparisons, pairs, strict=True):
            keep_questions(texts_of(comparison), [self._question(*order) for order in enumerate(pair)])
        self._statistics.add("seconds", time.perf_counter() - started)
        return preferences

    def _count_failures(self, too_long: int, failed: int) -> None:
        self._statistics.add("too_long", too_long)
        self._statistics.add("failed", failed)
        if failed:
            self.last_failure = NOT_FINITE
        elif too_long:
            self.last_failure = self._too_long

    @property
    def _too_long(self) -> str:
        return f"too long for the model, which reads {self.reader.max_tokens} tokens"

    def _question(self, swapped: int, p_first: float | None) -> Question:
        if p_first is None or math.isnan(p_first):
            return Question(bool(swapped), None, failure=self._too_long if p_first is None else NOT_FINITE)
        return Question(bool(swapped), p_first)

    def _both_orders(self, comparison: Group) -> list[Text]:
        """The token ids of a comparison in both orders."""
        judge = f"Judge `{self.name}`"
        with foreign(judge, lambda: at_row(comparison.prompt)):  # the chat template may reject this prompt
            texts = self.reader.token_ids([comparison, Group(comparison.prompt, comparison.completions[::-1])])
        for text in texts:
            check_known(text, self._known_tokens, judge, comparison.prompt)
        return texts

    def metrics(self) -> dict[str, float]:
        """Return the metrics since the last call, and reset them. See :meth:`LLMJudge.metrics`."""
        return self.drain().metrics()

    def drain(self) -> Counts:
        """Return the same counts with each rate as (part, whole), so that processes can add them up."""
        return self._statistics.drain()

    def _combine_and_count(self, given: float | None, swapped: float | None) -> float | None:
        """The mean preference of both orders, ``None`` if one is missing."""
        if given is None or swapped is None:
            return None
        if math.isnan(given) or math.isnan(swapped):
            self._failures.add(NOT_FINITE)
            return None
        self._failures.add(None)
        self._statistics.add_answer(given)
        self._statistics.add_answer(swapped)
        self._statistics.add("both_orders")
        self._statistics.add("disagreed", (given - 0.5) * (swapped - 0.5) > 0)
        return (1 + (given - swapped)) / 2  # exactly one half if both orders give the same

    def _probabilities(self, texts: list[Text]) -> dict[Text, float]:
        """The probability that the first answer of each text is better, nan if the model gives none."""
        probabilities: dict[Text, float] = {}
        with weights_cast_once(self.model):
            for batch in self._batches(sorted(texts, key=len, reverse=True)):
                log_odds_R = torch.tensor(self._fitting(batch, self.reader.log_odds), dtype=torch.float64)
                log_odds_R[~log_odds_R.isfinite()] = torch.nan
                probabilities.update(zip(batch, log_odds_R.sigmoid().tolist(), strict=True))
        return probabilities

    def _batches(self, longest_first: list[Text]) -> Iterator[list[Text]]:
        """Split texts into batches. If the model cannot pad, a batch has only texts of the same length."""
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
    """The class that loads a model of this kind, and the class of its reader."""
    if kind == PAIRRM:
        from online_dpo.scoring.judges.pairwise.pairrm import (  # importing DeBERTa takes a while
            DebertaV2PairRM,
            PairRMReader,
        )

        return DebertaV2PairRM, PairRMReader
    if kind == LETTERS:
        return AutoModelForCausalLM, LetterReader
    return AutoModelForSequenceClassification, PairwiseClassifier
