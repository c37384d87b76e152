"""`Predictions`: gathers the arguments of `compute_metrics` as `transformers.Trainer` does, and calls it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from transformers import EvalPrediction
from transformers.trainer_utils import denumpify_detensorize

from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.errors import ForeignCodeError
from online_dpo.evaluation.records import EvalRecord
from online_dpo.foreign import callable_name, foreign

FILL = -100  # as transformers fills up inputs


class Predictions:
    """Collects the results of an evaluation and hands them to `compute_metrics`.

    ``predictions`` are the scores of the policy's completions (prompts, K), ``label_ids`` those of the reference's
    (prompts,). If ``include_for_metrics`` asks for them, ``inputs`` are the prompts' token ids, filled up with -100,
    and ``losses`` the mean loss of each prompt's pairs. Missing values are nan.

    Each is one array for all batches, or a list with one array a batch if ``eval_do_concat_batches`` is off. With
    ``batch_eval_metrics`` each batch is handed over by itself.
    """

    def __init__(
        self, args: OnlineDPOConfig, compute_metrics: Callable[..., dict[str, Any]] | None, loss_only: bool
    ) -> None:
        self._args, self._compute, self._loss_only = args, compute_metrics, loss_only
        self._batches: list[Sequence[EvalRecord]] = []
        self._metrics: dict[str, Any] = {}

    @property
    def records(self) -> list[EvalRecord]:
        """The records of all batches."""
        return [record for batch in self._batches for record in batch]

    def add(self, records: Sequence[EvalRecord], is_last: bool) -> None:
        """Adds a batch; with ``batch_eval_metrics``, `compute_metrics` is called with it."""
        self._batches.append(records)
        if self._args.batch_eval_metrics and self._compute is not None and not self._loss_only:
            self._metrics = self._compute(self._prediction(records), compute_result=is_last)

    def arrays(self) -> tuple[Any, Any]:
        """``predictions`` and ``label_ids``; ``None`` where only losses are wanted."""
        if self._loss_only:
            return None, None
        return self._collected(_scores), self._collected(_reference_scores)

    def metrics(self) -> dict[str, Any]:
        """Returns the values of `compute_metrics`, as plain numbers."""
        if self._compute is not None and not self._loss_only and not self._args.batch_eval_metrics:
            self._metrics = self._compute(self._prediction(None))
        plain: Any = denumpify_detensorize(self._metrics)
        return plain

    def _prediction(self, records: Sequence[EvalRecord] | None) -> EvalPrediction:
        """The argument of `compute_metrics` for these records, or for all."""

        def array(of: Callable[[Sequence[EvalRecord]], Any]) -> Any:
            return self._collected(of) if records is None else of(records)

        wanted = self._args.include_for_metrics
        return EvalPrediction(
            predictions=array(_scores),
            label_ids=array(_reference_scores),
            inputs=array(_inputs) if "inputs" in wanted else None,
            losses=array(_losses) if "loss" in wanted else None,
        )

    def _collected(self, of: Callable[[Sequence[EvalRecord]], Any]) -> Any:
        if self._args.eval_do_concat_batches:
            return of(self.records)
        return [of(batch) for batch in self._batches]


def named_metrics(
    compute_metrics: Callable[..., dict[str, Any]] | None, step: Callable[[], int]
) -> Callable[..., dict[str, Any]] | None:
    """Returns the user's `compute_metrics`, wrapped so that its errors name it; ``None`` where there is none.

    For a batch before the last one (``compute_result=False``) it returns nothing.

    Raises:
        ForeignCodeError: (when called) `compute_metrics` failed.
    """
    if compute_metrics is None:
        return None

    def compute(*prediction: EvalPrediction, **options: bool) -> dict[str, Any]:
        who = f"`compute_metrics` (`{callable_name(compute_metrics)}`)"
        with foreign(who, f"(step {step()})", raises=ForeignCodeError):
            metrics = compute_metrics(*prediction, **options)
            return dict(metrics) if options.get("compute_result", True) else {}

    return compute


def _scores(records: Sequence[EvalRecord]) -> np.ndarray:
    return np.array([[np.nan if score is None else score for score in record.scores] for record in records])


def _reference_scores(records: Sequence[EvalRecord]) -> np.ndarray:
    return np.array([np.nan if record.reference_score is None else record.reference_score for record in records])


def _losses(records: Sequence[EvalRecord]) -> np.ndarray:
    return np.array([np.mean(record.losses) if record.losses else np.nan for record in records])


def _inputs(records: Sequence[EvalRecord]) -> np.ndarray:
    longest = max((len(record.prompt_ids) for record in records), default=0)
    return np.array([[*record.prompt_ids, *[FILL] * (longest - len(record.prompt_ids))] for record in records])
