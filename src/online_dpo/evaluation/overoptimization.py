"""Overoptimisation: the score that is trained on rises while a score that is not trained on falls.

Gao et al. 2022 (arXiv 2210.10760) show it for reward models: with the distance from the start, the proxy score goes on
rising, the gold score rises at first and then falls.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

logger = logging.getLogger(__name__)

ERRORS = 2.0
"""Standard errors of the difference that a rise or fall has to exceed."""

PROXIES, GOLDS = ("objective/scores", "win_rate"), ("gold_score", "gold_win_rate")
"""Metrics, the first that an evaluation has: a judge gives no scores, only a win rate."""


@dataclass(frozen=True)
class Measured:
    """One evaluation: mean training score (``proxy``) and mean gold score, each with its standard error.

    >>> Measured(step=100, proxy=1.2, proxy_error=0.1, gold=0.7, gold_error=0.05)
    """

    step: int
    proxy: float
    proxy_error: float
    gold: float
    gold_error: float


def measurements(log_history: Sequence[Mapping[str, Any]], prefix: str) -> list[Measured]:
    """The evaluations under ``prefix_`` that have both scores and their errors, in their order."""
    found = []
    for log in log_history:
        proxy, gold = (
            next((f"{prefix}_{n}" for n in names if f"{prefix}_{n}" in log), "") for names in (PROXIES, GOLDS)
        )
        names = (proxy, f"{proxy}_stderr", gold, f"{gold}_stderr")
        if all(name in log for name in names):
            found.append(Measured(log["step"], *(log[name] for name in names)))
    return found


def best_before(history: Sequence[Measured]) -> Measured:
    """The evaluation with the highest gold score of all but the last."""
    return max(history[:-1], key=lambda measured: measured.gold)


def evaluations_over(history: Sequence[Measured]) -> int:
    """How many evaluations in a row, up to the last, show overoptimisation.

    An evaluation shows it when, against the evaluation with the best gold score before it, the proxy is higher and gold
    is lower, both by more than `ERRORS` times the standard error of the difference, ``sqrt(e1^2 + e2^2)``. The errors
    are taken as independent. Evaluations use the same prompts, so the true error is smaller, which makes up for
    comparing with the luckiest of several.
    """
    count = 0
    while len(history) - count > 1:
        now, best = history[len(history) - count - 1], best_before(history[: len(history) - count])
        rises = _exceeds(now.proxy - best.proxy, now.proxy_error, best.proxy_error)
        if not (rises and _exceeds(best.gold - now.gold, now.gold_error, best.gold_error)):
            break
        count += 1
    return count


class OveroptimisationGuard(TrainerCallback):
    """Warns of overoptimisation once each time it begins, or stops training after a checkpoint.

    All that it knows stands in the log history, so a resumed run goes on where it was. Each evaluation dataset is
    watched for itself.

    Args:
        stop: stop, and do not only warn.
        patience: evaluations in a row that have to show it.
    """

    def __init__(self, stop: bool, patience: int) -> None:
        self._stop, self._patience = stop, patience
        self._stopped = False

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._stopped = False

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> TrainerControl:
        for prefix in _prefixes(metrics or {}):
            history = measurements(state.log_history, prefix)
            count = evaluations_over(history)
            if count == self._patience or (self._stop and count > self._patience):
                if state.is_world_process_zero:
                    logger.warning(self._message(history, args, prefix))
                if self._stop:
                    control.should_save = True
                    control.should_log = True  # what has been collected since the last log would be lost
                    control.should_training_stop = True
                    self._stopped = True
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self._stopped and args.save_strategy == SaveStrategy.BEST:  # which has overruled what was said above
            control.should_save = True
        return control

    def _message(self, history: Sequence[Measured], args: TrainingArguments, prefix: str) -> str:
        now, best = history[-1], best_before(history)
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{best.step}"
        place = f"in {folder}" if folder.is_dir() else "in no checkpoint (save as often as you evaluate)"
        return (
            f"Overoptimisation in `{prefix}` at step {now.step}: since step {best.step}, whose gold score is the best, "
            f"the training score has risen from {best.proxy:.4g} (standard error {best.proxy_error:.2g}) to "
            f"{now.proxy:.4g} ({now.proxy_error:.2g}) while gold has fallen from {best.gold:.4g} "
            f"({best.gold_error:.2g}) to {now.gold:.4g} ({now.gold_error:.2g}). The best weights by gold are {place}."
            + (" Training stops here." if self._stop else "")
        )


def _prefixes(metrics: Mapping[str, float]) -> list[str]:
    """Of the evaluations whose metrics these are: ``eval``, or ``eval_name``."""
    named = {name.removesuffix(f"_{gold}") for gold in GOLDS for name in metrics if name.endswith(f"_{gold}")}
    return sorted(named)


def _exceeds(difference: float, *errors: float) -> bool:
    return difference > ERRORS * math.hypot(*errors)
