"""Detection of overoptimisation: the score that is trained on rises while another (gold) score falls.

Gao et al. 2022 (arXiv 2210.10760) show this for reward models: as the policy moves away from its start, the proxy score
keeps rising, but the gold score first rises and then falls.
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
"""Standard errors of a difference that a rise or fall must exceed."""

PROXIES, GOLDS = ("objective/scores", "win_rate"), ("gold_score", "gold_win_rate")
"""Metrics in order of preference; the first that an evaluation has is used. A judge gives only a win rate."""


@dataclass(frozen=True)
class Measurement:
    """One evaluation: mean training score (``proxy``) and mean gold score, each with its standard error.

    >>> Measurement(step=100, proxy=1.2, proxy_error=0.1, gold=0.7, gold_error=0.05)
    """

    step: int
    proxy: float
    proxy_error: float
    gold: float
    gold_error: float


def measurements(log_history: Sequence[Mapping[str, Any]], prefix: str) -> list[Measurement]:
    """The evaluations in a log history that have both scores and their standard errors, in order.

    ``prefix`` is the prefix of their metrics: ``eval``, or ``eval_name`` for one of several datasets.
    """
    history = []
    for log in log_history:
        proxy, gold = (
            next((f"{prefix}_{n}" for n in names if f"{prefix}_{n}" in log), "") for names in (PROXIES, GOLDS)
        )
        names = (proxy, f"{proxy}_stderr", gold, f"{gold}_stderr")
        if all(name in log for name in names):
            history.append(Measurement(log["step"], *(log[name] for name in names)))
    return history


def best_before(history: Sequence[Measurement]) -> Measurement:
    """The evaluation with the highest gold score among all but the last."""
    return max(history[:-1], key=lambda measurement: measurement.gold)


def evaluations_over(history: Sequence[Measurement]) -> int:
    """Count the evaluations in a row, up to the last one, that show overoptimisation.

    An evaluation is compared with the earlier one that has the best gold score. It shows overoptimisation if its proxy
    score is higher and its gold score lower, both by more than `ERRORS` standard errors of the difference,
    ``sqrt(e1^2 + e2^2)``. This treats the errors as independent. In fact evaluations use the same prompts, so the true
    error is smaller; that makes up for the bias of comparing with the best of several evaluations.
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
    """Warns of overoptimisation once each time it begins, or saves a checkpoint and stops training.

    It reads only the log history, so a resumed run continues in the same state. Each evaluation dataset is judged
    separately.

    Args:
        stop: whether to stop training as well.
        patience: number of evaluations in a row that must show overoptimisation.
    """

    def __init__(self, stop: bool, patience: int) -> None:
        self._stop, self._patience = stop, patience
        self._stopped = False

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Forget that an earlier run was stopped."""
        self._stopped = False

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> TrainerControl:
        """Warn of overoptimisation, or stop training, after an evaluation."""
        for prefix in _prefixes(metrics or {}):
            history = measurements(state.log_history, prefix)
            count = evaluations_over(history)
            if count == self._patience or (self._stop and count > self._patience):
                if state.is_world_process_zero:
                    logger.warning(self._message(history, args, prefix))
                if self._stop:
                    control.should_save = True
                    control.should_log = True  # otherwise metrics since the last log would be lost
                    control.should_training_stop = True
                    self._stopped = True
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Save the checkpoint of a stopped run: the strategy "best" has reset ``should_save`` since `on_evaluate`."""
        if self._stopped and args.save_strategy == SaveStrategy.BEST:
            control.should_save = True
        return control

    def _message(self, history: Sequence[Measurement], args: TrainingArguments, prefix: str) -> str:
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
    """The prefixes of the evaluations whose metrics these are: ``eval``, or ``eval_name`` for several datasets."""
    named = {name.removesuffix(f"_{gold}") for gold in GOLDS for name in metrics if name.endswith(f"_{gold}")}
    return sorted(named)


def _exceeds(difference: float, *errors: float) -> bool:
    return difference > ERRORS * math.hypot(*errors)
