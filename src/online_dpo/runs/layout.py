"""Names of the files of a run folder, beside its checkpoints and its model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

SETTINGS = "run.yaml"
SETTINGS_BESIDE = "run.resolved.yaml"
"""The settings where a file of the user's has the first name."""

ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
VOTES = "votes.jsonl"
QUESTIONS = "questions.jsonl"
REPORT = "report.html"
EARLIER = "earlier"
"""The folder of what earlier runs in the same folder have written: ``earlier/1`` and so on."""

OF_ONE_NAME = (SETTINGS, SETTINGS_BESIDE, ENVIRONMENT, METRICS, EVENTS, VOTES, QUESTIONS)
"""The files of a record but those of completions."""

RECORD_PATTERNS = (*OF_ONE_NAME, f"{EARLIER}/*", "completions-r*.jsonl.zst", REPORT)
"""All files of a record, and the page that is made of it, as patterns."""

_COMPLETIONS = re.compile(r"completions-r(\d+)-(\d{5,})\.jsonl\.zst")


@dataclass(frozen=True, order=True)
class CompletionsFile:
    """The rank that writes a file of completions, and its number among the files of that rank.

    >>> CompletionsFile(rank=0, number=2).name
    'completions-r0-00002.jsonl.zst'
    """

    rank: int
    number: int

    @property
    def name(self) -> str:
        return f"completions-r{self.rank}-{self.number:05}.jsonl.zst"


def completions_files(folder: Path) -> list[CompletionsFile]:
    """The files of completions in a folder, by rank and number."""
    matches = (_COMPLETIONS.fullmatch(path.name) for path in folder.iterdir())
    return sorted(CompletionsFile(int(match[1]), int(match[2])) for match in matches if match)


def is_run_folder(folder: Path) -> bool:
    """Whether a run has written its record into this folder."""
    return any((folder / name).is_file() for name in (METRICS, EVENTS, ENVIRONMENT))
