"""Weights & Biases: histograms, and a `wandb.Table` of pairs."""

from __future__ import annotations

import os
from typing import Any

import wandb
from transformers import TrainerState, TrainingArguments
from transformers.integrations.integration_utils import WandbCallback

from online_dpo.training.samples import COLUMNS, Samples
from online_dpo.training.trackers.protocol import PREFIX


class WandbTracker:
    """Logs into the run of `WandbCallback`."""

    def __init__(self, callback: WandbCallback) -> None:
        self._callback = callback

    def go_on(self, run: str, args: TrainingArguments, state: TrainerState, model: Any) -> None:
        """Open the same run, unless one is open or WANDB_RUN_ID names another."""
        if wandb.run is None and "WANDB_RUN_ID" not in os.environ:
            project = os.environ.get("WANDB_PROJECT", "huggingface")  # as the callback has it
            wandb.init(project=project, id=run, resume="allow", name=args.run_name)

    def run(self, args: TrainingArguments) -> str | None:
        """Return the run's id."""
        return None if wandb.run is None else wandb.run.id

    def show(self, samples: Samples) -> None:
        """Log histograms and a table, at the step that the callback counts by."""
        if wandb.run is None:
            return
        shown: dict[str, Any] = {
            f"{PREFIX}/{name}": wandb.Histogram(values) for name, values in samples.distributions.items()
        }
        if samples.pairs:
            rows: list[Any] = [[getattr(pair, name) for name in COLUMNS] for pair in samples.pairs]
            shown[f"{PREFIX}/pairs"] = wandb.Table(columns=list(COLUMNS), data=rows)
        wandb.log({**shown, "train/global_step": samples.step})

    def end(self) -> None:
        """Do nothing: a run stays open until the process ends, as the callback leaves it."""

    def fail(self) -> None:
        """Do nothing: it sees the exit code of the process."""
