"""The page: one HTML file without scripts, that asks for nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from online_dpo import __version__
from online_dpo.runs.report.facts import RunFacts
from online_dpo.runs.report.sections import moment, sections, tiles
from online_dpo.runs.report.text import seen

GENERATOR = "online-dpo report"
"""What a page says of itself, so that a later one may take its place."""

LONGEST_TEXT = 10_000

STATES = {
    "finished": "",
    "running": "It is still running.",
    "lost": "No end is recorded, and its process has gone: it was killed, or lost with its machine.",
}
"""What is said of a state where the end of a run says nothing, or nothing of interest."""


def render(facts: RunFacts) -> str:
    """Make the page of a run."""
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )
    page = environment.get_template("page.html").render(
        name=seen(facts.name, 200),
        generator=GENERATOR,
        version=__version__,
        state=facts.state,
        said=_said(facts),
        tiles=list(tiles(facts)),
        sections=list(sections(facts)),
        missing=facts.missing,
    )
    return page.encode("utf-8", "replace").decode("utf-8")


def _visible(value: Any) -> Any:
    """What the template is given: mark-up as it is, text so that all of it can be seen."""
    return seen(value, LONGEST_TEXT) if isinstance(value, str) and not isinstance(value, Markup) else value


def is_report(path: Path) -> bool:
    """Whether a file is a page that was made here."""
    with path.open("rb") as file:
        return f'<meta name="generator" content="{GENERATOR}">'.encode() in file.read(2000)


def _said(facts: RunFacts) -> list[str]:
    """Sentences on what the run was and how it ended."""
    said = [STATES.get(facts.state, facts.end)]
    first, last = facts.metrics.first_time, facts.metrics.last_time
    if first is not None and last is not None:
        said.append(f"First log {moment(first)}, last log {moment(last)}.")
    if len(facts.sessions) > 1:
        said.append(f"It was begun or resumed {len(facts.sessions)} times.")
    if facts.earlier:
        said.append(f"Records of earlier runs in this folder: {facts.earlier}, under earlier/.")
    return [sentence for sentence in said if sentence]
