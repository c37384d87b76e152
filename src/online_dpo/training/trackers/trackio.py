"""Trackio: histograms, and a `trackio.Table` of pairs."""

from __future__ import annotations

import copy
from typing import Any

import trackio
from trackio import context_vars
from transformers import TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TrackioCallback

from online_dpo.training.samples import COLUMNS, Samples
from online_dpo.training.trackers.protocol import PREFIX


class TrackioTracker:
    """Logs into the run of `TrackioCallback`."""

    def __init__(self, callback: TrackioCallback) -> None:
        self._callback = callback

    def go_on(self, run: str, args: TrainingArguments, state: TrainerState, model: Any) -> None:
        """Open the run of that name, which the callback would give another name if ``run_name`` is not set."""
        named = copy.copy(args)
        named.run_name = run
        self._callback.setup(named, state, model)

    def run(self, args: TrainingArguments) -> str | None:
        """Return the run's name."""
        run = context_vars.current_run.get()
        return None if run is None else run.name

    def show(self, samples: Samples) -> None:
        """Log histograms and a table, at the step that the callback counts by."""
        if context_vars.current_run.get() is None:  # training has ended
            return
        shown: dict[str, Any] = {
            f"{PREFIX}/{name}": trackio.Histogram(values) for name, values in samples.distributions.items()
        }
        if samples.pairs:
            rows = [[getattr(pair, name) for name in COLUMNS] for pair in samples.pairs]
            shown[f"{PREFIX}/pairs"] = trackio.Table(columns=list(COLUMNS), data=rows)
        trackio.log({**shown, "train/global_step": samples.step})

    def end(self) -> None:
        """Do nothing: the callback ends the run."""

    def fail(self) -> None:
        """End the run, which waits until all has been written."""
        if context_vars.current_run.get() is not None:
            trackio.finish()
