"""Ctrl-C during training: the first one saves a checkpoint and stops, the second one stops at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from online_dpo.distributed.collectives import any_rank
from online_dpo.errors import TrainingInterrupted
from online_dpo.training.display.protocol import RunDisplay

NOTICE = "Stopping after this step, with a checkpoint. Press Ctrl-C again to stop at once."


class Interrupt(TrainerCallback):
    """Stops a run at the end of the step, or of the evaluation, in which Ctrl-C was pressed.

    It works only in the main thread, and only if Ctrl-C has Python's default handler: a user's own handler, or none (as
    in a background process), is not replaced. A run in its last step ends normally. ``checkpoint`` is the folder that
    the run saved last, if any.
    """

    def __init__(self) -> None:
        self._begin(())

    def _begin(self, displays: Sequence[RunDisplay]) -> None:
        self._requested = self._stopped = False
        self.checkpoint: str | None = None
        self._displays = displays
        self._state = TrainerState()
        self._best: str | None = None

    @contextmanager
    def handled(self, displays: Sequence[RunDisplay]) -> Iterator[None]:
        """Handle Ctrl-C inside this context. The previous handler is restored afterwards, also after an error.

        Raises:
            TrainingInterrupted: the run was stopped, at the end of a step or at once.
        """
        self._begin(displays)
        in_main_thread = threading.current_thread() is threading.main_thread()
        if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield
        else:
            previous = signal.signal(signal.SIGINT, self._on_signal)
            try:
                yield
            finally:
                signal.signal(signal.SIGINT, previous)
        if self._stopped:
            self._state.best_model_checkpoint = self._best
            raise self._error(f"Ctrl-C stopped the run after step {self._state.global_step}")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._requested:
            raise self._error(f"A second Ctrl-C stopped the run at once, after step {self._state.global_step}")
        self._requested = True
        if not any([display.on_interrupt(NOTICE) for display in self._displays]):
            # Not `print`: the signal may have interrupted a write to the same stream.
            os.write(2, f"\n{NOTICE}\n".encode())

    def _error(self, what: str) -> TrainingInterrupted:
        total = self._state.max_steps
        if self.checkpoint is None:
            return TrainingInterrupted(f"{what} of {total}. No checkpoint was saved.", None)
        resume = f"trainer.train(resume_from_checkpoint={self.checkpoint!r})"
        return TrainingInterrupted(
            f"{what} of {total}. Checkpoint: {self.checkpoint}. Go on with: {resume}", self.checkpoint
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Keep the trainer's state, for messages."""
        self._state = state

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> TrainerControl:
        """Stop the run if any rank was interrupted."""
        if self._requested_on_any_rank(args) and state.global_step < state.max_steps:
            self._stop(control)
        return control

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> TrainerControl:
        """Stop the run if any rank was interrupted during an evaluation, which belongs to the step before it."""
        if self._requested_on_any_rank(args) and state.global_step < state.max_steps:
            self._stop(control)
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> TrainerControl:
        """Save the checkpoint of a stopped run: the strategy "best" has reset ``should_save`` since the step ended."""
        if self._stopped and args.save_strategy == SaveStrategy.BEST:
            control.should_save = True
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Remember the folder of the checkpoint, and protect that of a stopped run."""
        self.checkpoint = str(Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        if self._stopped:
            # At its end, a run loads its best checkpoint and may delete the others. A stopped run must keep its latest
            # weights, so there is no best checkpoint until it has ended.
            self._best, state.best_model_checkpoint = state.best_model_checkpoint, None

    def _stop(self, control: TrainerControl) -> None:
        control.should_save = True
        control.should_log = True  # otherwise metrics since the last log would be lost
        control.should_training_stop = True
        self._stopped = True

    def _requested_on_any_rank(self, args: TrainingArguments) -> bool:
        """Whether any rank was interrupted. All must stop at the same step, or the others would wait for ever."""
        return any_rank(self._requested, args.device)
