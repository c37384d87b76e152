"""`SampleViews`: trackers and displays get a few samples with each log; resumed runs go on in their trackers."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import (
    MLflowCallback,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
)

from online_dpo.checkpoints.codec import read_json, write_json
from online_dpo.config.recording import OFF
from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.errors import named_error
from online_dpo.training.display.figures import SUMMARY, evaluation_prefix
from online_dpo.training.display.protocol import RunDisplay
from online_dpo.training.ledger import Ledger, Place
from online_dpo.training.samples import Samples, samples_of
from online_dpo.training.trackers.protocol import Tracker

logger = logging.getLogger(__name__)

TRACKERS: dict[type[TrainerCallback], tuple[str, str]] = {
    TensorBoardCallback: ("tensorboard", "TensorBoardTracker"),
    WandbCallback: ("wandb", "WandbTracker"),
    TrackioCallback: ("trackio", "TrackioTracker"),
    MLflowCallback: ("mlflow", "MLflowTracker"),
}
"""transformers' callbacks, and the module and class here of what each tracker shows besides."""
FEW, MANY = 4, 32
"""Pairs of a log that trackers get: usually, and at most where ``log_completions`` is a larger number."""


@dataclass(frozen=True)
class TrackedRuns:
    """What a checkpoint holds: what names the run in each tracker."""

    runs: Mapping[str, str] = field(default_factory=dict)


class SampleViews(TrainerCallback):
    """Shows with each log the distributions of its step, and a few pairs.

    It comes before transformers' callbacks for trackers, which open new runs where none is open. Samples are those of
    the first process, so that ranks exchange nothing. A tracker that fails is left alone from then on, with a warning.

    Args:
        args: the run's configuration.
        callbacks: of the trainer, among them transformers' for trackers, and displays.
        ledger: has the records of each step.
        differs: whether the run is not the one of the checkpoint that it was resumed from.
    """

    FILE = "trackers.json"

    def __init__(
        self,
        args: OnlineDPOConfig,
        callbacks: Callable[[], Iterable[TrainerCallback]],
        ledger: Ledger,
        differs: Callable[[], bool],
    ) -> None:
        self._args, self._callbacks, self._ledger, self._differs = args, callbacks, ledger, differs
        self._trackers: dict[str, Tracker] = {}
        self._displays: list[RunDisplay] = []
        self._resumed: Mapping[str, str] = {}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Find trackers and displays, ask the ledger to keep what they show, and have trackers go on with the runs of
        a checkpoint.
        """
        if not state.is_world_process_zero:
            return
        self._find()
        for name, run in ({} if self._differs() else self._resumed).items():
            if name in self._trackers:
                self._call(name, partial(self._trackers[name].go_on, run, self._args, state, model))
        self._resumed = {}
        self._displays = [c for c in self._callbacks() if isinstance(c, RunDisplay) and c.pairs_shown(self._args)]
        if self._args.log_completions != OFF and (self._trackers or self._displays):
            self._ledger.on = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show samples of the step, with the log of a training step."""
        logs = logs or {}
        is_step = not evaluation_prefix(logs) and f"{SUMMARY}_runtime" not in logs
        if not is_step or not state.is_world_process_zero or not (self._trackers or self._displays):
            return
        if not self._ledger.on:
            return
        groups = self._ledger.of_step(state.global_step, self._most())
        samples = samples_of(state.global_step, groups, MANY)
        for display in self._displays:
            display.show_pairs(samples.pairs[: display.pairs_shown(self._args)])
        few = self._most() or FEW
        for name, tracker in list(self._trackers.items()):
            self._call(name, partial(tracker.show, Samples(samples.step, samples.distributions, samples.pairs[:few])))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let trackers end."""
        for name, tracker in list(self._trackers.items()):
            self._call(name, tracker.end)

    def fail(self) -> None:
        """Have trackers end a run that has failed."""
        for name, tracker in list(self._trackers.items()):
            self._call(name, tracker.fail)

    def files(self, rank: int) -> Sequence[str]:
        """Return no name: a checkpoint without the file begins new runs in trackers."""
        return []

    def save(self, folder: Path, rank: int) -> None:
        """Save what names the run in each tracker, on the first process."""
        if rank == 0:
            runs = {n: self._call(n, partial(t.run, self._args)) for n, t in list(self._trackers.items())}
            write_json(folder / self.FILE, TrackedRuns({name: run for name, run in runs.items() if run}))

    def restore(self, folder: Path, rank: int) -> None:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is damaged.
        """
        path = folder / self.FILE
        self._resumed = read_json(path, TrackedRuns).runs if rank == 0 and path.is_file() else {}

    def _most(self) -> int | None:
        amount = self._args.log_completions
        return amount if isinstance(amount, int) else None

    def _find(self) -> None:
        """Load what belongs to the trackers that the trainer reports to; nothing else is imported."""
        for callback in self._callbacks():
            for kind, (module, name) in TRACKERS.items():
                if isinstance(callback, kind) and module not in self._trackers:
                    loaded = importlib.import_module(f"online_dpo.training.trackers.{module}")
                    self._trackers[module] = getattr(loaded, name)(callback)

    def _call(self, name: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:
            del self._trackers[name]
            logger.warning(
                "`report_to` %s shows no samples any more: %s. The run goes on, and its own log has every metric.",
                *(name, named_error(error).rstrip(".")),
            )
            return None


def with_ledger(trainer: Any) -> Ledger:
    """Return a ledger for a trainer, and give this the `SampleViews` that show what the ledger has."""
    place = Place.of(trainer.accelerator)
    ledger = Ledger(trainer.tokenizer, place, trainer.args.seed, lambda: trainer.guard.skipped_step)
    handler = trainer.callback_handler
    views = SampleViews(trainer.args, lambda: handler.callbacks, ledger, trainer.context.differs)
    handler.callbacks.insert(0, views)
    trainer.run_state.add(views)
    trainer.recording.at_failure.append(views.fail)
    return ledger
