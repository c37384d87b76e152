"""What is done when a run fails: a checkpoint of the steps that are done is saved, and the error says so."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerState

from online_dpo.distributed.collectives import RankErrors
from online_dpo.distributed.device_memory import free_kept_memory
from online_dpo.distributed.process_state import kept_random_state
from online_dpo.distributed.rank_watch import explained
from online_dpo.errors import CheckpointError, TrainingInterrupted, is_out_of_memory, named_error
from online_dpo.modeling.memory import forget_tensors
from online_dpo.training.failures import NamedCallbacks, StepsDone, blamed
from online_dpo.training.other_ranks import OtherRanks

logger = logging.getLogger(__name__)


class Rescue:
    """Saves the steps of a run that fails.

    Args:
        callbacks: the trainer's callback handler.
        others: the other processes of the run.
        errors: tells whether all of them have failed together.
        steps_done: the last complete step.
        state: returns the trainer's state.
        updaters: returns the optimizer and its schedule.
        holds_steps: returns whether the model holds finite weights of the steps done.
        save: saves a checkpoint, and returns its folder.
        newest: returns the newest checkpoint there is.
    """

    def __init__(
        self,
        callbacks: NamedCallbacks,
        others: OtherRanks,
        errors: RankErrors,
        steps_done: StepsDone,
        state: Callable[[], TrainerState],
        updaters: Callable[[], tuple[Any, Any]],
        holds_steps: Callable[[], bool],
        save: Callable[[], str | None],
        newest: Callable[[], Path | None],
    ) -> None:
        self._callbacks, self._others, self._errors, self._done = callbacks, others, errors, steps_done
        self._state, self._updaters, self._holds_steps = state, updaters, holds_steps
        self._save, self._newest = save, newest

    @contextmanager
    def failures_leave_checkpoint(self) -> Iterator[None]:
        """Inside, callbacks fail where all ranks can, and any error leaves a checkpoint, but for a second Ctrl-C."""
        try:
            with self._callbacks.deferred(), self._others.guarded():
                yield
        except TrainingInterrupted:
            raise
        except BaseException as raised:
            error = blamed(explained(raised), self._done.updating, self._state().global_step + 1, *self._updaters())
            self.leave_checkpoint(error)
            if error is raised:
                raise
            raise error from raised

    def leave_checkpoint(self, error: BaseException) -> None:
        """Saves the steps that are done, if there is anything new in them. One rank that failed alone cannot: the
        others would not take part. They do, without it.
        """
        if is_out_of_memory(error):  # saving needs some as well
            forget_tensors(error)
            free_kept_memory()
        state = self._state()
        full = isinstance(error, CheckpointError)  # a second try would end as the first
        with self._others.saving_after(error, self._errors.raised, state.global_step) as may_save:
            if may_save and not full and self._holds_steps() and self._done.wants_checkpoint(state):
                self._save_steps_done(error)
        if not may_save and self._others.keeps_parts:
            newest = self._newest()
            where = "there is no checkpoint" if newest is None else f"the newest checkpoint is {newest}"
            error.add_note(f"One process alone cannot save what all hold in parts: {where}.")

    def _save_steps_done(self, error: BaseException) -> None:
        assert self._done.random_state is not None
        try:
            with kept_random_state():
                self._done.random_state.restore()
                folder = self._save()
        except Exception as second:  # such as a full disk: the first error is the one to tell
            logger.warning("No checkpoint could be saved of the steps done: %s", named_error(second))
        else:
            error.add_note(f"Before that, a checkpoint of the steps done was saved: {folder}")
