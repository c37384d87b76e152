"""What a model card says of the course of its run, in Markdown, and the picture beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from online_dpo.checkpoints.files import write_text
from online_dpo.runs.reasons import REASONS
from online_dpo.runs.report.charts import Axes, line_chart, picture
from online_dpo.runs.report.facts import RunFacts, facts_of, to_look_into
from online_dpo.runs.report.pictures import OVER_STEPS, STEP, curve
from online_dpo.runs.report.text import plain_text

PICTURE = "training.svg"
SHOWN = 2
"""Metrics in the picture: the first of `OVER_STEPS` that the run has, reward and KL if possible."""


def describe_run(folder: Path) -> str:
    """Write the picture of a run into its folder, and return what its card says of it: empty without any metric."""
    facts = facts_of(folder, with_samples=False)
    drawn = [
        (title, line_chart([curve(series)], Axes(STEP, unit), title))
        for name, title, unit in OVER_STEPS
        if (series := facts.metrics.get(name)) is not None
    ][:SHOWN]
    if not drawn:
        return ""
    title = " and ".join(title for title, _ in drawn)
    write_text(folder / PICTURE, picture(drawn, title))
    return "\n".join(
        [f"## Course of the run\n\n![{title} over the steps]({PICTURE})\n", *_pairs(facts), *_events(facts)]
    )


def _pairs(facts: RunFacts) -> Iterator[str]:
    dropped = facts.dropped
    if facts.pairs is None:
        return
    without = f"{sum(dropped.values()):,.0f} of {facts.prompts:,.0f} prompts gave none"
    yield f"{facts.pairs:,.0f} pairs were trained on; {without}.\n"
    if dropped:
        rows = [(name, REASONS.get(name, ""), f"{count:,.0f}") for name, count in dropped.items()]
        yield _table(("reason", "meaning", "prompts"), rows)


def _events(facts: RunFacts) -> Iterator[str]:
    """Without their messages, which may name paths and addresses: a card is published."""
    if kinds := to_look_into(facts.events):
        rows = [(kind.kind, f"{kind.count:,}", f"{kind.first}", f"{kind.last}") for kind in kinds]
        yield _table(("event", "times", "first step", "last step"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([plain_text(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
