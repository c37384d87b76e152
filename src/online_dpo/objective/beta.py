"""Beta, the strength of the KL penalty: as configured, or adapted to reach a target KL."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from online_dpo.checkpoints.codec import read_json, write_json
from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.errors import CheckpointError

LARGEST_ERROR = 0.2


def adapted(beta: float, kl: float, target: float, gain: float) -> float:
    """The next beta of the proportional controller: ``beta (1 + gain e)`` with
    ``e = clip((kl - target) / target, -0.2, 0.2)`` (Ziegler et al. 2019, arXiv 1909.08593, section 2.2).

    >>> adapted(0.1, kl=12.0, target=6.0, gain=0.1)
    0.10200000000000001
    """
    error = min(max((kl - target) / target, -LARGEST_ERROR), LARGEST_ERROR)
    return beta * (1 + gain * error)


@dataclass(frozen=True)
class AdaptedBeta:
    """What a checkpoint holds of a `Beta` that is adapted."""

    beta: float


class Beta(TrainerCallback):
    """The current beta of a run.

    With ``target_kl`` it is adapted after each step: raised if the step's KL was above the target, lowered if it was
    below, within a factor of ``beta_range`` of its initial value. It is then part of checkpoints.

    Args:
        measure: returns the KL of the step that has ended, in nats per completion, over all ranks; ``None`` if nothing
            was trained.
    """

    FILE = "beta.json"

    def __init__(self, args: OnlineDPOConfig, measure: Callable[[], float | None]) -> None:
        self.adapts = args.target_kl is not None
        self._args, self._measure = args, measure
        self._value = args.beta_at(0)

    def at(self, epoch: float) -> float:
        """The current beta; unless it is adapted, the configured one for this epoch."""
        return self._value if self.adapts else self._args.beta_at(epoch)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Adapts beta to the KL of the step that has ended."""
        target = self._args.target_kl
        if target is None:
            return
        kl = self._measure()
        if kl is not None:
            start, factor = self._args.beta_at(0), self._args.beta_range
            beta = adapted(self._value, kl, target, self._args.beta_gain)
            self._value = min(max(beta, start / factor), start * factor)

    def files(self, rank: int) -> Sequence[str]:
        """Returns the name of beta's file, if it is adapted."""
        return [self.FILE] if self.adapts else []

    def save(self, folder: Path, rank: int) -> None:
        """Writes ``beta.json`` to a checkpoint's folder, on rank 0, if beta is adapted."""
        if self.adapts and rank == 0:
            write_json(folder / self.FILE, AdaptedBeta(self._value))

    def restore(self, folder: Path, rank: int) -> None:
        """Continues from what `save` wrote.

        Raises:
            CheckpointError: the file is damaged.
        """
        if self.adapts:
            beta = read_json(folder / self.FILE, AdaptedBeta).beta
            if not 0 < beta < math.inf:
                raise CheckpointError(f"{folder / self.FILE} is damaged (beta is {beta}). Give another checkpoint.")
            self._value = beta
