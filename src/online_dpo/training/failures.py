"""What fails in a run ends it on every rank alike, and leaves a checkpoint of the steps that are done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from online_dpo.errors import ForeignCodeError
from online_dpo.foreign import foreign

OURS = __name__.partition(".")[0]


class NamedCallbacks(CallbackHandler):
    """The callbacks of a trainer. What one of the user's raises is an error that names it and the event.

    Inside ``deferred()`` it is kept as ``failure`` (the first one) in place of being raised: where one rank alone
    broke off, the others would wait for it for ever. The trainer looks at it where all ranks come by.

    Args:
        handler: the trainer's own, whose place this takes.
    """

    def __init__(self, handler: CallbackHandler) -> None:
        vars(self).update(vars(handler))
        self.failure: ForeignCodeError | None = None
        self._defers = False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        self.failure, self._defers = None, True
        try:
            yield
        finally:
            self._defers = False

    def call_event(
        self, event: str, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """As the parent's."""
        arguments = {
            "model": self.model,
            "processing_class": self.processing_class,
            "optimizer": self.optimizer,
            "lr_scheduler": self.lr_scheduler,
            "train_dataloader": self.train_dataloader,
            "eval_dataloader": self.eval_dataloader,
            **kwargs,
        }
        for callback in self.callbacks:
            if type(callback).__module__.partition(".")[0] == OURS:
                result = getattr(callback, event)(args, state, control, **arguments)
            else:
                result = self._foreign(callback, event, args, state, control, **arguments)
            control = control if result is None else result
        return control

    def _foreign(self, callback: TrainerCallback, event: str, *args: Any, **kwargs: Any) -> TrainerControl | None:
        who = f"Callback `{type(callback).__name__}` in `{event}`"
        try:
            with foreign(who, f"(step {args[1].global_step})", raises=ForeignCodeError):
                return getattr(callback, event)(*args, **kwargs)
        except ForeignCodeError as error:
            if not self._defers:
                raise
            self.failure = self.failure or error
            return None


class StepsDone(TrainerCallback):
    """Knows which step was done last, and what a checkpoint of it needs that later work changes.

    It has to be the last callback: an update is half done from here on until the step has ended.

    Args:
        agree: called just before each update; raises where any rank has failed, so that the update is not made.
    """

    def __init__(self, agree: Callable[[], None]) -> None:
        self._agree = agree
        self.begin_run()

    def begin_run(self) -> None:
        self.step = self._saved = -1
        self.rng_state: torch.Tensor | None = None
        """Torch's on the CPU at the end of that step: an epoch draws from it before its first prompts are there."""
        self.updating = False

    def wants_checkpoint(self, state: TrainerState) -> bool:
        """Whether the step that the run is at is done, by this run, and not saved yet."""
        return not self.updating and state.global_step == self.step != self._saved

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._agree()
        self.updating = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.updating = False
        self.step = state.global_step
        self.rng_state = torch.get_rng_state()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._saved = state.global_step
