"""What a run shows while it trains: a bar and a table on a terminal, one line for each log elsewhere."""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Without the bars of libraries for loading weights and reading data, which would run through our own output."""
    import datasets
    from transformers.utils import logging

    of_datasets, of_transformers = datasets.are_progress_bars_disabled(), logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if not of_datasets:
            datasets.enable_progress_bars()
        if of_transformers:
            logging.enable_progress_bar()


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Warnings to users in one line, as the commands' own: where in the code they were given tells them nothing."""
    usual = warnings.formatwarning

    def formatted(message: Warning | str, category: type[Warning], *place: Any, **line: Any) -> str:
        if category is UserWarning:
            return f"warning: {' '.join(str(message).split())}\n"
        return usual(message, category, *place, **line)

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = usual


COLUMNS = {
    "loss": "loss",
    "reward": "objective/scores",
    "kl": "objective/kl",
    "margin": "rewards/margins",
    "tok/s": "perf/tokens_per_second",
    "win rate": "win_rate",
    "gold": "gold_score",
    "gold win rate": "gold_win_rate",
}
"""Heading of each shown figure, and the metric behind it; evaluations have some of them, and training others."""

TABLE_ROWS = 8


class ProgressDisplay(TrainerCallback):
    """Shows a run's progress, on the first process only: a table where ``stream`` is a terminal, else lines."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._view: LivePanel | None = None
        self._started = 0.0
        self._first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started, self._first_step = time.monotonic(), state.global_step
        if state.is_world_process_zero and self._stream.isatty():
            self._view = LivePanel(self._stream, state.max_steps, state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._view is not None:
            self._view.advance(state.global_step, self._eta(state))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if not state.is_world_process_zero or "train_runtime" in logs:  # the last log sums up: train_runtime and such
            return
        prefix = "eval_" if any(key.startswith("eval_") for key in logs) else ""
        figures = shown_figures(logs, prefix)
        if self._view is not None:
            self._view.add_row(f"{prefix.rstrip('_')} {state.global_step}".strip(), figures)
        else:
            line = plain_line(prefix, state.global_step, state.max_steps, figures, self._eta(state))
            print(line, file=self._stream, flush=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back. Also to be called when training failed, which ends without ``on_train_end``."""
        if self._view is not None:
            self._view.close()
            self._view = None

    def _eta(self, state: TrainerState) -> str:
        done = state.global_step - self._first_step
        if done < 1:
            return "?"
        return duration((time.monotonic() - self._started) / done * (state.max_steps - state.global_step))


class LivePanel:
    """A progress bar with a table of the latest logs above it, redrawn in place."""

    def __init__(self, stream: TextIO, total: int, done: int) -> None:
        self._rows: list[list[str]] = []
        self._progress = Progress(
            TextColumn("step"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta {task.fields[eta]}"),
        )
        self._task: TaskID = self._progress.add_task("train", total=total, completed=done, eta="?")
        self._live = Live(self._render(), console=Console(file=stream), refresh_per_second=4)
        self._live.start()

    def advance(self, step: int, eta: str) -> None:
        self._progress.update(self._task, completed=step, eta=eta)

    def add_row(self, label: str, figures: Mapping[str, str]) -> None:
        self._rows = [*self._rows, [label, *(figures.get(name, "") for name in COLUMNS)]][-TABLE_ROWS:]
        self._live.update(self._render())

    def close(self) -> None:
        self._live.stop()

    def _render(self) -> Group:
        table = Table(box=None, pad_edge=False)
        for heading in ("step", *COLUMNS):
            table.add_column(heading, justify="right")
        for row in self._rows:
            table.add_row(*row)
        return Group(table, self._progress)


def shown_figures(logs: Mapping[str, Any], prefix: str) -> dict[str, str]:
    """The figures of a log that are shown, formatted, by heading. ``prefix`` is ``eval_`` for evaluations."""
    return {
        heading: number(logs[prefix + metric])
        for heading, metric in COLUMNS.items()
        if logs.get(prefix + metric) is not None
    }


def plain_line(prefix: str, step: int, total: int, figures: Mapping[str, str], eta: str) -> str:
    """``step 10/100  loss 0.6931  reward 1.25  kl 0.01  eta 0:01:20``; evaluations start with ``eval``, without eta."""
    parts = [f"{'eval ' if prefix else ''}step {step}/{total}", *(f"{name} {value}" for name, value in figures.items())]
    return "  ".join(parts if prefix else [*parts, f"eta {eta}"])


def number(value: float) -> str:
    """Four significant digits, whole numbers in full from a thousand on."""
    value = float(value)
    return f"{value:.0f}" if math.isfinite(value) and abs(value) >= 1000 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """``1:02:03``."""
    return str(timedelta(seconds=round(max(seconds, 0.0))))
