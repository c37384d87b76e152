"""Measures how many weights change between logs, on a sample of them.

An update may be lost to rounding, or change other tensors than the model's; the loss does not show this.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from online_dpo.distributed.weights import part
from online_dpo.stats.catalogue import Metric, describe

logger = logging.getLogger(__name__)

describe(
    "Guards and weights",
    Metric(
        "train/updated_ratio",
        "share",
        "weights that have changed since the last log / weights, in a fixed sample of about 65 000 trained ones",
        "Near 1 in fp32; near 0 in bf16, updates are rounded away. Embeddings of tokens that did not occur stay.",
    ),
)

SAMPLE = 1 << 16
"""Approximate number of weights in the sample."""
FEW = 0.02
"""Share of changed weights that counts as none. At the default learning rate, weights in bf16 reach half of it."""
LOGS = 3
"""Number of such logs in a row after which a warning is given."""
FULL_RATE = 0.1
"""A step counts if its learning rate is at least this share of the highest. With a lower rate, it may rightly change
nothing."""


class UpdatedRatio(TrainerCallback):
    """Measures ``train/updated_ratio``: the share of the sampled weights that changed since the last log.

    Args:
        trained_steps: returns the number of steps that were trained so far.
        warns: whether to warn if hardly any weights change.
    """

    def __init__(self, trained_steps: Callable[[], int], warns: bool = True) -> None:
        self._trained_steps, self._warns = trained_steps, warns
        self._sample: list[tuple[nn.Parameter, slice]] = []
        self._last: list[torch.Tensor] = []
        self._counted = 0  # trained steps at the last call of `on_optimizer_step`
        self._steps = 0  # trained steps with a full learning rate since the last log
        self._logs = 0  # logs in a row with few changed weights

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Choose the sample and record its values."""
        assert model is not None
        trained = [p for p in model.parameters() if p.requires_grad]
        every = max(1, sum(part(p).numel() for p in trained) // SAMPLE)
        # The stride is odd, because rows have even lengths: otherwise some columns would never be sampled.
        self._sample = [(p, slice(i % every, None, every | 1)) for i, p in enumerate(trained)]
        self._last = self._values()
        self._counted, self._steps, self._logs = self._trained_steps(), 0, 0

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Count the step if it was trained with a full learning rate."""
        trained, self._counted = self._trained_steps() > self._counted, self._trained_steps()
        groups = optimizer.param_groups  # with the learning rates of this step
        self._steps += trained and any(g["lr"] >= FULL_RATE * g.get("initial_lr", g["lr"]) for g in groups)

    def drain_changed(self) -> tuple[int, int]:
        """Count the sampled weights of this process that changed since the last call, and record their new values.

        Returns:
            The number of changed weights and the size of the sample.
        """
        now = self._values()
        changed = sum(int((a != b).sum()) for a, b in zip(now, self._last, strict=True))
        self._last = now
        return changed, sum(values.numel() for values in now)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Warn once if hardly any weights change although steps are trained."""
        ratio = (logs or {}).get("train/updated_ratio")
        if ratio is None or not self._steps:  # no step was trained since the last log, or only with a tiny rate
            return
        self._steps = 0
        self._logs = self._logs + 1 if ratio < FEW else 0
        if self._logs == LOGS and self._warns and state.is_world_process_zero:
            self._warns = False
            logger.warning(
                "The weights hardly change: for %d logs in a row, steps were trained, and at step %d only %.2g %% of "
                "the sampled weights differ from the log before. Updates are smaller than the weights' type can hold "
                "(in bf16: load them in fp32, or raise `learning_rate`), or go to other tensors than the model's.",
                LOGS,
                state.global_step,
                100 * ratio,
            )

    def _values(self) -> list[torch.Tensor]:
        return [part(parameter).flatten()[chosen].clone() for parameter, chosen in self._sample]
