"""Failures during a run: they end it on every rank, and leave a checkpoint of the steps that are done."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from online_dpo.distributed.process_state import RandomState
from online_dpo.distributed.signals import is_interruption
from online_dpo.errors import ForeignCodeError, OnlineDPOError, error_text, is_out_of_memory, named_error
from online_dpo.foreign import foreign
from online_dpo.modeling.memory import named_memory_error

logger = logging.getLogger(__name__)

OURS = __name__.partition(".")[0]
NOT_DETERMINISTIC = ("does not have a deterministic implementation", "Deterministic behavior was enabled with")
"""What torch says where `full_determinism` cannot be had."""


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
        self._silenced: list[TrainerCallback] = []

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
        if callback in self._silenced:
            return None
        who = f"Callback `{type(callback).__name__}` in `{event}`"
        try:
            with (
                foreign(who, f"(step {args[1].global_step})", raises=ForeignCodeError),
                nullcontext() if _is_of_transformers(callback) else kept_run(who, args[0], args[1]),
            ):
                return getattr(callback, event)(*args, **kwargs)
        except Exception as error:
            if _is_tracker(callback) and self._defers and event not in ("on_init_end", "on_train_begin"):
                self._silenced.append(callback)
                logger.warning("%s It records nothing more; the run goes on, and its own log has every metric.", error)
                return None
            if not self._defers:
                raise
            self.failure = self.failure or error
            return None


def _is_of_transformers(callback: TrainerCallback) -> bool:
    return type(callback).__module__.partition(".")[0] == "transformers"


def _is_tracker(callback: TrainerCallback) -> bool:
    """Whether a callback only reports what happens, to TensorBoard or the like: training does not need it."""
    return type(callback).__module__.startswith("transformers.integrations")


OF_THE_RUN = ("global_step", "max_steps", "epoch", "num_train_epochs", "is_world_process_zero")
"""What the trainer counts by. Other values of its state, such as the best metric, a callback may set."""


@contextmanager
def kept_run(who: str, args: TrainingArguments, state: TrainerState) -> Iterator[None]:
    """Restores, at the end, the values of the state that the trainer counts by, and tells of them; tells of
    changed configuration fields, which take effect in part or not at all.
    """
    counts, fields = {name: getattr(state, name) for name in OF_THE_RUN}, dict(vars(args))
    try:
        yield
    finally:
        for name, value in counts.items():
            if getattr(state, name) != value:
                logger.warning(
                    "%s changed `state.%s` from %s to %s, which is put back. To end the run, set "
                    "`control.should_training_stop`.",
                    *(who, name, value, getattr(state, name)),
                )
                setattr(state, name, value)
        now = vars(args)
        for name in [name for name, value in fields.items() if now.get(name) is not value and now.get(name) != value]:
            logger.warning(
                "%s changed `args.%s` from %r to %r in the middle of the run, where most fields have been read.",
                *(who, name, fields[name], now.get(name)),
            )


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


def blamed(error: BaseException, updating: bool, step: int, optimizer: Any, schedule: Any) -> BaseException:
    """The error, or the one to raise in its place: where memory ran out and what to lower, that a model is not
    deterministic, or which optimizer and schedule left an update half done.

    Args:
        updating: whether an update had begun and was not complete.
        step: the step that was being made.
    """
    if isinstance(error, OnlineDPOError) or is_interruption(error):
        return error
    half_done = f"in the update of step {step}, which is half done, so that no checkpoint can be made"
    if is_out_of_memory(error):
        return named_memory_error(error, half_done if updating else f"in step {step}")
    if isinstance(error, RuntimeError) and any(words in str(error) for words in NOT_DETERMINISTIC):
        return ForeignCodeError(
            f"`full_determinism`: in step {step} an operation was needed that is not deterministic on this device: "
            f"{error_text(error, first_line=True)} Set `full_determinism: false`, or train a model without it."
        )
    if not updating:
        return error
    assert isinstance(optimizer, AcceleratedOptimizer)
    names = [type(part).__name__ for part in (optimizer.optimizer, schedule)]
    text = f"Optimizer `{names[0]}` or its schedule `{names[1]}` raised {named_error(error)} ({half_done})"
    return ForeignCodeError(text)
