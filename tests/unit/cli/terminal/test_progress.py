"""What a run shows on a terminal, narrow or wide, and where there is none."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState

from online_dpo.cli.terminal.progress import ProgressDisplay
from online_dpo.cli.terminal.screen import wrapped
from online_dpo.training.samples import PairSample
from support import training
from support.logs import EVALUATION, LOGS


def arguments() -> SimpleNamespace:
    """The part of TrainingArguments that displays read."""
    return SimpleNamespace(world_size=1, output_dir="out", metric_for_best_model=None, greater_is_better=None)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(stream: io.StringIO, *, main: bool = True, notice: str = "") -> str:
    """A run of 100 steps with a log at step 50, and one with two evaluations at its end."""
    state = TrainerState(max_steps=100, is_world_process_zero=main)
    display, control = ProgressDisplay(stream), TrainerControl()

    def log(logs: dict) -> None:
        state.log_history.append({**logs, "step": state.global_step})
        display.on_log(arguments(), state, control, logs=logs)

    display.on_train_begin(arguments(), state, control)
    state.global_step = 50
    display.on_step_end(arguments(), state, control)
    log(LOGS)
    if notice:
        assert display.on_interrupt(notice) is stream.isatty()
    state.global_step = 100
    display.on_step_end(arguments(), state, control)
    log({**LOGS, "objective/scores": 2.5})
    log(EVALUATION)
    log({"eval_maths_loss": 0.25, "eval_maths_runtime": 1.0})
    log({"train_runtime": 3.0, "train_loss": 0.5})
    display.on_train_end(arguments(), state, control)
    return stream.getvalue()


@pytest.mark.smoke
def test_plain_lines_where_output_is_no_terminal() -> None:
    figures = "kl 0.01235  margin -0.5  tok/s 12346"
    assert shown(io.StringIO()).splitlines() == [
        f"step 50/100  loss 0.6931  reward 1.25  {figures}  eta 0:00:00",
        f"step 100/100  loss 0.6931  reward 2.5  {figures}  eta 0:00:00",
        "eval step 100/100  loss 0.5  kl 2  win rate 0.75",
        "eval maths step 100/100  loss 0.25",
        "Trained 100 steps in 0:00:00.",
        "From the beginning to the end (the first log and the last):",
        "  reward  1.25 to 2.5",
        "  KL      0.01235 to 0.01235",
        "Best evaluation at step 100: eval_win_rate 0.75",
    ]


def test_other_ranks_are_silent() -> None:
    assert shown(io.StringIO(), main=False) == shown(Terminal(), main=False) == ""


def frames(text: str) -> list[str]:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).replace("\r", "\n").split("\n")


@pytest.mark.parametrize(
    ("width", "headings"),
    [
        (40, "step loss reward kl"),
        (80, "step loss reward kl win rate margin tok/s"),
        (200, "step loss reward kl win rate margin tok/s"),
    ],
)
def test_a_table_has_the_columns_that_fit_and_no_line_is_broken(width, headings, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    lines = frames(shown(Terminal(), notice="Stopping."))
    assert max(map(len, lines)) <= width
    assert [" ".join(line.split()) for line in lines if "loss" in line][-1] == headings
    rows = [line.split() for line in lines]
    assert [row[:4] for row in rows if row[:1] == ["100"]][-1] == ["100", "0.6931", "2.5", "0.01235"]
    assert ["eval", "maths", "100", "0.25"] in [row[:4] for row in rows]
    assert "Stopping." in lines[-8:] or "Stopping." in lines  # below the bar, redrawn with it
    bars = [line for line in lines if line.startswith("step ━")]
    assert all(line.rstrip().endswith(("0:00:00", "?")) and len(line.rstrip()) <= width - len("^C") for line in bars)
    assert not any("gold" in line for line in lines), "no column for what no row has"


@pytest.mark.parametrize(("name", "value"), [("TERM", "dumb"), ("TERM", "unknown")])
def test_a_terminal_that_cannot_redraw_gets_lines(name, value, monkeypatch) -> None:
    monkeypatch.setenv(name, value)
    assert shown(Terminal()).splitlines()[0].startswith("step 50/100  loss 0.6931")


def test_no_colours_where_none_are_wanted(monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    coloured = re.compile(r"\x1b\[[0-9;]*3[0-9]")
    assert coloured.search(shown(Terminal()))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not coloured.search(shown(Terminal()))


def test_closing_gives_the_screen_back_and_may_be_done_twice() -> None:
    stream = Terminal()
    display, state = ProgressDisplay(stream), TrainerState(max_steps=4, is_world_process_zero=True)
    display.on_train_begin(arguments(), state, TrainerControl())
    display.close()
    display.close()
    assert stream.getvalue().endswith("\x1b[?25h"), "the cursor is shown again"


def test_long_lines_break_between_words_and_paths_stay_whole() -> None:
    path = "/a/long/path/that-is/never/broken/anywhere"
    lines = wrapped(f"  output      {path} and some words behind it", 14, width=40).splitlines()
    assert lines == ["  output      ", f"              {path}", "              and some words behind it"] or lines == [
        "  output",
        f"              {path}",
        "              and some words behind it",
    ]


HOSTILE = "\x1b[2J[bold]not markup[/] <b>" + "word " * 200
PAIR = PairSample(50, "50-0-3-0", "Name a\ncolour.", "Red.", HOSTILE, 2.0, None, 1.0, "words 2 against none")


def shown_with_pairs(stream: io.StringIO, amount: int | None, monkeypatch: pytest.MonkeyPatch, rows: int = 40) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", str(rows))
    state, display = TrainerState(max_steps=100, is_world_process_zero=True), ProgressDisplay(stream)
    pairs = display.pairs_shown(SimpleNamespace(num_completions_to_print=amount))  # before the panel is there
    display.on_train_begin(arguments(), state, TrainerControl())
    display.show_pairs([PAIR, replace(PAIR, group="50-0-4-0")][:pairs])
    state.global_step = 50
    display.on_log(arguments(), state, TrainerControl(), logs=LOGS)
    display.close()
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())


def test_pairs_stand_under_the_bar_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown_with_pairs(Terminal(), None, monkeypatch)
    last = text[text.rindex("step ━") :]
    assert "pair 50-0-3-0" in last and "pair 50-0-4-0" in last
    assert "Name a colour." in last and "2 Red." in last and "words 2 against none" in last
    assert "[bold]not markup[/] <b>word word" in last and last.count("...") == 2
    assert max(map(len, last.splitlines())) <= 78 and len(last.splitlines()) <= 1 + 2 * 9


@pytest.mark.parametrize(("rows", "boxes"), [(40, 2), (24, 1), (10, 0)])
def test_only_pairs_that_fit_are_shown(rows: int, boxes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown_with_pairs(Terminal(), None, monkeypatch, rows)
    assert text[text.rindex("step ━") :].count("pair 50-0-") == boxes


def test_lines_have_pairs_only_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "pair" not in shown_with_pairs(io.StringIO(), None, monkeypatch)
    lines = shown_with_pairs(io.StringIO(), 1, monkeypatch).splitlines()
    assert lines[0] == "  pair 50-0-3-0" and lines[1] == "    prompt    Name a colour."
    assert lines[2] == "    chosen    2  Red." and lines[3].startswith("    rejected  [bold]not markup[/] <b>word")
    assert lines[3].endswith("...") and lines[4] == "    why       words 2 against none" and lines[5][:5] == "step "
    assert "pair" not in shown_with_pairs(Terminal(), 0, monkeypatch)


def test_a_run_shows_its_own_pairs(tmp_path: Path) -> None:
    stream = Terminal()
    fields = dict(num_completions=4, kwargs={"callbacks": [ProgressDisplay(stream)]})
    training.trainer(tmp_path, **fields).train()
    assert "pair 1-0-0-0" in stream.getvalue() and "word_reward" in stream.getvalue()
