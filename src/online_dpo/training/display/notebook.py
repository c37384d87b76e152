"""What a run shows in a notebook: a bar, a table of its logs, and a table of its evaluations.

Only to be imported in a notebook: it needs IPython.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import IPython.display as ipython  # pyright: ignore[reportMissingImports]  (where there is a notebook, there it is)
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length
from transformers.utils.notebook import NotebookProgressBar, NotebookTrainingTracker, text_to_html_table

from online_dpo.training.display.figures import SUMMARY, evaluation_prefix, number, shown_figures
from online_dpo.training.display.protocol import RunDisplay

Row = dict[str, str]


class Tracker(NotebookTrainingTracker):
    """The bar of training with the two tables below it."""

    def __init__(self, num_steps: int) -> None:
        super().__init__(num_steps)
        self.logs: list[Row] = []
        self.evaluations: list[Row] = []

    def display(self) -> None:
        self.inner_table = None
        if self.logs:
            self.inner_table = _cells(self.logs)
        super().display()
        assert self.output is not None
        if self.evaluations:
            self.html_code += _titled_table("Evaluation", self.evaluations)
            self.output.update(ipython.HTML(self.html_code))


class NotebookDisplay(RunDisplay):
    """Shows a run's progress in a notebook: every log with reward and KL, every evaluation with its win rate."""

    def __init__(self) -> None:
        self._tracker: Tracker | None = None
        self._bar: NotebookProgressBar | None = None
        self._notice = ""

    def on_interrupt(self, notice: str) -> bool:
        self._notice = notice  # to stay in the cell's output; where a process's own errors go, it stands at once
        return False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._notice = ""
        if state.is_world_process_zero:
            self._tracker = Tracker(state.max_steps)
            self._tracker.update(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._tracker is not None:
            self._tracker.update(state.global_step, comment=self._comment(state), force_update=bool(self._notice))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if not state.is_world_process_zero or f"{SUMMARY}_runtime" in logs:
            return
        prefix = evaluation_prefix(logs)
        row = {"step": str(state.global_step)}
        if prefix:
            row |= {"dataset": escape(prefix.removeprefix("eval_").rstrip("_"))} if prefix != "eval_" else {}
            self._show_evaluation(row | evaluation_cells(logs, prefix))
        elif self._tracker is not None:
            self._tracker.logs.append(row | shown_figures(logs, ""))
            self._tracker.update(state.global_step, force_update=True)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not has_length(eval_dataloader):
            return
        if self._bar is None:
            total = len(eval_dataloader)
            self._bar = NotebookProgressBar(total) if self._tracker is None else self._tracker.add_child(total)
            self._bar.update(1)
        else:
            self._bar.update(int(self._bar.value or 0) + 1)

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._end_bar()

    def on_predict(self, *args: Any, **kwargs: Any) -> None:
        self._end_bar()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._tracker is not None:
            self._tracker.update(state.global_step, comment=self._comment(state), force_update=True)

    def close(self) -> None:
        self._tracker = self._bar = None

    def _comment(self, state: TrainerState) -> str:
        epoch = f"Epoch {state.epoch or 0:.2f}/{state.num_train_epochs}"
        return f"{epoch}. {self._notice}" if self._notice else epoch

    def _end_bar(self) -> None:
        if self._bar is not None and self._tracker is None:
            self._bar.close()
        elif self._tracker is not None:
            self._tracker.remove_child()
        self._bar = None

    def _show_evaluation(self, row: Row) -> None:
        if self._tracker is None:
            ipython.display(ipython.HTML(_titled_table("Evaluation", [row])))
        else:
            self._tracker.evaluations.append(row)
            self._tracker.display()


def evaluation_cells(logs: Mapping[str, Any], prefix: str) -> Row:
    """The shown figures of an evaluation, win rates with their 95 % intervals, and what completions were like."""
    cells = shown_figures(logs, prefix)
    for heading, metric in (("win rate", "win_rate"), ("gold win rate", "gold_win_rate")):
        if heading in cells:
            low, high = (number(logs[f"{prefix}{metric}_ci95_{end}"]) for end in ("low", "high"))
            cells[heading] += f" ({low} to {high})"
    return cells | {
        heading: number(logs[prefix + metric])
        for heading, metric in (("tokens", "completions/mean_length"), ("prompts", "prompts"))
        if prefix + metric in logs
    }


def _cells(rows: list[Row]) -> list[list[str]]:
    """The headings and the rows of a table; a row has an empty cell for what it has not."""
    headings = list(dict.fromkeys(heading for row in rows for heading in row))
    return [headings, *([row.get(heading, "") for heading in headings] for row in rows)]


def _titled_table(title: str, rows: list[Row]) -> str:
    return f"<p>{title}</p>{text_to_html_table(_cells(rows))}"
