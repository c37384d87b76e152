"""`Recording`: the callback that writes down a run while it trains, in the run folder."""

from __future__ import annotations

import functools
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import psutil
from accelerate import Accelerator
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from online_dpo import __version__
from online_dpo.config.recording import OFF
from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.distributed.collectives import RankErrors
from online_dpo.distributed.rank_watch import LAST_WORDS
from online_dpo.distributed.signals import StoppedBySignal, is_interruption
from online_dpo.errors import NothingTrainedError, OnlineDPOError, TrainingInterrupted, named_error
from online_dpo.modeling.introspection import unwrapped
from online_dpo.runs import beginning, events, written
from online_dpo.runs.cutting import Cut
from online_dpo.runs.directory import RunDirectory
from online_dpo.runs.endings import End
from online_dpo.runs.often import OFTEN
from online_dpo.training.display.figures import evaluation_prefix
from online_dpo.training.ledger import Ledger
from online_dpo.training.resumed_record import metrics_row, restore_metrics, resumed_events, step_in
from online_dpo.training.session_facts import environment_facts, settings_of

logger = logging.getLogger(__name__)

Train = TypeVar("Train", bound=Callable[..., Any])

MEGABYTE = 1_000_000
OF_ALL_RANKS = ("skip", "learning_rate", "idle", "stop", "checkpoint", "evaluation", "sync")
"""Kinds of events that all ranks come to together. The first one writes them down."""


class RecordError(OnlineDPOError, RuntimeError):
    """The record of a run could not be begun. The message names the folder and the cause."""


class Recording(TrainerCallback):
    """Writes the record of a run: settings, environment, metrics, events, completions.

    It comes before the callbacks that tell other ranks, and checkpoints, that a step is done: what they say to be done
    is in the record. Nothing that fails in it ends a run that has begun.

    ``settings`` is the text of the run's settings and ``command`` the words that started it, where whoever built the
    trainer knows them. ``ledger`` has the groups of a step. With ``ends_later`` the end of `train` is not that of the
    run (see `ending`).

    Args:
        args: the run's configuration.
        accelerator: knows rank and number of processes.
        errors: ends the run on all ranks where one fails.
        state: returns the trainer's state.
        in_step: whether a step is being made.
    """

    def __init__(
        self,
        args: OnlineDPOConfig,
        accelerator: Accelerator,
        errors: RankErrors,
        state: Callable[[], TrainerState],
        in_step: Callable[[], bool],
    ) -> None:
        self._args, self._accelerator, self._errors = args, accelerator, errors
        self._state, self._in_step = state, in_step
        self.settings: str | None = None
        self.command: Sequence[str] = sys.argv
        self._parts: dict[str, str] = {}
        self.ledger: Ledger | None = None
        self.ends_later = False
        self.at_failure: list[Callable[[], None]] = []
        """Called where training has failed, whether there is a run folder or not."""
        self._failure: End | None = None
        self._done, self._process = 0, os.getpid()
        self._logged = 0
        """How many entries of the trainer's history have been written."""
        self._is_begun = False
        self._directory: RunDirectory | None = None
        self._session = ExitStack()

    def describe(self, ledger: Ledger, policy: nn.Module, reference: str, sources: Sequence[Any]) -> None:
        """Takes the parts of the trainer: what has the groups of a step, and what the settings name in comments."""
        self.ledger = ledger
        name = getattr(unwrapped(policy).config, "_name_or_path", "") or "made in Python"
        feedback = ", ".join(source.name for source in sources)
        self._parts = {"model": f"{type(policy).__name__}, {name}", "reference": reference, "feedback": feedback}

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(str(self._args.output_dir))

    def begin(self, checkpoint: str | None, passed_over: str = "") -> None:
        """Begins the record of a run, or goes on with that of the run that is resumed. A collective operation.

        Args:
            checkpoint: the one that the run goes on from.
            passed_over: why it is none of the newer ones.

        Raises:
            RecordError, ForeignFileError: on every rank, if it cannot be begun on any.
        """
        self._done = 0 if checkpoint is None else step_in(Path(checkpoint))
        if not self._args.run_folder:
            return
        first: list[events.Event] = []
        self._errors.run(lambda: self._told(lambda: first.extend(self._prepare(checkpoint, passed_over))))
        self._errors.run(lambda: self._told(self._open))
        for event in first:
            self._write_event(replace(event, facts={"step": self._done, **event.facts}))

    def reset(self) -> None:
        """Forget the end of an earlier run of the same trainer."""
        self._session.close()
        self._failure, self._is_begun = None, False

    def _told(self, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError as error:
            raise RecordError(
                f"The record of the run cannot be written into {self.folder}: {named_error(error)}. Mend this, or set "
                "`run_folder: false` to train without it."
            ) from error

    def _prepare(self, checkpoint: str | None, passed_over: str) -> list[events.Event]:
        """Brings the files in the folder into order, on one process for all, and returns the first events."""
        if not self._args.should_save:
            return []
        self.folder.mkdir(parents=True, exist_ok=True)
        step = self._done
        told = [events.Event("start", f"The run starts after step {step}.", self._who())]
        is_own = checkpoint is not None and Path(checkpoint).resolve().parent == self.folder.resolve()
        cut = beginning.go_on(self.folder, step) if is_own else Cut()
        if not is_own and (number := beginning.begin_anew(self.folder)) is not None:
            text = f"The record of an earlier run is in {beginning.EARLIER}/{number} now."
            told.append(events.Event("record", text, {"earlier": number}))
        if checkpoint is not None:
            restored = restore_metrics(self.folder, Path(checkpoint), cut.last_logged)
            told += resumed_events(Path(checkpoint), cut, restored, passed_over)
        text = settings_of(self._args, self._parts) if self.settings is None else self.settings
        written.write_settings(self.folder, text, __version__)
        written.add_session(self.folder, environment_facts(self._accelerator.num_processes, self.command))
        return told

    def _who(self) -> dict[str, Any]:
        """What tells whether the process is still there."""
        started = psutil.Process().create_time()
        return {"host": socket.gethostname(), "pid": os.getpid(), "process_started": started} | {
            "processes": self._accelerator.num_processes
        }

    def _open(self) -> None:
        process, args = self._accelerator, self._args
        limit = args.log_completions_max_mb * MEGABYTE
        directory = RunDirectory(self.folder, process.process_index, process.num_processes, limit)
        if self._directory is not None:
            self._directory.close()
        self._directory, self._is_begun = directory, True
        if self.ledger is not None:
            self.ledger.on = args.log_completions != OFF
        LAST_WORDS.append(self._say_last)
        self._session.callback(LAST_WORDS.remove, self._say_last)
        self._session.enter_context(events.listening(self._write_event))
        self._session.enter_context(events.warnings_told(__name__.partition(".")[0]))

    def _write_event(self, event: events.Event) -> None:
        if os.getpid() != self._process:  # a forked process, which reads data or scores
            return
        rank = self._accelerator.process_index
        if self._directory is not None and (rank == 0 or event.kind not in OF_ALL_RANKS):
            self._directory.add_event(event, self._step())

    def _step(self) -> int:
        """The step that is being made, or else the last one."""
        return max(self._state().global_step, self._done + 1 if self._in_step() else 0)

    def _say_last(self, reason: str) -> None:
        """The end of a process that hangs and ends itself."""
        self._failure = End(1, reason)
        self.end()

    def sync(self) -> None:
        """Brings everything to the disk."""
        if self._directory is not None:
            self._directory.sync()

    def files(self, rank: int) -> Sequence[str]:
        """Return no name: it has no file in a checkpoint."""
        return []

    def save(self, folder: Path, rank: int) -> None:
        """Bring everything to the disk, before a checkpoint says that the steps until now are done."""
        self.sync()

    def restore(self, folder: Path, rank: int) -> None:
        """Do nothing: `begin` has cut the record."""

    def fail(self, error: BaseException) -> None:
        """Remembers what will have ended the run, for `end`."""
        self._failure = end_of(error)
        for told in self.at_failure:
            told()

    def end(self, code: int | None = None) -> None:
        """Writes the end of the run.

        Args:
            code: the exit code of the process; when not given, that of the failure, or 0.
        """
        if not self._is_begun:
            return
        self._is_begun = False
        end = self._failure or End(0)
        end = end if code is None else End(code, end.message)
        done = f"The run ended after step {self._state().global_step}"
        OFTEN.flush()
        message = f"{done}: {end.message}" if end.message else f"{done}."
        self._write_event(events.Event("end", message, {"code": end.code, "state": end.state}))
        self.sync()
        self._tell_loss()
        self._session.close()

    def _tell_loss(self) -> None:
        assert self._directory is not None
        if lost := self._directory.waiting + self._directory.dropped:
            logger.warning("%d rows and frames of the record could not be written into %s.", lost, self.folder)

    @contextmanager
    def ending(self) -> Iterator[Callable[[int], int]]:
        """Inside, the end of `train` is not that of the run. Yields what is to be called with the exit code, which it
        returns; what is raised instead is the end as well.
        """
        self.ends_later = True
        try:
            yield self._ended
        except BaseException as error:
            self.fail(error)
            self.end()
            raise

    def _ended(self, code: int) -> int:
        self.end(code)
        return code

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin after what a checkpoint has logged."""
        self._logged = len(state.log_history)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the groups of the step."""
        self._done = state.global_step
        if self._directory is not None and self.ledger is not None and self.ledger.on:
            amount = self._args.log_completions
            groups = self.ledger.take(state.global_step, amount if isinstance(amount, int) else None)
            self._directory.add_groups([group.as_json() for group in groups])
        OFTEN.flush()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a row of metrics for each log since the last call: a callback before this one may have logged something
        as well, and have taken something from ``logs``.
        """
        history, since = state.log_history, self._logged
        self._logged = len(history)
        if self._directory is not None and self._accelerator.process_index == 0:
            for log in history[since:] if since <= len(history) else history[-1:]:  # else somebody has shortened it
                self._directory.add_metrics({**metrics_row(int(log["step"]), log), "time": time.time()})

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Tell of the evaluation."""
        if self._accelerator.process_index == 0:
            prefix = evaluation_prefix(metrics or {})
            seconds = (metrics or {}).get(f"{prefix}runtime")
            events.emit("evaluation", f"Evaluated after step {state.global_step}.", prefix=prefix, seconds=seconds)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tell of the checkpoint."""
        if self._accelerator.process_index == 0:
            name = f"checkpoint-{state.global_step}"
            events.emit("checkpoint", f"{name} was saved.", name=name, saved=True)


def end_of(error: BaseException) -> End:
    """The end of a run that an error has ended, as a script ends that does not catch it."""
    if isinstance(error, (TrainingInterrupted, StoppedBySignal)):
        return End(128 + error.signal, str(error))
    if is_interruption(error):
        return End(130, "Interrupted.")
    return End(3 if isinstance(error, NothingTrainedError) else 1, named_error(error))


def tells_end(train: Train) -> Train:
    """Decorates the method of a trainer that trains: however it ends, its ``recording`` says so."""

    @functools.wraps(train)
    def told(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.recording.reset()
        try:
            result = train(self, *args, **kwargs)
        except BaseException as error:
            self.recording.fail(error)
            if not self.recording.ends_later:
                self.recording.end()
            raise
        if not self.recording.ends_later:
            self.recording.end()
        return result

    return told  # pyright: ignore[reportReturnType]
