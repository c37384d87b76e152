"""The display of a run in a notebook: a progress bar, charts, tables of logs and evaluations, and a few pairs.

Import it only in a notebook, since it needs IPython.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import IPython.display as ipython  # pyright: ignore[reportMissingImports]  (every notebook has it)
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length
from transformers.utils.notebook import NotebookProgressBar, NotebookTrainingTracker, text_to_html_table

from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.training.display.chart import Point, charts
from online_dpo.training.display.figures import SHOWN, SUMMARY, evaluation_prefix, number, shown_figures
from online_dpo.training.display.protocol import RunDisplay
from online_dpo.training.samples import PairSample

Row = dict[str, str]
CHARTS = ("reward", "kl", "loss", "margin", "win rate")
"""Headings of the figures that have a chart."""
PAIRS = 2
"""Pairs that are shown unless the configuration says otherwise."""
LONGEST = 600
"""Most characters of a text that are shown."""


class Tracker(NotebookTrainingTracker):
    """The progress bar of training; below it charts, the tables of logs and evaluations, and pairs of the last log."""

    def __init__(self, num_steps: int) -> None:
        super().__init__(num_steps)
        self.logs: list[Row] = []
        self.evaluations: list[Row] = []
        self.figures: dict[str, list[Point]] = {}
        self.pairs: Sequence[PairSample] = ()

    def add_figures(self, step: int, logs: Mapping[str, Any], prefix: str) -> None:
        """Add what a log or an evaluation says to the charts."""
        for heading in CHARTS:
            if (value := logs.get(prefix + SHOWN[heading])) is not None:
                name = f"{heading} ({prefix.rstrip('_')})" if prefix else heading
                self.figures.setdefault(name, []).append((step, float(value)))

    def display(self) -> None:
        """Draw the bar and the tables."""
        self.inner_table = None
        if self.logs:
            self.inner_table = _cells(self.logs)
        super().display()
        assert self.output is not None
        below = charts(self.figures)
        if self.evaluations:
            below += _titled_table("Evaluation", self.evaluations)
        if self.pairs:
            below += pairs_table(self.pairs)
        if below:
            self.html_code += below
            self.output.update(ipython.HTML(self.html_code))


class NotebookDisplay(RunDisplay):
    """Shows a run's progress in a notebook: each log with reward and KL, each evaluation with its win rate."""

    def __init__(self) -> None:
        self._tracker: Tracker | None = None
        self._bar: NotebookProgressBar | None = None
        self._notice = ""

    def pairs_shown(self, args: OnlineDPOConfig) -> int:
        """Return how many pairs are wanted, or else 2."""
        return PAIRS if args.num_completions_to_print is None else args.num_completions_to_print

    def show_pairs(self, pairs: Sequence[PairSample]) -> None:
        """Show pairs below the tables with the next drawing, which the log itself brings."""
        if self._tracker is not None:
            self._tracker.pairs = pairs

    def on_interrupt(self, notice: str) -> bool:
        """Show the notice in the cell's output at the next step. Returns False, so that it is also printed at once."""
        self._notice = notice
        return False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the bar at the first step."""
        self._notice = ""
        if state.is_world_process_zero:
            self._tracker = Tracker(state.max_steps)
            self._tracker.update(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance the bar."""
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
        """Add a row for a log or an evaluation."""
        logs = logs or {}
        if not state.is_world_process_zero or f"{SUMMARY}_runtime" in logs:
            return
        prefix = evaluation_prefix(logs)
        row = {"step": str(state.global_step)}
        if self._tracker is not None:
            self._tracker.add_figures(state.global_step, logs, prefix)
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
        """Advance the bar of an evaluation."""
        if not state.is_world_process_zero or not has_length(eval_dataloader):
            return
        if self._bar is None:
            total = len(eval_dataloader)
            self._bar = NotebookProgressBar(total) if self._tracker is None else self._tracker.add_child(total)
            self._bar.update(1)
        else:
            self._bar.update(int(self._bar.value or 0) + 1)

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Remove the bar of an evaluation."""
        self._end_bar()

    def on_predict(self, *args: Any, **kwargs: Any) -> None:
        """Remove the bar of a prediction."""
        self._end_bar()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the bar a last time."""
        if self._tracker is not None:
            self._tracker.update(state.global_step, comment=self._comment(state), force_update=True)

    def close(self) -> None:
        """Forget the bars, which stay in the cell's output."""
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
    """The cells of an evaluation: its figures, win rates with 95 % intervals, mean length and number of prompts."""
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


def pairs_table(pairs: Sequence[PairSample]) -> str:
    """A table of pairs, in which what a model wrote is text and nothing else."""
    head = "".join(f"<th>{name}</th>" for name in ("", "prompt", "chosen", "rejected", "why"))
    rows = [
        "<tr>" + "".join(f'<td style="text-align:left;white-space:pre-wrap">{cell}</td>' for cell in cells) + "</tr>"
        for cells in map(_pair_cells, pairs)
    ]
    return f"<p>Pairs of the last log</p><table border='1'><tr>{head}</tr>{''.join(rows)}</table>"


def _pair_cells(pair: PairSample) -> list[str]:
    scored = [
        f"{'' if score is None else f'<b>{number(score)}</b><br>'}{_shown(text)}"
        for score, text in ((pair.chosen_score, pair.chosen), (pair.rejected_score, pair.rejected))
    ]
    return [escape(pair.group), _shown(pair.prompt), *scored, _shown(pair.why)]


def _shown(text: str) -> str:
    return escape(text if len(text) <= LONGEST else text[:LONGEST] + "...")


def _cells(rows: list[Row]) -> list[list[str]]:
    """The headings and rows of a table. A row without a figure has an empty cell there."""
    headings = list(dict.fromkeys(heading for row in rows for heading in row))
    return [headings, *([row.get(heading, "") for heading in headings] for row in rows)]


def _titled_table(title: str, rows: list[Row]) -> str:
    return f"<p>{title}</p>{text_to_html_table(_cells(rows))}"
