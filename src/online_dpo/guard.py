"""What keeps a run alive: steps that are not finite are skipped, batches that do not fit are split."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from online_dpo.errors import TrainingDivergedError
from online_dpo.types import PackedRows

logger = logging.getLogger(__name__)


class StepGuard(TrainerCallback):
    """Lets an optimizer step happen only when there is something to learn from it, on every rank alike.

    The trainer reports each loss, the gradient norm and the number of pairs; just before the optimizer runs, the guard
    drops all gradients when any rank saw a loss or gradient that is not finite, or when no rank has a pair. An
    optimizer leaves parameters without a gradient, and their state, untouched; a zero gradient would still apply weight
    decay and momentum.
    """

    def __init__(
        self, accelerator: Accelerator, max_skipped_steps: int, on_skip: Callable[[int], None] = lambda pairs: None
    ) -> None:
        self.accelerator = accelerator
        self.on_skip = on_skip
        self.max_skipped_steps = max_skipped_steps
        self.skipped_in_a_row = 0
        self.skipped = 0
        self._idle = False
        self._begin_step(num_pairs=0)

    def _begin_step(self, num_pairs: int) -> None:
        self._num_pairs = num_pairs
        self._finite = torch.ones((), dtype=torch.bool, device=self.accelerator.device)

    def expect(self, num_pairs: int) -> None:
        """A new optimizer step begins, with this many pairs over all ranks."""
        self._begin_step(num_pairs)

    def saw_loss(self, loss: torch.Tensor) -> None:
        self._finite = self._finite & torch.isfinite(loss.detach()).all()

    def saw_gradient_norm(self, norm: torch.Tensor | float) -> None:
        self._finite = self._finite & torch.isfinite(torch.as_tensor(norm, device=self._finite.device)).all()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step >= state.max_steps and state.is_world_process_zero:
            logger.warning(
                "This run was over: step %d of %d is done. Nothing more is trained; to go on, raise `max_steps` or "
                "`num_train_epochs`.",
                state.global_step,
                state.max_steps,
            )

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None
        ranks_in_trouble = self.accelerator.reduce((~self._finite).float(), reduction="sum")
        finite = not bool(ranks_in_trouble)  # pyright: ignore[reportArgumentType]
        if not finite or self._num_pairs == 0:
            for parameter in model.parameters():
                parameter.grad = None
        if finite:
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        self.skipped += 1
        self.on_skip(self._num_pairs)
        logger.warning(
            "Step %d skipped: its loss or gradient is not finite (%d in a row).",
            state.global_step + 1,
            self.skipped_in_a_row,
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.diverged:
            control.should_save = True
            control.should_training_stop = True
        if control.should_training_stop:
            control.should_log = True  # what has been collected since the last log would be lost
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Says once, until there are pairs again, that nothing is trained."""
        if not logs or "pairs/count" not in logs:  # an evaluation's, or the last one's
            return
        idle = logs["pairs/count"] == 0
        if idle and not self._idle and state.is_world_process_zero:
            reasons = {name.partition("/")[2]: count for name, count in logs.items() if name.startswith("dropped/")}
            why = ", ".join(f"{reason} {count:.0f}" for reason, count in reasons.items() if count)
            logger.warning(
                "Nothing was trained since the last log, at step %d: none of %.0f prompts gave a pair (%s).",
                state.global_step,
                logs["prompts"],
                why,
            )
        self._idle = idle

    @property
    def diverged(self) -> bool:
        return self.skipped_in_a_row >= self.max_skipped_steps

    def raise_if_diverged(self, state: TrainerState, output_dir: str) -> None:
        """
        Raises:
            TrainingDivergedError: the run was stopped by this guard.
        """
        if self.diverged:
            raise TrainingDivergedError(
                f"{self.skipped_in_a_row} steps in a row had a loss or gradient that is not finite; stopped at step "
                f"{state.global_step}. The weights before them are in {output_dir}/checkpoint-{state.global_step}. "
                "Try a lower learning rate, a larger beta, or bf16 instead of fp16; `max_skipped_steps` sets the limit."
            )


def refuse_to_split(rows: PackedRows, num_processes: int) -> None:
    """
    Raises:
        torch.OutOfMemoryError: the pass is a single pair, or other ranks wait in the same backward pass.
    """
    pairs = len(rows.pairs)
    if pairs < 2 or num_processes > 1:
        raise torch.OutOfMemoryError(
            f"A pass of {pairs} pair(s), in rows of {rows.tokens.ids_RT.shape[1]} tokens, does not fit in memory "
            "and cannot be split here. Lower `max_tokens_per_pass` (which splits micro-batches of several pairs), "
            "`max_length` or `max_new_tokens`."
        )
    logger.warning("A pass of %d pairs ran out of memory; it is split in two.", pairs)
