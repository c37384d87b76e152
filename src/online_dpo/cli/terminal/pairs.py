"""Pairs of a step as people read them on a terminal: in boxes, or in lines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from online_dpo.errors import one_line, printable
from online_dpo.training.display.figures import number
from online_dpo.training.samples import PairSample

LINES = {"prompt": 1, "chosen": 3, "rejected": 3, "why": 2}
"""Most lines of each part in a box."""
HEIGHT = sum(LINES.values()) + 2
LONGEST = 300
"""Most characters of a part that is one line."""
READ = 20_000
"""Most characters of a text that are looked at: no screen shows more."""


def pair_panels(pairs: Sequence[PairSample], width: int, height: int) -> list[Panel]:
    """Return a box for each pair, as many as are sure to fit in the height. What a model wrote stays text."""
    return [_panel(pair, width) for pair in pairs[: max(0, height // HEIGHT)]]


def pair_lines(pair: PairSample) -> Iterator[str]:
    """Yield a pair in lines: its prompt, both answers with their scores, and why the one is better."""
    yield f"  pair {pair.group}"
    for part, score, text in _parts(pair):
        line = one_line(text, READ)
        shown = line if len(line) <= LONGEST else line[:LONGEST] + "..."
        yield f"    {part:<8}  {score + '  ' if score else ''}{shown}"


def _panel(pair: PairSample, width: int) -> Panel:
    table = Table.grid(padding=(0, 1))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    parts = list(_parts(pair))
    room = width - 4 - len("rejected") - max(len(score) for _, score, _ in parts) - 2
    for part, score, text in parts:
        table.add_row(part, score, _cut(text, LINES[part], max(room, 8)), style=_style(part))
    return Panel(table, title=Text(f"pair {pair.group}"), title_align="left", border_style="dim")


def _parts(pair: PairSample) -> Iterator[tuple[str, str, str]]:
    """The name, the score if there is one, and the text of each part."""
    scores = ["" if score is None else number(score) for score in (pair.chosen_score, pair.rejected_score)]
    yield "prompt", "", pair.prompt
    yield "chosen", scores[0], pair.chosen
    yield "rejected", scores[1], pair.rejected
    if pair.why:
        yield "why", "", pair.why


def _cut(text: str, lines: int, width: int) -> Text:
    """The text in at most so many lines of a width, without the characters by which a terminal is steered."""
    wrapped = list(Text(printable(one_line(text, READ)), overflow="fold").wrap(Console(width=width), width))
    kept = wrapped[:lines]
    if len(wrapped) > lines:
        kept[-1].truncate(width - len("..."))
        kept[-1].append("...")
    return Text("\n").join(kept)


def _style(part: str) -> str:
    return {"chosen": "green", "rejected": "red"}.get(part, "")
