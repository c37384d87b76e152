"""Signals during training: the first one saves a checkpoint and stops, a second Ctrl-C stops at once."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from online_dpo.distributed.collectives import max_over_ranks, world_size
from online_dpo.distributed.signals import Handled, StoppedBySignal, handling, is_interruption, name_of, write_now
from online_dpo.errors import RankLostError, TrainingInterrupted, TrainingTerminated, named_error
from online_dpo.runs import events
from online_dpo.training.display.protocol import RunDisplay
from online_dpo.training.stop_request import StopRequest

logger = logging.getLogger(__name__)


class Interrupt(TrainerCallback):
    """Stops a run at the end of the step, of the evaluation or of the save in which a signal came: Ctrl-C, SIGTERM and
    others (see `online_dpo.distributed.signals`).

    It works only in the main thread, and only for signals with Python's default handler: a user's own handler, or none
    (as in a background process), is not replaced. A run in its last step ends normally. ``checkpoint`` is the folder
    that the run saved last, if any.

    Args:
        is_updating: whether the weights are being updated, so that there is no state that could be saved.
    """

    def __init__(self, is_updating: Callable[[], bool] = lambda: False) -> None:
        self._is_updating = is_updating
        self.request = StopRequest(
            self._tell,
            at_once=self._at_once,
            may_drop_step=self._may_drop_step,
        )
        self._begin((), 0.0)

    def _begin(self, displays: Sequence[RunDisplay], timeout: float) -> None:
        self.request.begin(timeout)
        self._stopped = False
        self.checkpoint: str | None = None
        self._displays = displays
        self._state = TrainerState()
        self._best: str | None = None
        self._handled: Handled | None = None

    @contextmanager
    def handled(self, displays: Sequence[RunDisplay], timeout: float = 20.0) -> Iterator[None]:
        """Handle signals inside this context. The previous handlers are restored afterwards, also after an error.

        Args:
            displays: show what a signal does.
            timeout: seconds that a step may go on after a signal other than Ctrl-C.

        Raises:
            TrainingInterrupted: the run was stopped, at the end of a step or at once.
        """
        self._begin(displays, timeout)
        with handling(self.request.receive) as self._handled:
            try:
                yield
            except TrainingInterrupted:  # at once
                raise
            except (Exception, StoppedBySignal) as error:
                self._raise_if_stopping(error)
                raise
            finally:
                self.request.close()
        if self._stopped:
            self._state.best_model_checkpoint = self._best
            assert self.request.signal is not None
            raise self._told(self._error(f"{name_of(self.request.signal)} stopped the run", self.request.signal))

    def _raise_if_stopping(self, error: BaseException) -> None:
        """The step after which the run was to stop was dropped, or it failed: often because the same signal has ended
        processes that it needs. What has been asked for is then what ends the run.
        """
        number = error.signal if isinstance(error, StoppedBySignal) else self.request.signal
        if number is None or isinstance(
            error, RankLostError
        ):  # then torchrun has sent the signal, as it ends all ranks
            return
        name = name_of(number)
        why = "" if is_interruption(error) else f" (the step after it failed: {named_error(error)})"
        raise self._told(self._error(f"{name} stopped the run", number, why)) from error

    def _tell(self, notice: str) -> None:
        if not any([display.on_interrupt(notice) for display in self._displays]) and self._state.is_world_process_zero:
            write_now(f"\n{notice}\n")

    def _told(self, error: TrainingInterrupted) -> TrainingInterrupted:
        """The error; its message is written where nothing else will: Python ends silently after a `SystemExit`."""
        inside_command = self._handled is not None and self._handled.inside_another
        if isinstance(error, TrainingTerminated) and self._state.is_world_process_zero and not inside_command:
            write_now(f"{error}\n")
        return error

    def _may_drop_step(self) -> bool:
        """Whether the step can be stopped in its middle. Several ranks cannot: each would stop somewhere else."""
        last = self._state.global_step >= self._state.max_steps
        return world_size() == 1 and not last and not self._stopped and not self._is_updating()

    def _at_once(self) -> TrainingInterrupted:
        insisted = "A second Ctrl-C" if self.request.signal is signal.SIGINT else "Ctrl-C"
        return self._error(f"{insisted} stopped the run at once,", signal.SIGINT)

    def _error(self, what: str, number: signal.Signals, why: str = "") -> TrainingInterrupted:
        message = f"{what} after step {self._state.global_step} of {self._state.max_steps}{why}."
        if self.checkpoint is None:
            message += " No checkpoint was saved."
        else:
            resume = f"trainer.train(resume_from_checkpoint={self.checkpoint!r})"
            message += f" Checkpoint: {self.checkpoint}. Go on with: {resume}"
        kind = TrainingInterrupted if number is signal.SIGINT else TrainingTerminated
        return kind(message, self.checkpoint, number)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Keep the trainer's state, for messages."""
        self._state = state

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> TrainerControl:
        """Stop the run if any rank has received a signal."""
        self._warn_of_other_handlers()
        if self._requested_on_any_rank(args) and state.global_step < state.max_steps:
            self._stop(control)
        return control

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> TrainerControl:
        """Stop the run if a signal came during an evaluation, which belongs to the step before it."""
        if self._requested_on_any_rank(args) and state.global_step < state.max_steps:
            self._stop(control)
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> TrainerControl:
        """Save the checkpoint of a stopped run: the strategy "best" has reset ``should_save`` since the step ended."""
        if self._stopped and args.save_strategy == SaveStrategy.BEST and self.checkpoint != _folder(args, state):
            control.should_save = True
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> TrainerControl:
        """Remember the folder of the checkpoint, stop the run if a signal came during the save, and protect the
        checkpoint of a stopped run.
        """
        self.checkpoint = _folder(args, state)
        if not self._stopped and self._requested_on_any_rank(args) and state.global_step < state.max_steps:
            self._stop(control)
            control.should_save = False
        if self._stopped and state.best_model_checkpoint is not None:
            # At its end, a run loads its best checkpoint and may delete the others. A stopped run must keep its latest
            # weights, so there is no best checkpoint until it has ended.
            self._best, state.best_model_checkpoint = state.best_model_checkpoint, None
        return control

    def _stop(self, control: TrainerControl) -> None:
        number = self.request.signal
        assert number is not None
        text = f"{name_of(number)}: the run stops after this step, with a checkpoint."
        events.emit("stop", text, signal=number.name)
        control.should_save = True
        control.should_log = True  # otherwise metrics since the last log would be lost
        control.should_training_stop = True
        self._stopped = True

    def _requested_on_any_rank(self, args: TrainingArguments) -> bool:
        """Whether any rank has received a signal. All must stop at the same step, or the others would wait for ever."""
        own = self.request.signal or 0
        number = own if world_size() == 1 else int(max_over_ranks(torch.tensor(int(own), device=args.device)))
        if number:
            self.request.signal = signal.Signals(number)
        return bool(number)

    def _warn_of_other_handlers(self) -> None:
        if self._handled is not None and (lost := self._handled.taken_away()):
            names = " and ".join(map(name_of, lost))
            logger.warning(
                "Code that this run calls has set a handler of its own for %s, which no longer saves a checkpoint "
                "before the run stops.",
                names,
            )
            for number in lost:
                del self._handled.previous[number]


def _folder(args: TrainingArguments, state: TrainerState) -> str:
    return str(Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
