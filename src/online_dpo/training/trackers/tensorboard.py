"""TensorBoard: histograms, and pairs as a table in its text page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback

from online_dpo.training.samples import COLUMNS, PairSample, Samples
from online_dpo.training.trackers.protocol import PREFIX

SPECIAL = frozenset("\\`*_{}[]()<>#+-.!|&~\"'")
"""Characters that mean something in Markdown or HTML."""


class TensorBoardTracker:
    """Writes into the folder of `TensorBoardCallback`."""

    def __init__(self, callback: TensorBoardCallback) -> None:
        self._callback = callback

    def go_on(self, run: str, args: TrainingArguments, state: TrainerState, model: Any) -> None:
        """Write into the same folder; what it has of later steps is not shown any more."""
        if self._callback.tb_writer is None:
            from torch.utils.tensorboard import SummaryWriter

            folder = str(Path(str(args.output_dir)) / run)  # an absolute path stays as it is
            self._callback.logging_dir = folder
            self._callback.tb_writer = SummaryWriter(folder, purge_step=state.global_step + 1)

    def run(self, args: TrainingArguments) -> str | None:
        """Return the folder, below the run's own if it is there, so that this may be moved."""
        if self._callback.logging_dir is None:
            return None
        folder, base = Path(self._callback.logging_dir).absolute(), Path(str(args.output_dir)).absolute()
        return str(folder.relative_to(base) if folder.is_relative_to(base) else folder)

    def show(self, samples: Samples) -> None:
        """Write histograms, and a table."""
        writer = self._callback.tb_writer
        if writer is None:  # training has ended
            return
        for name, values in samples.distributions.items():
            writer.add_histogram(f"{PREFIX}/{name}", np.array(values), samples.step)
        if samples.pairs:
            writer.add_text(f"{PREFIX}/pairs", pairs_table(samples.pairs), samples.step)
        writer.flush()

    def end(self) -> None:
        """Do nothing: the callback closes the writer."""

    def fail(self) -> None:
        """Do nothing: what has been logged is in its file."""


def pairs_table(pairs: Sequence[PairSample]) -> str:
    """Return a Markdown table that shows every text as it is, whatever Markdown or HTML it has.

    >>> pairs_table([PairSample(1, "1-0-0-0", "a|b", "c", "d", 1.0, None, 1.0, "")]).splitlines()[2][:24]
    '| 1 | 1&#45;0&#45;0&#45;'
    """
    rows = [[getattr(pair, name) for name in COLUMNS] for pair in pairs]
    lines = [COLUMNS, ["---"] * len(COLUMNS), *([_cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _cell(value: object) -> str:
    text = "" if value is None else str(value)
    escaped = "".join(f"&#{ord(char)};" if char in SPECIAL else char for char in text)
    return "<br>".join(escaped.splitlines())
