"""The progress of a run: on a terminal a bar and a table, elsewhere one line for each log."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group
from rich.constrain import Constrain
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from transformers import TrainerControl, TrainerState, TrainingArguments

from online_dpo.cli.terminal.pairs import pair_lines, pair_panels
from online_dpo.cli.terminal.screen import print_lines
from online_dpo.cli.terminal.summary import summary_of_figures
from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.errors import one_line
from online_dpo.training.display.figures import SHOWN, SUMMARY, duration, evaluation_prefix, shown_figures
from online_dpo.training.display.protocol import RunDisplay
from online_dpo.training.samples import PairSample


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Hide the progress bars of datasets and transformers inside this context, since they would disturb our output."""
    import datasets
    from transformers.utils import logging

    datasets_disabled, transformers_enabled = datasets.are_progress_bars_disabled(), logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if not datasets_disabled:
            datasets.enable_progress_bars()
        if transformers_enabled:
            logging.enable_progress_bar()


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Print warnings for users in one line inside this context, like the commands' own, without their place in code."""
    original = warnings.formatwarning

    def formatted(message: Warning | str, category: type[Warning], *place: Any, **line: Any) -> str:
        if category is UserWarning:
            return f"warning: {one_line(str(message))}\n"
        return original(message, category, *place, **line)

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = original


TABLE_ROWS = 8
PAIRS = 2
"""Pairs that are shown on a terminal unless the configuration says otherwise."""


class ProgressDisplay(RunDisplay):
    """Shows a run's progress and, at the end, a summary. Only the first process prints.

    It prints a table and a bar if ``stream`` is a terminal, else lines. It replaces the progress bar and logs of
    transformers: ``OnlineDPOTrainer(..., callbacks=[ProgressDisplay()])``.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._panel: LivePanel | None = None
        self._started = 0.0
        self._first_step = 0

    def pairs_shown(self, args: OnlineDPOConfig) -> int:
        """Return how many pairs are wanted, or else 2 on a terminal; also asked before training begins."""
        if args.num_completions_to_print is not None:
            return args.num_completions_to_print
        return PAIRS if self._draws() else 0

    def show_pairs(self, pairs: Sequence[PairSample]) -> None:
        """Show pairs under the bar, or in lines."""
        if self._panel is not None:
            self._panel.pairs = tuple(pairs)
        else:
            print_lines((line for pair in pairs for line in pair_lines(pair)), indent=6, stream=self._stream)

    def on_interrupt(self, notice: str) -> bool:
        """Show the notice below the table, if there is one."""
        if self._panel is None:
            return False
        self._panel.notice = notice
        return True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock and, on a terminal, the panel."""
        self._started, self._first_step = time.monotonic(), state.global_step
        if state.is_world_process_zero and self._draws():
            self._panel = LivePanel(Console(file=self._stream), state.max_steps, state.global_step)

    def _draws(self) -> bool:
        """Whether there is a terminal on which something can be drawn again."""
        return self._stream.isatty() and not Console(file=self._stream).is_dumb_terminal

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance the bar."""
        if self._panel is not None:
            self._panel.advance(state.global_step, self._eta(state))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the figures of a log or of an evaluation."""
        logs = logs or {}
        if not state.is_world_process_zero or f"{SUMMARY}_runtime" in logs:
            return
        prefix = evaluation_prefix(logs)
        figures = shown_figures(logs, prefix)
        label = prefix.rstrip("_").replace("_", " ", 1)
        if self._panel is not None:
            self._panel.add_row({"step": f"{label} {state.global_step}".strip(), **figures})
        else:
            line = plain_line(label, state.global_step, state.max_steps, figures, self._eta(state))
            print(line, file=self._stream, flush=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the panel and print the summary."""
        self.close()
        if state.is_world_process_zero:
            print_lines(
                summary_of_figures(args, state, self._first_step, time.monotonic() - self._started), stream=self._stream
            )

    def close(self) -> None:
        """Stop redrawing. May be called twice."""
        if self._panel is not None:
            self._panel.close()
            self._panel = None

    def _eta(self, state: TrainerState) -> str:
        done = state.global_step - self._first_step
        if done < 1:
            return "?"
        return duration((time.monotonic() - self._started) / done * (state.max_steps - state.global_step))


class LivePanel:
    """A progress bar with a table of the latest logs above it, redrawn in place. ``notice`` is shown below them, and
    then as many of ``pairs`` as the screen has room for.
    """

    def __init__(self, console: Console, total: int, done: int) -> None:
        self.notice = ""
        self.pairs: Sequence[PairSample] = ()
        self._rows: list[dict[str, str]] = []
        self._progress = Progress(
            TextColumn("step"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta {task.fields[eta]}"),
            expand=True,
        )
        self._task: TaskID = self._progress.add_task("train", total=total, completed=done, eta="?")
        self._live = Live(console=console, refresh_per_second=4, get_renderable=lambda: self)
        self._live.start()

    def advance(self, step: int, eta: str) -> None:
        """Set the bar to a step; ``eta`` is the estimated time left."""
        self._progress.update(self._task, completed=step, eta=eta)

    def add_row(self, row: dict[str, str]) -> None:
        """Add a row to the table, which keeps the latest `TABLE_ROWS`."""
        self._rows = [*self._rows, row][-TABLE_ROWS:]
        self._live.refresh()

    def close(self) -> None:
        """Stop redrawing and leave the last picture on the screen."""
        self._live.stop()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Any:
        rows = self._rows  # read once: another thread redraws while rows are added
        parts: list[Any] = [_table(rows, options.max_width)] if rows else []
        # The bar leaves room for the terminal's ^C: on a full line it would start a new line, and redrawing, which does
        # not know of it, would be off by one.
        width = options.max_width - len("^C")
        parts.append(Constrain(self._progress, width))
        if self.notice:
            parts.append(Text(self.notice, style="bold"))
        room = console.size.height - (len(rows) + 1) * bool(rows) - 2 - bool(self.notice)
        yield Group(*parts, *(Constrain(panel, width) for panel in pair_panels(self.pairs, width, room)))


def _table(rows: Sequence[Mapping[str, str]], width: int) -> Table:
    """A table of the figures in any of the rows, as many columns as fit in the width, from the left."""
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    free = width
    for heading in ("step", *SHOWN):
        needed = max(cell_len(text) for text in (heading, *(row.get(heading, "") for row in rows)))
        if not any(row.get(heading) for row in rows) or needed > free:
            continue
        free -= needed + 2
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(row.get(str(column.header), "") for column in table.columns))
    return table


def plain_line(label: str, step: int, total: int, figures: Mapping[str, str], eta: str) -> str:
    """One log in one line: ``step 10/100  loss 0.6931  reward 1.25  kl 0.01  eta 0:01:20``.

    An evaluation starts with its ``label`` and has no eta.
    """
    parts = [f"{label} step {step}/{total}".lstrip(), *(f"{name} {value}" for name, value in figures.items())]
    return "  ".join(parts if label else [*parts, f"eta {eta}"])
