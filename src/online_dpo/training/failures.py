"""Failures during a run: they end it on every rank, and leave a checkpoint of the steps that are done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from online_dpo.distributed.process_state import RandomState
from online_dpo.errors import ForeignCodeError
from online_dpo.foreign import foreign

OURS = __name__.partition(".")[0]


class NamedCallbacks(CallbackHandler):
    """The callback handler of a trainer. An error in a user's callback becomes one that names callback and event.

    Inside ``deferred()``, the first error is stored as ``failure`` instead of being raised, because if only one rank
    stopped, the others would wait for it for ever. The trainer checks ``failure`` at a point that all ranks reach.

    Args:
        handler: the trainer's own handler, which this one replaces.
    """

    def __init__(self, handler: CallbackHandler) -> None:
        vars(self).update(vars(handler))
        self.failure: Exception | None = None
        self._defers = False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Store errors of callbacks inside this context instead of raising them."""
        self.failure, self._defers = None, True
        try:
            yield
        finally:
            self._defers = False

    def call_event(
        self, event: str, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Call an event of all callbacks, as `transformers.trainer_callback.CallbackHandler.call_event`.

        Raises:
            ForeignCodeError: a user's callback failed, outside of `deferred`.
        """
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
        except Exception as error:
            if not self._defers:
                raise
            self.failure = self.failure or error
            return None


class StepsDone(TrainerCallback):
    """Records the last complete step, and the random state at its end, so that a failed run can save a checkpoint.

    It must come after all callbacks that may fail: between its `on_pre_optimizer_step` and its `on_step_end`, the
    update is incomplete.

    Args:
        raise_on_every_rank: called just before each update; raises if any rank has failed, to prevent the update.
    """

    def __init__(self, raise_on_every_rank: Callable[[], None]) -> None:
        self._raise_on_every_rank = raise_on_every_rank
        self.begin_run()

    def begin_run(self) -> None:
        """Reset the record for a new run."""
        self.step = self._saved = -1
        self.random_state: RandomState | None = None
        """The state of all random generators at the end of the step. A new epoch draws from it before its first step,
        and so may code of the user's in a step that fails.
        """
        self.updating = False

    def wants_checkpoint(self, state: TrainerState) -> bool:
        """Whether this run has completed its current step and not saved it yet."""
        return not self.updating and state.global_step == self.step != self._saved

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Mark the update as begun, unless a rank has failed."""
        self._raise_on_every_rank()
        self.updating = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record the step as complete."""
        self.updating = False
        self.step = state.global_step
        self.random_state = RandomState.now()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record the step as saved."""
        self._saved = state.global_step
