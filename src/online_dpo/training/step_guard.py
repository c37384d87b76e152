"""Guards of the optimizer steps: steps that are not finite are skipped, and a run that trains nothing is reported."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from online_dpo.checkpoints.codec import read_json, write_json
from online_dpo.distributed.collectives import any_rank
from online_dpo.distributed.sharding import NoSharding, Sharding
from online_dpo.errors import NothingTrainedError, TrainingDivergedError, TrainingStalledError
from online_dpo.runs import events
from online_dpo.stats.catalogue import Metric, describe
from online_dpo.training.learning_rate import LearningRateBackoff
from online_dpo.training.trained import check_trained, warn_of_untrained

logger = logging.getLogger(__name__)

describe(
    "Guards and weights",
    Metric(
        "guard/skipped_steps",
        "steps",
        "steps of the run that were skipped because something was not finite",
        "Some are harmless; many in a row stop the run (`max_skipped_steps`).",
    ),
    Metric("guard/skipped_pairs", "pairs", "pairs in skipped steps", "What was lost by it.", "after a skipped step"),
)


@dataclass(frozen=True)
class GuardCounts:
    """What a checkpoint holds of a `StepGuard`."""

    trained_steps: int
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    idle: Counter[str] = field(default_factory=Counter)
    learning_rate_debt: int = 0


class StepGuard(TrainerCallback):
    """Prevents optimizer steps that are not finite or have no pair, in the same way on every rank.

    The trainer reports the number of pairs, each loss and the gradient norm. Just before the optimizer runs, the guard
    removes all gradients if a loss or gradient of any rank is not finite, or if no rank has a pair. An optimizer does
    not change parameters without a gradient, nor their state; a zero gradient would still apply weight decay and
    momentum.

    ``skipped_step`` says whether the latest step had pairs and its update was left out, since it was not finite.
    ``trained_steps`` counts the steps that were made with a learning rate above 0; ``untrained`` counts the others of
    this process by reason, and ``idle`` those since the last trained step. All counts are the same on every rank.

    Args:
        accelerator: the trainer's accelerator.
        max_skipped_steps: the run stops after this many skipped steps in a row.
        max_idle_steps: the run stops after this many steps in a row that train nothing; ``None``: never.
        backoff: lowers the learning rate after skipped steps.
        on_skip: called with the number of pairs when a step is skipped.
        check_start: called when training begins, with all weights loaded; raises if nothing can be trained from them.
        sharding: removes gradients where they are kept; when not given, from the model.
    """

    FILE = "guard.json"

    def __init__(
        self,
        accelerator: Accelerator,
        max_skipped_steps: int,
        max_idle_steps: int | None,
        backoff: LearningRateBackoff,
        on_skip: Callable[[int], None] = lambda pairs: None,
        check_start: Callable[[], None] = lambda: None,
        sharding: Sharding | None = None,
    ) -> None:
        self.accelerator, self.sharding = accelerator, sharding or NoSharding(accelerator)
        self.on_skip, self._check_start = on_skip, check_start
        self.max_skipped_steps, self.max_idle_steps, self.backoff = max_skipped_steps, max_idle_steps, backoff
        self._warned_idle = False
        self.begin_run()

    def begin_run(self) -> None:
        """Reset all counts for a new run."""
        self.trained_steps = 0
        self.untrained: Counter[str] = Counter()
        self.idle: Counter[str] = Counter()
        self.skipped = self.skipped_in_a_row = 0
        self.trains = self.skipped_step = False
        self.backoff.begin_run()
        self._begin_step(num_pairs=0)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Check that the optimizer trains the model, and warn if the run has no step left.

        Raises:
            ValueError: the optimizer trains no weight of the model.
        """
        assert model is not None
        self._check_start()
        if state.global_step >= state.max_steps and state.is_world_process_zero:
            logger.warning(
                "This run was over: step %d of %d is done. Nothing more is trained; to continue, raise `max_steps` or "
                "`num_train_epochs`.",
                state.global_step,
                state.max_steps,
            )
        if self.sharding.copies:
            return
        inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
        check_trained(model, inner)
        warn_of_untrained(model, inner)

    def _begin_step(self, num_pairs: int) -> None:
        self._num_pairs = num_pairs
        self._finite = torch.ones((), dtype=torch.bool, device=self.accelerator.device)

    def expect(self, num_pairs: int) -> None:
        """Begin a new optimizer step with this number of pairs on all ranks together."""
        self._begin_step(num_pairs)

    def saw_loss(self, loss: torch.Tensor) -> None:
        """Record whether a loss of this step is finite. The result stays on the device until the optimizer runs."""
        self._finite = self._finite & torch.isfinite(loss.detach()).all()

    def saw_gradient_norm(self, norm: torch.Tensor | float) -> None:
        """Record whether the gradient norm of this step is finite."""
        self._finite = self._finite & torch.isfinite(torch.as_tensor(norm, device=self._finite.device)).all()

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Remove all gradients if the step is not finite on any rank, or has no pair.

        Raises:
            TrainingDivergedError: the learning rate is not finite; the update would make all weights so.
        """
        assert model is not None
        _check_learning_rates(optimizer, state)
        finite = not any_rank(not bool(self._finite), self.accelerator.device)
        if not finite or self._num_pairs == 0:
            self.sharding.drop_gradients(model)
        self.trains = finite and self._num_pairs > 0
        self.skipped_step = not finite
        if finite:
            self.skipped_in_a_row = 0
            if not self.trains:
                self._count_untrained("without a pair")
            return
        self._count_untrained("not finite")
        self.skipped_in_a_row += 1
        self.skipped += 1
        self.backoff.on_skip()
        self.on_skip(self._num_pairs)
        step, in_a_row = state.global_step + 1, self.skipped_in_a_row
        text = f"Step {step} skipped: its loss or gradient is not finite ({in_a_row} in a row)."
        events.warn(logger, "skip", text, in_a_row=in_a_row, pairs=self._num_pairs)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Count the step as trained, or as untrained with its reason."""
        if not self.trains:
            return
        if self.accelerator.optimizer_step_was_skipped:
            self._count_untrained("gradient beyond the range of fp16")
            self.skipped_step = True
        elif all(group["lr"] == 0 for group in optimizer.param_groups):
            self._count_untrained("learning rate 0")
        else:
            self.trained_steps += 1
            self.idle.clear()

    def _count_untrained(self, reason: str) -> None:
        self.untrained[reason] += 1
        self.idle[reason] += 1
        events.emit("idle", f"A step that trained nothing: {reason}.", reason=reason, in_a_row=self.idle.total())

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Stop a run that has diverged or stalled, and save a checkpoint of a run that ends without a trained step."""
        if self.diverged or self.stalled:
            control.should_save = True
            control.should_training_stop = True
        if self.trained_steps == 0 and (control.should_training_stop or state.global_step >= state.max_steps):
            control.should_save = True
        if control.should_training_stop:
            control.should_log = True  # otherwise metrics since the last log would be lost
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Warn that nothing is trained, once until there are pairs again."""
        if not logs or "pairs/count" not in logs:  # the log of an evaluation, or the last log of a run
            return
        idle = logs["pairs/count"] == 0
        if idle and not self._warned_idle and state.is_world_process_zero:
            reasons = {name.partition("/")[2]: count for name, count in logs.items() if name.startswith("dropped/")}
            why = ", ".join(f"{reason} {count:.0f}" for reason, count in reasons.items() if count)
            text = (
                f"Nothing was trained since the last log, at step {state.global_step}: none of {logs['prompts']:.0f} "
                f"prompts gave a pair ({why})."
            )
            events.warn(logger, "idle", text, dropped=reasons)
        self._warned_idle = idle

    @property
    def diverged(self) -> bool:
        """Whether so many steps in a row were skipped that the run must stop."""
        return self.skipped_in_a_row >= self.max_skipped_steps

    @property
    def stalled(self) -> bool:
        """Whether so many steps in a row trained nothing that the run must stop."""
        return self.max_idle_steps is not None and self.idle.total() >= self.max_idle_steps

    def raise_at_end(self, state: TrainerState, output_dir: str) -> None:
        """Raise an error if this guard has stopped the run, or if no step trained anything.

        Raises:
            TrainingDivergedError, NothingTrainedError, TrainingStalledError: see the methods below.
        """
        self.raise_if_diverged(state, output_dir)
        self.raise_if_nothing_trained(state, output_dir)
        self.raise_if_stalled(state, output_dir)

    def raise_if_diverged(self, state: TrainerState, output_dir: str) -> None:
        """Raise an error if this guard has stopped the run.

        Raises:
            TrainingDivergedError: too many steps in a row were not finite.
        """
        if self.diverged:
            folder = Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"  # of finite weights alone
            where = f"The weights before them are in {folder}" if folder.is_dir() else "No checkpoint was saved"
            raise TrainingDivergedError(
                f"{self.skipped_in_a_row} steps in a row had a loss or gradient that is not finite; stopped at step "
                f"{state.global_step}. {where}. "
                "Try a lower learning rate, a larger beta, or bf16 instead of fp16; `max_skipped_steps` sets the limit."
            )

    def raise_if_nothing_trained(self, state: TrainerState, output_dir: str) -> None:
        """Raise an error that counts the reasons, if no step was trained.

        Raises:
            NothingTrainedError: neither this run nor the run that it resumes has trained anything.
        """
        if self.trained_steps:
            return
        if state.global_step == 0:
            raise NothingTrainedError("The run has trained nothing: there was no step, because the data gave no batch.")
        message = f"The run has trained nothing. {_dropped(state.log_history)}."
        if steps := self.untrained.total():  # none of a run that was over when it was resumed
            message += (
                f" Of {steps} steps: {_counts(self.untrained)}. The weights are those of the start; the run's state is "
                f"in {output_dir}/checkpoint-{state.global_step}."
            )
        if self.stalled:
            message += f" It stopped after {self.max_idle_steps} steps; `max_idle_steps` sets the limit."
        raise NothingTrainedError(message)

    def raise_if_stalled(self, state: TrainerState, output_dir: str) -> None:
        """Raise an error that counts the reasons, if this guard has stopped a run that trained something before.

        Raises:
            TrainingStalledError: too many steps in a row trained nothing.
        """
        if not self.stalled:
            return
        steps = self.idle.total()
        logs = [log for log in state.log_history if log["step"] > state.global_step - steps]
        raise TrainingStalledError(
            f"{steps} steps in a row trained nothing ({_counts(self.idle)}); stopped at step {state.global_step}. "
            f"{_dropped(logs)}. The run is saved in {output_dir}/{PREFIX_CHECKPOINT_DIR}-{state.global_step}. See why "
            "the completions of a prompt get no different scores; `max_idle_steps` sets the limit."
        )

    def files(self, rank: int) -> Sequence[str]:
        """Return the name of the file with the counts."""
        return [self.FILE]

    def save(self, folder: Path, rank: int) -> None:
        """Save the counts to a checkpoint, on rank 0."""
        if rank == 0:
            counts = GuardCounts(self.trained_steps, self.skipped, self.skipped_in_a_row, self.idle, self.backoff.debt)
            write_json(folder / self.FILE, counts)

    def restore(self, folder: Path, rank: int) -> None:
        """Restore the counts of a checkpoint.

        A checkpoint of an earlier version has the first count alone.

        Raises:
            CheckpointError: the file is damaged.
        """
        counts = read_json(folder / self.FILE, GuardCounts)
        self.trained_steps = counts.trained_steps
        self.skipped, self.skipped_in_a_row = counts.skipped_steps, counts.skipped_in_a_row
        self.idle = Counter(counts.idle)
        self.backoff.debt = counts.learning_rate_debt


def _check_learning_rates(optimizer: Any, state: TrainerState) -> None:
    rates = [group["lr"] for group in optimizer.param_groups if group["lr"] is not None]
    wrong = [rate for rate in rates if not math.isfinite(rate)]
    if wrong:
        raise TrainingDivergedError(
            f"The learning rate of step {state.global_step + 1} is {float(wrong[0])}: check the schedule, or the "
            "callback that sets it. The step was not made."
        )


def _counts(of: Counter[str]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in of.most_common() if count) or "none"


def _dropped(logs: Sequence[Mapping[str, Any]]) -> str:
    """The prompts of these logs, and why they gave no pair."""
    dropped: Counter[str] = Counter()
    for log in logs:
        dropped.update({name.partition("/")[2]: int(n) for name, n in log.items() if name.startswith("dropped/")})
    return f"Dropped of {int(sum(log.get('prompts', 0) for log in logs))} prompts: {_counts(dropped)}"
