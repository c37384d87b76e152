"""The learning rate after skipped steps: lowered for a while, without touching the schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from online_dpo.runs import events
from online_dpo.stats.catalogue import Metric, describe

describe(
    "Guards and weights",
    Metric(
        "guard/lr_factor",
        "1",
        "what the learning rate of the last step was multiplied by",
        "How far skipped steps have lowered it. `learning_rate` has it in it.",
        when="with `skipped_step_lr_factor`",
    ),
)


class LearningRateBackoff(TrainerCallback):
    """Multiplies the learning rate by a factor after each skipped step, from which it recovers geometrically.

    With a factor of 0.5 and a recovery of 100 steps, the first step after a skipped one is made with half the learning
    rate, the one 50 trained steps later with 0.5 ** 0.5 of it, and after 100 the learning rate is the schedule's again.
    Skipped steps multiply: after two in a row it is a quarter, and 200 trained steps lead back.

    The optimizer has the lowered learning rate only while it updates the weights. So a schedule of any kind, also one
    that reads the learning rate to change it, sees its own.

    Must come after the callback that decides whether a step is skipped, and after `StepsDone`: between its
    `on_pre_optimizer_step` and `on_optimizer_step` the update is incomplete.

    Args:
        factor: in (0, 1]; 1 changes nothing.
        recovery: trained steps that make up for one skipped step.
        trains: returns whether the optimizer is about to train the weights, or the step is skipped or has no pair.
        skipped: returns how many steps of the run have been skipped.
    """

    def __init__(self, factor: float, recovery: int, trains: Callable[[], bool]) -> None:
        self.factor, self.recovery, self._trains = factor, recovery, trains
        self._scheduled: list[Any] | None = None
        self.begin_run()

    def begin_run(self) -> None:
        """Forget the skipped steps of an earlier run."""
        self.debt = 0
        """Trained steps until the learning rate is the schedule's again; a whole number, so that no step is rounded."""
        self.used = 1.0
        """What the learning rate of the last step was multiplied by."""

    @property
    def is_on(self) -> bool:
        """Whether skipped steps lower the learning rate."""
        return self.factor < 1

    def on_skip(self) -> None:
        """Count a skipped step."""
        self.debt += self.recovery if self.is_on else 0
        if self.is_on:
            factor = self.factor ** (self.debt / self.recovery)
            text = f"The learning rate is {factor:.3g} of the schedule's for now, because a step was skipped."
            events.emit("learning_rate", text, factor=factor)

    def in_log(self, logs: Mapping[str, float]) -> dict[str, float]:
        """Return the log of a step with the learning rate that was used, and by what the schedule's was multiplied."""
        if not self.is_on:
            return dict(logs)
        rate = logs["learning_rate"] * self.used
        return {**logs, "learning_rate": rate, "guard/lr_factor": self.used}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Check that the optimizer has a learning rate.

        Raises:
            ValueError: it chooses its own.
        """
        if self.is_on and any(group.get("lr") is None for group in optimizer.param_groups):
            raise ValueError(
                "`skipped_step_lr_factor` lowers the learning rate, but this optimizer chooses its own. Give it a "
                "learning rate (Adafactor: `relative_step=False`), or leave `skipped_step_lr_factor` at 1."
            )

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Lower the learning rate for the update."""
        self.used = self.factor ** (self.debt / self.recovery)
        if self.used == 1 or not self._trains():
            return
        self._scheduled = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * self.used

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Give the optimizer the schedule's learning rate back, and count the step towards recovery."""
        if self._scheduled is not None:
            for group, rate in zip(optimizer.param_groups, self._scheduled, strict=True):
                group["lr"] = rate
            self._scheduled = None
        if self._trains():
            if self.debt == 1:
                events.emit("learning_rate", "The learning rate is the schedule's again.", factor=1.0)
            self.debt = max(0, self.debt - 1)
