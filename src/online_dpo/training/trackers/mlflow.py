"""MLflow: a table of pairs for each log, as an artifact. It has no histograms."""

from __future__ import annotations

import os
from typing import Any

import mlflow
from transformers import TrainerState, TrainingArguments
from transformers.integrations.integration_utils import MLflowCallback

from online_dpo.training.samples import COLUMNS, Samples
from online_dpo.training.trackers.protocol import PREFIX


class MLflowTracker:
    """Logs into the run of `MLflowCallback`."""

    def __init__(self, callback: MLflowCallback) -> None:
        self._is_users = mlflow.active_run() is not None
        self._started = False

    def go_on(self, run: str, args: TrainingArguments, state: TrainerState, model: Any) -> None:
        """Open the same run, unless one is open or MLFLOW_RUN_ID names another."""
        if mlflow.active_run() is None and "MLFLOW_RUN_ID" not in os.environ:
            mlflow.start_run(run_id=run)
            self._started = True

    def run(self, args: TrainingArguments) -> str | None:
        """Return the run's id."""
        run = mlflow.active_run()
        return None if run is None else run.info.run_id

    def show(self, samples: Samples) -> None:
        """Write a table, one file a log: one for all would be read and written again each time."""
        if samples.pairs and mlflow.active_run() is not None:
            columns = {name: [getattr(pair, name) for pair in samples.pairs] for name in COLUMNS}
            mlflow.log_table(columns, f"{PREFIX}/pairs/step-{samples.step:06d}.json")

    def end(self) -> None:
        """Wait until the metrics have arrived, which the callback sends in the background; end a run begun here."""
        mlflow.flush_async_logging()
        if self._started and mlflow.active_run() is not None:
            mlflow.end_run()
            self._started = False

    def fail(self) -> None:
        """End the run as failed, unless it is the user's own."""
        mlflow.flush_async_logging()
        if not self._is_users and mlflow.active_run() is not None:
            mlflow.end_run("FAILED")
