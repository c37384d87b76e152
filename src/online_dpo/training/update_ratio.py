"""How many weights change: a sample is compared from log to log, since an update may be lost to rounding, or made to
other tensors, and the loss does not tell.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

SAMPLE = 1 << 16
"""Numbers that are looked at, of all trained weights together (about)."""
FEW = 0.02
"""A share of changed weights that is as good as none; at the default learning rate, weights in bf16 reach half of it.
"""
LOGS = 3
"""So many in a row, and a warning is due."""
FULL_RATE = 0.1
"""A step counts if its learning rate is at least this share of the highest: others may change nothing and be right."""


class UpdatedRatio(TrainerCallback):
    """Measures ``train/updated_ratio``: the share of the sampled weights that changed since the last log.

    Args:
        trained_steps: how many steps have trained so far.
        warns: whether weights that stay as they are have to mean that updates are lost.
    """

    def __init__(self, trained_steps: Callable[[], int], warns: bool = True) -> None:
        self._trained_steps, self._warns = trained_steps, warns
        self._places: list[tuple[nn.Parameter, slice]] = []
        self._last: list[torch.Tensor] = []
        self._seen = self._steps = self._logs = 0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None
        trained = [p for p in model.parameters() if p.requires_grad]
        every = max(1, sum(_local(p).numel() for p in trained) // SAMPLE)
        # An odd distance, since rows have even lengths: otherwise some columns would never be looked at.
        self._places = [(p, slice(i % every, None, every | 1)) for i, p in enumerate(trained)]
        self._last = self._values()
        self._seen, self._steps, self._logs = self._trained_steps(), 0, 0

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        trained, self._seen = self._trained_steps() > self._seen, self._trained_steps()
        groups = optimizer.param_groups  # with the rates of this step
        self._steps += trained and any(g["lr"] >= FULL_RATE * g.get("initial_lr", g["lr"]) for g in groups)

    def since_last(self) -> tuple[int, int]:
        """How many of the sampled weights of this process have changed since the last call, and how many there are."""
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
        """Says once that the weights do not change although steps are trained."""
        ratio = (logs or {}).get("train/updated_ratio")
        if ratio is None or not self._steps:  # nothing was trained since the last log, or with next to no rate
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
        return [_local(parameter).flatten()[places].clone() for parameter, places in self._places]


def _local(parameter: nn.Parameter) -> torch.Tensor:
    """What this process holds of a parameter that may be sharded."""
    tensor = parameter.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
